"""Collect the pages of the site: those of docs/, some of the root, and the Python reference.

A link from a page of docs/ to a file elsewhere in the repository works where the repository is at
hand. On the site it must lead to a copy, so that the site needs nothing else.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from option_files import pages as option_pages
from secateur.recipes.verbs import VERBS

DOCS = Path("docs")
PROJECT = tuple(
    Path(name) for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
)
ASSISTANTS = Path("llms.txt")
README, MAP = Path("README.md"), DOCS / "README.md"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^[ ]*```.*?^[ ]*```[ ]*$)", re.MULTILINE | re.DOTALL)
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")


def collect(root: Path, pages: Path) -> None:
    """Write all pages of the site, and the files that they link to.

    Args:
        root: of the repository.
        pages: folder to write; what was there is deleted.

    Raises:
        ValueError: a page links to a folder, or to what is not there.
    """
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(root / DOCS, pages)
    for page in [*(root / DOCS).rglob("*.md"), *(root / file for file in PROJECT)]:
        place = placed(page.relative_to(root))
        text, files = relinked(page.read_text(encoding="utf-8"), page.relative_to(root), root)
        for file in [place, *files]:
            (pages / file).parent.mkdir(parents=True, exist_ok=True)
        (pages / place).write_text(text, encoding="utf-8")
        for file, source in files.items():
            shutil.copyfile(root / source, pages / file)
    (pages / README).write_text(home_page(root), encoding="utf-8")
    (pages / "options").mkdir()
    for name, words in option_pages().items():
        (pages / name).write_text(words, encoding="utf-8")
    (pages / ASSISTANTS).write_text(assistants_page(root), encoding="utf-8")
    (pages / "python.md").write_text(python_page(root), encoding="utf-8")


def placed(file: Path) -> Path:
    """Where a file of the repository is on the site."""
    if file == MAP:
        return Path("map.md")
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS)
    if file == README:
        return README
    return Path("project" if file in PROJECT else "files") / file


def home_page(root: Path) -> str:
    """The first page: what Secateur is and brings, from the README."""
    opening, _, _ = (root / README).read_text(encoding="utf-8").partition("\n## Find your way")
    return relinked(opening, README, root)[0]


def relinked(text: str, page: Path, root: Path) -> tuple[str, dict[Path, Path]]:
    """A page whose links are those of the site.

    Args:
        text: of the page.
        page: its path in the repository.
        root: of the repository.

    Returns:
        The text, and the files to copy: by their place on the site, their path in the repository.
    """
    files: dict[Path, Path] = {}

    def linked(match: re.Match[str]) -> str:
        opening, link, anchor, closing = match.groups()
        if re.match(r"[a-z]+:", link):
            return match[0]
        target = Path(os.path.normpath(page.parent / link))
        if not (root / target).is_file():
            raise ValueError(f"{page}: {link} is no file")
        place = placed(target)
        if place.parts[0] == "files":
            files[place] = target
        relative = os.path.relpath(place, placed(page).parent)
        return f"{opening}{Path(relative).as_posix()}{anchor or ''}{closing}"

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(linked, part) for part in parts[::2]]
    return "".join(parts), files


def assistants_page(root: Path) -> str:
    """`llms.txt` for the root of the site: its links lead to built pages."""

    def built(match: re.Match[str]) -> str:
        place = placed(Path(match[2])).with_suffix(".html")
        return f"{match[1]}{str(place).replace('README', 'index')}{match[4]}"

    return LINK.sub(built, (root / ASSISTANTS).read_text(encoding="utf-8"))


def python_page(root: Path) -> str:
    """The reference of the public names, from the stub and the docstrings; imports nothing."""
    package = root / "src" / "secateur"
    stub = ast.parse((package / "__init__.pyi").read_text(encoding="utf-8"))
    homes = homes_of(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    declared = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    lines = [
        "---",
        "search:",
        "  boost: 0.3",
        "---",
        "",
        "# Python",
        "",
        "This page lists the public names of `secateur`, from its docstrings. Every verb of the "
        "command line is a function with the same options: [all options](options.md).",
        "",
    ]
    for name in sorted({*homes, *declared}, key=str.lower):
        home = homes.get(name, "secateur")
        node = declared.get(name) or found(root / "src", home, name)
        lines += entry(name, node, home)
    return "\n".join(lines) + "\n"


def homes_of(module: ast.Module) -> dict[str, str]:
    """The module of each public name that is written by hand."""
    own = [place.partition(":") for verb in VERBS.values() if (place := verb.function)]
    for node in module.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "HOMES":
            homes: dict[str, str] = ast.literal_eval(node.value)
            return homes | {name: home for home, _, name in own}
    raise ValueError("secateur/__init__.py has no HOMES")


def found(source: Path, home: str, name: str) -> ast.stmt | None:
    """The definition of a name, or the string below its assignment; None if it has none."""
    path = source / home.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in [getattr(target, "id", None) for target in targets]:
            return after if isinstance(after, ast.Expr) else None
    return None


def entry(name: str, node: ast.stmt | None, home: str) -> Iterator[str]:
    """The lines about one name."""
    yield f"## secateur.{name}"
    yield ""
    text = ""
    if isinstance(node, ast.FunctionDef):
        yield from ("```python", *signature(node), "```", "")
        text = ast.get_docstring(node) or ""
    elif isinstance(node, ast.ClassDef):
        yield from ("```python", f"class {name}", "```", "")
        text = ast.get_docstring(node) or ""
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        text = inspect.cleandoc(str(node.value.value))
    yield from _markdown_lines(text or f"Defined in `{home}`.")
    yield ""


def signature(node: ast.FunctionDef) -> Iterator[str]:
    """A function's signature, one argument a line."""
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    yield f"{node.name}("
    for argument, default in zip(plain, defaults, strict=True):
        yield f"    {argument_text(argument, default)},"
    if arguments.kwonlyargs:
        yield "    *,"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield f"    {argument_text(argument, default)},"
    if arguments.kwarg:
        yield f"    **{arguments.kwarg.arg},"
    yield f") -> {ast.unparse(node.returns)}" if node.returns else ")"


def argument_text(argument: ast.arg, default: ast.expr | None) -> str:
    """One argument, with its type and default."""
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def _markdown_lines(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: its sections become lists, its indented code stays code."""
    listing = False
    for line in docstring.splitlines():
        if line in SECTIONS:
            listing = line != "Returns:" or ": " in docstring
            yield from (f"**{line[:-1]}**", "")
        elif not listing or not line.startswith("    "):
            listing = listing and not line
            yield line
        elif named := re.match(r"    (\*{0,2}\w[\w.\[\], ]*): (.*)", line):
            yield f"- `{named[1]}`: {named[2]}"
        elif line.startswith("        "):
            yield "  " + textwrap.dedent(line)
        else:
            yield line.strip()
