"""What is made from the declared options: the stub, and the pages of the site.

    python tools/option_files.py          # write the stub
    python tools/option_files.py --check  # fail if it is out of date

`src/secateur/__init__.pyi` gives editors and type checkers the keywords of every verb. The pages
list every option with its flag, its keyword, its key in YAML and its default; `site_pages.py` puts
them on the site.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import secateur
from secateur.recipes.keywords import public_function
from secateur.recipes.options import GROUPS, Option, all_options, options_of, run_options_of
from secateur.recipes.verbs import STAGES, VERBS, Verb, imported
from written_files import write_or_check

ROOT = Path(__file__).resolve().parents[1]
STUB = Path("src/secateur/__init__.pyi")

STUB_HEAD = '''"""The public names of secateur, with the keywords of every verb.

Written by tools/option_files.py from the sections in secateur/recipes; do not edit.
"""

'''

PAGE_HEAD = """# Options

Every option of every verb: its flag, its key in a recipe, its default and what it does.

- **Command line**: `secateur VERB --help` shows the same list. Every verb also has `--json`,
  which prints the result as JSON, and `--quiet` (`-q`), which shows only errors and the result.
  `secateur --install-completion` lets the Tab key complete verbs, options, choices and files.
- **Python**: the keyword is the flag with underscores: `--tune-passes` is `tune_passes=`. None
  means "not given".
- **YAML**: `memory.max_memory` is the key `max_memory` in the section `memory`. `secateur VERB
  recipe.yaml` reads a recipe. Flags replace its values, and `--set KEY=VALUE` sets any key. An
  option *of the call* is no key of a recipe.

