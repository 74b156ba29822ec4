"""`ManyAdapters`: a Trainer trains several adapters at once, and each becomes what a loop by hand makes of it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from device import DEVICE
from families import FAMILIES, PAD, build, ids
from oracles import adapter_weights, embed
from peft_input_tuning import create_input_tuning_optimizer
from peft_input_tuning.training import EarlyStoppingOfEach, ManyAdapters
from peft_input_tuning.training.rows import CollateNames, EvenRows
from test_training_many import LLAMA, activation, many

T5 = FAMILIES["t5"]
SOME = {"a": {}, "b": {"num_virtual_tokens": 7, "adapter_hidden_dim": 9, "adapter_activation": "gelu"}}
RATES = {"a": 1e-2, "b": 3e-3}
PROMPT_RATES = {"a": 2e-2, "b": 5e-2}


class TrainerOfMany(ManyAdapters, Trainer):
    pass


class Pad:
    """What DataCollatorForSeq2Seq does, without a tokenizer."""

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        def pad(key, value):
            values = [torch.as_tensor(row[key]) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)

        ids, labels = pad("input_ids", PAD), pad("labels", -100)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["input_ids"])) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def data(names: str, seed: int = 0, lengths=(5, 8, 3, 6, 7)) -> list[dict]:
    """A row for each letter; the first token of a row has no label, and every third row has fewer."""
    rows = []
    for at, name in enumerate(names):
        row = ids(lengths[at % len(lengths)], seed=seed + at).cpu()
        labels = row.clone()
        labels[: 1 + 2 * (at % 3 == 2)] = -100
        rows.append({"input_ids": row.tolist(), "labels": labels.tolist(), "adapter_name": name})
    return rows


def trainer_of(model, rows, folder: Path, callbacks=(), optimizer=None, eval_dataset=None, kind=TrainerOfMany, **more):
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none"}
    settings |= {"use_cpu": DEVICE.type == "cpu", "disable_tqdm": True, "save_strategy": "no", "max_steps": 3}
    settings |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
    return kind(
        model,
        TrainingArguments(str(folder), **{**settings, **more}),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        data_collator=Pad(),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


class Alone:
    """One adapter's training by hand: the formula on a base, a mean loss over its rows of a step, AdamW."""

    def __init__(self, family, base, model, name: str, smoothing: float = 0.0) -> None:
        self.family, self.base, self.name, self.smoothing = family, base, name, smoothing
        self.leaves = {key: value.clone().requires_grad_() for key, value in adapter_weights(model, name).items()}
        prompt = [self.leaves[key] for key in self.leaves if key.startswith("prompt")]
        rest = [self.leaves[key] for key in self.leaves if not key.startswith("prompt")]
        groups = [{"params": rest, "lr": RATES[name], "weight_decay": 0.1}]
        groups += [{"params": prompt, "lr": PROMPT_RATES[name], "weight_decay": 0.0}]
        # Adam's eps is that of the parameter, the prompt divided by 8, whose gradient is 8 times the prompt's.
        groups[1]["eps"] = 1e-8 / 8
        self.optimizer = torch.optim.AdamW(groups)
        self.losses: list[float] = []

    def loss(self, rows: list[dict]) -> Tensor:
        total, count = 0, 0
        for row in rows:
            labels = torch.tensor(row["labels"], device=DEVICE)
            x = embed(self.base, self.leaves, torch.tensor(row["input_ids"]), activation(self.name))
            if self.family is T5:
                logits = self.base(inputs_embeds=x, labels=labels[None]).logits[0]
            else:
                logits, labels = self.base(inputs_embeds=x).logits[0, -len(labels) : -1], labels[1:]
            total = total + cross_entropy(logits, labels, reduction="sum", label_smoothing=self.smoothing)
            count += int((labels != -100).sum())
        return total / count

    def step(self, rows: list[dict], clip: float = 0.0) -> None:
        if not rows:
            return
        loss = self.loss(rows)
        self.losses.append(float(loss))
        self.optimizer.zero_grad()
        loss.backward()
        if clip:  # by the norm that the parameters' gradients have: the prompt's parameter is the prompt divided by 8
            scale = {key: 8.0 if key.startswith("prompt") else 1.0 for key in self.leaves}
            norm = torch.stack([(leaf.grad * scale[key]).norm() for key, leaf in self.leaves.items()]).norm()
            assert norm > clip, "the case shows nothing"
            for leaf in self.leaves.values():
                leaf.grad *= clip / norm
        self.optimizer.step()


