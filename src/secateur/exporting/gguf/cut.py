"""What a cut of a GGUF file is: experts, layers and tokens that go, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from secateur.errors import ArchitectureError, CheckpointError
from secateur.exporting.gguf.cut_experts import cut_experts, experts_of
from secateur.exporting.gguf.cut_layers import FileLayers, cut_layers
from secateur.exporting.gguf.cut_tokens import check_vocabulary, cut_tokens
from secateur.exporting.gguf.edit import Edit
from secateur.models.gguf_file import GGUFSource


def cut_of(
    source: GGUFSource,
    *,
    experts: Mapping[int, Sequence[int]] | None = None,
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> Edit:
    """The edit of a file that keeps some of its experts, layers and tokens.

    All numbers are those of the source. None keeps all.

    Args:
        source: the file.
        experts: those that stay, for each layer that has experts.
        layers: the decoder layers that stay. Layers that predict several tokens stay always.
        tokens: the ids that stay.

    Raises:
        ArchitectureError: the file cannot be cut so.
        RecipeError: llama.cpp would compute what stays otherwise.
    """
    edit = Edit.of(source)
    if tokens is not None:  # before layers, which take columns of a table of tokens
        edit = cut_tokens(source, edit, tokens)
    if experts is not None:
        edit = cut_experts(source, edit, experts)
    if layers is not None:
        edit = cut_layers(source, edit, layers)
    return edit


def cuttable(source: GGUFSource) -> dict[str, str | None]:
    """Why experts, layers and tokens of a file cannot be cut; None for what can."""
    return {
        "experts": _why_not(lambda: experts_of(source), "the model has no experts"),
        "layers": _why_not(lambda: FileLayers.of(source)),
        "tokens": _why_not(lambda: check_vocabulary(source)),
    }


def _why_not(check: Callable[[], object], none: str = "") -> str | None:
    try:
        found = check()
    except (ArchitectureError, CheckpointError) as error:
        return f"{error.where}: {error.what}"
    return none if found is None else None
