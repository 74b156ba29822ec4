"""Shifts of words over how well the model knows them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import figures
import moved_words
from device import DEVICE
from peft_input_tuning import InputTuningConfig

SOURCES = ["one two three", "two four", "three three five six"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "overnight").mkdir()
    lines = [{"source": source, "references": ["x"]} for source in SOURCES]
    (folder / "overnight" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    config = InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, adapter_hidden_dim=8, init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(folder)
    return folder


def test_surprisals_are_those_of_a_loop(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).to(DEVICE).eval()
    rows = [[5, 7, 9, 7], [7, 5, 7]]
    found = moved_words.surprisals(model, rows)
    naive: dict[int, list[float]] = {}
    for row in rows:
        for place in range(1, len(row)):
            with torch.no_grad():
                logits = model(torch.tensor([row[:place]], device=DEVICE)).logits[0, -1]
            bits = -logits.log_softmax(-1)[row[place]].item() / math.log(2)
            naive.setdefault(row[place], []).append(bits)
    assert found == pytest.approx({word: sum(bits) / len(bits) for word, bits in naive.items()}, rel=1e-4)


def test_shifts_are_the_adapters(data, adapter, tiny_model, tmp_path):
    from peft import PeftModel

    pairs = moved_words.measured(data, str(adapter), "overnight", str(tiny_model), tmp_path)
    ranked, by_bits = pairs.values()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), adapter)
    base = model.get_base_model().get_input_embeddings().base_layer.weight
    weights = {
        name.rpartition("input_tuning_")[2]: p for name, p in model.named_parameters() if "input_tuning" in name
    }
    inner = torch.relu(base @ weights["fc1.default.weight"].T)
    shifts = (inner @ weights["fc2.default.weight"].T).norm(dim=1) / base.norm(dim=1)
    assert {int(word): shift for word, shift in ranked} == pytest.approx(
        {int(word): shifts[int(word)].item() for word, _ in ranked}, rel=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    seen = {word for source in SOURCES for word in tokenizer(source + "\n").input_ids[1:]}
    assert len(by_bits) == len(seen - set(tokenizer.all_special_ids))


def test_the_command_prints_and_plots(data, adapter, tiny_model, tmp_path, capsys):
    output = tmp_path / "plots" / "moved.svg"
    arguments = [str(data), str(adapter), "--model", str(tiny_model), "--work", str(tmp_path), "--output", str(output)]
    assert moved_words.main(arguments) == 0
    out = capsys.readouterr().out
    assert "shift over rank in the vocabulary: Spearman" in out
    assert "shift over bits in inputs of overnight: Spearman" in out
    assert output.read_text(encoding="utf-8").startswith("<svg ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": "nowhere"}, "ADAPTER: there is no adapter_config.json"),
        ({"task": "e2e"}, "DATA: there is no file"),
    ],
)
def test_what_is_not_there_is_named(change, message, data, adapter, tiny_model, tmp_path, capsys):
    wanted = {"adapter": str(adapter), "task": "overnight"} | change
    arguments = [str(data), wanted["adapter"], "--task", wanted["task"], "--model", str(tiny_model)]
    assert moved_words.main([*arguments, "--work", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_plots_quartiles_are_those_by_hand():
    pairs = {"measure": [(float(n), float(n % 4)) for n in range(16)]}
    svg = figures.quantiles_over(pairs, "shift", 4)
    assert 'aria-label="shift over measure"' in svg
    assert figures._quartiles([1.0]) == [1.0, 1.0, 1.0]
    assert figures._quartiles([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
