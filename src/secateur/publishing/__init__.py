"""Publish: which files of a folder go to the hub, what must not, and the upload."""
