"""`ManyAdapters`: adapters that stop early leave the batch; and what cannot be trained together is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from adapters import adapted
from families import build, ids
from oracles import adapter_weights
from peft_input_tuning.training import EarlyStoppingOfEach
from peft_input_tuning.training.rows import CollateNames
from test_trainer_of_many import SOME, Pad, TrainerOfMany, data, trainer_of
from test_training_many import LLAMA, many

# ---- stopping -------------------------------------------------------------------------------------------------------


class Rows:
    """How many rows the model gets in training."""

    def __init__(self, model) -> None:
        self.counts: list[int] = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs) -> None:
        if model.training:
            self.counts.append(len(kwargs["input_ids"]))


class StopAfter(TrainerCallback):
    def __init__(self, step: int, names: str) -> None:
        self.step, self.names = step, names

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        if state.global_step == self.step:
            model.set_requires_grad(list(self.names), requires_grad=False)


@pytest.mark.trains_with("transformers Trainer", "many adapters at once: one that stops leaves the batch")
def test_rows_of_a_stopped_adapter_leave_the_batch(tmp_path):
    whole, _ = many(adapters=SOME)
    trainer_of(whole, data("ab" * 6), tmp_path / "whole").train()
    model, _ = many(adapters=SOME)
    rows, before = Rows(model), {}
    stop = StopAfter(1, "a")
    trainer = trainer_of(model, data("ab" * 6), tmp_path / "parts", callbacks=[stop])
    first, _ = many(adapters=SOME)
    trainer_of(first, data("ab" * 2), tmp_path / "first", max_steps=1).train()
    before = adapter_weights(first, "a")
    trainer.train()
    assert rows.counts == [4, 2, 2]
    for key, value in adapter_weights(model, "a").items():
        assert torch.equal(value, before[key])
    for key, value in adapter_weights(whole, "b").items():
        assert_close(adapter_weights(model, "b")[key], value, atol=1e-10, rtol=1e-8)


def test_a_batch_of_stopped_adapters_only_is_no_step(tmp_path):
    """Adam would move "b" on by its momentum if it got a gradient of zero."""
    model, _ = many(adapters=SOME)
    rows = Rows(model)
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            seen[state.global_step] = adapter_weights(model, "b")

    trainer_of(model, data("abbb" + "aaaa" + "bbbb"), tmp_path, callbacks=[StopAfter(1, "a"), Look()]).train()
    assert rows.counts == [4, 4]
    assert all(torch.equal(seen[1][key], seen[2][key]) for key in seen[1])
    assert not torch.equal(seen[2]["fc1.weight"], seen[3]["fc1.weight"])


def test_all_have_stopped(tmp_path):
    model, _ = many(adapters=SOME)
    trainer = trainer_of(model, data("ab" * 6), tmp_path, callbacks=[StopAfter(1, "ab")])
    with pytest.raises(ValueError, match=r"No adapter trains any more\. Call model\.set_requires_grad"):
        trainer.train()


@pytest.mark.trains_with("transformers Trainer", "many adapters at once: early stopping and best weights of each")
def test_early_stopping_of_each(tmp_path, monkeypatch):
    """ "a" is best at the second evaluation and stops at the fourth, "b" is best at the fifth and stops at the
    seventh, which ends the run."""
    losses = {"a": [3, 1, 2, 1, 0, 0, 0, 0], "b": [9, 8, 7, 8, 6, 6, 7, 0]}
    model, _ = many(adapters=SOME)
    seen = {name: [] for name in SOME}

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        out = Trainer.evaluation_loop(self, dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        name = metric_key_prefix.removeprefix("eval_")
        seen[name].append(adapter_weights(model, name))
        out.metrics[f"{metric_key_prefix}_loss"] = float(losses[name][len(seen[name]) - 1])
        return out

    monkeypatch.setattr(TrainerOfMany, "evaluation_loop", evaluation_loop, raising=False)
    trainer = trainer_of(
        model,
        data("ab" * 20),
        tmp_path,
        callbacks=[EarlyStoppingOfEach(patience=2)],
        eval_dataset={name: data(name, seed=70) for name in SOME},
        eval_strategy="steps",
        eval_steps=1,
        max_steps=10,
    )
    trainer.train()
    assert trainer.state.global_step == 7
    for name, best in (("a", 1), ("b", 4)):
        for key, value in adapter_weights(model, name).items():
            assert torch.equal(value, seen[name][best][key]), (name, key)
    assert torch.equal(seen["a"][4]["fc1.weight"], seen["a"][1]["fc1.weight"])  # it had its best back when it stopped
    assert not torch.equal(seen["b"][6]["fc1.weight"], seen["b"][4]["fc1.weight"]), "the case shows nothing"


def test_patience_must_be_positive():
    with pytest.raises(ValueError, match="`patience` must be >= 1, got 0"):
        EarlyStoppingOfEach(patience=0)


# ---- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}, "EarlyStoppingOfEach"),
        ({"ddp_find_unused_parameters": False}, "`ddp_find_unused_parameters` is False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_would_mix_adapters(tmp_path, settings, says):
    model, _ = many(adapters=SOME)
    with pytest.raises(ValueError, match=says):
        trainer_of(model, data("ab"), tmp_path, eval_dataset=data("ab"), **settings)


def test_another_loss(tmp_path):
    model, _ = many(adapters=SOME)
    with pytest.raises(ValueError, match=r"`compute_loss_func` is .*Each adapter's loss is a cross-entropy"):
        TrainerOfMany(
            model,
            TrainingArguments(str(tmp_path), use_cpu=True),
            train_dataset=data("ab"),
            compute_loss_func=lambda outputs, labels, **_: 0,
        )


def test_a_model_without_input_tuning(tmp_path):
    with pytest.raises(ValueError, match="`model` has no input-tuning adapter"):
        trainer_of(build(LLAMA), data("ab"), tmp_path)


@pytest.mark.parametrize(
    ("rows", "collator", "says"),
    [
        ([{"input_ids": [3]}], Pad(), r"A row has no `adapter_name`, but \['input_ids'\]"),
        (data("abx"), Pad(), r"A row has the `adapter_name` 'x'\. Give each row the name of an adapter: \['a', 'b'\]"),
        (data("ab"), lambda rows: {"input_ids": torch.zeros(1, 9)}, r"made \[1\] rows of 2: .*padding_free=False"),
    ],
)
def test_rows_that_cannot_be_told_apart(rows, collator, says):
    with pytest.raises(ValueError, match=says):
        CollateNames(collator, ["a", "b"])(rows)


def test_rows_without_labels(tmp_path):
    model, _ = many(adapters=SOME)
    trainer = trainer_of(model, data("abab"), tmp_path)
    trainer.data_collator = CollateNames(lambda rows: {"input_ids": ids(len(rows), 5)}, ["a", "b"])
    with pytest.raises(ValueError, match="`labels` are missing in a batch of"):
        trainer.train()


def test_adapters_of_transformers(tmp_path):
    """`model.add_adapter` makes no PeftModel, and has no switch for what trains."""
    model, *_ = adapted(LLAMA)
    with pytest.raises(ValueError, match=r"`model` must be a PeftModel, got LlamaForCausalLM"):
        trainer_of(model.get_base_model(), data("ab"), tmp_path)
