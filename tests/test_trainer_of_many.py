"""`ManyAdapters`: a Trainer trains several adapters at once; each becomes what a loop by hand makes of it alone."""

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
from peft_input_tuning.training import ManyAdapters
from peft_input_tuning.training.rows import EvenRows
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
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
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


class StopB(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            model.set_requires_grad(["b"], False)


def test_logs_of_an_adapter_that_stops(tmp_path):
    """Means over the steps in which it trained, and nothing afterwards."""
    apart, together = [], []
    for logs, every in ((apart, 1), (together, 2)):
        model, _ = many(LLAMA, SOME)
        trainer = trainer_of(model, data("ab" * 12), tmp_path, callbacks=[StopB()], max_steps=6, logging_steps=every)
        trainer.train()
        logs += [log for log in trainer.state.log_history if "loss" in log]
    assert ["loss_b" in log for log in apart] == [True] * 3 + [False] * 3
    assert ["loss_b" in log for log in together] == [True, True, False]
    assert together[1]["loss_b"] == pytest.approx(apart[2]["loss_b"], rel=1e-5)


def test_an_adapter_without_rows_in_a_step_that_clips(tmp_path):
    model, _ = many(LLAMA, SOME)
    trainer_of(model, data("aabbbbbb"), tmp_path, max_steps=2, max_grad_norm=1.0).train()


class Endless(torch.utils.data.Dataset):
    """Has a length, and a row for any number."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict:
        return data("ab" * 4)[row % 8]


def test_a_dataset_that_knows_no_end(tmp_path):
    model, _ = many(LLAMA, SOME)
    trainer = trainer_of(model, Endless(), tmp_path, max_steps=2, train_sampling_strategy="random")
    assert trainer.train().global_step == 2


def test_a_name_with_a_slash_is_refused(tmp_path):
    """Trainer would not find its file again when the run is resumed."""
    model, _ = many(LLAMA, {"a": {}, "org/b": {}})
    with pytest.raises(ValueError, match="'org/b' has a slash in its name"):
        trainer_of(model, data("aa"), tmp_path)


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