def optimizer_of(model):
    return create_input_tuning_optimizer(model, torch.optim.AdamW, lr=RATES, prompt_lr=PROMPT_RATES, weight_decay=0.1)


def assert_weights(model, alone: Alone, **tolerance) -> None:
    for key, value in adapter_weights(model, alone.name).items():
        assert_close(value, alone.leaves[key].detach(), **(tolerance or {"atol": 1e-8, "rtol": 1e-6}), msg=f"{key}")


CASES = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "rows of one in a batch": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "clipped": {"max_grad_norm": 0.05},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "checkpointed": {"gradient_checkpointing": True},
    "several workers": {"dataloader_num_workers": 1},
}


@pytest.mark.trains_with("transformers Trainer", "many adapters at once: each as a loop by hand trains it alone")
@pytest.mark.parametrize(
    ("family", "case"), [*((LLAMA, case) for case in CASES), (T5, "accumulated"), (T5, "label smoothing")], ids=str
)
def test_each_adapter_is_what_it_becomes_alone(tmp_path, family, case):
    model, base = many(family, SOME)
    rows = data("abbaabbbbbbb")  # the last step has none of "a"
    settings = CASES[case]
    alone = [Alone(family, base, model, name, settings.get("label_smoothing_factor", 0.0)) for name in SOME]
    trainer = trainer_of(model, rows, tmp_path, optimizer=optimizer_of(model), **settings)
    trainer.train()
    for one in alone:
        for step in range(3):
            own = [row for row in rows[4 * step : 4 * step + 4] if row["adapter_name"] == one.name]
            one.step(own, settings.get("max_grad_norm", 0.0))
        assert_weights(model, one)
        logged = [log[f"loss_{one.name}"] for log in trainer.state.log_history if f"loss_{one.name}" in log]
        assert logged == pytest.approx(one.losses, rel=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(one.losses[0] for one in alone), rel=1e-5)


def test_the_number_of_others_rows_changes_nothing(tmp_path):
    """ "a" with two rows a step: beside two of "b", and beside six."""
    weights = []
    for names, size in (("aabb", 4), ("aabbbbbb", 8)):
        model, _ = many(adapters=SOME)
        rows = data(names)
        trainer_of(model, rows, tmp_path, per_device_train_batch_size=size, max_grad_norm=0.05).train()
        weights.append(adapter_weights(model, "a"))
    for key, value in weights[0].items():
        assert_close(weights[1][key], value, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("as_dataset", [True, False], ids=["datasets.Dataset", "a list"])
def test_other_columns_go_and_the_name_stays(tmp_path, as_dataset):
    model, _ = many(adapters=SOME)
    rows = [{**row, "source": "text"} for row in data("abab")]
    trainer = trainer_of(model, Dataset.from_list(rows) if as_dataset else rows, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "adapter_names"}
    assert batch["adapter_names"] == list("abab")


# ---- the order of rows ----------------------------------------------------------------------------------------------


def test_as_many_rows_of_each_in_every_batch():
    names = ["a"] * 12 + ["b"] * 12 + ["c"] * 12
    order = list(EvenRows(names, seed=3))
    assert sorted(order) == list(range(36))
    for start in range(0, 36, 6):
        assert sorted(names[row] for row in order[start : start + 6]) == list("aabbcc")
    own = {name: [row % 12 for row in order if names[row] == name] for name in "abc"}
    assert own["a"] == own["b"] == own["c"] != sorted(own["a"])


def test_unequal_numbers_of_rows_are_spread_over_the_epoch():
    names = ["a"] * 30 + ["b"] * 10
    order = list(EvenRows(names, seed=0))
    assert sorted(order) == list(range(40))
    assert all("".join(names[row] for row in order[at : at + 4]).count("b") == 1 for at in range(0, 40, 4))


def test_each_epoch_has_its_own_order():
    rows = EvenRows(["a"] * 9 + ["b"] * 9, seed=0)
    first = list(rows)
    rows.set_epoch(1)
    assert list(rows) != first
    rows.set_epoch(0)
    assert list(rows) == first


def test_trainer_takes_rows_in_that_order(tmp_path):
    model, _ = many(adapters=SOME)
    rows = data("aaaaaabbbbbb")
    trainer = trainer_of(model, rows, tmp_path, train_sampling_strategy="random", seed=5, num_train_epochs=2)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda batch: seen.append([row["adapter_name"] for row in batch]) or collate(batch)
    trainer.train()
    assert all(sorted(names) == list("aabb") for names in seen)


# ---- stopping -------------------------------------------------------------------------------------------------------


class Rows:
    """How many rows the model gets in training."""

    def __init__(self, model) -> None:
        self.counts: list[int] = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs) -> None:
        if model.training:
            self.counts.append(len(kwargs["input_ids"]))
            assert len(kwargs["adapter_names"]) == len(kwargs["input_ids"])


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
    """ "a" is best at the second evaluation and stops at the fourth, "b" is best at the fifth and stops at the seventh,
    which ends the run."""
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


