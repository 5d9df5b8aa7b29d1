"""The results of the verbs: one file per verb, one contract for all (`result.py`)."""
