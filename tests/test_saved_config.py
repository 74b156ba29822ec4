"""A file is not loaded under another configuration than it was saved with: not over an adapter in use, which PEFT
would do without a look at the folder's configuration, and not with a configuration of the caller's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from adapters import adapted, add, config
from families import FAMILIES, build, ids
from oracles import adapter_weights, row_output

LLAMA = FAMILIES["llama"]
X = ids(1, 6)
# what is saved, what is in use, the field that is named
DIFFERENT = {
    "activation": ({"adapter_activation": "gelu"}, {}, "adapter_activation"),
    "scope": ({"adapter_scope": "input"}, {}, "adapter_scope"),
    "bias": ({"adapter_bias": True}, {}, "adapter_bias"),
    "scale of the prompt": ({"prompt_scale": 1.0}, {}, "prompt_scale"),
    "length of the prompt": ({"num_virtual_tokens": 5}, {}, "num_virtual_tokens"),
    "hidden size": ({"adapter_hidden_dim": 8}, {}, "adapter_hidden_dim"),
    "no adapter": ({"adapter_hidden_dim": 0}, {}, "adapter_hidden_dim"),
}
SAME = {
    "nothing": ({}, {}),
    "the paper's size in numbers": ({"adapter_hidden_dim": None}, {"adapter_hidden_dim": 64}),
    "dropout": ({"adapter_dropout": 0.1}, {}),
    "scale without a prompt": ({"prompt_scale": 1.0, "num_virtual_tokens": 0}, {"num_virtual_tokens": 0}),
    "activation without an adapter": (
        {"adapter_activation": "gelu", "adapter_hidden_dim": 0},
        {"adapter_hidden_dim": 0},
    ),
}
each_different = pytest.mark.parametrize(("saved", "in_use", "field"), DIFFERENT.values(), ids=DIFFERENT)
each_same = pytest.mark.parametrize(("saved", "in_use"), SAME.values(), ids=SAME)


def save(folder: Path, **changes) -> PeftModel:
    model, _, _ = adapted(LLAMA, seed=2, **changes)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def answer(model) -> torch.Tensor:
    if getattr(model, "peft_config", None) and model.peft_config["default"].adapter_scope == "input":
        return model.generate(input_ids=X, max_new_tokens=4, do_sample=False, output_logits=True)
    return model(input_ids=X).logits


@each_different
def test_another_configuration_is_not_loaded_over_a_name_in_use(tmp_path, saved, in_use, field):
    save(tmp_path, **saved)
    model, _, _ = adapted(LLAMA, **in_use)
    weights, want = adapter_weights(model), answer(model)
    theirs, ours = (config(**one).to_dict()[field] for one in (saved, in_use))
    with pytest.raises(
        ValueError, match=rf"`{field}` is {theirs!r} in .* but adapter 'default' has {ours!r}"
    ) as error:
        model.load_adapter(tmp_path, "default")
    assert "under a name of its own" in str(error.value)
    after = adapter_weights(model)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert torch.equal(answer(model), want)
    assert model.peft_config["default"].to_dict()[field] == ours


@each_same
def test_the_same_configuration_is_loaded_over_a_name_in_use(tmp_path, saved, in_use):
    other = save(tmp_path, **saved)
    model, _, _ = adapted(LLAMA, **in_use)
    assert not torch.equal(answer(model), answer(other))
    model.load_adapter(tmp_path, "default")
    assert torch.equal(answer(model), answer(other))


def test_what_was_refused_is_right_under_a_name_of_its_own(tmp_path):
    save(tmp_path, adapter_activation="gelu")
    model, base, _ = adapted(LLAMA)
    with pytest.raises(ValueError, match="adapter_activation"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    want = row_output(base, adapter_weights(model, "second"), X[0], activation="gelu")
    torch.testing.assert_close(answer(model)[0], want, atol=2e-4, rtol=1e-3)


def test_the_remedy_works(tmp_path):
    other = save(tmp_path, adapter_activation="gelu")
    model, _, _ = adapted(LLAMA)
    add(model, "second", seed=3)
    model.set_adapter("second")
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "default")
    model.set_adapter("default")
    assert torch.equal(answer(model), answer(other))


def test_a_folder_of_another_method_is_named(tmp_path):
    get_peft_model(build(LLAMA), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    model, _, _ = adapted(LLAMA)
    with pytest.raises(ValueError, match="into adapter 'default' is a LoraConfig, not an InputTuningConfig"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_configuration_of_the_callers_own_must_fit_the_folder(tmp_path, is_trainable):
    save(tmp_path)
    base = build(LLAMA)
    with pytest.raises(ValueError, match=r"`prompt_scale` is 8.0 in .* but adapter 'default' has 1.0"):
        PeftModel.from_pretrained(base, tmp_path, config=config(LLAMA, prompt_scale=1.0), is_trainable=is_trainable)
    want = answer(save(tmp_path))
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path, config=config(LLAMA), is_trainable=is_trainable).eval()
    assert torch.equal(answer(loaded), want)


def test_a_subfolder_is_where_the_configuration_is_looked_for(tmp_path):
    save(tmp_path)
    other = save(tmp_path / "inner", adapter_activation="gelu")
    with pytest.raises(ValueError, match="adapter_activation"):
        adapted(LLAMA)[0].load_adapter(tmp_path, "default", subfolder="inner")
    model, _, _ = adapted(LLAMA, adapter_activation="gelu")
    model.load_adapter(tmp_path, "default", subfolder="inner")
    assert torch.equal(answer(model), answer(other))


def test_tensors_without_a_folder_are_taken_as_they_are():
    other, _, _ = adapted(LLAMA, seed=2)
    model, _, _ = adapted(LLAMA)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(answer(model), answer(other))


def test_transformers_refuses_names_in_use(tmp_path):
    save(tmp_path / "first")
    save(tmp_path / "second", adapter_activation="gelu")
    model = build(LLAMA)
    model.load_adapter(str(tmp_path / "first"))
    want = answer(model)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(tmp_path / "second"))
    assert torch.equal(answer(model), want)


# ---- Trainer ------------------------------------------------------------------------------------------------------


def trainer(folder: Path, steps: int, **changes) -> Trainer:
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids(8, 6)]
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",  # the same for a run of two steps
        report_to="none",
    )
    torch.manual_seed(0)
    return Trainer(
        get_peft_model(build(LLAMA), config(LLAMA, **changes)), arguments, train_dataset=Dataset.from_list(rows)
    )


def test_a_resumed_run_is_the_run(tmp_path):
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "halves", 2).train()
    resumed = trainer(tmp_path / "halves", 4)
    resumed.train(resume_from_checkpoint=True)
    want, got = adapter_weights(whole.model), adapter_weights(resumed.model)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_run_is_not_resumed_with_another_configuration(tmp_path):
    trainer(tmp_path, 2).train()
    with pytest.raises(ValueError, match=r"`adapter_activation` is 'relu' in .* but adapter 'default' has 'gelu'"):
        trainer(tmp_path, 4, adapter_activation="gelu").train(resume_from_checkpoint=True)


def test_a_checkpoint_from_before_there_was_a_scale_is_resumed_with_1(tmp_path):
    trainer(tmp_path, 2, prompt_scale=1.0).train()
    file = tmp_path / "checkpoint-2" / "adapter_config.json"
    written = json.loads(file.read_text())
    del written["prompt_scale"]
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"`prompt_scale` is 1.0 in .* but adapter 'default' has 8.0"):
        trainer(tmp_path, 4).train(resume_from_checkpoint=True)
    trainer(tmp_path, 4, prompt_scale=1.0).train(resume_from_checkpoint=True)
