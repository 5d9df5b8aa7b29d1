"""What a model reads beside the tokens of a window, such as the pixels of a picture.

A file of ready windows may have more tensors than `input_ids`. Each of them has the name of an
argument of the model, and a row for each window: what the model's processor makes of this window
alone. Where a picture stands, `input_ids` has the tokens that hold its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import SourceError

IDS, MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class Beside:
    """Further arguments of the model for each calibration window.

    Attributes:
        tensors: by name of the argument, [windows, …].
    """

    tensors: Mapping[str, Tensor]

    def of(self, row: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The arguments of one window.

        Args:
            row: its number.
            device: of the model.
            dtype: of the computation, for floating-point values.
        """
        return {
            name: x[row].to(device, dtype if x.is_floating_point() else None)
            for name, x in self.tensors.items()
        }

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The entry of the manifest."""
        return {name: list(x.shape) for name, x in self.tensors.items()}

    def save(self, path: Path) -> None:
        """Write them to a file that `load_beside` reads."""
        save_file({name: x.contiguous() for name, x in self.tensors.items()}, path)


def names_beside(names: Iterable[str]) -> list[str]:
    """The tensors of a file of windows that are neither tokens nor their mask."""
    return sorted(set(names) - {IDS, MASK})


def refuse_beside(names: Iterable[str], path: Path) -> None:
    """Refuse a file of windows with pictures.

    Args:
        names: of its tensors.
        path: the file.

    Raises:
        SourceError: it has more than tokens.
    """
    more = names_beside(names)
    if more:
        raise SourceError(
            f"the windows have {', '.join(more)} beside their tokens, and only `secateur prune` of "
            "a checkpoint reads them",
            where=str(path),
            remedy="use windows of text, a file with input_ids alone",
        )


def load_beside(path: Path, windows: int) -> Beside | None:
    """What a file of windows has beside the tokens; None if nothing.

    Args:
        path: a file that `load_windows` has read, or one of `Beside.save`.
        windows: how many windows there are.

    Raises:
        SourceError: a tensor has not one row for each window, or windows are padded.
    """
    tensors = load_file(path)
    names = names_beside(tensors)
    if not names:
        return None
    odd = next((n for n in names if tensors[n].ndim < 1 or len(tensors[n]) != windows), None)
    if odd is not None:
        raise SourceError(
            f"{odd} has the shape {tuple(tensors[odd].shape)}, and there are {windows} windows",
            where=str(path),
            remedy="give each tensor a row for each window: what the model's processor returns for "
            "this window alone",
        )
    mask = tensors.get(MASK)
    if mask is not None and not bool(mask.all()):
        raise SourceError(
            f"{int((mask == 0).sum())} tokens are padding, and would count in the statistics",
            where=f"{path}: {MASK}",
            remedy="cut all windows to the same length, without padding",
        )
    return Beside({name: tensors[name] for name in names})
