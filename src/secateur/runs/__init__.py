"""The life of a run: its folder, its ledger, and the schemas of its files."""
