"""A file of masks, applied to a dense model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.importing.torch_prune import as_mask
from secateur.models.at_rest import damaged
from secateur.models.checkpoint import CheckpointReader, TensorEntry, read_entry, read_header
from secateur.models.hub import CONVERT, PICKLES

ENDINGS = ("", ".weight", "_mask", ".weight_mask", ".mask")


class MaskedReader(CheckpointReader):
    """Reads the tensors of a model with the masks of a file applied.

    A mask has the name of the tensor, or of its module, with or without `_mask` or `.mask` at the
    end. It has its shape, and True or 1 where the weight is kept.

    Args:
        model: reads the dense tensors.
        file: a safetensors file of masks.

    Raises:
        RecipeError: a mask belongs to no tensor of the model, or has another shape.
        CheckpointError: the file is a pickle, damaged, or holds no masks.
    """

    def __init__(self, model: CheckpointReader, file: Path) -> None:
        if file.suffix in PICKLES:
            raise CheckpointError(
                "pickled masks can run code when you load them", where=str(file), remedy=CONVERT
            )
        if not file.is_file():
            raise RecipeError("no such file of masks", where=str(file), remedy="check the path")
        self.model, self.folder, self.files = model, model.folder, model.files
        self.entries = model.entries
        self.masks: dict[str, TensorEntry] = {}
        for stored, entry in read_header(file).items():
            name = _owner(stored, model)
            if name in self.masks:
                raise damaged(f"there are two masks of {name}", file)
            if entry.shape != model.entries[name].shape:
                raise RecipeError(
                    f"the mask is {list(entry.shape)}, the weight "
                    f"{list(model.entries[name].shape)}",
                    where=name,
                    remedy="give the masks of this model; a cut model needs masks of its own",
                )
            self.masks[name] = entry
        if not self.masks:
            raise damaged("the file of masks is empty", file)

    def read(self, name: str) -> Tensor:
        """One tensor, masked if it has a mask."""
        tensor = self.model.read(name)
        if name in self.masks:
            tensor.masked_fill_(~as_mask(read_entry(self.masks[name])), 0)
        return tensor


def _owner(mask: str, model: CheckpointReader) -> str:
    """The tensor that a mask is of."""
    stems = {mask.removesuffix(ending) for ending in ENDINGS}
    names = {name for stem in stems for name in (stem, f"{stem}.weight")} & model.entries.keys()
    if len(names) != 1:
        raise RecipeError(
            f"there is a mask {mask}, but the model has no such tensor",
            where=str(model.folder),
            remedy="give the masks of this model, by the names of its tensors",
        )
    return names.pop()
