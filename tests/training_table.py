"""docs/compatibility.md: what one can train with, from tests that ran.

A test that stands for a row of the table has a marker with the row's group and its words:

    @pytest.mark.trains_with("TRL", "DPOTrainer: log-probabilities and accuracies by hand")

As a plugin of pytest (`conftest.py`), this file keeps the outcome of every such test that runs, in pytest's own cache.
As a script, it makes the table of these outcomes. A row is ticked where all of its tests have run and passed, on the
CPU or on a GPU; everything else is named for what it is.

    make test-all                            run the tests
    python tests/training_table.py           write the table from what became of them (`make compatibility`)
    python tests/training_table.py --check   say whether the page has the rows that the tests have
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "compatibility.md"
MARKER, CACHE_KEY = "trains_with", "compatibility/outcomes"
ON_GPU = f"{CACHE_KEY}-cuda"  # of a run with DEVICE=cuda
GROUPS = (  # in the order of the page; a marker with another group is an error
    "transformers Trainer",
    "TRL",
    "sentence-transformers",
    "accelerate and processes",
    "Quantized bases",
    "Memory",
    "Packed and padding-free rows",
    "Other engines",
    "examples/training/train.py",
    "Faults",
)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "deepspeed", "bitsandbytes", "torchao", "hqq")
PACKAGES += ("optimum-quanto", "lightning", "sentence-transformers")
HEAD = """\
# What one can train with

Each tick is a test that ran and passed where the column says; `make compatibility` writes this page from the outcomes
of `make test-all`, for the GPU with `DEVICE=cuda`. "not run" is what it says: nothing is known of it. An empty cell:
there is no such test.

"""


@dataclass(frozen=True)
class Row:
    """A test and the row that it stands for."""

    nodeid: str
    group: str
    text: str
    on_gpu: bool


def rows_of(items: Iterable[pytest.Item]) -> list[Row]:
    """The rows that collected tests stand for, in the order of the tests.

    Raises:
        pytest.UsageError: a marker with an unknown group.
    """
    rows = []
    for item in items:
        for marker in item.iter_markers(MARKER):
            group, text = marker.args
            if group not in GROUPS:
                raise pytest.UsageError(f"{item.nodeid}: group {group!r} is not one of {GROUPS}.")
            rows.append(Row(item.nodeid, group, text, item.get_closest_marker("gpu") is not None))
    return rows


# ---- the plugin -----------------------------------------------------------------------------------------------------


class Outcomes:
    """What became of each test: "passed", "failed" or "skipped", by node id."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seen: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a failure of set-up or tear-down counts too
            self.seen[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        cache = getattr(self.config, "cache", None)
        if cache is not None and self.seen:
            device = os.environ.get("DEVICE", "cpu")
            key = CACHE_KEY if device == "cpu" else f"{CACHE_KEY}-{device}"
            cache.set(key, {**cache.get(key, {}), **self.seen})


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist: the controller gets the reports of all
    if not is_worker and not config.option.collectonly:
        config.pluginmanager.register(Outcomes(config), "training-table-outcomes")


# ---- the page -------------------------------------------------------------------------------------------------------


class Collected:
    """A plugin of pytest: the rows of all tests, and what became of them in the runs before."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.outcomes: dict[str, str] = {}
        self.on_gpu: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.rows = rows_of(session.items)
        if session.config.cache is not None:
            self.outcomes, self.on_gpu = (session.config.cache.get(key, {}) for key in (CACHE_KEY, ON_GPU))


def collect() -> Collected:
    collected, said = Collected(), io.StringIO()
    with contextlib.redirect_stdout(said):
        failed = pytest.main(["--collect-only", "-qq", str(TESTS)], plugins=[collected])
    if failed:
        raise SystemExit(f"{said.getvalue()}The tests could not be collected.")
    return collected


def cell(rows: list[Row], outcomes: Mapping[str, str]) -> str:
    """A tick where all tests ran and passed; else what is known."""
    became = [outcomes.get(row.nodeid) for row in rows]
    if not rows:
        return ""
    if "failed" in became:
        return "✗ failed"
    if None in became or "skipped" in became:
        return "not run"
    return "✓" if len(rows) == 1 else f"✓ {len(rows)} tests"


def page(rows: list[Row], outcomes: dict[str, str], machine: str, on_gpu: Mapping[str, str] = {}) -> str:
    """The page's Markdown, of the outcomes on a CPU and on a GPU."""
    parts = [HEAD, f"{machine}\n"]
    for group in GROUPS:
        texts = dict.fromkeys(row.text for row in rows if row.group == group)
        if not texts:
            continue
        parts.append(f"\n## {group}\n\n| | CPU | GPU |\n| :-- | :-- | :-- |\n")
        for text in texts:
            mine = [row for row in rows if (row.group, row.text) == (group, text)]
            cells = cell([row for row in mine if not row.on_gpu], outcomes), cell(mine, on_gpu)
            parts.append(f"| {text} | {' | '.join(cells)} |\n")
    return "".join(parts)


def machine() -> str:
    """Where the tests ran, in words."""
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return (
        f"Run on {platform.system()} {platform.machine()}, Python {platform.python_version()}: {', '.join(versions)}."
    )


def row_texts(page: str) -> list[str]:
    """The first cells of a page's rows."""
    return re.findall(r"^\| ([^|:].*?) \|", page, re.MULTILINE)


def main() -> None:
    collected = collect()
    if "--check" in sys.argv[1:]:
        written = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
        if row_texts(written) != row_texts(page(collected.rows, {}, "")):
            raise SystemExit("docs/compatibility.md has other rows than the tests. Run `make compatibility`.")
        return
    if not any(row.nodeid in collected.outcomes for row in collected.rows):
        raise SystemExit("No test of the table has run here. Run `make test-all` first.")
    TABLE.write_text(page(collected.rows, collected.outcomes, machine(), collected.on_gpu), encoding="utf-8")
    print(f"Wrote {TABLE.relative_to(TESTS.parent)}")


if __name__ == "__main__":
    sys.exit(main())
