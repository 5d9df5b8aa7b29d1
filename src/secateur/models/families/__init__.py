"""Declared families of models, as tables; found by the registry `families`."""

from secateur.models.architecture import Groups


def grouped(*names: str) -> Groups:
    """Linears by shared input; those of a group with spaces between."""
    return tuple(tuple(each.split()) for each in names)


def over(axes: str, names: str) -> dict[str, tuple[str, ...]]:
    """The same axes for several modules or parameters, with spaces between."""
    return dict.fromkeys(names.split(), tuple(axes.split()))


def ffn(inputs: str, down: str) -> dict[str, tuple[str, ...]]:
    """The axes of the linears of a feed-forward."""
    return {**over("neurons hidden", inputs), **over("hidden neurons", down)}


def ends(embedding: str, norm: str) -> dict[str, tuple[str, ...]]:
    """The axes of embedding, last norm and head."""
    return {**over("- hidden", embedding), **over("hidden", norm), "lm_head": ("-", "hidden")}
