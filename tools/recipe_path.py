"""Print the way of a recipe through the code: which modules a reader of the run opens, in order.

    python tools/recipe_path.py              the way in this working tree
    python tools/recipe_path.py FOLDER       the way in another working tree

A tiny checkpoint is pruned with SparseGPT, from folder to folder, and a profile notes when a
function of each module runs for the first time. A reader who follows the run opens the modules in
this order, and reads each of them once.

- stay: consecutive modules in one room;
- move: from one stay to the next;
- climb: a move to a room that imports the room before it, directly or not.

The rooms in `GROUND` do not count: every room uses them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from house_map import PACKAGE, Arrows, module_imports, reachable, room_arrows, room_of

GROUND = frozenset({"errors", "types", "registry", "progress", "precision", "allocator"})


def opened_modules(work: Callable[[], object], package: Path) -> list[str]:
    """The modules of the folder `package` in the order in which a function of each runs first."""
    files: dict[str, None] = {}
    start = f"{package}/"

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(start):
            files.setdefault(file)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    below = [Path(file).relative_to(package.parent).with_suffix("") for file in files]
    return [".".join(path.parts).removesuffix(".__init__") for path in below]


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
    count = sum(len(modules) for _, modules in path)
    lines.append(
        f"{count} modules in {len(path)} stays, {len(path) - 1} moves, {sum(climbed)} climbs"
    )
    return "\n".join(lines)


def tiny_run(tree: Path, folder: Path) -> Callable[[str], object]:
    """A function that prunes a tiny checkpoint of `folder` into the subfolder that it is given."""
    sys.path[:0] = [str(tree / "src"), str(tree / "tests")]
    import secateur
    from secateur.calibration.windows import save_windows
    from tiny import save_tiny
    from zoo import tiny_windows

    save_tiny(folder / "model", num_hidden_layers=2)
    text = folder / "windows.safetensors"
    save_windows(tiny_windows(4, 20), text)

    def prune(output: str) -> object:
        return secateur.prune(
            folder / "model",
            output=folder / output,
            method="sparsegpt",
            sparsity=0.5,
            calibration=text,
        )

    return prune


def main() -> None:
    """Print the path in a working tree."""
    tree = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    arrows = room_arrows(module_imports(tree / "src"))
    with tempfile.TemporaryDirectory() as folder:
        prune = tiny_run(tree, Path(folder))
        prune("first")  # imports run now, and not under the profile
        opened = opened_modules(lambda: prune("second"), tree / "src" / PACKAGE)
    print(picture(opened, arrows))


if __name__ == "__main__":
    main()
