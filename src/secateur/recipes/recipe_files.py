"""Recipes as files of YAML 1.2.

PyYAML reads YAML 1.1, in which `2:4` is the number 124 and `1e-3` is text. Here numbers are read as
in YAML 1.2. Refused are a key that is given twice (YAML would keep the last one), keys that are not
text, aliases (a few lines of them can mean gigabytes), and documents that are too deep.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from secateur.errors import RecipeError

LONGEST_RECIPE = 2**20
"""Characters of a file that is no recipe."""


def read_recipe_file(file: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        RecipeError: the file does not exist, or is not a mapping.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(LONGEST_RECIPE)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe cannot be read: {error}",
            where=str(file),
            remedy="check the path; a recipe is UTF-8 text",
        ) from None
    if len(text) == LONGEST_RECIPE:
        raise RecipeError(
            "the file is too large for a recipe", where=str(file), remedy="check the path"
        )
    content = read_yaml(text, str(file))
    if not isinstance(content, dict):
        raise RecipeError(
            "a recipe is a mapping of keys to values",
            where=str(file),
            remedy="write for example 'model: smollm2-135m'",
        )
    return content


def dump_recipe(recipe: BaseModel) -> str:
    """Write the recipe as YAML, with every default."""
    return write_yaml(recipe.model_dump(mode="json"))


INT = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
INT_TAG, FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
FIRST_OF_NUMBERS = list("-+.0123456789")


class Loader(yaml.SafeLoader):
    """Reads plain data, with YAML 1.2 numbers and without aliases."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML declares it
        first: [(tag, text) for tag, text in known if tag not in (INT_TAG, FLOAT_TAG)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse an alias; else the usual node."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice or is not text."""
        seen = set[str]()
        for key, _ in node.value:
            text = isinstance(key, yaml.ScalarNode) and key.tag == "tag:yaml.org,2002:str"
            if not text or key.value in seen:
                what = f"the key {key.value!r} is given twice" if text else "a key is not text"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number. Unlike in YAML 1.1, a leading zero changes nothing."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


class _Dumper(yaml.SafeDumper):
    """Writes YAML that 1.1 and 1.2 read alike: text that is a number in either is quoted."""


Loader.add_constructor(INT_TAG, Loader.construct_yaml_int)
for kind in (Loader, _Dumper):
    for tag, pattern in ((FLOAT_TAG, FLOAT), (INT_TAG, INT)):
        whole = re.compile(rf"(?:{pattern.pattern})$")
        kind.add_implicit_resolver(tag, whole, FIRST_OF_NUMBERS)


def read_yaml(text: str, where: str | None = None) -> Any:
    """Read a YAML document.

    Args:
        text: the document.
        where: the file or option that it comes from, for errors.

    Raises:
        RecipeError: it is not YAML, has a key twice, or is too deep for a recipe.
    """
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # a value that does not fit its tag can raise any exception
        raise RecipeError(
            f"the recipe is not YAML: {str(error)[:500]}",
            where=where,
            remedy="mend it there; a recipe is lines of 'key: value'",
        ) from None


def write_yaml(value: Any) -> str:
    """Write plain data as YAML, with keys in their order."""
    # on one line each: a path that is broken at a space is no path any more
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
