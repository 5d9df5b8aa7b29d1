"""The names of shapes. One vocabulary of axes for every signature in the library.

| axis              | meaning                                             |
|-------------------|-----------------------------------------------------|
| `out`, `in`       | rows and columns of a linear's weight, y = x Wᵀ     |
| `tokens`          | calibration tokens, all windows joined              |
| `samples`         | calibration windows                                 |
| `sequence_length` | tokens in one window                                |

`*batch` before them is nothing, or the number of matrices that are worked on at once: of the same
linear of many experts.

The test suite checks these annotations at run time in the `sparsity` and `calibration` rooms.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The numbers of plain weights, as configurations and users name them."""

Weight = Float[Tensor, "*batch out in"]
"""A weight matrix [out, in] of any floating dtype (Conv1D weights are transposed to this form)."""

Score = Float32[Tensor, "*batch out in"]
"""Importance of each weight, float32; higher = more important."""

UnitScores = Float32[Tensor, "*batch unit_rows unit_columns"]
"""Importance of what competes under a pattern: weights, blocks, or groups of columns."""

Mask = Bool[Tensor, "*batch out in"]
"""True = kept, False = pruned."""

Gram = Float32[Tensor, "*batch in in"]
"""XᵀX over all calibration tokens, float32."""

ColumnNorm = Float32[Tensor, "*batch in"]
"""‖X_j‖₂ of each input feature j over all calibration tokens, float32."""

Inputs = Float[Tensor, "tokens in"]
"""The inputs of a linear, one row per token."""

Windows = Int64[Tensor, "samples sequence_length"]
"""Token ids, one calibration or evaluation window per row."""

Statistics = Mapping[str, Tensor]
"""What was gathered for one linear, by statistic name: `column_mean` [in], `column_norm` [in],
`column_variance` [in], `gram` [in, in], `gradient` [out, in], `fisher` [out, in], all float32; and
without gathering `stored` [out, in], the weight as it was read."""

STORED = "stored"
"""A score may require this too: the weight as it is stored, before any fit. Nobody gathers it."""
