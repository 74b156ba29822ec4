"""`peft-input-tuning compare`: what it reads of runs, and what it shows in a terminal and as a page."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from parsed_page import Page
from peft_input_tuning import InputTuningConfig
from peft_input_tuning.command_line.main import main
from peft_input_tuning.run_comparison import plot, read_runs
from peft_input_tuning.run_comparison.read import best, differing_settings, scale

PACKAGE = Path(__file__).parents[1] / "peft_input_tuning"
HOSTILE = "<script>alert(1)</script> [bold]x[/bold]"


def write_run(folder: Path, losses: list[float], bleu: float | None = None, **options) -> Path:
    """As train.py leaves one: a training loss each step, a validation loss every second one."""
    folder.mkdir(parents=True)
    curve: list[dict] = [{"loss": loss, "step": step, "learning_rate": 1e-3} for step, loss in enumerate(losses, 1)]
    curve += [{"eval_loss": loss + 0.5, "step": step} for step, loss in enumerate(losses, 1) if step % 2 == 0]
    results = {"steps": len(losses), "validation_loss": losses[-1] + 0.5, "train_seconds": 12.5}
    results |= {} if bleu is None else {"bleu": bleu}
    options = {"method": "input-tuning", "num_virtual_tokens": 20, "adapter_hidden_dim": None} | options
    arguments = {"learning_rate": 3e-3, "output_dir": str(folder), "bf16": False}
    report = {"options": options, "arguments": arguments, "results": results, "curve": curve}
    (folder / "results.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    first = write_run(tmp_path / "a", [3.0, 2.0, 1.5, 1.0], bleu=40.0)
    second = write_run(tmp_path / "b", [3.0, 2.5, 2.4, 2.0], method="lora", lora_rank=8)
    return [first, second]


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_a_run_of_train_py(runs):
    first, second = read_runs(runs)
    assert (first.name, second.name) == ("a", "b")
    assert first.figures == {"steps": 4, "validation_loss": 1.5, "train_seconds": 12.5, "bleu": 40.0}
    assert first.training == ((1, 3.0), (2, 2.0), (3, 1.5), (4, 1.0))
    assert first.validation == ((2, 2.5), (4, 1.5))
    assert first.settings == {
        "learning_rate": "0.003",
        "bf16": "false",
        "method": "input-tuning",
        "num_virtual_tokens": "20",
    }


def test_only_settings_that_differ_are_shown(runs):
    assert differing_settings(read_runs(runs)) == {"method": ["input-tuning", "lora"], "lora_rank": [None, "8"]}


def test_which_value_is_the_best(runs):
    both = read_runs(runs)
    assert best("validation_loss", both) == {0}
    assert best("train_seconds", both) == set()  # nobody says whether that is good
    third = read_runs([write_run(runs[0].parent / "c", [1.0, 1.0], bleu=41.0)])
    assert best("bleu", [*both, *third]) == {2}
    assert best("steps", both) == set()


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """What a stock Trainer leaves: checkpoints only."""
    folder = tmp_path_factory.mktemp("trainer") / "stock"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    rows = [{"input_ids": [3, 4, 5, n], "labels": [3, 4, 5, n]} for n in range(6, 14)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=10,
        save_steps=2,
        save_total_limit=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=5,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows).train()
    return folder


def test_a_run_of_any_trainer(trained):
    """Its state is that of the last checkpoint: 10 comes after 8, not before it."""
    (run,) = read_runs([trained])
    state = json.loads((trained / "checkpoint-10" / "trainer_state.json").read_text())
    losses = [log["eval_loss"] for log in state["log_history"] if "eval_loss" in log]
    assert [step for step, _ in run.training] == [2, 4, 6, 8, 10]
    assert run.validation == ((5, losses[0]), (10, losses[1]))
    assert run.figures["steps"] == 10
    assert run.figures["eval_loss"] == losses[1]
    assert run.figures["lowest eval_loss"] == min(losses)
    assert run.settings["train_batch_size"] == "2"
    assert float(run.settings["highest learning_rate"]) == pytest.approx(0.01, rel=0.2)


def test_runs_of_two_kinds_are_compared_by_what_both_record(runs, trained):
    assert differing_settings(read_runs([runs[0], trained])) == {"num_virtual_tokens": ["20", "2"]}
    assert "lora_rank" in differing_settings(read_runs(runs))


def test_the_adapters_settings_stand_beside_the_state(trained):
    (run,) = read_runs([trained])
    assert run.settings["num_virtual_tokens"] == "2"


def test_the_state_of_the_folder_comes_before_that_of_a_checkpoint(trained, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    for place, step in ((folder / "checkpoint-2", 2), (folder, 7)):
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    (run,) = read_runs([folder])
    assert run.figures == {"steps": 7}
    assert scale([run]) is None


def test_names_are_as_long_as_it_takes(tmp_path):
    folders = [write_run(tmp_path / place / "run", [1.0, 1.0]) for place in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: [runs[0]], "RUN: one run was given. Name two or more."),
        (lambda runs: [runs[0], runs[0].parent / "none"], "RUN: there is no folder '"),
        (lambda runs: [runs[0], runs[0]], "is given twice. Name each run once."),
        (lambda runs: [runs[0], runs[0].parent], "has no results.json (of train.py), and no trainer_state.json"),
        (lambda runs: (runs[1] / "results.json").write_text('{"resu') and runs, "results.json' cannot be read ("),
        (lambda runs: (runs[1] / "results.json").write_text("[1]") and runs, "results.json' holds no object."),
        (
            lambda runs: (runs[1] / "results.json").write_text('{"results": []}') and runs,
            "under 'results', not an object",
        ),
        (
            lambda runs: (runs[1] / "results.json").write_text('{"curve": 5}') and runs,
            "under 'curve', not a list of obj",
        ),
        (lambda runs: (runs[1] / "results.json").write_text('{"options": null}') and runs, "has None under 'options'"),
        (lambda runs: [*runs, "--html", runs[0]], "--html: "),
    ],
    ids=["one", "no folder", "twice", "no run", "broken", "a list", "results", "curve", "options", "page"],
)
def test_refusals(runs, change, message, capsys):
    assert main(["compare", *map(str, change(runs))]) == 2
    said = capsys.readouterr().err
    assert said.startswith("peft-input-tuning compare: ")
    assert message in said


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_the_terminal_has_tables_and_curves(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") == 4}
    assert [cell.strip() for cell in lines["bleu"].split("│")[2:4]] == ["40", "–"]
    assert [cell.strip() for cell in lines["method"].split("│")[2:4]] == ["input-tuning", "lora"]
    assert "learning_rate" not in out
    assert "1 to 3, 4 steps" in out
    assert any("\u2800" < character < "\u28ff" for character in out)


def test_a_name_is_no_markup(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folders = [write_run(tmp_path / name, [1.0, 0.5], method=HOSTILE.replace("/", "")) for name in ("[red]a", "b")]
    write_run(tmp_path / "c", [1.0, 0.5])
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, folders), str(tmp_path / "c"), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "[red]a" in out
    assert "[bold]x" in out
    assert "<script" not in page.read_text()


def test_the_page(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--html", str(page)]) == 0
    assert f"Wrote {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "<td>bleu</td><td>40</td><td>–</td>" in text
    assert "<td>validation_loss</td><td><b>1.5</b></td><td>2.5</td>" in text
    assert text.count("<svg") == 2
    assert text.count("<circle") == 2
    assert not {"script", "link", "img"} & set(Page(text).tags)
    assert "http" not in text


def test_a_curve_is_drawn_where_its_points_are():
    """A falling line of two points: from the dot at the top left to the one at the bottom right."""
    shared = (10.0, 0.0, 4.0)
    rows = plot.drawn([((0.0, 4.0), (10.0, 0.0))], shared, 5, 3)
    bits = [[0 if character == " " else ord(character) - 0x2800 for character, _ in row] for row in rows]
    assert bits[0][0] & 0x01
    assert bits[2][4] & 0x80
    assert bits[0][4] == bits[2][0] == 0
    assert sum(map(bool, [one for row in bits for one in row])) <= 7  # of 15
    alone = plot.drawn([((10.0, 4.0),)], shared, 5, 3)
    assert alone[0] == [*[(" ", -1)] * 4, ("\u2808", 0)]  # one dot, at the top right


def test_later_curves_are_drawn_over_earlier_ones():
    flat = ((0.0, 1.0), (10.0, 1.0))
    rows = plot.drawn([flat, flat], (10.0, 0.0, 1.0), 4, 2)
    assert {of for _, of in rows[0]} == {1}
    assert {of for _, of in rows[1]} == {-1}


def test_losses_that_are_no_numbers_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a", [1.0, math.nan, 0.5, math.inf])
    (run,) = read_runs([folder])
    assert run.training == ((1, 1.0), (3, 0.5))
    assert scale([run]) == (3, 0.5, 1.0)


def test_it_answers_without_torch(runs, tmp_path):
    """In a process in which torch, transformers and PEFT cannot be imported."""
    for name in ("torch", "transformers", "peft"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    page = tmp_path / "page.html"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}
    command = [sys.executable, "-m", "peft_input_tuning", "compare", *map(str, runs), "--html", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "validation_loss" in done.stdout
    assert page.is_file()
