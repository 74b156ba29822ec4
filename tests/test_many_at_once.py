"""The example of many adapters in one run: whole runs on a tiny model, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import many_at_once
import time_a_row
from curves import Curves, curves_page

SMALL = ["--steps", "4", "--evaluate-every", "2", "--rows", "1", "--train-rows", "12", "--validation-rows", "4"]


@pytest.fixture
def run(tiny_model, tmp_path):
    def main(*arguments: str) -> int:
        places = ["--model", str(tiny_model), "--output-dir", str(tmp_path / "out")]
        return many_at_once.main([*places, *SMALL, "--max-length", "200", *arguments])

    return main


def configurations(folder: Path) -> dict[str, dict]:
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/adapter_config.json")}
    assert all((folder / name / "adapter_model.safetensors").is_file() for name in found)
    return found


def test_three_tasks_at_once(run, tmp_path, capsys):
    assert run() == 0
    said = capsys.readouterr().out
    assert "3 adapters at once, 4 steps of 1 rows each" in said
    names = ("logic-to-text", "text-to-logic", "properties")
    assert all(re.search(rf"{name}: validation loss \d+\.\d+ at step \d", said) for name in names)
    lengths = {name: saved["num_virtual_tokens"] for name, saved in configurations(tmp_path / "out").items()}
    assert lengths == {"logic-to-text": 10, "text-to-logic": 20, "properties": 30}
    page = (tmp_path / "out" / "curves.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page


def test_a_search_in_one_run(run, tmp_path, capsys):
    assert run("--search", "properties", "--rates", "0.001", "0.01", "--seeds", "0", "1") == 0
    assert "4 adapters at once" in capsys.readouterr().out
    assert set(configurations(tmp_path / "out")) == {
        f"{rate} seed {seed}" for rate in ("0_001", "0_01") for seed in (0, 1)
    }


def test_tasks_from_files(run, tmp_path, capsys):
    for name in ("upper", "lower"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for split in ("train", "test"):
            lines = [json.dumps({"source": f"{name} {i}", "references": [f"answer {i}"]}) for i in range(12)]
            (tmp_path / "data" / name / f"{split}.jsonl").write_text("\n".join(lines))
    assert run("--data", str(tmp_path / "data"), "--tasks", "upper", "lower") == 0
    assert set(configurations(tmp_path / "out")) == {"upper", "lower"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--search", "nothing"], "--search: no task 'nothing'. Pass --data, or one of logic-to-text"),
        (
            ["--max-length", "3"],
            "--max-length: logic-to-text has 0 rows of at most 3 tokens, and 4 are for validation",
        ),
    ],
)
def test_what_cannot_be(run, capsys, arguments, says):
    assert run(*arguments) == 2
    assert says in capsys.readouterr().err


def test_the_page_keeps_the_best_step():
    curves = Curves(training=[(2, 3.0), (4, 1.0)], validation=[(2, 1.5), (4, 2.5), (6, 2.0)])
    assert curves.best == (2, 1.5)
    page = curves_page("<title>", {"a<b": curves, "c": Curves([(2, 4.0), (6, 3.0)], [(6, 1.25)])}, patience=2)
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert "<td>1.500</td><td>2</td><td>4</td>" in page
    assert "<td>1.250</td><td>6</td><td>trained to the end</td>" in page


def test_the_time_of_a_row(tiny_model, capsys):
    arguments = ["--adapters", "2", "--rows", "1", "2", "--rounds", "2", "--length", "4", "--prompt", "2"]
    assert time_a_row.main(["--model", str(tiny_model), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"Weights, gradients and moments: \d+ MB of the base", lines[0])
    assert [line.split("|")[1:3] for line in lines[4:]] == [[" 2 ", " 1 "], [" 2 ", " 2 "]]
