"""The table of training methods: what each does, the command that runs it, and its paper."""

from __future__ import annotations

from typing import NamedTuple


class TrainingMethod(NamedTuple):
    """A row of the table.

    Attributes:
        command: the shortest command that runs it, without `--output`.
        description: one line about what it does.
        paper: its source.
    """

    command: str
    description: str
    paper: str


_GRADUAL = "secateur train MODEL --gradual 0.8 --steps 1000"
_ROUNDS = "secateur train MODEL --iterative 0.8 --steps 500"
_TICKET = f"{_ROUNDS} --set iterative.rewind=weights --set iterative.rewind_step=50"

# fmt: off
training_methods = {name: TrainingMethod(*row) for name, *row in (
    ("train", "secateur train PRUNED --minutes 20",
     "trains on text with the zeros held", "Han et al. 2015, arXiv:1506.02626"),
    ("distillation", "secateur train PRUNED --teacher DENSE --minutes 20",
     "learns from the dense model with the zeros held", "Hinton et al. 2015, arXiv:1503.02531"),
    ("lora", "secateur train PRUNED --lora 16 --minutes 20",
     "trains adapters under the mask, and merges them", "Hu et al. 2021, arXiv:2106.09685"),
    ("gradual", _GRADUAL,
     "prunes a little every few steps of a training", "Zhu and Gupta 2017, arXiv:1710.01878"),
    ("regrowth", f"{_GRADUAL} --set gradual.regrowth=0.3",
     "gradual pruning in which weights of large gradient come back",
     "Liu et al. 2021, arXiv:2106.10404"),
    ("iterative", _ROUNDS,
     "prunes in rounds, and trains after each with the learning rate rewound",
     "Renda et al. 2020, arXiv:2003.02389"),
    ("lottery-ticket", _TICKET,
     "the same, and the weights go back to an early step before each training",
     "Frankle et al. 2020, arXiv:1912.05671"),
)}
"""The methods by name."""
