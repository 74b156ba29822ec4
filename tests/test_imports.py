"""Imports inside the package flow one way, from what knows most to what knows least, and never in a circle.

Read from the sources, so that imports for type checkers and imports inside of functions count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peft_input_tuning"
# Rooms and files at the top, from what knows least to what knows most. Each may import what stands in lines above its
# own; a room's files import each other. `__init__` is what `import peft_input_tuning` brings.
ORDER = (
    "version program tested_versions registration output tied_tables",
    "base_weights call_state modules pending_weights prompt_states model_card",
    "config prompt_start merging mixed_rows",
    "layer saved_config",
    "virtual_tokens checkpoint nesting optimizer prompt_embeds prompt_tuning weighted",
    "placement",
    "model",
    "engines export inspection",
    "lora_form",
    "api",
    "__init__",
    "familiarity run_comparison training",
    "command_line",
    "__main__",
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
ONLY_TORCH = ("peft_input_tuning.modules", "peft_input_tuning.virtual_tokens.layout")


def files_of(package: Path) -> dict[str, Path]:
    """Dotted names → files; a folder's name stands for its `__init__.py`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports: (module, name in it), the name empty for `import module`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((module, alias.name) for alias in node.names)


def graph_of(package: Path) -> dict[str, set[str]]:
    """Each file's name → the files that it imports, with the `__init__.py` of every room that it enters for that."""
    files = files_of(package)
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for module, member in imported(name, path):
            target = f"{module}.{member}" if f"{module}.{member}" in files else module
            if target not in files:
                continue
            graph[name].add(target)
            parts = target.split(".")
            entered = {".".join(parts[:end]) for end in range(1, len(parts))}
            graph[name] |= {room for room in entered if not f"{name}.".startswith(f"{room}.")}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The names of a circle, the first one again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def room_of(name: str) -> str:
    """A file's room, or its own name at the top."""
    return [*name.split("."), "__init__"][1]


def test_there_is_no_circle():
    assert circle_in(graph_of(PACKAGE)) == []


def test_imports_follow_the_order():
    against = [
        f"{name} imports {other}"
        for name, others in graph_of(PACKAGE).items()
        for other in others
        if room_of(name) != room_of(other) and LEVELS[room_of(name)] <= LEVELS[room_of(other)]
    ]
    assert not against


def test_the_order_names_what_there_is():
    assert set(LEVELS) == {room_of(name) for name in files_of(PACKAGE)}


@pytest.mark.parametrize("name", ONLY_TORCH)
def test_pure_files_know_torch_only(name):
    modules = {module for module, _ in imported(name, files_of(PACKAGE)[name])} - set(ONLY_TORCH)
    assert {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize(
    "line",
    [
        "from .room.inner import y",
        "from . import room",
        "import package.room.inner",
        "if TYPE_CHECKING:\n    from package.room import inner",
        "def f():\n    from .room import y",
    ],
)
def test_every_kind_of_import_is_seen(line, tmp_path):
    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "room" / "__init__.py").write_text("from .inner import y\n")
    (package / "room" / "inner.py").write_text("from ..top import x\n")
    (package / "top.py").write_text("x = y = 0\n")
    assert circle_in(graph_of(package)) == []
    (package / "top.py").write_text(f"{line}\n")
    assert {"package.top", "package.room.inner"} <= set(circle_in(graph_of(package)))
