"""Read and write the YAML of a recipe, with YAML 1.2 numbers and strict keys.

PyYAML reads YAML 1.1, in which `2:4` is the number 124 and `1e-3` is text. This module reads
numbers as in YAML 1.2. It refuses a key that is given twice (YAML would keep the last one), keys
that are not text, and documents that are too deep or grow too large when aliases are expanded.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from secateur.errors import RecipeError

DEEPEST = 50
MOST_NODES = 10_000

INT = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
INT_TAG, FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
FIRST_OF_NUMBERS = list("-+.0123456789")


class Loader(yaml.SafeLoader):
    """Reads plain data, with YAML 1.2 numbers."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML declares it
        first: [(tag, text) for tag, text in known if tag not in (INT_TAG, FLOAT_TAG)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number. Unlike in YAML 1.1, a leading zero changes nothing."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


class Dumper(yaml.SafeDumper):
    """Writes YAML that 1.1 and 1.2 read alike: text that is a number in either is quoted."""


Loader.add_constructor(INT_TAG, Loader.construct_yaml_int)
for kind in (Loader, Dumper):
    for tag, pattern in ((FLOAT_TAG, FLOAT), (INT_TAG, INT)):
        whole = re.compile(rf"(?:{pattern.pattern})$")
        kind.add_implicit_resolver(tag, whole, FIRST_OF_NUMBERS)


def read_yaml(text: str, where: str | None = None) -> Any:
    """Read a YAML document.

    Args:
        text: the document.
        where: the file or option that it comes from, for errors.

    Raises:
        RecipeError: it is not YAML, has a key twice, or is too deep or too large for a recipe.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, where, {}, ())
        return loader.construct_document(node)
    except RecursionError:
        raise _too_deep(where) from None
    except (  # PyYAML raises other errors than its own if a value does not fit its tag
        yaml.YAMLError,
        AttributeError,
        KeyError,
        OverflowError,
        TypeError,
        ValueError,
    ) as error:
        raise RecipeError(
            f"the recipe is not YAML: {str(error)[:500]}",
            where=where,
            remedy="mend it there; a recipe is lines of 'key: value'",
        ) from None


def _check_node(
    node: yaml.Node, where: str | None, sizes: dict[int, int], above: tuple[int, ...]
) -> int:
    """Count the nodes below a node, with aliases expanded."""
    if id(node) in above or len(above) > DEEPEST:
        raise _too_deep(where)
    if id(node) in sizes:
        return sizes[id(node)]
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys([key for key, _ in node.value], where)
        inner = [value for _, value in node.value]
    size = 1
    for part in inner:
        size += _check_node(part, where, sizes, (*above, id(node)))
        if size > MOST_NODES:
            raise RecipeError(
                f"the recipe has more than {MOST_NODES} values when its aliases are written out",
                where=where,
                remedy="write the values out, without anchors and aliases",
            )
    sizes[id(node)] = size
    return size


def _check_keys(keys: list[yaml.Node], where: str | None) -> None:
    """Refuse a mapping with a key that is given twice or is not text."""
    seen: dict[str, int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (
            "tag:yaml.org,2002:str",
            "tag:yaml.org,2002:merge",
        ):
            raise RecipeError(
                f"a key in line {line} is not text: {str(key.value)[:80]!r}",
                where=where,
                remedy="put it in quotes if it is meant",
            )
        if key.value in seen:
            raise RecipeError(
                f"the key {key.value[:80]!r} is given twice, in lines {seen[key.value]} and {line}",
                where=where,
                remedy="remove one of them",
            )
        seen[key.value] = line


def _too_deep(where: str | None) -> RecipeError:
    """The error for a document that is too deep or contains itself."""
    return RecipeError(
        f"the recipe is nested more than {DEEPEST} levels deep",
        where=where,
        remedy="a recipe has three or four levels; see docs/run-folder.md",
    )


def write_yaml(value: Any) -> str:
    """Write plain data as YAML, with keys in their order."""
    # on one line each: a path that is broken at a space is no path any more
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
