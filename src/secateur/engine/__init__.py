"""The engine runs one decoder layer at a time: load → gather → prune → propagate → write.

Start with `prune/run.py`, which has the loop; `Job` in `prepared.py` calls it. In `stream/`,
`targets` gives layers their weights, `calls` records how the model calls them, and
`calibration_stream` and `halted_forwards` pass calibration through them. `prune/run.py`
prunes a group of linears, and `plan_memory.py` predicts memory.
"""
