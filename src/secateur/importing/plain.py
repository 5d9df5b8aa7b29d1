"""Plain safetensors with zeros: what wanda, sparsegpt, llm-compressor and most others save."""

from __future__ import annotations

from typing import ClassVar

from secateur.errors import CheckpointError
from secateur.importing import import_formats
from secateur.importing.torch_prune import pairs_of
from secateur.models.at_rest import AssembledReader, SourceFolder

UNFINISHED = {
    "._weight_mask": (
        "masks of Model-Optimizer were not applied, and their format is not documented",
        "call modelopt.torch.sparsity.export(model), and save the model again with save_pretrained",
    ),
    ".weight.original": (
        "weights of torch.ao.pruning have no masks: it does not store them with the model",
        "call squash_mask() of the sparsifier, and save the model again",
    ),
}
"""The ends of names of tensors that another tool has not finished, and what to do."""


class PlainFolder:
    """A folder that transformers loads as it is. Nothing changes but the records beside it."""

    name: ClassVar[str] = "plain"

    def recognises(self, source: SourceFolder) -> bool:
        """Whether the configuration names no quantization, and no tensor is a part of another."""
        return "quantization_config" not in source.config and not pairs_of(source.reader.entries)

    def open(self, source: SourceFolder) -> AssembledReader:
        """Return the tensors as they are.

        Raises:
            CheckpointError: the tensors are those of a tool that has not applied its masks yet.
        """
        for end, (what, remedy) in UNFINISHED.items():
            found = [name for name in source.reader.entries if name.endswith(end)]
            if found:
                raise CheckpointError(f"{len(found)} {what}", where=found[0], remedy=remedy)
        return AssembledReader(source.reader, {}, source.config)


import_formats.register(PlainFolder.name)(PlainFolder())
