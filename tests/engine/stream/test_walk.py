"""One walk over the layers: in order, one layer in memory, and its outputs enter the next one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import CONFIGS, tiny_model, tiny_windows

from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.models.checkpoint import CheckpointReader
from secateur.models.targets import CheckpointTarget, ModelTarget, walk_layers

WINDOWS = tiny_windows()


def checkpoint(folder: Path) -> CheckpointTarget:
    tiny_model("llama").save_pretrained(folder)
    return CheckpointTarget(CheckpointReader(folder), None, torch.device("cpu"))


def filled(target: CheckpointTarget) -> list[int]:
    """The layers that have weights."""
    return [i for i, x in enumerate(target.layers) if not next(x.parameters()).is_meta]


def test_one_layer_has_weights_at_a_time(tmp_path: Path) -> None:
    target = checkpoint(tmp_path)
    assert [(number, filled(target)) for number, _ in walk_layers(target)] == [
        (0, [0]), (1, [1]), (2, [2]),
    ]  # fmt: skip
    assert [number for number, _ in walk_layers(target, [2, 0])] == [2, 0]
    assert not [*walk_layers(target, range(0))]
    assert filled(target) == []


def test_a_loop_that_ends_early_leaves_no_layer_filled(tmp_path: Path) -> None:
    target = checkpoint(tmp_path)
    for number, _ in walk_layers(target):
        if number == 1:
            break
    assert filled(target) == []

    def fail() -> None:
        for _, layer in walk_layers(target):
            raise ValueError(f"{type(layer).__name__} is broken")

    with pytest.raises(ValueError, match="is broken"):
        fail()
    assert filled(target) == []


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_written_enters_the_next_layer(in_memory: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    calibration = CalibrationStream(ModelTarget(model), WINDOWS, 40, in_memory, tmp_path).open()
    with torch.no_grad():
        expected = model.model(input_ids=WINDOWS, output_hidden_states=True).hidden_states
        for number, layer in calibration.walk():
            for batch in calibration.batches():
                inputs = calibration.read(batch)
                torch.testing.assert_close(inputs, expected[number][batch])
                calibration.write(
                    batch, call_layer(layer, inputs, calibration.stream.call(number, batch))
                )
    assert not list(tmp_path.glob("inputs-*"))  # the inputs of finished layers are gone


def test_a_walk_resumes_from_stored_inputs(tmp_path: Path) -> None:
    target = ModelTarget(tiny_model("llama"))

    def walked(stream: CalibrationStream, start: int, stop: int) -> list[torch.Tensor]:
        inputs, calibration = [], stream.open(start)
        for number, layer in calibration.walk():
            inputs.append(torch.cat([calibration.read(batch) for batch in calibration.batches()]))
            if number == stop:
                break
            for batch in calibration.batches():
                out = call_layer(
                    layer, calibration.read(batch), calibration.stream.call(number, batch)
                )
                calibration.write(batch, out)
        return inputs

    with torch.no_grad():
        whole = walked(CalibrationStream(target, WINDOWS, 40, True, None), 0, 2)
        walked(CalibrationStream(target, WINDOWS, 40, True, tmp_path), 0, 1)
        (again, last) = walked(CalibrationStream(target, WINDOWS, 40, True, tmp_path), 1, 2)
    assert torch.equal(again, whole[1])
    assert torch.equal(last, whole[2])


@pytest.mark.parametrize("family", CONFIGS)
def test_from_one_end_to_the_other_is_the_model(family: str) -> None:
    model = tiny_model(family)
    outer = EmbeddingAndHead(ModelTarget(model), WINDOWS)
    with torch.no_grad():
        (hidden,) = outer.embedded([4])
        for number, layer in walk_layers(outer.target):
            hidden = call_layer(layer, hidden, outer.calls()[number])
        with outer.outside():
            logits = outer.head(4, hidden)
        expected = model(input_ids=WINDOWS[4:5]).logits[0]
    torch.testing.assert_close(logits, expected)


def test_parts_hold_as_many_windows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = EmbeddingAndHead(ModelTarget(tiny_model("llama")), WINDOWS)
    (hidden,) = outer.embedded([0])
    assert list(outer.parts([0, 1, 2, 5], 2)) == [[0, 1, 2, 5]]
    limit = 6 * hidden.numel() * hidden.element_size()
    monkeypatch.setattr("secateur.engine.stream.hidden_states.STATES_BYTES", limit)
    assert list(outer.parts([0, 1, 2, 5], 2)) == [[0, 1, 2], [5]]
    assert list(outer.parts([0, 1, 2, 5], 100)) == [[0], [1], [2], [5]]
