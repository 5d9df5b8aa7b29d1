"""Reporting: what was done and what came out, for people and for programs."""
