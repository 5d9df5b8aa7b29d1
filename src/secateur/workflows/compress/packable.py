"""Selects the tensors of a checkpoint that can be packed."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import ArchitectureError
from secateur.models.architecture import describe, linears_of
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton, refuse_missing, stored_names


@dataclass(frozen=True)
class PackableMatrix:
    """A stored tensor that can be packed.

    Attributes:
        transposed: whether it is stored [in, out].
        linear: name of the linear of a decoder layer; empty for an embedding and the head.
    """

    transposed: bool = False
    linear: str = ""

    @property
    def prunable(self) -> bool:
        """Whether it is a linear of a decoder layer."""
        return bool(self.linear)


def find_matrices(
    reader: CheckpointReader, embeddings: str, trust_remote_code: bool
) -> dict[str, PackableMatrix]:
    """The matrices of a checkpoint that can be packed, by stored name.

    Raises:
        ArchitectureError: the checkpoint has no such matrix.
    """
    model = build_skeleton(reader.folder, trust_remote_code=trust_remote_code)
    stored = stored_names(model, reader)
    architecture = describe(model)
    layers = enumerate(architecture.layers(model))
    linears = [x for i, y in layers for x in linears_of(y, architecture.layer_name(i)).values()]
    refuse_missing((f"{linear.name}.weight" for linear in linears), stored, reader.folder)
    found = {}
    for linear in linears:
        name = stored[f"{linear.name}.weight"]
        if name.endswith(".weight"):
            found[name] = PackableMatrix(linear.transposed, linear.name)
    if not found:
        raise ArchitectureError(
            f"the checkpoint stores none of the linears of {type(model).__name__} as a matrix of "
            "its own",
            where=str(reader.folder),
            remedy="experts of families that secateur does not declare cannot be compressed; see "
            "CONTRIBUTING.md, 'Add a model family'",
        )
    if embeddings == "int8":
        outside = [model.get_input_embeddings(), model.get_output_embeddings()]
        for path, module in model.named_modules():
            kept = stored.get(f"{path}.weight")  # a tied head is stored only once
            if any(module is x for x in outside) and kept is not None:
                found[kept] = PackableMatrix()
    return found
