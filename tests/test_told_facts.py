"""Which facts the benchmark's texts tell: by hand, by the command, and in the page that says so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sacrebleu

import told_facts
from input_tuning_examples.task_data import InputError
from records import outputs_file, write_outputs, write_record
from tasks import SPLITS, read_task

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "examples" / "benchmark"

DATA = ROOT.parent / "shared" / "data"
SOURCES = ["Ann : bornIn : Ulm, Germany | Ann : job : judge | Ulm : river : Danube", "Bo : job : cook"]
REFERENCES = ["Ann, a judge, was born in Ulm in Germany on the Danube.", "Bo is a cook."]
TEXTS = ["Ann is a judge. Ann is a judge from Ulm, GERMANY.", "Bo cooks."]  # the last fact and a form are missing


@pytest.mark.parametrize(
    ("entity", "text", "told"),
    [
        ("Danube", "on the danube.", True),
        ("Danube", "on the Danubes", False),
        ("Diane Duane Smith", "By Duane, Diane.", True),  # two of three
        ("Diane Duane", "By Duane.", False),  # one of two
        ("São_Paulo", "in são paulo", True),
        ("2007-06-25", "25 June 2007", True),
        ("!", "nothing to tell", True),
    ],
)
def test_a_fact_is_told_by_enough_of_its_words(entity, text, told):
    assert told_facts.is_told(entity, text) is told


@pytest.mark.parametrize(
    ("text", "share"),
    [("a b c a b c", 1 / 4), ("a b c d", 0.0), ("a b", 0.0), ("", 0.0), ("a a a a a", 2 / 3)],
)
def test_repeated_trigrams_by_hand(text, share):
    assert told_facts.repeated(text) == pytest.approx(share)


def test_a_row_by_hand():
    """Of four facts Danube and cook are not told. The first text has 11 words, so 9 trigrams, two of them again."""
    assert told_facts.row("m", SOURCES, TEXTS) == ["m", "6.5", "50 %", "100 %", "0 %", f"{100 * 2 / 9 / 2:.1f} %"]


def test_a_source_without_triples_is_an_error():
    with pytest.raises(InputError, match=r"--task: 'name\[x\]' is not 'subject : predicate : object | ...'"):
        told_facts.objects("name[x]")


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Options of the command for one run on the sources above."""
    (tmp_path / "data" / "webnlg").mkdir(parents=True)
    for split in SPLITS:
        lines = [json.dumps({"source": s, "references": [r]}) + "\n" for s, r in zip(SOURCES, REFERENCES, strict=True)]
        (tmp_path / "data" / "webnlg" / f"{split}.jsonl").write_text("".join(lines))
    rows = dict.fromkeys(SPLITS, 2)
    hashes = read_task(tmp_path / "data", "webnlg", dict(rows)).data_hash
    for stage, method, texts in (
        ("main", "input-tuning", TEXTS),
        ("main", "input-tuning-gelu", REFERENCES),
        ("amounts", "lora", REFERENCES),
    ):
        record = {"status": "finished", "stage": stage, "task": "webnlg", "method": method, "seed": 0, "attempts": 1}
        bleu = sacrebleu.corpus_bleu(texts, [REFERENCES], lowercase=True).score
        record |= {"config": {"rows": rows}, "data_hash": hashes, "metrics": {"bleu": bleu}}
        write_outputs(tmp_path / "results", f"{stage}/webnlg.{method}.seed0", texts)
        write_record(tmp_path / "results", f"{stage}/webnlg.{method}.seed0", record)
    return [str(tmp_path / "data"), "--results", str(tmp_path / "results")]


def table_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [a-z]", line)]


def test_the_command_prints_a_row_of_each_compared_main_run(runs, capsys):
    assert told_facts.main(runs) == 0
    assert table_of(capsys.readouterr().out) == [
        ["input-tuning", "6.5", "50 %", "100 %", "0 %", "11.1 %"],
        ["first reference", "8.0", "100 %", "100 %", "100 %", "0.0 %"],
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda folder, run: (folder / "results" / "runs" / "main" / f"{run}.json").unlink(),
            "no main run of webnlg in",
        ),
        (lambda folder, run: (folder / "data" / "webnlg" / "test.jsonl").unlink(), "there is no webnlg/test.jsonl"),
        (lambda folder, run: outputs_file(folder / "results", f"main/{run}").unlink(), "its texts"),
    ],
    ids=["no run", "no data", "no outputs"],
)
def test_what_is_missing_is_said(changed, message, runs, tmp_path, capsys):
    changed(tmp_path, "webnlg.input-tuning.seed0")
    assert told_facts.main(runs) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "webnlg").is_dir(), reason=f"the tasks' data is not at {DATA}")
def test_the_page_has_the_table_of_the_stored_runs(capsys):
    assert told_facts.main([str(DATA)]) == 0
    page = (ROOT / "docs" / "methods-measured.md").read_text(encoding="utf-8")
    section = page.partition("told_facts.py")[2].partition("\n## ")[0]
    printed = {row[0]: row for row in table_of(capsys.readouterr().out)}
    assert {row[0]: row for row in table_of(section)} == printed