# ---- evaluation and files -------------------------------------------------------------------------------------------


def test_evaluation_of_each_adapter(tmp_path):
    model, base = many(adapters=SOME)
    rows = {name: data(name * 4, seed=60) for name in SOME}
    trainer = trainer_of(model, data("abab"), tmp_path, eval_dataset=rows)
    metrics = trainer.evaluate()
    want = {name: float(Alone(LLAMA, base, model, name).loss(rows[name])) for name in SOME}
    assert {name: metrics[f"eval_{name}_loss"] for name in SOME} == pytest.approx(want, rel=1e-6)
    together = trainer.evaluate([*rows["a"], *rows["b"]], metric_key_prefix="both")
    assert together["both_loss"] == pytest.approx(sum(want.values()) / 2, rel=1e-6)


@pytest.mark.trains_with("transformers Trainer", "many adapters at once: resume = an uninterrupted run")
def test_all_adapters_are_saved_and_go_on(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
    settings |= {"per_device_train_batch_size": 2, "num_train_epochs": 2, "max_steps": -1}
    rows = data("ab" * 4)
    whole, _ = many(adapters=SOME)
    trainer_of(whole, rows, tmp_path / "whole", **settings).train()
    first, _ = many(adapters=SOME)
    trainer_of(first, rows, tmp_path / "parts", callbacks=[StopRun(6)], **settings).train()
    second, _ = many(adapters=SOME)
    for parameter in second.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    trainer = trainer_of(second, rows, tmp_path / "parts", **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "parts" / "checkpoint-8" / "a", adapter_name="a")
    loaded.load_adapter(tmp_path / "parts" / "checkpoint-8" / "b", adapter_name="b")
    for name in SOME:
        for key, value in adapter_weights(whole, name).items():
            assert_close(adapter_weights(second, name)[key], value, atol=1e-6, rtol=1e-5)
            assert_close(adapter_weights(loaded, name)[key].double(), value.double(), atol=1e-6, rtol=1e-5)


class StopRun(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_training_stop = state.global_step == self.step


# ---- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}, "EarlyStoppingOfEach"),
        ({"ddp_find_unused_parameters": False}, "`ddp_find_unused_parameters` is False"),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, "`torch_compile` is True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_would_mix_adapters(tmp_path, settings, says):
    model, _ = many(adapters=SOME)
    with pytest.raises(ValueError, match=says):
        trainer_of(model, data("ab"), tmp_path, eval_dataset=data("ab"), **settings)


def test_another_loss(tmp_path):
    model, _ = many(adapters=SOME)
    with pytest.raises(ValueError, match="`compute_loss_func` is .*Each adapter's loss is a cross-entropy"):
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

