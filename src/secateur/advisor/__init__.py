"""Advice without running anything: what would fit, how fast, at what cost, with which loss.

`facts.py` reads hardware, prices and published results. `shape.py` holds the sizes of a model.
`options.py` lists the ways to make it smaller. `memory.py`, `speed.py`, `capacity.py` and
`money.py` are the formulas. `advice.py` compares the options and decides.
"""
