"""The benchmark's report: its arithmetic against values by hand and naive loops, its files from made-up runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
from operator import sub
from pathlib import Path
from statistics import fmean, stdev, variance
from types import SimpleNamespace

import numpy
import pytest
import sacrebleu

from parsed_page import Page

BENCHMARK = Path(__file__).parent.parent / "examples" / "benchmark"
HOSTILE = "<script>alert(1)</script> | `x` [a](https://example.com)"
BITS = {"e2e": 1.5, "overnight": 2.0, "dart": 3.0}
# Share of the words that a made-up run gets right, by task.
SKILL = {
    "prompt-tuning": {"e2e": 0.80, "overnight": 0.70, "dart": 0.55},
    "input-tuning": {"e2e": 0.85, "overnight": 0.85, "dart": 0.80},
    "fine-tuning": {"e2e": 0.88, "overnight": 0.92, "dart": 0.93},
}
WORDS = [f"w{number}" for number in range(40)]
ROWS = {"train": 4, "validation": 2, "test": 24}
SEEDS = (0, 1)


# ---- made-up data and runs ------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    draw = random.Random(0)
    for task in BITS:
        (folder / task).mkdir(parents=True)
        for split, rows in (("train", 4), ("validation", 2), ("test", 30)):
            lines = []
            for row in range(rows):
                texts = [" ".join(draw.choices(WORDS, k=draw.randint(6, 10))) for _ in range(draw.randint(1, 2))]
                lines.append(json.dumps({"source": f"{task} {split} {row}", "references": texts}) + "\n")
            (folder / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def bleu(texts: list[str], references: list[list[str]]) -> float:
    streams = [[row[n] if n < len(row) else None for row in references] for n in range(max(map(len, references)))]
    return sacrebleu.corpus_bleu(texts, streams, lowercase=True).score


def started(task: str, method: str, seed: int = 0, **changes) -> dict:
    record = {"stage": "main", "task": task, "method": method, "seed": seed, "rate": 0.001, "steps": 200}
    record |= {
        "budget": "small",
        "status": "running",
        "attempts": 1,
        "errors": [],
        "machine": "a machine, 1 of 2 cores",
    }
    return record | {"versions": {"python": "3.11.7", "torch": "2.13.0"}, "data_hash": {}} | changes


def ended(task: str, method: str, seed: int, scores: dict, texts: list[str] = (), **changes) -> dict:
    peft = None if method == "fine-tuning" else {"num_virtual_tokens": 20}
    if method == "prompt-tuning":
        peft["token_dim"] = 576
    config = {"model": "a-model.Q4", "dtype": "bfloat16", "peft": peft, "learning_rate": 0.001, "steps": 200}
    return started(task, method, seed) | {
        "status": "finished",
        "config": config | {"batch_size": 8, "rows": ROWS},
        "metrics": {"validation_loss": 2.0 - scores["bleu"] / 100, **scores},
        "seconds": {"training": 61.0, "generation": 30.0},
        "peak_memory_mb": 3000,
        "trainable_parameters": 1_338_624,
        "curve": {"train": [[1, 3.0]], "validation": [[100, 2.5], [200, 2.0 - scores["bleu"] / 100]]},
        "samples": [{"row": row, "output": text} for row, text in enumerate(texts[:20])],
        **changes,
    }


def write_run(results: Path, data: Path, task: str, method: str, seed: int, skill: float) -> None:
    from records import write_outputs, write_record
    from tasks import read_task

    read = read_task(data, task, ROWS)
    references = [list(row.references) for row in read.rows["test"]]
    draw = random.Random(f"{task} {method} {seed}")
    texts = [
        " ".join(word if draw.random() < skill else draw.choice(WORDS) for word in row[0].split())
        for row in references
    ]
    texts[0] = HOSTILE
    scores = {"bleu": bleu(texts, references), "chrf": 50.0 + seed, "ter": 40.0}
    name = f"main/{task}.{method}.seed{seed}"
    write_outputs(results, name, texts)
    write_record(results, name, ended(task, method, seed, scores, texts, data_hash=read.data_hash))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """Data, records and the report on them; tests that change something take a `copy`."""
    import report
    from records import write_record

    folder = tmp_path_factory.mktemp("benchmark")
    data, results = folder / "data", folder / "results"
    write_data(data)
    for method, skills in SKILL.items():
        for task, skill in skills.items():
            for seed in SEEDS:
                write_run(results, data, task, method, seed, skill)
    write_run(results, data, "e2e", "lora", 0, 0.9)
    write_run(results, data, "e2e", "input-tuning-gelu", 0, 0.85)
    for name, changes in {
        "main/e2e.lora.seed1": {"status": "failed", "errors": [f"OSError: '/srv/someone/x.bin' {HOSTILE}"]},
        "main/dart.lora.seed0": {"status": "diverged", "errors": ["TrainingError: loss is nan"]},
        "main/dart.lora.seed1": {"status": "interrupted", "attempts": 2},
        "main/overnight.lora.seed0": {},
    }.items():
        task, method, seed = name.removeprefix("main/").split(".")
        write_record(results, name, started(task, method, int(seed[-1]), **changes))
    for rate, loss in ((0.0003, 1.9), (0.001, 1.5), (0.003, 1.7), (0.01, None)):
        for task in ("e2e", "overnight"):
            run = started(task, "input-tuning", stage="rates", rate=rate, steps=60)
            if loss is None:
                run |= {"status": "diverged"}
            else:
                run = ended(task, "input-tuning", 0, {"bleu": 0.0}) | {"stage": "rates", "rate": rate, "steps": 60}
                run["metrics"] = {"validation_loss": loss}
            write_record(results, f"rates/{task}.input-tuning.rate{rate:g}", run)
    measured = {"model": "a-model.Q4.gguf", "limit": 300, "seed": 0}
    familiarity = folder / "familiarity.json"
    familiarity.write_text(json.dumps(measured | {task: {"bits_per_byte": bits} for task, bits in BITS.items()}))
    options = ["--results", str(results), "--familiarity", str(familiarity)]
    assert report.main([str(data), *options, "--samples", "200"]) == 0
    return SimpleNamespace(data=data, results=results, familiarity=familiarity, options=options)


@pytest.fixture
def copy(made, tmp_path) -> SimpleNamespace:
    shutil.copytree(made.data, tmp_path / "data")
    shutil.copytree(made.results, tmp_path / "results")
    options = ["--results", str(tmp_path / "results"), "--familiarity", str(made.familiarity)]
    return SimpleNamespace(data=tmp_path / "data", results=tmp_path / "results", options=options)


def some(values: dict[tuple[str, str], list[float]]) -> dict[str, dict]:
    """Records in memory with these BLEU scores, one a seed."""
    return {
        f"main/{task}.{method}.seed{seed}": ended(task, method, seed, {"bleu": value})
        for (task, method), found in values.items()
        for seed, value in enumerate(found)
    }


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_means_and_spreads_are_those_by_hand():
    from comparisons import Mean, means

    records = some({("e2e", "lora"): [10.0, 12.0, 17.0], ("e2e", "fine-tuning"): [30.0]})
    records["main/e2e.lora.seed3"] = started("e2e", "lora", 3)
    records["rates/e2e.lora.rate1"] = ended("e2e", "lora", 0, {"bleu": 99.0}) | {"stage": "rates"}
    found = means(records, "bleu")
    assert found["e2e", "lora"] == Mean(13.0, pytest.approx(math.sqrt((9 + 1 + 16) / 2)), 3)
    assert found["e2e", "fine-tuning"] == Mean(30.0, None, 1)
    assert means(records, "no-metric") == {}


def test_figures_say_of_how_many_seeds_they_are_where_some_are_missing():
    from comparisons import Mean
    from findings import Findings
    from plan import BUDGETS

    found = Findings(BUDGETS["full"], some({("e2e", "lora"): [1.0, 2.0, 3.0]}), {}, None, None, 0, ())
    of = {seeds: Mean(2.0, None if seeds == 1 else 0.5, seeds) for seeds in (1, 2, 3)}
    shown = [found.shown(of.get(seeds), ".1f") for seeds in (0, 1, 2, 3)]
    assert shown == ["–", "2.0", "2.0 ± 0.5 (2 of 3 seeds)", "2.0 ± 0.5"]


def test_the_gap_by_hand():
    from comparisons import gain, gap_closed, means, relative

    scores = {("e2e", "prompt-tuning"): [20.0], ("e2e", "input-tuning"): [29.0], ("e2e", "fine-tuning"): [30.0, 34.0]}
    scores |= {("dart", "prompt-tuning"): [20.0], ("dart", "input-tuning"): [25.0], ("dart", "fine-tuning"): [20.0]}
    found = means(some(scores), "bleu")
    assert gap_closed(found, "e2e", "input-tuning") == pytest.approx(75.0)
    assert gap_closed(found, "e2e", "fine-tuning") == pytest.approx(100.0)
    assert gap_closed(found, "dart", "input-tuning") is None  # no gap
    assert gap_closed(found, "e2e", "lora") is None
    assert relative(found, "e2e", "prompt-tuning") == pytest.approx(62.5)
    assert relative(found, "webnlg", "prompt-tuning") is None
    assert gain(found, "e2e") == pytest.approx(9.0)
    assert gain(found, "webnlg") is None


def test_the_line_is_numpys():
    from comparisons import means, regression

    bits = {"e2e": 1.5, "overnight": 2.0, "dart": 2.4, "webnlg": 3.9, "unmeasured": 1.0}
    shares = {"e2e": 95.0, "overnight": 90.0, "dart": 91.0, "webnlg": 70.0}
    scores = {(task, "fine-tuning"): [50.0] for task in shares}
    scores |= {(task, "prompt-tuning"): [share / 2] for task, share in shares.items()}
    found = regression(means(some(scores), "bleu"), bits)
    slope, intercept = numpy.polyfit([bits[task] for task in shares], [100 - s for s in shares.values()], 1)
    assert (found.slope, found.intercept) == (pytest.approx(slope), pytest.approx(intercept))
    covariance = numpy.polyfit([bits[task] for task in shares], [100 - s for s in shares.values()], 1, cov=True)[1]
    assert found.slope_error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert (found.tasks, found.lowest, found.highest) == (4, 1.5, 3.9)
    del scores["e2e", "fine-tuning"], scores["dart", "prompt-tuning"]
    assert regression(means(some(scores), "bleu"), bits) is None


@pytest.mark.parametrize(
    ("xs", "ys", "rho", "p_value"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0, 2 / 24),
        ([1, 2, 3], [3, 2, 1], -1.0, 2 / 6),
        # Ranks 1 2.5 2.5 4 and 1 2 3 4: 4.5 / sqrt(4.5 * 5). Orders whose sum is as large: those with 1 and 4 at the
        # ends, either way round.
        ([1, 5, 5, 9], [0, 1, 7, 8], math.sqrt(0.9), 4 / 24),
        # d = 0 1 1 0 0 : 1 - 6 * 2 / (5 * 24).
        ([1, 2, 3, 4, 5], [1, 3, 2, 4, 5], 0.9, None),
    ],
    ids=["same order", "reversed", "ties", "one swap"],
)
def test_rank_correlation_by_hand(xs, ys, rho, p_value):
    from comparisons import rank_correlation

    found = rank_correlation(xs, ys)
    assert found.rho == pytest.approx(rho)
    assert found.number == len(xs)
    if p_value is not None:
        assert found.p_value == pytest.approx(p_value)


def test_no_rank_correlation():
    from comparisons import rank_correlation

    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation(list(range(9)), list(range(9))).p_value is None  # 9! orders


# ---- the bootstrap --------------------------------------------------------------------------------------------------


@pytest.fixture
def references() -> list[list[str]]:
    draw = random.Random(1)
    return [
        [" ".join(draw.choices(WORDS, k=draw.randint(6, 9))) for _ in range(draw.randint(1, 3))] for _ in range(20)
    ]


def spoiled(references: list[list[str]], skill: float, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(w if draw.random() < skill else "x" for w in texts[0].split()).upper() for texts in references]


@pytest.mark.parametrize("skills", [(0.9, 0.9), (0.9, 0.85), (0.7, 0.8)], ids=str)
def test_the_bootstrap_is_the_naive_loop(references, skills):
    """Whole corpora scored anew in each draw; the p-value as bootstrap.py writes it down."""
    from bootstrap import SEED, paired_bootstrap

    ours, theirs = (spoiled(references, skill, seed) for seed, skill in enumerate(skills))
    draws = numpy.random.default_rng(SEED).choice(len(references), size=(80, len(references)))
    differences = []
    for rows in draws:
        drawn = [references[row] for row in rows]
        differences.append(bleu([ours[row] for row in rows], drawn) - bleu([theirs[row] for row in rows], drawn))
    mean = sum(map(abs, differences)) / 80
    observed = abs(bleu(ours, references) - bleu(theirs, references))
    expected = (1 + sum(abs(one) - mean > observed for one in differences)) / 81
    found = paired_bootstrap(ours, theirs, references, samples=80)
    assert found.bleu == pytest.approx(bleu(ours, references))
    assert found.baseline_bleu == pytest.approx(bleu(theirs, references))
    assert found.p_value == pytest.approx(expected)


def test_equal_texts_do_not_differ(references):
    from bootstrap import paired_bootstrap

    texts = spoiled(references, 0.8, 0)
    assert paired_bootstrap(texts, texts, references, samples=50).p_value == 1.0


def test_perfect_texts_against_garbage(references):
    from bootstrap import LEVEL, paired_bootstrap

    perfect, garbage = [texts[0] for texts in references], ["x y z x y"] * len(references)
    found = paired_bootstrap(perfect, garbage, references, samples=200)
    assert found.bleu == pytest.approx(100.0)
    assert found.baseline_bleu < 5
    assert found.p_value < LEVEL
    turned = paired_bootstrap(garbage, perfect, references, samples=200)
    assert (turned.bleu, turned.baseline_bleu, turned.p_value) == (found.baseline_bleu, found.bleu, found.p_value)


@pytest.mark.parametrize("seed", ["7", "none", None])
def test_the_seed_is_fixed_whatever_the_environment_says(references, monkeypatch, seed):
    from bootstrap import paired_bootstrap

    texts = [spoiled(references, skill, n) for n, skill in enumerate((0.8, 0.75))]
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    expected = paired_bootstrap(*texts, references, samples=60)
    monkeypatch.delenv("SACREBLEU_SEED") if seed is None else monkeypatch.setenv("SACREBLEU_SEED", seed)
    assert paired_bootstrap(*texts, references, samples=60) == expected
    assert os.environ.get("SACREBLEU_SEED") == seed


# ---- what is stored of it -------------------------------------------------------------------------------------------


def stored(results: Path) -> dict:
    return json.loads((results / "significance.json").read_text(encoding="utf-8"))


def test_each_seed_and_all_together_are_compared(made):
    from records import outputs_file, read_outputs
    from tasks import read_task

    found = {
        (c["task"], c["method"], c["baseline"], tuple(c["seeds"])): c for c in stored(made.results)["comparisons"]
    }
    for task in BITS:
        for baseline in ("prompt-tuning", "fine-tuning"):
            assert {(0,), (1,), (0, 1)} == {k[3] for k in found if k[:3] == (task, "input-tuning", baseline)}
    assert [k for k in found if k[1] == "lora"] == [("e2e", "lora", "input-tuning", (0,))]  # its seed 1 failed
    both = found["dart", "input-tuning", "prompt-tuning", (0, 1)]
    assert both["rows"] == 2 * ROWS["test"]
    names = [f"main/dart.input-tuning.seed{seed}" for seed in SEEDS]
    texts = [text for name in names for text in read_outputs(made.results, name)]
    rows = [list(row.references) for row in read_task(made.data, "dart", ROWS).rows["test"]]
    assert both["bleu"] == pytest.approx(bleu(texts, rows + rows))
    outputs = outputs_file(made.results, names[0])
    assert both["runs"][names[0]]["outputs"] == hashlib.sha256(outputs.read_bytes()).hexdigest()
    assert stored(made.results)["samples"] == 200


def test_runs_on_fewer_rows_are_compared_among_themselves(copy):
    """Not with main runs, and beside them in the table."""
    import report
    from records import read_outputs, read_record, write_outputs, write_record
    from tasks import read_task

    names = {}
    for method, rows in (("input-tuning", 50), ("fine-tuning", 50), ("prompt-tuning", 500)):
        names[method] = f"amounts/e2e.{method}.rows{rows}.seed0"
        run = read_record(copy.results, f"main/e2e.{method}.seed0") | {"stage": "amounts", "rows": rows}
        write_outputs(copy.results, names[method], read_outputs(copy.results, f"main/e2e.{method}.seed0"))
        write_record(copy.results, names[method], run)
    before = stored(copy.results)["comparisons"]
    assert report.main(copy.options) == 0
    new = "e2e, 50 training rows: input-tuning against fine-tuning, seed 0: not compared yet."
    assert (copy.results / "report.md").read_text(encoding="utf-8").count("not compared yet.") == 1
    assert new in (copy.results / "report.md").read_text(encoding="utf-8")
    assert report.main([str(copy.data), *copy.options, "--samples", "200"]) == 0
    found = stored(copy.results)["comparisons"]
    assert found[:-1] == before
    assert [found[-1][key] for key in ("task", "training_rows", "method", "baseline", "seeds")] == [
        "e2e", 50, "input-tuning", "fine-tuning", [0],
    ]  # fmt: skip
    assert set(found[-1]["runs"]) == {names["input-tuning"], names["fine-tuning"]}
    references = [list(row.references) for row in read_task(copy.data, "e2e", ROWS).rows["test"]]
    assert found[-1]["bleu"] == pytest.approx(bleu(read_outputs(copy.results, names["input-tuning"]), references))
    row = row_of(
        (copy.results / "report.md").read_text(encoding="utf-8"), "Differences in BLEU", "e2e, 50 training rows"
    )
    assert row[1:4] == ["input-tuning", "fine-tuning", "0"]
    assert report.summary(report.gather(report.parse_arguments(copy.options))) == report.summary(
        report.gather(report.parse_arguments([str(copy.data), *copy.options, "--samples", "200"]))
    )


def test_without_data_the_stored_comparisons_are_shown(copy):
    import report

    before = {path.name: path.read_bytes() for path in copy.results.iterdir() if path.is_file()}
    shutil.rmtree(copy.data)
    assert report.main(copy.options) == 0
    assert {path.name: path.read_bytes() for path in copy.results.iterdir() if path.is_file()} == before


def test_stale_comparisons_are_left_out_with_a_word(copy, capsys):
    import report
    from records import write_outputs

    name = "main/dart.input-tuning.seed1"
    write_outputs(copy.results, name, ["other"] * ROWS["test"])
    assert report.main(copy.options) == 0
    text = (copy.results / "report.md").read_text(encoding="utf-8")
    for seeds in ("seed 1", "seeds 0, 1"):
        assert f"dart: input-tuning against prompt-tuning, {seeds}: {name} changed since." in text
    assert f"{name} changed since" in capsys.readouterr().err
    section = text.partition("## Differences in BLEU")[2].partition("\n## ")[0]
    rows = [re.split(r" ?\| ?", line)[1:5] for line in section.splitlines() if line.startswith("| dart")]
    assert rows == [["dart", "input-tuning", baseline, "0"] for baseline in ("prompt-tuning", "fine-tuning")]


@pytest.mark.parametrize("change", ["nothing", "attempts", "status", "data_hash", "config", "no outputs", "no record"])
def test_what_makes_a_comparison_stale(copy, change):
    from records import outputs_file, read_records
    from significance import load, still_true

    name = "main/dart.input-tuning.seed1"
    records = read_records(copy.results)
    changes = {
        "attempts": {"attempts": 2},
        "status": {"status": "running"},
        "data_hash": {"data_hash": {"test": "0"}},
        "config": {"config": {"rows": {"test": 9}}},
    }
    records[name] |= changes.get(change, {})
    if change == "no outputs":
        outputs_file(copy.results, name).unlink()
    if change == "no record":
        del records[name]
    comparisons, draws = load(copy.results / "significance.json")
    kept, words = still_true(comparisons, records, copy.results)
    assert draws == 200
    assert {one.task for one in comparisons if one not in kept} == (set() if change == "nothing" else {"dart"})
    assert len(words) == len(comparisons) - len(kept) == (0 if change == "nothing" else 4)


def test_what_was_not_compared_is_named(made):
    from records import read_records
    from significance import load, still_true

    comparisons, _ = load(made.results / "significance.json")
    some = [one for one in comparisons if (one.task, one.baseline) != ("dart", "fine-tuning") and one.method != "lora"]
    kept, words = still_true(some, read_records(made.results), made.results)
    assert kept == some
    assert words == [
        "e2e: lora against input-tuning, seed 0: not compared yet.",
        *(f"dart: input-tuning against fine-tuning, seed {seed}: not compared yet." for seed in SEEDS),
    ]


def test_without_data_or_stored_comparisons_or_three_tasks(copy):
    import report

    (copy.results / "significance.json").unlink()
    for seed in SEEDS:
        (copy.results / "runs" / "main" / f"dart.fine-tuning.seed{seed}.json").unlink()
    assert report.main(copy.options) == 0
    text = (copy.results / "report.md").read_text(encoding="utf-8")
    assert "Not computed: call report.py with DATA." in text
    assert "Fewer than three tasks have both" in text
    assert row_of(text, "Familiarity", "dart")[2:4] == ["–", "–"]
    assert row_of(text, "BLEU", "fine-tuning")[3] == "–"


def test_a_single_run_of_one_seed(copy, capsys):
    """What is not there is a dash, or a sentence that says so; no figure is drawn of nothing."""
    import report

    shutil.rmtree(copy.results / "runs" / "rates")
    shutil.rmtree(copy.results / "figures")
    for path in (copy.results / "runs" / "main").glob("*.json"):
        if path.stem != "dart.input-tuning.seed1":
            path.unlink()
    assert report.main([str(copy.data), *copy.options]) == 0
    text = (copy.results / "report.md").read_text(encoding="utf-8")
    score = json.loads((copy.results / "runs" / "main" / "dart.input-tuning.seed1.json").read_text())["metrics"][
        "bleu"
    ]
    assert "One seed." in text
    assert row_of(text, "BLEU", "input-tuning") == ["input-tuning", f"{score:.1f}"]
    assert row_of(text, "BLEU", "fine-tuning") == ["fine-tuning", "–"]
    assert row_of(text, "Share of the gap between prompt-tuning and fine-tuning", "dart") == ["dart", "–"]
    assert row_of(text, "Familiarity", "dart") == ["dart", "3.00", "–", "–", "–"]
    assert {path.name for path in (copy.results / "figures").iterdir()} == {"curves.svg"}
    assert stored(copy.results)["comparisons"] == []
    capsys.readouterr()
    assert report.main([*copy.options, "--summary"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"| dart | – | {score:.1f} | – | – | – | – |"


# ---- refusals -------------------------------------------------------------------------------------------------------


def other_data(copy) -> None:
    path = copy.data / "dart" / "test.jsonl"
    path.write_text(path.read_text().replace("w1 ", "w2 "))


def missing_task(copy) -> None:
    (copy.data / "dart" / "test.jsonl").unlink()


def one_output_less(copy) -> None:
    path = copy.results / "runs" / "main" / "dart.input-tuning.seed0.txt"
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")


def other_outputs(copy) -> None:
    path = copy.results / "runs" / "main" / "dart.input-tuning.seed0.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")


def no_outputs(copy) -> None:
    (copy.results / "runs" / "main" / "dart.input-tuning.seed0.txt").unlink()


def other_rows(copy) -> None:
    path = copy.results / "runs" / "main" / "dart.prompt-tuning.seed0"
    lines = path.with_suffix(".seed0.txt").read_text().splitlines()
    record = json.loads(path.with_suffix(".seed0.json").read_text())
    record["config"]["rows"] = ROWS | {"test": 30}
    rows = [json.loads(line)["references"] for line in (copy.data / "dart" / "test.jsonl").read_text().splitlines()]
    texts = [*lines, *["x"] * 6]
    record["metrics"]["bleu"] = bleu(texts, rows)
    path.with_suffix(".seed0.txt").write_text("\n".join(texts) + "\n")
    path.with_suffix(".seed0.json").write_text(json.dumps(record))


def nothing_finished(copy) -> None:
    shutil.rmtree(copy.results / "runs" / "main")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            other_data,
            [],
            r"DATA: dart/test.jsonl is not the file that main/dart\.\S+ was tested on .* Pass the data of the run\.",
        ),
        (missing_task, [], "DATA: there is no dart/test.jsonl"),
        (one_output_less, [], "main/dart.input-tuning.seed0: it has 23 outputs for 24 test rows. Take its line out"),
        (other_outputs, [], r"main/dart.input-tuning.seed0: its outputs have BLEU \d\.\d\d on DATA, its record says"),
        (no_outputs, [], "main/dart.input-tuning.seed0: its texts are missing. Take its line out"),
        (other_rows, [], "main/dart.input-tuning.seed0 and main/dart.prompt-tuning.seed0 were tested on different"),
        (
            nothing_finished,
            [],
            r"--results: no main run in '.*' has finished \(8 runs were started\). Call `run_all.py",
        ),
        (lambda copy: None, ["--budget", "full"], "--budget: '.*' has runs of the budget 'small', got 'full'. Name"),
        (lambda copy: None, ["--samples", "0"], "--samples must be >= 1, got 0"),
    ],
    ids=["data", "task", "fewer outputs", "outputs", "no outputs", "rows", "nothing finished", "budget", "samples"],
)
def test_refusals_write_nothing(copy, capsys, change, options, message):
    import report

    change(copy)
    before = {path: path.stat().st_mtime_ns for path in copy.results.rglob("*")}
    assert report.main([str(copy.data), *copy.options, "--samples", "20", *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert {path: path.stat().st_mtime_ns for path in copy.results.rglob("*")} == before


def test_a_broken_file_of_comparisons(copy, capsys):
    import report

    (copy.results / "significance.json").write_text("{}")
    assert report.main(copy.options) == 2
    assert (
        "significance.json holds no comparisons ('comparisons'). Remove it, or pass DATA." in capsys.readouterr().err
    )


# ---- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(made) -> str:
    return (made.results / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(made) -> str:
    return (made.results / "report.html").read_text(encoding="utf-8")


def row_of(text: str, heading: str, first: str) -> list[str]:
    """Cells of the first row that begins so, below a heading."""
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    line = next(line for line in section.splitlines() if line.startswith(f"| {first} |"))
    return line.strip("| ").split(" | ")


def test_every_started_run_is_named(made, text, html):
    names = [f"{path.parent.name}/{path.stem}" for path in (made.results / "runs").glob("*/*.json")]
    assert len(names) == 32
    for name in names:
        assert f"| {name} |" in text
        assert f"<td>{name}</td>" in html
    states = text.partition("## What was run")[2].partition("\n## ")[0]
    for status, number, of in (("failed", 1, "e2e.lora.seed1"), ("interrupted", 1, "dart.lora.seed1")):
        assert f"| {status} | {number} | main/{of} |" in states
    assert "| finished | 26 |" in states
    assert "| diverged | 3 | main/dart.lora.seed0, rates/e2e.input-tuning.rate0.01," in states
    assert "| running | 1 | main/overnight.lora.seed0 |" in states


def test_what_was_run(text):
    for cell in ("a-model.Q4", "a machine, 1 of 2 cores", "python 3.11.7, torch 2.13.0", "0, 1", "bfloat16"):
        assert f"| {cell} |" in text
    assert "main runs: 200 steps" in text
    assert row_of(text, "What was run", "dart")[1:4] == ["4", "2", "24"]


def test_the_tables_have_the_records_figures(made, text):
    scores = {}
    for method in SKILL:
        paths = [made.results / "runs" / "main" / f"dart.{method}.seed{seed}.json" for seed in SEEDS]
        scores[method] = [json.loads(path.read_text())["metrics"]["bleu"] for path in paths]
        first, second = scores[method]
        shown = f"{(first + second) / 2:.1f} ± {abs(first - second) / math.sqrt(2):.1f}"
        assert shown == row_of(text, "BLEU", method)[3]  # e2e, overnight, dart
        assert shown in row_of(text, "dart", method)
    low, ours, high = (sum(scores[method]) for method in ("prompt-tuning", "input-tuning", "fine-tuning"))
    gap = row_of(text, "Share of the gap between prompt-tuning and fine-tuning", "dart")
    assert gap == ["dart", f"{100 * (ours - low) / (high - low):.0f}", "–"]  # no LoRA on dart
    near = row_of(text, "Familiarity", "dart")
    assert near[1:] == ["3.00", f"{100 * low / high:.1f}", f"{100 * ours / high:.1f}", f"{(ours - low) / 2:+.1f}"]
    assert row_of(text, "BLEU", "lora")[2:] == ["–", "–"]
    assert re.fullmatch(r"\d+\.\d", row_of(text, "BLEU", "lora")[1])  # its seed 1 failed
    assert "Mean ± sample standard deviation over seeds; without ±, one." in text
    assert row_of(text, "dart", "input-tuning")[-4:] == ["1,338,624", "61", "30", "3,000"]


def test_a_line_that_cannot_be_fitted():
    from regression import FamiliarityRegression

    for values, losses in (([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0])):
        with pytest.raises(ValueError, match="`values` must be at least 3"):
            FamiliarityRegression.fit(values, losses)


def test_what_a_line_rests_on():
    from regression import FamiliarityRegression

    values = [2.0, 4.0, 7.0, 9.0, 12.0]
    assert FamiliarityRegression.fit(values, [2 * x for x in values]).unsupported is None
    few = FamiliarityRegression.fit(values[:4], [2 * x for x in values[:4]])
    assert few.unsupported == "it rests on 4 tasks, fewer than 5"
    loose = FamiliarityRegression.fit(values, [5.0, -5.0, 9.0, -9.0, 8.0])
    assert loose.unsupported == f"its slope, {loose.slope:.3g} ± {loose.slope_error:.2g}, is too uncertain"


def test_the_line_is_what_the_report_says(made, text):
    from comparisons import means, regression
    from records import read_records

    line = regression(means(read_records(made.results), "bleu"), BITS)
    assert line.tasks == 3
    said = f"= {line.intercept:.1f} + ({line.slope:.1f} ± {line.slope_error:.1f}) × bits per byte"
    assert f"prompt-tuning's loss in per cent of fine-tuning's BLEU {said}" in text
    assert "The line says nothing of other inputs: it rests on 3 tasks, fewer than 5." in text
    assert "exact two-sided p = 0.333" in text


def test_rates_and_their_choice(text):
    assert row_of(text, "Learning rates", "input-tuning") == [
        *("input-tuning", "e2e", "0.0003: 1.900, 0.001: 1.500, 0.003: 1.700, 0.01: diverged", "0.001")
    ]
    assert "| input-tuning | other tasks |  | 0.001 |" in text


def test_ablations_are_tabled_where_they_were_run(text):
    ablations = text.partition("\n## Ablations")[2].partition("\n## ")[0]
    assert re.findall("^### (.*)$", ablations, re.MULTILINE) == ["Activation"]
    assert re.findall("^(.*):$", ablations, re.MULTILINE) == ["e2e"]
    assert row_of(ablations, "Activation", "gelu")[1] == "input-tuning-gelu"


def test_less_and_more_training_stands_beside_the_main_runs(copy):
    """Two methods on 50 and 500 rows, and one on 5,000: means over seeds by hand, and which step was kept."""
    import report
    from amount_sections import _groups, _scores_over_rows
    from records import write_record

    def gathered(copy) -> object:
        return report.gather(report.parse_arguments(copy.options))

    def write(method: str, seed: int, score: float, rows: int, steps: int) -> None:
        run = ended("e2e", method, seed, {"bleu": score, "chrf": 40.0})
        run |= {"stage": "amounts", "rows": rows, "steps": steps, "step_kept": 50}
        run["config"] = run["config"] | {"rows": ROWS | {"train": rows}}
        write_record(copy.results, f"amounts/e2e.{method}.rows{rows}.seed{seed}", run)

    for rows, seed, score in ((50, 0, 10.0), (50, 1, 14.0), (500, 0, 31.0)):
        write("input-tuning", seed, score, rows, 200)
        write("lora", seed, score + 1, rows, 200)
    write("input-tuning", 0, 60.0, 5000, 625)
    write_record(copy.results, "amounts/dart.lora.rows50.seed0", started("dart", "lora", stage="amounts", rows=50))
    before = (copy.results / "report.md").read_text(encoding="utf-8")
    assert report.main(copy.options) == 0
    text = (copy.results / "report.md").read_text(encoding="utf-8")
    section = text.partition("\n## Less and more training\n")[2].partition("\n## ")[0]
    assert re.findall("^### (.*)$", section, re.MULTILINE) == ["e2e"]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert [row[:4] for row in table[:2]] == [["4", "200 (main run)", m, "200"] for m in ("input-tuning", "lora")]
    assert [row[:4] + row[5:] for row in table[2:]] == [
        ["50", "200", "input-tuning", "50", "12.0 ± 2.8", "40.0 ± 0.0"],
        ["50", "200", "lora", "50", "13.0 ± 2.8", "40.0 ± 0.0"],
        ["500", "200", "input-tuning", "50", "31.0", "40.0"],
        ["500", "200", "lora", "50", "32.0", "40.0"],
        ["5,000", "625", "input-tuning", "50", "60.0", "40.0"],
    ]
    svg = (copy.results / "figures" / "rows.svg").read_text(encoding="utf-8")
    ours = _scores_over_rows(_groups(gathered(copy), "e2e", {"input-tuning"}))["input-tuning"]
    assert [rows for rows, _ in ours] == [4, 50, 500, 5000]
    for words in (">4<", ">50<", ">500<", ">e2e<", ">lora<", "training rows"):
        assert words in svg
    assert "(figures/rows.svg)" in section
    assert "Less and more training" not in before

    def of_main_runs(report: str) -> list[str]:
        return [part for part in report.split("\n## ") if part.startswith(("BLEU", "Each task", "Familiarity", "Abl"))]

    assert of_main_runs(text) == of_main_runs(before)  # they have no part in the other tables


def test_2e_is_a_number_where_the_records_tell(made):
    from records import read_records
    from result_sections import _value

    main = read_records(made.results)
    found = SimpleNamespace(main={name: run for name, run in main.items() if run["status"] == "finished"})
    assert _value(found, "2e") == "2e = 1152"
    assert _value(found, "64") == "64"
    assert _value(SimpleNamespace(main={}), "2e") == "2e"


def test_the_ablations_are_methods():
    from methods import METHODS
    from plan import ABLATIONS
    from result_sections import ABLATION_GROUPS

    named = {method for values in ABLATION_GROUPS.values() for method in values}
    assert set(ABLATIONS) <= named <= set(METHODS)


def test_links_of_the_markdown_lead_to_files(made, text):
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", text.replace(r"\[", "["))
    links = [link for link in links if link != "https://example.com"]  # within a code span, see below
    assert links == [f"figures/{name}.svg" for name in ("relative", "curves", "gap", "rates")]
    for link in links:
        svg = (made.results / link).read_text(encoding="utf-8")
        assert svg.startswith("<svg ")
        assert svg.rstrip().endswith("</svg>")


def test_outputs_stay_code_in_the_markdown(text):
    line = next(line for line in text.splitlines() if line.startswith("| 0 | prompt-tuning |"))
    assert line == "| 0 | prompt-tuning | `` " + HOSTILE.replace("|", r"\|") + " `` |"
    assert "/srv/someone" not in text
    assert r"OSError: '…/x.bin' <script>" in text


def test_the_page_stands_alone(html):
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 4
    links = [value for key, value in page.attributes if key in ("src", "href", "xlink:href")]
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(set(ids)) == len(ids)
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert all(link.startswith("#") for link in links)
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert "@import" not in html
    assert HOSTILE in page.text
    assert "<?xml" not in html
    assert "<!DOCTYPE" not in html
    assert "<metadata" not in html


def test_figures_say_what_they_show(made):
    svg = {path.stem: path.read_text(encoding="utf-8") for path in (made.results / "figures").iterdir()}
    for words in ("not the paper&#x27;s", "e2e", "overnight", "dart", "prompt-tuning", "input-tuning", "per cent"):
        assert words in svg["relative"].replace("'", "&#x27;")
    assert "learning rate" in svg["rates"]
    for task in BITS:
        assert f">{task}<" in svg["curves"]


def test_a_method_has_one_colour(made):
    from figures import STYLES

    for name in ("curves", "gap", "relative", "rates"):
        assert STYLES["input-tuning"][0].lower() in (made.results / "figures" / f"{name}.svg").read_text().lower()
    assert len(set(STYLES.values())) == len(STYLES)


def test_the_same_records_give_the_same_bytes(copy):
    import report

    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in copy.results.rglob("*") if path.is_file()}

    before = everything()
    assert report.main([str(copy.data), *copy.options, "--samples", "200"]) == 0
    assert everything() == before


@pytest.mark.parametrize("content", [None, '{"e2e": {', '{"model": "m", "e2e": {}}', "[]"])
def test_a_familiarity_file_that_is_not_one(content, copy, tmp_path, capsys):
    import report

    path = tmp_path / "familiarity-of-mine.json"
    if content is not None:
        path.write_text(content)
    assert report.main([*copy.options, "--familiarity", str(path)]) == 2
    message = capsys.readouterr().err
    assert ("there is no file" if content is None else "is not what familiarity_of_tasks.py writes") in message
    assert (copy.results / "report.md").is_file()  # an earlier call's


def test_the_summary(made, capsys):
    import report

    before = (made.results / "report.md").stat().st_mtime_ns
    assert report.main([*made.options, "--summary"]) == 0
    assert (made.results / "report.md").stat().st_mtime_ns == before
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert head.strip("| ").split(" | ")[:5] == ["task", "prompt-tuning", "input-tuning", "LoRA", "fine-tuning"]
    assert [row.strip("| ").split(" | ")[0] for row in rows] == list(BITS)
    of_each_seed = [
        one["p_value"]
        for one in stored(made.results)["comparisons"]
        if (one["task"], one["baseline"]) == ("dart", "prompt-tuning") and len(one["seeds"]) == 1
    ]
    assert len(of_each_seed) == 2
    cells = rows[2].strip("| ").split(" | ")
    assert (cells[3], cells[5]) == ("–", f"{max(of_each_seed):.3f}")
    assert cells[6].endswith(" %")


# ---- new metrics of old runs ----------------------------------------------------------------------------------------


def test_metrics_are_computed_again_from_the_stored_texts(copy, capsys):
    import evaluate

    import rescore
    from input_tuning_examples.metrics import PAPER_METRICS
    from records import read_outputs, read_records

    before, given = read_records(copy.results), [str(copy.data), *copy.options[:2]]
    assert rescore.main(given) == 0
    after = read_records(copy.results)
    main = {name for name, record in before.items() if (record["stage"], record["status"]) == ("main", "finished")}
    assert {name for name in before if before[name] != after[name]} == main
    metric = evaluate.load(PAPER_METRICS)
    for name in main:
        lines = (copy.data / after[name]["task"] / "test.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = sorted(random.Random(0).sample(range(30), 24))  # the rows that a run draws
        references = [json.loads(lines[row])["references"] for row in chosen]
        expected = metric.compute(predictions=read_outputs(copy.results, name), references=references)
        assert after[name]["metrics"] == {"validation_loss": before[name]["metrics"]["validation_loss"], **expected}
        assert after[name] == before[name] | {"metrics": after[name]["metrics"]}
    assert f"{len(main)} records" in capsys.readouterr().out
    assert rescore.main(given) == 0
    assert capsys.readouterr().out.startswith("0 records")


@pytest.mark.parametrize(
    "change", [other_data, missing_task, one_output_less, other_outputs, no_outputs, nothing_finished]
)
def test_what_cannot_be_measured_again_changes_nothing(copy, change, capsys):
    import rescore
    from records import read_records

    change(copy)
    before = read_records(copy.results)
    assert rescore.main([str(copy.data), *copy.options[:2]]) == 2
    assert capsys.readouterr().err.startswith("rescore.py: ")
    assert read_records(copy.results) == before


# ---- what the repository says ---------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "benchmark" / "results"


@pytest.mark.parametrize("budget", ["small", "h100"])
def test_the_stored_report_is_that_of_the_stored_runs(budget, tmp_path, capsys):
    import report

    copied = shutil.copytree(RESULTS / budget, tmp_path / budget)
    (copied / "report.md").unlink()
    arguments = ["--budget", budget, "--results", str(copied)]
    assert report.main([*arguments, "--familiarity", str(RESULTS / "familiarity.json")]) == 0
    assert (copied / "report.md").read_text() == (RESULTS / budget / "report.md").read_text()
    assert "Pass DATA" not in capsys.readouterr().err  # nothing is stale


@pytest.mark.parametrize(("budget", "place"), [("small", "comparison"), ("h100", "longer")])
def test_the_page_of_the_comparison_has_the_summary(budget, place, capsys):
    import report

    assert report.main(["--budget", budget, "--summary"]) == 0
    page = (ROOT / "docs" / "paper-comparison.md").read_text()
    assert re.search(rf"<!-- {place} -->\n(.*?)<!-- end -->", page, re.DOTALL)[1] == capsys.readouterr().out


@pytest.fixture(scope="module")
def runs_of_the_repository() -> dict[str, dict]:
    from records import read_records

    return read_records(RESULTS / "small")


@pytest.fixture(scope="module")
def advice() -> str:
    return (ROOT / "docs" / "methods-measured.md").read_text(encoding="utf-8")


def rows_in(page: str, columns: int) -> list[list[str]]:
    """Of its tables with so many columns."""
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.count("|") == columns + 1]


def of_seeds(runs: dict, task: str, method: str, metric: str) -> list[float]:
    """A metric of each main run that finished."""
    names = sorted(name for name in runs if name.startswith(f"main/{task}.{method}.seed"))
    return [runs[name]["metrics"][metric] for name in names if runs[name]["status"] == "finished"]


def over_seeds(values: list[float], form: str) -> str:
    """Mean and sample standard deviation; of one value itself."""
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def shares_of_the_gap(runs: dict) -> list[int]:
    """The lowest and the highest share that input-tuning closes, over all tasks."""
    from plan import TASKS

    shares = []
    for task in TASKS:
        methods = ("prompt-tuning", "input-tuning", "fine-tuning")
        low, ours, high = (fmean(of_seeds(runs, task, method, "bleu")) for method in methods)
        shares.append(round(100 * (ours - low) / (high - low)))
    return [min(shares), max(shares)]


PAGES = ("README.md", "docs/which-method.md", "docs/methods-measured.md", "docs/paper-comparison.md")


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_how_much_of_the_gap_is_closed(page, runs_of_the_repository):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    ((low, high),) = re.findall(r"closes (\d+) to (\d+) % of the gap", text)
    assert [int(low), int(high)] == shares_of_the_gap(runs_of_the_repository)


def test_the_advice_says_how_much_is_chance(advice, runs_of_the_repository):
    """The pooled standard deviation over seeds of one run, from the pairs of runs that differ in the seed alone."""
    cells = {(run["task"], run["method"]) for run in runs_of_the_repository.values() if run["seed"] != 0}
    spreads = [
        math.sqrt(fmean(variance(of_seeds(runs_of_the_repository, *cell, metric)) for cell in cells))
        for metric in ("bleu", "validation_loss")
    ]
    said = re.search(r"seeds of ([\d.]+) BLEU and ([\d.]+) of validation loss \((\d+) pairs", " ".join(advice.split()))
    assert list(said.groups()) == [f"{spreads[0]:.1f}", f"{spreads[1]:.3f}", str(len(cells))]


def test_the_advice_has_what_input_tuning_gains(advice, runs_of_the_repository):
    names = {"DART": "dart", "E2E": "e2e", "WebNLG": "webnlg", "Overnight": "overnight"}
    names |= {"French": "multi30k_fr_en", "German": "multi30k_de_en", "Czech": "multi30k_cs_en"}
    found = {task: row[2:] for row in rows_in(advice, 6) for name, task in names.items() if name in row[0]}
    assert set(found) == set(names.values())
    for task, (low, high, gain, loss) in found.items():
        (theirs, ours), losses = (
            [of_seeds(runs_of_the_repository, task, method, metric) for method in ("prompt-tuning", "input-tuning")]
            for metric in ("bleu", "validation_loss")
        )
        assert [low, high] == [over_seeds(theirs, ".1f"), over_seeds(ours, ".1f")]
        assert gain == over_seeds(list(map(sub, ours, theirs)), ".1f")
        assert loss == f"{fmean(losses[0]) - fmean(losses[1]):.2f}"


def test_the_advice_has_the_search_for_rates(advice, runs_of_the_repository):
    tried = [run for run in runs_of_the_repository.values() if (run["stage"], run["status"]) == ("rates", "finished")]
    rows = [row for row in rows_in(advice, 3) if re.search(r"\de-\d: ", row[1])]
    assert {row[0].partition("'")[0] for row in rows} == {run["method"] for run in tried}
    for name, *cells in rows:
        for task, cell in zip(("e2e", "overnight"), cells, strict=True):
            runs = [run for run in tried if (run["task"], run["method"]) == (task, name.partition("'")[0])]
            losses = {run["rate"]: f"{run['metrics']['validation_loss']:.3f}" for run in runs}
            assert {float(rate): loss for rate, loss in re.findall(r"(\de-\d): ([\d.]+)", cell)} == losses
            best = re.search(r"\*\*(\de-\d): [\d.]+\*\*", cell)[1]
            assert float(best) == min(runs, key=lambda run: run["metrics"]["validation_loss"])["rate"]


@pytest.mark.parametrize(("heading", "columns"), [("What the defaults rest on", 5), ("Beside other methods", 6)])
def test_the_advice_has_the_scores_of_methods(heading, columns, advice, runs_of_the_repository):
    from methods import METHODS

    section = advice.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [row for row in rows_in(section, columns) if row[0] in METHODS]
    assert len(rows) == len({row[0] for row in rows}) >= 8
    for name, *cells in rows:
        expected = [
            over_seeds(of_seeds(runs_of_the_repository, task, name, metric), form)
            for task in ("e2e", "overnight")
            for metric, form in (("bleu", ".1f"), ("validation_loss", ".3f"))
        ]
        number = runs_of_the_repository[f"main/e2e.{name}.seed0"]["trainable_parameters"]
        assert cells == ([f"{number:,}", *expected] if columns == 6 else expected)


def test_the_advice_has_the_scores_by_number_of_examples(advice, runs_of_the_repository):
    section = advice.partition("\n## By number of examples\n")[2].partition("\n## ")[0]
    rows = [row for row in rows_in(section, 6) if row[0] in ("e2e", "overnight")]
    finished = {
        (run["task"], run["rows"])
        for run in runs_of_the_repository.values()
        if (run["stage"], run["status"]) == ("amounts", "finished")
    }
    mains = {(task, 1600) for task in ("e2e", "overnight")}
    assert {(task, int(amount.replace(",", ""))) for task, amount, *_ in rows} == finished | mains
    for task, amount, *cells in rows:
        number = int(amount.replace(",", ""))
        for method, cell in zip(("prompt-tuning", "input-tuning", "lora", "fine-tuning"), cells, strict=True):
            name = f"amounts/{task}.{method}.rows{number}.seed0"
            score, loss = (
                over_seeds(of_seeds(runs_of_the_repository, task, method, metric), form)
                if number == 1600
                else f"{runs_of_the_repository[name]['metrics'][metric]:{form}}"
                for metric, form in (("bleu", ".1f"), ("validation_loss", ".3f"))
            )
            assert cell == f"{score} ({loss})"


def test_the_advice_has_the_lengths_of_texts(advice, runs_of_the_repository):
    """And BLEU without its penalty, exp(1 - references' length / texts' length) where texts are shorter."""
    said = re.search(
        r"they have (\d+) % .* \(prompt-tuning's (\d+) %, fine-tuning's (\d+) %\)\. On DART it is (\d+) % \("
        r"(\d+) %, (\d+) %\)\. Without the penalty input-tuning is ([\d.]+) ahead of prompt-tuning on "
        r"WebNLG and ([\d.]+) on DART",
        " ".join(advice.split()),
    ).groups()
    lengths, ahead = [], []
    for task in ("webnlg", "dart"):
        of = {
            method: [of_seeds(runs_of_the_repository, task, method, metric) for metric in ("bleu", "length_ratio")]
            for method in ("input-tuning", "prompt-tuning", "fine-tuning")
        }
        lengths += [f"{100 * fmean(ratios):.0f}" for _, ratios in of.values()]
        ours, low, _ = (
            fmean(bleu / min(1.0, math.exp(1 - 1 / ratio)) for bleu, ratio in zip(*both, strict=True))
            for both in of.values()
        )
        ahead.append(f"{ours - low:.1f}")
    assert list(said) == [*lengths, *ahead]


def test_the_advice_begins_with_answer_recipe_and_cost():
    page = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    start = "\n".join(page.splitlines()[:30])
    assert start.index("**Input-tuning** where") < start.index("**Recipe.**") < start.index("**Cost.**")


def test_the_advice_says_how_methods_compare(runs_of_the_repository):
    page = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    groups = [
        ("records", ("e2e", "dart", "webnlg")),
        ("logical forms", ("overnight", "multi30k_fr_en", "multi30k_de_en")),
        ("Czech", ("multi30k_cs_en",)),
    ]
    rows = rows_in(page, 4)[-len(groups) :]
    for (name, tasks), (inputs, _, gain, lora) in zip(groups, rows, strict=True):
        assert inputs.startswith(name)
        for cell, ours, theirs in ((gain, "input-tuning", "prompt-tuning"), (lora, "lora", "input-tuning")):
            means = [
                fmean(of_seeds(runs_of_the_repository, task, ours, "bleu"))
                - fmean(of_seeds(runs_of_the_repository, task, theirs, "bleu"))
                for task in tasks
            ]
            said = [int(number.replace("−", "-")) for number in cell.split(" to ")]
            assert [said[0], said[-1]] == [round(min(means)), round(max(means))]


# ---- the answer in short --------------------------------------------------------------------------------------------


def test_the_report_begins_with_three_sentences(text, html):
    lead = text.split("\n\n")[1]
    assert re.findall(r"\. |\.$", lead) == [". ", ". ", "."]
    assert lead.replace("<", "&lt;") in html.replace("&#39;", "'")


def in_short_of(bleu: dict[tuple[str, str], float], bits: dict[str, float] | None = None) -> str:
    from findings import Findings
    from in_short import in_short
    from plan import BUDGETS

    records = {
        f"main/{task}.{method}.seed0": {"task": task, "method": method, "seed": 0, "metrics": {"bleu": score}}
        for (task, method), score in bleu.items()
    }
    records = {name: {**record, "stage": "main", "status": "finished"} for name, record in records.items()}
    return in_short(Findings(BUDGETS["small"], records, bits or {}, None, None, 0, ()))


def test_the_answer_by_hand():
    scores = {
        ("e2e", "prompt-tuning"): 50, ("e2e", "input-tuning"): 60, ("e2e", "lora"): 61, ("e2e", "fine-tuning"): 58,
        ("dart", "prompt-tuning"): 30, ("dart", "input-tuning"): 28, ("dart", "lora"): 20, ("dart", "fine-tuning"): 40,
        ("webnlg", "prompt-tuning"): 10, ("webnlg", "input-tuning"): 11,
    }  # fmt: skip
    assert in_short_of(scores, {"e2e": 3.0, "dart": 1.0, "webnlg": 2.0}) == (
        "Input-tuning has more BLEU than prompt-tuning on 2 of 3 tasks, +3.0 in the mean. "
        "It is above LoRA (queries and values) on 1 of 2 and above full fine-tuning on 1 of 2; of the gap from "
        "prompt-tuning to full fine-tuning it closes -20 to 125 %. "
        "That it gains more where inputs are less familiar is not shown: Spearman's correlation is 1.00 over 3 tasks, "
        "p = 0.33."
    )


def test_what_has_no_runs_is_not_said():
    assert in_short_of({("e2e", "prompt-tuning"): 50}) == ""
    assert "LoRA" not in in_short_of({("e2e", "prompt-tuning"): 50, ("e2e", "input-tuning"): 60})
