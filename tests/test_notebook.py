"""The notebook: it runs from its first cell to its last, and the outputs that lie in it are of such a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
SERVED = "the same as the adapter: True"  # what a plain checkpoint writes in another Python


def outputs_of(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def text_of(notebook: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in outputs_of(notebook))


def pictures_of(notebook: dict) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


def test_the_stored_outputs_are_those_of_one_run():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert {output["output_type"] for output in outputs_of(notebook)} <= {"stream", "display_data", "execute_result"}
    assert pictures_of(notebook) == 3
    assert SERVED in text_of(notebook)
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = pictures_of(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
    assert pictures_of(notebook) == stored
    assert SERVED in text_of(notebook)