Below the tables of a verb stand options that only work with another one, and options that do
not go together. "The preset's" means that the preset (`--effort`) decides;
[presets](methods/presets.md) says what each brings.
"""


def stub() -> str:
    """The text of the stub."""
    imports: set[str] = set()
    bodies = []
    homes = dict(secateur.HOMES)
    for verb in VERBS.values():
        if verb.in_python and hasattr(public_function(verb.name), "__signature__"):
            bodies.append(declaration(public_function(verb.name), imports))
        elif verb.in_python:
            homes[verb.python] = verb.function.partition(":")[0]
    imports |= {f"from {home} import {name} as {name}" for name, home in homes.items()}
    names = ", ".join(f'"{name}"' for name in secateur.__all__)
    body = "\n\n".join(sorted(bodies, key=lambda text: str(re.findall(r"def (\w+)", text))))
    head = STUB_HEAD + "\n".join(sorted(imports))
    text = f"{head}\n\n__version__: str\nHOMES: dict[str, str]\n__all__ = [{names}]\n\n{body}\n"
    return ruff("format", text=ruff("check", "--select", "I", "--fix", "-q", text=text))


def ruff(*words: str, text: str) -> str:
    """A text as ruff rewrites it."""
    command = [sys.executable, "-m", "ruff", *words, "--stdin-filename", str(STUB), "-"]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def declaration(function: Callable[..., Any], imports: set[str]) -> str:
    """The declaration of a function with its keywords and its help; adds what it needs.

    With `dry_run` a function returns another type, so it is declared for both.
    """
    lines, star = [], False
    signature = inspect.signature(function)
    returned, planned = annotation(signature.return_annotation, function, imports), ""
    if "dry_run" in signature.parameters:
        returned, _, planned = returned.partition(" | ")
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines.append("    *,")
            star = True
        text = annotation(parameter.annotation, function, imports)
        default = "" if parameter.default is parameter.empty else " = None"
        if default and parameter.default is not None:
            default = " = ..."
        if parameter.name == "dry_run" and planned:
            text = "Literal[False] | None"
        lines.append(f"    {parameter.name}: {text}{default},")
    doc = textwrap.indent(inspect.cleandoc(function.__doc__ or ""), "    ").strip()
    head = f"def {function.__name__}(\n" + "\n".join(lines) + f"\n) -> {returned}:"
    whole = f'{head}\n    """{doc}\n    """'
    if not planned:
        return whole
    imports.update(f"from typing import {name}" for name in ("Any", "Literal", "overload"))
    dry = f"    {lines[0].strip()}\n    *,\n    dry_run: Literal[True],\n    **options: Any,\n"
    plan = f"def {function.__name__}(\n{dry}) -> {planned}: ..."
    return f"@overload\n{plan}\n@overload\n{whole}"


def annotation(kind: Any, function: Callable[..., Any], imports: set[str]) -> str:
    """A type as text; the names in it are imported."""
    text = type_text(kind)
    for part in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else [kind]:
        if isinstance(part, type) and part.__module__.startswith("secateur."):
            imports.add(f"from {part.__module__} import {part.__name__}")
    for name in re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'", "", text)):
        found = function.__globals__.get(name)
        if isinstance(found, types.ModuleType):
            package, _, last = found.__name__.rpartition(".")
            imports.add(f"from {package} import {last}")
        elif name in ("Any", "Literal"):
            imports.add(f"from typing import {name}")
        elif name in ("Iterable", "Mapping", "Sequence"):
            imports.add(f"from collections.abc import {name}")
        elif name == "Path":
            imports.add("from pathlib import Path")
        elif found is not None:
            imports.add(f"from {found.__module__} import {name}")
    return text


def type_text(kind: Any) -> str:
    """Write a type as in a stub."""
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(type_text(part) for part in get_args(kind))
    if kind is types.NoneType:
        return "None"
    if isinstance(kind, str):
        return kind
    if get_origin(kind) is None:
        return getattr(kind, "__name__", str(kind))
    text = re.sub(r"\b(typing|collections\.abc|pathlib)\.", "", str(kind))
    unions = r"Union\[((?:[^][]|\[[^][]*\])*)\]"
    return re.sub(unions, lambda found: re.sub(r", (?![^[]*\])", " | ", found[1]), text)


def pages() -> dict[str, str]:
    """The page of all verbs and flags, and one for each verb, by their paths on the site."""
    parts = [PAGE_HEAD, "\n| verbs | |\n|---|---|\n"]
    for stage in STAGES:
        links = [f"[{v.name}](options/{v.name}.md)" for v in VERBS.values() if v.stage == stage]
        parts.append(f"| {stage} | {', '.join(links)} |\n")
    found = {"options.md": "".join([*parts, "\n## By flag\n", *by_flag()])}
    for verb in VERBS.values():
        head = f"# secateur {verb.name}: options\n\n{verb.summary}\n"
        lines = [head, *tables(verb), *contradictions(verb)]
        found[f"options/{verb.name}.md"] = "".join(lines)
    return found


def by_flag() -> Iterator[str]:
    """Every flag with its verbs, a paragraph for each first letter."""
    verbs: dict[str, list[str]] = {}
    for verb in VERBS.values():
        for option in all_options(imported(verb.recipe)):
            if not option.required and not option.flag.hidden:
                verbs.setdefault(dashed(option), []).append(
                    f"[{verb.name}](options/{verb.name}.md)"
                )
    for _, flags in groupby(sorted(verbs), key=lambda flag: flag[2]):
        yield "\n" + " · ".join(f"`{flag}` {', '.join(verbs[flag])}" for flag in flags) + "\n"


def dashed(option: Option) -> str:
    """The flag of an option."""
    return "--" + option.name.replace("_", "-")


def tables(verb: Verb) -> Iterator[str]:
    """One table for each group of options of a verb."""
    kind = imported(verb.recipe)
    of_call = {option.name for option in run_options_of(kind)}
    rows = sorted(all_options(kind), key=lambda option: GROUPS.index(option.group))
    for group, options in groupby(rows, key=lambda option: option.group):
        yield f"\n**{group}**\n\n| flag | key in YAML | value | default | meaning |\n"
        yield "|---|---|---|---|---|\n"
        for option in options:
            yield row(option, called=option.name in of_call)


def contradictions(verb: Verb) -> Iterator[str]:
    """The options of a verb that need others, and those that do not go together."""
    kind = imported(verb.recipe)
    sections = (kind, kind.run) if kind.run else (kind,)
    flags = {o.name: o.flag_text for section in sections for o in options_of(section)}

    def named(words: str, between: str) -> str:
        """These options as flags, with their values."""
        pairs = [word.partition("=")[::2] for word in words.split(" or ")]
        found = [f"{flags[name]} {value}".removesuffix(" None").rstrip() for name, value in pairs]
        return between.join(f"`{flag}`" for flag in found)

    needs = [item for section in sections for item in section.needs.items()]
    for needed, names in groupby(needs, key=lambda item: item[1]):
        options = ", ".join(f"`{flags[name]}`" for name, _ in names)
        yield f"\n{options}: only with {named(' or '.join(needed), ' or ')}.\n"
    conflicts = [row for section in sections for row in section.conflicts if row.option]
    rows = sorted(conflicts, key=lambda row: list(flags).index(row.option.partition("=")[0]))
    if rows:
        yield "\n**Not together**\n\n| option | | reason | remedy |\n|---|---|---|---|\n"
    for (option, *words), alike in groupby(rows, key=lambda r: (r.option, r.reason, r.remedy)):
        others = []
        for each in alike:
            without = "without " * each.other.endswith("=None")
            unless = f", without {named(each.unless, ' or ')}" if each.unless else ""
            others.append(f"{without}{named(each.other, ' or ')}{unless}")
        yield f"| {named(option, ' or ')} | {', '.join(others)} | {' | '.join(words)} |\n"


def row(option: Option, *, called: bool) -> str:
    """The row of an option."""
    flag = f"`{option.name.upper()}`" if option.required else f"`{dashed(option)}`"
    if option.flag.hidden:
        flag = "none"
    elif option.flag.off:
        flag += f", `--{option.flag.off.replace('_', '-')}`"
    elif option.flag.short:
        flag += f", `{option.flag.short}`"
    key = "*of the call*" if called else f"`{option.key}`"
    default = "required" if option.required else option.default
    words = option.choices or (option.word,)
    value = "switch" if option.type is bool else ", ".join(f"`{word}`" for word in words)
    cells = [flag, key, value, default, option.help]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def main() -> None:
    """Write the stub, or check it."""
    write_or_check(ROOT, {STUB: stub()}, "option_files.py")


if __name__ == "__main__":
    main()
