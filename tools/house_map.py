"""Print the rooms of the package and the imports between them.

    python tools/house_map.py              the house of this working tree
    python tools/house_map.py FOLDER       the house of another working tree

A room is a package or a module directly below another package. An arrow from one room to another
means that some module of the first imports some module of the second; imports for type checkers
count too. A circle is a set of rooms, or of modules, in which every member can reach every other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import grimp

PACKAGE = "secateur"
OPENED = (PACKAGE, f"{PACKAGE}.engine", f"{PACKAGE}.steps")
Arrows = dict[str, set[str]]


def module_imports(source: Path) -> Arrows:
    """All modules below the folder `source`, and the modules that each of them imports."""
    sys.path.insert(0, str(source))
    try:
        graph = grimp.build_graph(PACKAGE, cache_dir=None, exclude_type_checking_imports=False)
    finally:
        sys.path.pop(0)
    return {name: graph.find_modules_directly_imported_by(name) for name in sorted(graph.modules)}


def packages(modules: Iterable[str]) -> list[str]:
    """The modules that contain other modules."""
    return sorted({name.rpartition(".")[0] for name in modules} - {""})


def room_of(module: str, package: str) -> str | None:
    """The room directly below `package` that contains `module`, if there is one."""
    if not module.startswith(package + "."):
        return None
    return module[len(package) + 1 :].partition(".")[0]


def room_arrows(imports: Arrows, package: str = PACKAGE) -> Arrows:
    """The rooms directly below `package`, and the rooms that each of them imports."""
    arrows: Arrows = {}
    for module, imported in imports.items():
        room = room_of(module, package)
        if room is None:
            continue
        others = {room_of(name, package) for name in imported}
        arrows.setdefault(room, set()).update(o for o in others if o is not None and o != room)
    return arrows


def circles(arrows: Arrows) -> list[list[str]]:
    """The largest sets in which every member reaches every other, each sorted by name."""
    reached = {name: reachable(arrows, name) for name in arrows}
    partners: Arrows = {}
    for one, other in combinations(sorted(arrows), 2):
        if other in reached[one] and one in reached[other]:
            partners.setdefault(one, {one}).add(other)
            partners.setdefault(other, {other}).add(one)
    return sorted({tuple(sorted(circle)): sorted(circle) for circle in partners.values()}.values())


def reachable(arrows: Arrows, start: str) -> set[str]:
    """All that can be reached from `start` along arrows."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = arrows.get(waiting.pop(), set()) - seen
        seen |= new
        waiting.extend(new)
    return seen


def all_circles(imports: Arrows) -> list[list[str]]:
    """The circles of the modules, and then those of the rooms of every package."""
    found = circles(imports)
    for package in packages(imports):
        rooms = circles(room_arrows(imports, package))
        found += [[f"{package}.{room}" for room in circle] for circle in rooms]
    return [list(circle) for circle in dict.fromkeys(map(tuple, found))]


def picture(imports: Arrows) -> str:
    """The rooms and arrows of the packages in `OPENED`, and all circles."""
    lines: list[str] = []
    for package in OPENED:
        arrows = room_arrows(imports, package)
        count = sum(map(len, arrows.values()))
        lines.append(f"{package}: {len(arrows)} rooms, {count} arrows")
        for room, others in sorted(arrows.items()):
            size = sum(room_of(name, package) == room for name in imports)
            named = ", ".join(sorted(others)) or "nothing"
            lines.append(f"  {room} ({size} modules) -> {named}")
    found = all_circles(imports)
    lines += [f"circle: {', '.join(circle)}" for circle in found]
    count = sum(map(len, imports.values()))
    lines.append(f"{len(imports)} modules, {count} imports between them, {len(found)} circles")
    return "\n".join(lines)


def main() -> None:
    """Print the picture of a working tree."""
    here = Path(__file__).parent.parent
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    print(picture(module_imports(tree / "src")))


if __name__ == "__main__":
    main()
