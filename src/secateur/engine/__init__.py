"""The engine runs one decoder layer at a time: load → gather → prune → propagate → write.

Start with `prune/run.py`, which has the loop, and `prune/layer.py`, which prunes a layer. In
`stream/`, `targets` gives layers their weights, `calls` records how the model calls them, `layouts`
finds linears that share an input, and `calibration_stream` and `halted_forwards` pass calibration
through them. `plan_memory.py` predicts memory.
"""
