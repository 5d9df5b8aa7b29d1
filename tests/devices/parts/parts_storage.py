"""Matrices packed without their zeros, from weights on cuda, and back."""

from __future__ import annotations

import pytest
import torch
from test_formats import CASES, VALUES, bits, sparse_matrix

from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.runtime.formats import Layout, bitmask_parts, formats


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("values", [*VALUES])
def test_format(name, pattern, values, both):
    chosen = formats[name]
    dtype = torch.bfloat16 if values == "int8" else VALUES[values]
    weight = sparse_matrix((9, 64), 0.5, pattern, dtype)
    layout = Layout(name, values, (9, 64), pattern)

    def there_and_back(weight):
        parts = chosen.pack(weight, layout)
        chosen.check(parts, layout)
        mask, _ = chosen.kept(parts, layout)
        return dict(parts), mask, bits(chosen.unpack(parts, layout)), dict(bitmask_parts(parts, layout))

    both(there_and_back, weight)


def test_int8(both):
    both(lambda weight: (*quantize_rows(weight), dequantize_rows(*quantize_rows(weight))), torch.randn(9, 24))
