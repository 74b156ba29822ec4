"""Results in the form that is kept: what is stored is what runs wrote, and no run is made again."""

from __future__ import annotations

import json
import lzma
import subprocess
from pathlib import Path

import pytest

import collect
import plan
import records
import run_all
from input_tuning_examples.task_data import InputError
from records import outputs_file, read_outputs, read_record, read_records, record_file, write_outputs, write_record
from stored_runs import RUNS, TEXTS, store, stored_texts

TEXTS_OF = {"main/dart.lora.seed0": ["the café", "", "a\u2028b \u0085"], "main/e2e.lora.seed0": ['"x"', "y"]}


def record(status: str = "finished", stage: str = "main", **more) -> dict:
    return {"stage": stage, "status": status, "attempts": 1, "errors": [], "metrics": {"validation_loss": 0.1}, **more}


@pytest.fixture
def results(tmp_path) -> Path:
    """Two runs with texts, one of the search, one that failed."""
    folder = tmp_path / "results"
    for name, texts in TEXTS_OF.items():
        write_outputs(folder, name, texts)
        write_record(folder, name, record(metrics={"validation_loss": 1 / 3, "bleu": 56.908964957866594}))
    write_record(folder, "rates/e2e.lora.rate0.001", record(stage="rates"))
    write_record(folder, "main/e2e.fine-tuning.seed0", record("failed", errors=["é\u2028"]))
    return folder


def test_what_is_collected_is_what_runs_wrote(results):
    before = read_records(results)
    texts = {name: read_outputs(results, name) for name in TEXTS_OF}
    assert collect.main(["--results", str(results)]) == 0
    assert {path.name for path in results.iterdir()} == {RUNS, TEXTS}
    assert read_records(results) == before
    assert list(read_records(results)) == sorted(before)
    assert {name: read_outputs(results, name) for name in TEXTS_OF} == texts
    assert read_record(results, "rates/e2e.lora.rate0.001") == before["rates/e2e.lora.rate0.001"]
    assert read_record(results, "main/none") is None


def test_a_line_of_each_file_is_a_run(results):
    collect.collect(results)
    lines = (results / RUNS).read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["name"] for line in lines] == sorted(read_records(results))
    packed = lzma.decompress((results / TEXTS).read_bytes()).decode()
    assert [json.loads(line)["name"] for line in packed.split("\n")[:-1]] == sorted(TEXTS_OF)


def test_the_same_runs_give_the_same_bytes(results):
    collect.collect(results)
    before = [(results / name).read_bytes() for name in (RUNS, TEXTS)]
    texts, stored = stored_texts(results), read_records(results)
    store(results, dict(reversed(stored.items())), dict(reversed(texts.items())))
    assert [(results / name).read_bytes() for name in (RUNS, TEXTS)] == before


def test_a_run_of_its_own_comes_before_a_stored_one(results):
    name = "main/e2e.lora.seed0"
    collect.collect(results)
    write_record(results, name, record("interrupted"))
    assert read_record(results, name) == read_records(results)[name] == record("interrupted")
    with pytest.raises(InputError, match=r"seed0: its texts are missing\. Take its line out of runs\.jsonl"):
        read_outputs(results, name)  # not those of the run before
    collect.collect(results)
    assert read_records(results)[name] == record("interrupted")
    assert set(stored_texts(results)) == {"main/dart.lora.seed0"}
    write_outputs(results, name, ["new"])
    write_record(results, name, record())
    collect.collect(results)
    assert read_outputs(results, name) == ["new"]
    assert read_outputs(results, "main/dart.lora.seed0") == ["the café", "", "a b"]


@pytest.mark.parametrize("change", ["running", "no texts"])
def test_what_cannot_be_collected_changes_nothing(results, change, capsys):
    name = "main/e2e.lora.seed0"
    if change == "running":
        write_record(results, name, record("running"))
    else:
        outputs_file(results, name).unlink()
    assert collect.main(["--results", str(results)]) == 2
    assert name in capsys.readouterr().err
    assert not (results / RUNS).exists()
    assert record_file(results, name).exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (RUNS, b'{"name": "main/x", "status": "finished"}\n{"status"', "line 2 of '.*runs.jsonl' is no record"),
        (RUNS, b"{}\n", "line 1 of '.*runs.jsonl' is no record"),
        (TEXTS, b"no such file", "'.*texts.jsonl.xz' holds no texts of runs"),
        (TEXTS, lzma.compress(b"[]\n"), "'.*texts.jsonl.xz' holds no texts of runs"),
    ],
)
def test_a_stored_file_that_is_none_is_named(results, name, content, message):
    collect.collect(results)
    (results / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_records(results) if name == RUNS else read_outputs(results, "main/e2e.lora.seed0")


def test_a_stored_run_is_not_run_again(tmp_path, monkeypatch):
    """Runs of a whole budget, made up as they are asked for; once collected, the same command starts none."""
    started = []

    def start(run, options, device):
        started.append(run.name)
        write_record(options.results, run.name, record(stage=run.stage, metrics={"validation_loss": run.rate}))
        write_outputs(options.results, run.name, ["a text"])
        return run_all.Active(run, subprocess.Popen(["true"]), tmp_path / "log", (tmp_path / "log").open("wb"), device)

    monkeypatch.setattr(run_all, "start", start)
    monkeypatch.setattr(run_all, "LOOK_EVERY", 0.01)
    options = run_all.parse_arguments(["DATA", "--budget", "trial", "--results", str(tmp_path / "results")])
    options.workers = 2
    assert run_all.run_all(plan.BUDGETS["trial"], options) == 0
    first = set(started)
    assert first == set(read_records(options.results))
    collect.collect(options.results)
    started.clear()
    assert run_all.run_all(plan.BUDGETS["trial"], options) == 0
    assert not started
    path = options.results / RUNS
    lines = path.read_text(encoding="utf-8").splitlines()
    (out,) = [line for line in lines if json.loads(line)["name"].startswith("main/e2e.prompt-tuning")]
    path.write_text("".join(f"{line}\n" for line in lines if line != out), encoding="utf-8")
    assert run_all.run_all(plan.BUDGETS["trial"], options) == 0
    assert started == [json.loads(out)["name"]]  # whose line was taken out


@pytest.mark.parametrize("budget", ["small", "h100"])
def test_the_repository_has_no_file_of_a_single_run(budget):
    folder = records.RESULTS / budget
    kept = {path.name for path in folder.iterdir()} - {records.OWN, "report.html"}  # which git ignores
    assert kept == {RUNS, TEXTS, "report.md", "figures", "significance.json"}
    assert set(stored_texts(folder)) == {name for name, run in read_records(folder).items() if records.has_texts(run)}
