"""`secateur prune`: a checkpoint into a new folder, or a loaded model in place."""
