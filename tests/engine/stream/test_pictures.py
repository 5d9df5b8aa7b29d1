"""Windows with pictures pass through the layers as they do in the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import class_of, config_of, tiny_model, tiny_windows

from secateur.calibration.windows import MultimodalInputs
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.targets import ModelTarget
from secateur.errors import ArchitectureError
from secateur.models.architecture import describe

IMAGE = 90
COUNT, LENGTH = 3, 14


def windows_with_places(tokens: int) -> Tensor:
    """Windows that each have the places of one picture, each of them elsewhere."""
    windows = tiny_windows(COUNT, LENGTH)
    windows[windows >= IMAGE] = 3
    for row in range(COUNT):
        windows[row, 2 + row : 2 + row + tokens] = IMAGE
    return windows


def pixels(*shape: int) -> Tensor:
    return torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(2))


def with_pictures(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows and what their pictures are for the processor of a model: a row for each window."""
    windows = windows_with_places(1 if name == "qwen2_5_vl" else 4)
    kinds = (windows == IMAGE).long()[:, None]
    if name == "qwen2_5_vl":  # 2 x 2 patches, which become one token
        grids = torch.tensor([[1, 2, 2]]).expand(COUNT, 1, 3)
        patches = pixels(4, 3 * 2 * 8 * 8)
        return windows, {
            "pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": kinds,
        }  # fmt: skip
    if name == "gemma3 vision":
        return windows, {"pixel_values": pixels(1, 3, 16, 16), "token_type_ids": kinds}
    return windows, {"pixel_values": pixels(1, 3, 16, 16)}


NAMES = ("llava", "qwen2_5_vl", "gemma3 vision")


def heard(
    model: nn.Module, windows: Tensor, multimodal: MultimodalInputs
) -> dict[int, list[Tensor]]:
    """The inputs of every decoder layer in plain forwards of the whole model, by hooks."""
    found: dict[int, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, n=number: found.setdefault(n, []).append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for number, layer in enumerate(describe(model).layers(model))
    ]
    for row in range(len(windows)):
        given = {name: x[row] for name, x in multimodal.tensors.items()}
        model(input_ids=windows[row : row + 1], use_cache=False, **given)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_layer_by_layer_is_the_model(name: str) -> None:
    model: Any = tiny_model(name)
    windows, tensors = with_pictures(name)
    multimodal = MultimodalInputs(tensors)
    expected = heard(model, windows, multimodal)
    calibration = CalibrationStream(
        ModelTarget(model), windows, 2048, True, None, multimodal=multimodal
    ).open()
    for number, layer in calibration.walk():
        assert len(calibration.batches()) == COUNT
        for row, batch in enumerate(calibration.batches()):
            hidden = calibration.read(batch)
            torch.testing.assert_close(hidden, expected[number][row], rtol=0, atol=1e-6)
            calibration.write(
                batch, call_layer(layer, hidden, calibration.stream.call(number, batch))
            )
    plain = CalibrationStream(ModelTarget(model), windows, 2048, True, None)
    if name == "llava":  # the others do not run with places of pictures and no picture
        assert not torch.allclose(plain.open().read(slice(0, 1)), expected[0][0])


def test_what_is_added_between_layers_is_refused() -> None:
    """Qwen3-VL adds features of pictures to the outputs of its first layers."""
    config = config_of("qwen3_vl")
    config.vision_config.deepstack_visual_indexes = [0]
    model: Any = class_of(config).from_config(config, dtype=torch.float32).eval()
    windows, tensors = with_pictures("qwen2_5_vl")
    calibration = CalibrationStream(
        ModelTarget(model), windows, 2048, True, None, multimodal=MultimodalInputs(tensors)
    )
    with pytest.raises(ArchitectureError, match=r"adds .*pixel_values.* between its layers"):
        calibration.open()
