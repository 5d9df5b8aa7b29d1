"""The report: one page about pruned models, for people.

`runs/records/` declares the files of a run, and `records.py` reads them. `claims.py` and
`figures.py` compute what the page shows. `page.py` writes it.
"""
