"""The groups of packages that developers install (PEP 735), as pip reads them from pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS: dict[str, list[Any]] = PYPROJECT["dependency-groups"]
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
NAME = PYPROJECT["project"]["name"]


def group(name: str) -> list[Requirement]:
    """What a group brings, with the groups and the extras of this package that it names."""
    found = []
    for entry in GROUPS[name]:
        if isinstance(entry, dict):
            found += group(entry["include-group"])
        elif (requirement := Requirement(entry)).name == NAME:
            found += [Requirement(line) for extra in sorted(requirement.extras) for line in EXTRAS[extra]]
        else:
            found.append(requirement)
    return found
