"""The report: one page about pruned models, for people, and the data behind it.

`runs/records.py` says what the files of a run hold, `records.py` reads them, `headline.py`,
`quality.py` and `figures.py` say what follows from them, `drawing.py` and `page.py` draw the page.
"""
