"""docs/compatibility.md is made of tests that ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training_table import CACHE_KEY, GROUPS, TABLE, Row, cell, page, row_texts

TESTS = Path(__file__).parent
GROUP = GROUPS[0]


def rows(count: int, on_gpu: bool = False) -> list[Row]:
    return [Row(f"test_{n}", GROUP, "resume", on_gpu) for n in range(count)]


@pytest.mark.parametrize(
    ("became", "said"),
    [
        (["passed"], "✓"),
        (["passed", "passed"], "✓ 2 tests"),
        (["passed", "failed"], "✗ failed"),
        (["skipped", "failed"], "✗ failed"),
        (["passed", "skipped"], "not run"),
        (["passed", None], "not run"),
        ([], ""),
    ],
)
def test_a_cell_is_ticked_where_all_tests_ran_and_passed(became, said):
    outcomes = {f"test_{n}": outcome for n, outcome in enumerate(became) if outcome}
    assert cell(rows(len(became)), outcomes) == said


def test_the_page_keeps_cpu_and_gpu_apart():
    both = [*rows(1), Row("on_gpu", GROUP, "resume", on_gpu=True), Row("other", "TRL", "DPO", on_gpu=False)]
    text = page(both, {"test_0": "passed", "on_gpu": "skipped", "other": "failed"}, "Run on this.")
    assert "| resume | ✓ | not run |" in text
    assert "| DPO | ✗ failed | not run |" in text
    assert row_texts(text) == ["resume", "DPO"]
    text = page(both, {"test_0": "passed"}, "", on_gpu={"test_0": "passed", "on_gpu": "passed", "other": "failed"})
    assert "| resume | ✓ | ✓ 2 tests |" in text
    assert "| DPO | not run | ✗ failed |" in text
    assert text.index(f"## {GROUP}") < text.index("## TRL")


CASES = f"""
import pytest
mark = pytest.mark.trains_with("{GROUP}", "resume")

@mark
def test_passes(): pass

@mark
def test_fails(): assert False

@mark
def test_skips(): pytest.skip("not here")

@pytest.fixture
def broken(): raise RuntimeError

@mark
def test_breaks(broken): pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_outcomes_are_kept_over_runs(tmp_path, workers):
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS}\nmarkers =\n    trains_with(group, row)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "training_table", "-n", workers]
    for chosen in ("passes or fails", "skips or breaks"):
        subprocess.run([*command, "-k", chosen], cwd=tmp_path, capture_output=True, env={"PYTHONPATH": str(TESTS)})
    kept = json.loads((tmp_path / ".pytest_cache" / "v" / CACHE_KEY).read_text())
    assert {key.partition("::")[2]: value for key, value in kept.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_breaks": "failed",
    }


def test_the_page_has_the_rows_of_the_tests():
    done = subprocess.run(
        [sys.executable, str(TESTS / "training_table.py"), "--check"], capture_output=True, text=True, cwd=TABLE.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
