"""Model families as tables, one file for each layout; found by the registry `families`."""
