"""Reporting: results, cards, charts and the report page, for people and for programs."""
