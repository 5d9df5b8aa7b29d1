"""The table of training methods: what each does, the command that runs it, and its paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class TrainingMethod:
    """A row of the table.

    Attributes:
        command: the shortest command that runs it, without `--output`.
        description: one line about what it does.
        paper: its source.
    """

    command: str
    description: str
    paper: str

    def to_json(self) -> dict[str, str]:
        """The row as plain data."""
        return asdict(self)


training_methods: Mapping[str, TrainingMethod] = MappingProxyType(
    {
        "train": TrainingMethod(
            command="secateur train PRUNED --minutes 20",
            description="trains on text with the zeros held",
            paper="Han et al. 2015, arXiv:1506.02626",
        ),
        "distillation": TrainingMethod(
            command="secateur train PRUNED --teacher DENSE --minutes 20",
            description="learns from the dense model with the zeros held",
            paper="Hinton et al. 2015, arXiv:1503.02531",
        ),
        "lora": TrainingMethod(
            command="secateur train PRUNED --lora 16 --minutes 20",
            description="trains adapters under the mask, and merges them",
            paper="Hu et al. 2021, arXiv:2106.09685",
        ),
        "gradual": TrainingMethod(
            command="secateur train MODEL --gradual 0.8 --steps 1000",
            description="prunes a little every few steps of a training",
            paper="Zhu and Gupta 2017, arXiv:1710.01878",
        ),
        "regrowth": TrainingMethod(
            command="secateur train MODEL --gradual 0.8 --steps 1000 --set gradual.regrowth=0.3",
            description="gradual pruning in which weights of large gradient come back",
            paper="Liu et al. 2021, arXiv:2106.10404",
        ),
        "iterative": TrainingMethod(
            command="secateur train MODEL --iterative 0.8 --steps 500",
            description="prunes in rounds, and trains after each with the learning rate rewound",
            paper="Renda et al. 2020, arXiv:2003.02389",
        ),
        "lottery-ticket": TrainingMethod(
            command="secateur train MODEL --iterative 0.8 --steps 500 "
            "--set iterative.rewind=weights --set iterative.rewind_step=50",
            description="the same, and the weights go back to an early step before each training",
            paper="Frankle et al. 2020, arXiv:1912.05671",
        ),
        "learned-masks": TrainingMethod(
            command="secateur structure MODEL --keep-parameters 0.75 --learned 1000",
            description="learns which layers, heads, neurons and channels stay, with the weights",
            paper="Xia et al. 2023, arXiv:2310.06694",
        ),
        "dynamic-batch-loading": TrainingMethod(
            command="secateur structure MODEL --keep-parameters 0.75 --learned 1000 "
            "--set learned.domains=[TEXT]",
            description="learned masks that read more text of the domains that lag behind",
            paper="Xia et al. 2023, arXiv:2310.06694",
        ),
        "layer-wise-rates": TrainingMethod(
            command="secateur train PRUNED --minutes 20 --set layer_decay=0.9",
            description="lower layers learn at lower rates; `rates` sets any by name",
            paper="Howard and Ruder 2018, arXiv:1801.06146",
        ),
    }
)
"""The methods by name."""
