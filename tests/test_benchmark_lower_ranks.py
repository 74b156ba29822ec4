"""The loss of an adapter's LoRA over its rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lower_ranks
from peft_input_tuning import InputTuningConfig

ROWS = [("one two three", "four five"), ("two four", "six"), ("three three five six", "one")]
HIDDEN = 8
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "overnight").mkdir()
    lines = [json.dumps({"source": source, "references": [target]}) + "\n" for source, target in ROWS]
    (folder / "overnight" / "validation.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    config = InputTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, adapter_hidden_dim=HIDDEN, init_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fc2" in name:
                parameter.mul_(20)  # words move far
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def by_hand(tiny_model: Path, adapter: Path, rank: int | None) -> float:
    """Each row alone, on embeddings that were projected on the main directions of what the adapter adds."""
    from safetensors.torch import load_file

    weights = {name.rpartition("input_tuning_")[2]: w for name, w in load_file(adapter / WEIGHTS).items()}
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    table = model.get_input_embeddings().weight
    added = torch.relu(table @ weights["fc1.weight"].T) @ weights["fc2.weight"].T
    if rank is not None:
        directions = torch.linalg.svd(added[: len(tokenizer)], full_matrices=False).Vh[:rank]
        added = added @ directions.T @ directions
    scale = json.loads((adapter / "adapter_config.json").read_text())["prompt_scale"]
    prompt = weights["prompt.weight"] * scale
    total, count = 0.0, 0
    for source, target in ROWS:
        ids = tokenizer(source + "\n").input_ids
        labels = [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        embeds = torch.cat([prompt, (table + added)[ids + labels]])[None]
        logits = model(inputs_embeds=embeds).logits[0, len(prompt) + len(ids) - 1 : -1]
        logits = torch.cat([logits, torch.zeros(len(logits), len(prompt))], dim=1)  # words of the virtual tokens
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
        count += len(labels)
    return total / count


def test_the_losses_are_those_by_hand(data, adapter, tiny_model, tmp_path, capsys):
    arguments = [str(data), str(adapter), "--model", str(tiny_model), "--work", str(tmp_path), "--ranks", "2", "8"]
    assert lower_ranks.main(arguments) == 0
    table = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    want = {
        "the adapter itself": by_hand(tiny_model, adapter, None),
        "2": by_hand(tiny_model, adapter, 2),
        "8": by_hand(tiny_model, adapter, None),
    }
    assert abs(want["2"] - want["8"]) > 0.02
    assert {rank: float(loss) for rank, loss in table.items()} == pytest.approx(want, abs=6e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "nowhere"}, "DATA"),
        ({"adapter": "nowhere"}, "ADAPTER: there is no adapter_config.json"),
        ({"--ranks": "0"}, "--ranks must be >= 1, got 0"),
    ],
    ids=["data", "adapter", "ranks"],
)
def test_what_cannot_be_read_is_named(data, adapter, tiny_model, tmp_path, capsys, changes, said):
    call = {"data": str(data), "adapter": str(adapter), "--model": str(tiny_model), "--work": str(tmp_path)} | changes
    options = [part for name, value in call.items() if name.startswith("--") for part in (name, value)]
    assert lower_ranks.main([call["data"], call["adapter"], *options]) == 2
    assert said in capsys.readouterr().err
