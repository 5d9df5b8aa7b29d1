"""Matrices packed without their zeros, from weights on cuda, and back."""

from __future__ import annotations

import pytest
import torch
from test_formats import CASES, VALUES, bits, sparse_matrix

from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.runtime.formats import Layout, bitmask_parts, formats


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("values", [*VALUES])
def test_format(name, pattern, values):
    chosen = formats[name]
    dtype = torch.bfloat16 if values == "int8" else VALUES[values]
    weight = sparse_matrix((9, 64), 0.5, pattern, dtype)
    layout = Layout(name, values, (9, 64), pattern)

    parts, expected = chosen.pack(weight.to("cuda"), layout), chosen.pack(weight, layout)
    chosen.check(parts, layout)
    for suffix, part in expected.items():
        assert type(parts[suffix]) is torch.Tensor, "parts are bytes of files, so of the CPU"
        assert torch.equal(parts[suffix], part)
    chosen.kept(parts, layout)
    bitmask_parts(parts, layout)
    stands_for = dequantize_rows(*quantize_rows(weight)) if values == "int8" else weight
    assert torch.equal(bits(chosen.unpack(parts, layout)), bits(stands_for))


def test_int8(both):
    def there_and_back(weight):
        quantized, scale = quantize_rows(weight)
        return quantized, scale, dequantize_rows(quantized, scale)

    both(there_and_back, torch.randn(9, 24))
