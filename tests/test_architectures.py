"""A sample of what `make test-architectures` tries with every text architecture of transformers, and how it judges."""

from __future__ import annotations

import json
import re

import pytest
import torch

from architectures.build import Architecture, architectures
from architectures.calling import what_masks_change
from architectures.cells import CELLS, run
from architectures.judging import Cell, judge
from architectures.report import PAGE, WORDS, page
from architectures.runner import main, worst
from architectures.sample import SAMPLE
from architectures.subject import Subject
from peft_input_tuning import InputTuningConfig
from peft_input_tuning.virtual_tokens import start

CHOSEN = ("forward", "cache by hand, padded", "generate, padded", "mixed batch, padded")
KNOWN = architectures()


@pytest.mark.parametrize("name", SAMPLE.values(), ids=SAMPLE.keys())
def test_an_adapter_gives_what_the_oracle_gives(name):
    if name not in KNOWN:
        pytest.skip(f"this transformers has no {name}")
    cells = run(KNOWN[name], lambda cell: cell in CHOSEN)
    assert not {key: cell for key, cell in cells.items() if cell.status not in ("exact", "lacks")}
    assert cells["forward"].status == "exact"


PECULIAR = [
    ("Blip2ForConditionalGeneration", "static cache"),  # made by `generate` of the model inside
    ("RwkvForCausalLM", "generate"),  # a list of tensors
    ("XLNetLMHeadModel", "forward"),  # looks ids up as (length, batch)
    ("XLNetLMHeadModel", "cache by hand"),
    ("XLNetLMHeadModel", "mixed batch, padded"),
    ("UdopForConditionalGeneration", "left padding"),  # its encoder puts out the decoder's mask
    # arguments with something for each place
    ("IdeficsForVisionText2Text", "generate"),
    ("Kosmos2ForConditionalGeneration", "generate"),
    ("LongformerForMaskedLM", "sequence classification"),
    ("MllamaForConditionalGeneration", "image"),
    ("MllamaForConditionalGeneration", "image, generate, padded"),
]


@pytest.mark.parametrize(("name", "cell"), PECULIAR)
def test_what_few_models_do(name, cell):
    if name not in KNOWN:
        pytest.skip(f"this transformers has no {name}")
    (found,) = run(KNOWN[name], lambda one: one == cell).values()
    assert found.status == "exact", found


def test_the_sample_has_classes_that_differ():
    assert len(set(SAMPLE.values())) == len(SAMPLE) >= 40
    assert set(CHOSEN) <= set(CELLS)


@pytest.fixture
def llama():
    before = torch.get_default_dtype()
    with torch.no_grad():
        yield Subject(KNOWN["LlamaForCausalLM"])
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["prompt", "fc1", "fc2"])
def test_a_wrong_weight_shows_in_every_cell(llama, kind):
    for key, parameter in llama.model.named_parameters():
        if f"{kind}.default." in key:
            parameter.data[0] += 0.1 * parameter.abs().max()
    for name in ("forward", "left padding", "cache by hand", "generate", "static cache"):
        assert CELLS[name](llama).status == "failure", name


def test_what_masks_change_is_seen_in_the_base():
    before = torch.get_default_dtype()
    with torch.no_grad():
        found = {name: what_masks_change(Subject(KNOWN[name])) for name in ("LlamaForCausalLM", "ConvBertForMaskedLM")}
    torch.set_default_dtype(before)
    assert found["LlamaForCausalLM"] == ""
    assert "2 masked places on the left differs from the same row alone" in found["ConvBertForMaskedLM"]


def test_a_refusal_of_what_the_base_does_right_stays_one(monkeypatch):
    monkeypatch.setattr(start, "check_mixed_lengths", lambda *_: InputTuningConfig(num_virtual_tokens=-1))
    cells = run(KNOWN["LlamaForCausalLM"], lambda cell: cell == "mixed batch, unequal prompts")
    assert cells["mixed batch, unequal prompts"].status == "refused"


def test_a_prefill_that_is_kept_apart_holds_the_prompt():
    """Unlimited-OCR's `generate` tells its cache how long the prefill is; what follows stands in a window."""
    name = "UnlimitedOcrForConditionalGeneration"
    if name not in KNOWN:
        pytest.skip(f"this transformers has no {name}")
    assert run(KNOWN[name], lambda cell: cell == "mixed batch, generate")["mixed batch, generate"].status == "exact"


