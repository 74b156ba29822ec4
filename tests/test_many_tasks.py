"""The example of many tasks in one batch: a whole run on a tiny model, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import many_tasks


@pytest.fixture
def run(tiny_model, tmp_path):
    def main(*arguments: str) -> int:
        small = ["--steps", "3", "--batch-size", "2", "--max-new-tokens", "6", "--train-rows", "40"]
        places = ["--model", str(tiny_model), "--output-dir", str(tmp_path / "out")]
        return many_tasks.main([*places, *small, *arguments])

    return main


def write_tasks(folder: Path) -> None:
    for name in ("upper", "reverse"):
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            lines = [json.dumps({"source": f"{name} {split} {i}", "references": [f"answer {i}"]}) for i in range(12)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines))


def test_a_run_trains_and_checks_every_row(run, tmp_path, capsys):
    assert run() == 0
    said = capsys.readouterr().out
    assert "7 rows, 3 adapters and the bare model" in said
    assert "Every row is what its adapter gives alone." in said
    assert "now there: loaded-again, properties, text-to-logic" in said
    lengths = {
        path.parent.name: json.loads(path.read_text())["num_virtual_tokens"]
        for path in (tmp_path / "out").glob("*/adapter_config.json")
    }
    assert lengths == {"logic-to-text": 10, "text-to-logic": 20, "properties": 30}
    # What is there is not trained again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert run() == 0
    assert capsys.readouterr().out.count("not trained again") == 3
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}


def test_an_adapter_without_weights_is_trained_again(run, tmp_path, capsys):
    assert run() == 0
    (tmp_path / "out" / "properties" / "adapter_model.safetensors").unlink()
    assert run() == 0
    assert capsys.readouterr().out.count("not trained again") == 2


def test_tasks_from_files(run, tmp_path, capsys):
    write_tasks(tmp_path / "data")
    assert run("--data", str(tmp_path / "data"), "--tasks", "upper", "reverse") == 0
    assert "5 rows, 2 adapters and the bare model" in capsys.readouterr().out


def test_a_row_that_differs_is_an_error(run, monkeypatch, capsys):
    monkeypatch.setattr(many_tasks, "alone", lambda *_: "something else")
    assert run() == 1
    assert "'something else' alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--steps", "0"],
        ["--data", "nowhere"],
        ["--tasks", "one"],
        ["--tasks", "one", "one"],
        ["--seed", "-1"],
        ["--model", "./no"],
        ["--output-dir", "/proc/nothing"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_named_before_any_work(run, capsys, tmp_path, wrong):
    try:
        code = run(*wrong)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert wrong[0] in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
