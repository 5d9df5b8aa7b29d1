"""`evaluate`, `bench`, `diagnose`, `generate`, `inspect`: what a model is worth."""