def test_what_is_said_to_be_no_text_model_cannot_be_run():
    found = run(KNOWN["Pix2StructForConditionalGeneration"])["base"]
    assert (found.status, found.note.partition(": ")[0]) == ("lacks", "its input is an image, its text an output")


def values(*numbers: float) -> list[torch.Tensor]:
    return [torch.tensor(numbers)]


def refusal() -> list[torch.Tensor]:
    return [InputTuningConfig(num_virtual_tokens=-1)]


def accident() -> list[torch.Tensor]:
    return values(1.0)[0].no_such_thing


def good() -> list[torch.Tensor]:
    return values(1.0, 2.0)


@pytest.mark.parametrize(
    ("ours", "wanted", "base", "also", "status"),
    [
        (good, good, good, None, "exact"),
        (lambda: values(1.0, 2.1), good, good, None, "failure"),
        (lambda: values(1.0, float("nan")), good, good, None, "failure"),
        (lambda: values(1.0), good, good, None, "failure"),
        (refusal, good, good, None, "refused"),
        (refusal, good, accident, None, "refused"),
        (accident, good, good, None, "failure"),
        (accident, good, accident, None, "lacks"),
        (good, accident, accident, None, "lacks"),
        (good, accident, good, None, "failure"),
        (refusal, accident, good, None, "refused"),
        (good, lambda: values(1.0, 2.1), good, good, "exact"),
        (good, lambda: values(1.0, 2.1), good, lambda: values(1.0, 2.2), "lacks"),
        (good, lambda: values(1.0, 2.1), good, lambda: values(1.0, 2.1), "failure"),
    ],
)
def test_judging(ours, wanted, base, also, status):
    assert judge(ours, wanted, base, also).status == status


def test_what_an_architecture_comes_to_and_its_line():
    cells = {
        "forward": Cell("exact", gap=0.0),
        "static cache": Cell("lacks", "IndexError: no (cache.py:1)"),
        "generate": Cell("refused", "ValueError: because | so (call.py:2)"),
        "training step": Cell("failure", "wrong value", 0.5),
    }
    record = {"name": "ThatModel", "cells": {name: vars(cell) for name, cell in cells.items()}}
    assert worst(record) == "failure"
    said = page({"ThatModel": record}, "transformers 1")
    assert "0 of 1 architectures are exact" in said
    assert "| ThatModel | 1 | static cache: IndexError: no | **wrong**: training step: wrong value<br>" in said
    assert "<br>generate: ValueError: because \\| so |\n" in said
    del record["cells"]["training step"], record["cells"]["generate"]
    assert worst(record) == "exact"


def test_a_run_goes_on_where_the_file_ends(tmp_path, capsys):
    file = tmp_path / "found.jsonl"
    arguments = ["--only", "^(LlamaForCausalLM|BertForMaskedLM)$", "--cells", "^forward$", "--out", str(file)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "2 of 2 architectures" in first
    assert "[2/2] LlamaForCausalLM: 1 exact" in first
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == [
        "BertForMaskedLM",
        "LlamaForCausalLM",
    ]
    main(arguments)
    assert "0 of 2 architectures" in capsys.readouterr().out


def test_a_process_that_dies_or_hangs_is_a_failure(capsys):
    assert main(["--only", "^LlamaForCausalLM$", "--limit", "0.01"]) == 1
    assert "not done after" in capsys.readouterr().out


def test_every_mapping_is_taken():
    assert len(KNOWN) > 300
    assert {arch.mapping for arch in KNOWN.values()} == {"causal", "seq2seq", "masked", "image"}
    assert KNOWN["LlamaForCausalLM"] == Architecture("LlamaForCausalLM", "llama", "causal")
    assert KNOWN["RobertaForMaskedLM"].has_heads
    assert not KNOWN["RobertaForCausalLM"].has_heads


def test_the_readme_has_the_counts_of_the_page():
    counts = dict(re.findall(r"^\| ([^|\n]+) \| (\d+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    number = {status: int(counts.get(said, 0)) for status, said in WORDS.items()}
    readme = " ".join((PAGE.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"{number['exact']} of {sum(number.values())} are exact in all that is tried, {number['refused']} refuse "
        f"something by name, {number['failure'] or 'none'} is wrong, and {number['lacks']} cannot be run"
    ) in readme
