"""The run: one decoder layer at a time, load → gather → prune → propagate → write.

The order of reading: `run` tells the story; `targets` says where layers live, `calls` how they are
called, `forwards` how calibration passes through them, `surgery` what is done to a group of
linears, `ledger` how a killed run goes on. `plan` foretells memory, `meter` measures it.
"""
