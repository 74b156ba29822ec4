"""Scores on inputs that the training rows have and on those that they have not: by hand, and in the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sacrebleu

import seen_inputs
from records import write_outputs, write_record
from tasks import read_task

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "examples" / "benchmark"

DATA = ROOT.parent / "shared" / "data"
RIGHT, WRONG = "the judge was born in Ulm in Germany", "a cook lives on the Danube in Vienna"


def bleu(text: str, reference: str) -> float:
    return sacrebleu.corpus_bleu([text], [[reference]], lowercase=True).score


def test_scores_of_both_parts():
    texts, references = [RIGHT, WRONG, RIGHT], [[RIGHT], [RIGHT], [RIGHT]]
    seen, unseen = seen_inputs.split_scores(texts, references, [True, False, True])
    assert seen == pytest.approx(100.0)
    assert unseen == pytest.approx(bleu(WRONG, RIGHT))
    assert seen_inputs.split_scores(texts, references, [False] * 3)[0] is None
    assert seen_inputs.split_scores(texts, references, [True] * 3)[1] is None


def write_run(folder: Path, name: str, texts: list[str], references: list[str], **changes) -> None:
    hashes = read_task(folder / "data", "dart", dict.fromkeys(("train", "validation", "test"))).data_hash
    score = sacrebleu.corpus_bleu(texts, [references], lowercase=True).score
    record = {"status": "finished", "stage": "main", "task": "dart", "seed": 0, "rows": None, "attempts": 1}
    record |= {"config": {"rows": {"train": 2, "test": 3}}, "data_hash": hashes, "metrics": {"bleu": score}}
    write_outputs(folder / "results", name, texts)
    write_record(folder / "results", name, record | changes)


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Of three test inputs two are training inputs: a run on both rows, one of another seed, one on a single row."""
    (tmp_path / "data" / "dart").mkdir(parents=True)
    references = [RIGHT, RIGHT, RIGHT]
    for split, sources in (("train", ["a", "b"]), ("validation", ["v"]), ("test", ["a", "b", "c"])):
        lines = [json.dumps({"source": source, "references": [RIGHT]}) + "\n" for source in sources]
        (tmp_path / "data" / "dart" / f"{split}.jsonl").write_text("".join(lines))
    write_run(tmp_path, "main/dart.lora.seed0", [RIGHT, RIGHT, WRONG], references, method="lora")
    write_run(tmp_path, "main/dart.lora.seed1", [WRONG, WRONG, WRONG], references, method="lora", seed=1)
    fewer = {"stage": "amounts", "rows": 1, "config": {"rows": {"train": 1, "test": 3}}}
    write_run(tmp_path, "amounts/dart.lora.rows1.seed0", [RIGHT] * 3, references, method="lora", **fewer)
    return [str(tmp_path / "data"), "--task", "dart", "--results", str(tmp_path / "results")]


def rows_of(text: str) -> list[list[str]]:
    """Of the table's rows those with "N of N" in their second cell."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in cells if len(row) > 1 and re.fullmatch(r"\d+ of \d+", row[1])]


def test_the_command(arguments, capsys):
    assert seen_inputs.main(arguments) == 0
    assert rows_of(capsys.readouterr().out) == [
        ["1", "1 of 3", "–", "–", "100.0 / 100.0", "–"],
        ["2", "2 of 3", "–", "–", f"100.0 / {bleu(WRONG, RIGHT):.1f}", "–"],  # seed 0 alone
    ]


def test_what_is_missing_is_said(arguments, tmp_path, capsys):
    assert seen_inputs.main([*arguments[:2], "e2e", *arguments[3:]]) == 2
    assert "no run of e2e in" in capsys.readouterr().err
    (tmp_path / "data" / "dart" / "test.jsonl").unlink()
    assert seen_inputs.main(arguments) == 2
    assert "there is no dart/test.jsonl" in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "overnight").is_dir(), reason=f"the tasks' data is not at {DATA}")
def test_the_page_has_the_table_of_the_stored_runs(capsys):
    assert seen_inputs.main([str(DATA)]) == 0
    page = (ROOT / "docs" / "methods-measured.md").read_text(encoding="utf-8")
    assert rows_of(page) == rows_of(capsys.readouterr().out)
