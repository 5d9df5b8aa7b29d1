"""`evaluate`, `bench`, `diagnose`, `generate`, `inspect`: measure and inspect a model."""
