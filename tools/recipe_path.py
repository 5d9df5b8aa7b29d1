"""Print the way of a recipe through the code: which modules a reader of the run opens, in order.

    python tools/recipe_path.py              the way in this working tree
    python tools/recipe_path.py FOLDER       the way in another working tree

The command line prunes a tiny checkpoint with Wanda, in one process, and a profile notes when a
function of each module runs for the first time. A reader who follows the run opens the modules in
this order, and reads each of them once.

- stay: consecutive modules in one room;
- move: from one stay to the next;
- climb: a move to a room that imports the room before it, directly or not.

The rooms in `GROUND` do not count: every room uses them.

The last line says how far Wanda's formula is from the command line. Files are those opened until
then, all rooms included; frames are the functions of the package that call each other there.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import count, groupby, pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from house_map import PACKAGE, Arrows, module_imports, reachable, room_arrows, room_of

GROUND = frozenset({"errors", "types", "registry", "progress", "machine"})
FORMULA = "sparsity/scores/wanda.py"
COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>"})
"""Frames that Python 3.12 no longer has."""


def opened_modules(
    work: Callable[[], object],
    package: Path,
    also: Callable[[FrameType, str, Any], None] = lambda frame, event, function: None,
) -> list[str]:
    """The modules of the folder `package` in the order in which a function of each runs first.

    Args:
        work: the run.
        package: the folder.
        also: called with everything that a profile sees.
    """
    files: dict[str, None] = {}
    start = f"{package}/"

    def note(frame: FrameType, event: str, function: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(start):
            files.setdefault(file)
        also(frame, event, function)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    below = [Path(file).relative_to(package.parent).with_suffix("") for file in files]
    return [".".join(path.parts).removesuffix(".__init__") for path in below]


def _depth(frame: FrameType | None, start: str) -> int:
    """The frames of files whose path has this start, from a frame outwards."""
    depth = 0
    while frame is not None:
        code = frame.f_code
        depth += code.co_filename.startswith(start) and code.co_name not in COMPREHENSIONS
        frame = frame.f_back
    return depth


class AtFormula(NamedTuple):
    """How far into a run a formula is."""

    frames: int
    files: int
    moves: int


def at_formula(work: Callable[[], object], package: Path, formula: str = FORMULA) -> AtFormula:
    """How far a run is when it first calls a function of the file `formula` of a package.

    Raises:
        RuntimeError: it calls none.
    """
    start, frames = f"{package}/", list[int]()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename == f"{package / formula}":
            frames.append(_depth(frame, start))

    opened = opened_modules(work, package, note)
    if not frames:
        raise RuntimeError(f"no function of {formula} has been called")
    name = ".".join((package.name, *Path(formula).with_suffix("").parts))
    opened = opened[: opened.index(name) + 1]
    return AtFormula(frames[0], len(opened), len(stays(opened, package.name)) - 1)


def stays(opened: Sequence[str], package: str = PACKAGE) -> list[tuple[str, list[str]]]:
    """The rooms of a path with the modules that are opened in each, without the ground."""
    rooms = [(room_of(module, package), module) for module in opened]
    counted = [(room, module) for room, module in rooms if room and room not in GROUND]
    groups = groupby(counted, key=lambda pair: pair[0])
    return [(room, [module for _, module in group]) for room, group in groups]


def climbs(rooms: Sequence[str], arrows: Arrows) -> list[bool]:
    """For each room of a path, whether the reader climbed to get there."""
    return [False, *(before in reachable(arrows, room) for before, room in pairwise(rooms))]


def picture(opened: Sequence[str], arrows: Arrows) -> str:
    """The stays of a path, a line each; `^` marks the climbs."""
    path = stays(opened)
    climbed = climbs([room for room, _ in path], arrows)
    lines = []
    for (room, modules), up in zip(path, climbed, strict=True):
        names = [name.removeprefix(f"{PACKAGE}.{room}.") for name in modules]
        lines.append(f"{'^' if up else ' '} {room}: {', '.join(names)}")
    opened_once = sum(len(modules) for _, modules in path)
    lines.append(
        f"{opened_once} modules in {len(path)} stays, {len(path) - 1} moves, {sum(climbed)} climbs"
    )
    return "\n".join(lines)


@contextmanager
def tiny_run(tree: Path) -> Iterator[Callable[[], object]]:
    """A function that runs `secateur prune` on a tiny checkpoint with the code of a working tree.

    It has run once before, so imports do not show in a profile.
    """
    sys.path[:0] = [str(tree / "src"), str(tree / "tests/support")]
    from tiny import save_tiny
    from zoo import tiny_windows

    from secateur.calibration.windows import save_windows
    from secateur.cli import main

    with tempfile.TemporaryDirectory() as name:
        folder, outputs = Path(name), count()
        save_tiny(folder / "model", num_hidden_layers=2)
        text = folder / "windows.safetensors"
        save_windows(tiny_windows(4, 20), text)

        def command() -> None:
            words = "--method", "wanda", "--sparsity", "0.5", "--calibration", f"{text}", "--quiet"
            output = folder / f"pruned-{next(outputs)}"
            sys.argv = ["secateur", "prune", f"{folder / 'model'}", "--output", f"{output}", *words]
            with redirect_stdout(io.StringIO()), suppress(SystemExit):
                main()

        command()
        yield command


def main() -> None:
    """Print the path in a working tree."""
    tree = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    arrows = room_arrows(module_imports(tree / "src"))
    package = tree / "src" / PACKAGE
    with tiny_run(tree) as command:
        opened, formula = opened_modules(command, package), at_formula(command, package)
    print(picture(opened, arrows))
    print(
        f"Wanda's formula: {formula.frames} frames, {formula.files} files, {formula.moves} moves "
        "from the command line"
    )


if __name__ == "__main__":
    main()
