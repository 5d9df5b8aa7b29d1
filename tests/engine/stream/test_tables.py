"""The table of per-layer embeddings is never copied as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import class_of, config_of, tiny_model, tiny_windows

from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import quiet_transformers
from secateur.models.targets import CheckpointTarget, per_layer_table

NAMES = ("gemma3n_text shared", "gemma4_text small")
WINDOWS = tiny_windows(3, 8)


def stored_in_bfloat16(name: str, folder: Path) -> CheckpointTarget:
    """A checkpoint whose layers compute in float32, so that its tensors have to be copied."""
    with quiet_transformers():
        tiny_model(name).bfloat16().save_pretrained(folder)
    reader, device = CheckpointReader(folder), torch.device("cpu")
    return CheckpointTarget(reader, None, device, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_has_the_rows_of_its_tokens(name: str, tmp_path: Path) -> None:
    target = stored_in_bfloat16(name, tmp_path)
    table: Any = per_layer_table(target.model)
    before = table.weight
    sizes = []
    table.register_forward_hook(lambda module, args, out: sizes.append(len(module.weight)))
    calibration = CalibrationStream(target, WINDOWS, 16, True, None).open()
    for number, _ in calibration.walk():
        for batch in calibration.batches():
            calibration.stream.call(number, batch)
            calibration.write(batch, calibration.read(batch))
    assert len(sizes) > len(WINDOWS) * len(target.layers)
    assert max(sizes) <= WINDOWS.shape[1] * 2  # of the tokens of a micro-batch
    assert table.weight is before
    assert table.weight.is_meta
    assert table.padding_idx == 0


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_arguments_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """Of every layer and window, one that has the padding token among them."""
    target = stored_in_bfloat16(name, tmp_path)
    windows = WINDOWS.clone()
    windows[1, 2:4] = 0
    calibration = CalibrationStream(target, windows, 16, True, None).open()
    with quiet_transformers():
        whole = class_of(config_of(name)).from_pretrained(tmp_path, dtype=torch.float32).eval()
    seen: dict[int, Any] = {}
    for number, layer in enumerate(whole.model.layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, n=number: seen.update({n: (args, kwargs)}),
            with_kwargs=True,
        )
    whole(input_ids=windows, use_cache=False)
    for number in range(len(target.layers)):
        call = calibration.stream.outer.call(number, range(3))
        args, kwargs = seen[number]
        given = [*args[1:], *kwargs.values()]
        own = call.values()
        matching = [
            x for x in given
            if isinstance(x, torch.Tensor) and x.shape == own.shape and torch.equal(x, own)
        ]  # fmt: skip
        assert matching, number
