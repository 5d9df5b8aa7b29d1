"""Serves a model to many clients: a scheduler for sequences, and OpenAI's API over HTTP."""
