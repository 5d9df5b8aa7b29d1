"""What verbs return: one file a verb, one contract for all of them (`result.py`)."""
