"""Matrices packed without their zeros, from weights on cuda, and back."""

from __future__ import annotations

import pytest
import torch
from test_formats import CASES, STORED, bits, layout_of, source_dtype, sparse_matrix, stands_for

from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.runtime.formats import bitmask_parts, formats


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("stored", STORED)
def test_format(name, pattern, stored):
    chosen = formats[name]
    weight = sparse_matrix((9, 64), 0.5, pattern, source_dtype(stored))
    layout = layout_of(name, stored, (9, 64), pattern)

    parts, expected = chosen.pack(weight.to("cuda"), layout), chosen.pack(weight, layout)
    chosen.check(parts, layout)
    for suffix, part in expected.items():
        assert type(parts[suffix]) is torch.Tensor, "parts are bytes of files, so of the CPU"
        assert torch.equal(parts[suffix], part)
    chosen.kept(parts, layout)
    bitmask_parts(parts, layout)
    found, expected = chosen.unpack(parts, layout), stands_for(weight, layout)
    assert torch.equal(bits(found), bits(expected))


def test_int8(both):
    def there_and_back(weight):
        quantized, scale = quantize_rows(weight)
        return quantized, scale, dequantize_rows(quantized, scale)

    both(there_and_back, torch.randn(9, 24))
