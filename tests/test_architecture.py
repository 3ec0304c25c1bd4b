"""The order of imports. It counts imports inside functions too."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tcaq_lightning"
ORDER = (
    {"__main__"},
    {"cli"},
    {"api"},
    {"reports", "zoo"},
    {"evaluation"},
    {"calibration", "backends"},
    {"artifact", "methods"},
    {"nn"},
    {"quantizers", "models"},
    {"runtime"},
    {"config"},
    {"errors"},
)
"""Rooms from the top to the ground. A room imports from those below it; rooms of one floor do not know each other."""
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
MOST_ENTRIES = 18


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name taken from it) of every import in a file; the name is empty where the whole module is taken."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in FILES else (node.module, alias.name)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def own_imports(module: str) -> Iterator[tuple[str, str]]:
    return ((target, name) for target, name in imports(FILES[module]) if target.split(".")[0] == "tcaq_lightning")


def test_imports_go_down() -> None:
    upward = [
        f"{module} imports {target}"
        for module in FILES
        for target, _ in own_imports(module)
        if room(module) and room(target) != room(module) and FLOOR[room(target)] <= FLOOR[room(module)]
    ]
    assert upward == []


def test_no_module_is_in_a_circle() -> None:
    graph = {module: {target for target, _ in own_imports(module) if target != module} for module in FILES}
    graph.pop("tcaq_lightning")  # its names are taken lazily
    reached: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        stack = list(targets)
        while stack:
            if (target := stack.pop()) not in reached[module]:
                reached[module].add(target)
                stack.extend(graph.get(target, ()))
    assert [module for module in graph if module in reached[module]] == []


def test_callbacks_are_handed_in() -> None:
    importing = [
        module for module in FILES for target, _ in imports(FILES[module]) if target.split(".")[0] == "callbacks"
    ]
    assert importing == []


def test_no_private_name_is_imported() -> None:
    private = [
        f"{module} imports {target}.{name}"
        for module in FILES
        for target, name in own_imports(module)
        if name.startswith("_")
    ]
    assert private == []


def test_the_top_level_is_small() -> None:
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert len(entries) <= MOST_ENTRIES
    assert {Path(entry).stem for entry in entries} - {"__init__", "py"} <= set(FLOOR)
