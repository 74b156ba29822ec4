"""`ManyAdapters`: a Trainer trains several adapters at once, and each becomes what a loop by hand makes of it alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from adapters import adapted
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
@pytest.mark.parametrize("family", [LLAMA, T5], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_each_adapter_is_what_it_becomes_alone(tmp_path, family, case):
    if family is T5 and case in ("several workers", "checkpointed"):
        pytest.skip("once is enough")
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
