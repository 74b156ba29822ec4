"""What trainings side by side share: the frozen model, the tasks' rows as tensors, and the time that is left."""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed

from dense_model import plain_checkpoint
from ensemble import Ensemble, trained_weights
from input_tuning_examples.base_model import Base
from input_tuning_examples.forgetting import prose_loss
from input_tuning_examples.task_data import InputError
from input_tuning_examples.train_and_generate import IGNORED
from methods import METHODS, Method
from peft_input_tuning import input_tuning_parameter_groups
from plan import Budget, Run
from run_training import MAX_LENGTH, features_of, trainable_model
from tasks import Task, read_task, side_by_side


@dataclass(frozen=True)
class Together:
    """Runs of one method and one seed on tasks of like length: one ensemble."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        first = self.runs[0]
        return f"{first.method}.seed{first.seed}.{'+'.join(run.task for run in self.runs)}"


def grouped(budget: Budget, known: list[Run]) -> list[Together]:
    """The runs in their order, those that can be trained together in one place."""
    found: dict[tuple, list[Run]] = {}
    for run in known:
        place = next((place for place, tasks in enumerate(budget.together) if run.task in tasks), run.task)
        found.setdefault((run.method, run.seed, run.rate, place), []).append(run)
    return [Together(tuple(some)) for some in found.values()]


class Bench:
    """What all trainings share: the base, the tokenizer, the rows, the device, and the time that is left."""

    def __init__(self, options: argparse.Namespace, budget: Budget) -> None:
        self.options, self.budget = options, budget
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.place = Base.find(plain_checkpoint(options.model, options.work))
        if self.place.seq2seq:
            raise InputError(f"--model: {options.model!r} is an encoder-decoder model. Use run_all.py for it.")
        self.tokenizer = self.place.tokenizer
        self.tokenizer.padding_side = "right"
        self.end = time.monotonic() + 60 * options.minutes
        self._tasks: dict[str, tuple[Task, dict[str, list[dict]]]] = {}
        self._prose: dict[str, float] = {}

    def time_is_up(self) -> bool:
        return time.monotonic() > self.end

    def task(self, name: str) -> tuple[Task, dict[str, list[dict]]]:
        """A task and its rows as ids; read once."""
        if name not in self._tasks:
            budget = self.budget
            most = {"train": budget.train_rows, "validation": budget.validation_rows, "test": budget.test_rows}
            task = read_task(self.options.data, name, most)
            features = {
                split: features_of(rows, self.tokenizer, False, sys.maxsize if split == "test" else MAX_LENGTH)
                for split, rows in task.rows.items()
            }
            self._tasks[name] = task, features
        return self._tasks[name]

    def autocast(self, method: str) -> contextlib.AbstractContextManager:
        wanted = self.options.dtype == "bfloat16" or METHODS[method].config is None
        return torch.autocast(self.device.type, torch.bfloat16) if wanted else contextlib.nullcontext()

    def ensemble(self, together: Together) -> Ensemble:
        """The trainings at their start. Each has the start that it would have alone."""
        first = together.runs[0]
        method = METHODS[first.method]
        base = self.place.load("float32" if method.config is None else self.options.dtype).to(self.device)
        members, model = [], base
        for run in together.runs:
            set_seed(run.seed)
            model = trainable_model(copy.deepcopy(base), method).to(self.device)
            members.append(trained_weights(model))
        return Ensemble(model, members, first.rate, first.steps, groups_by_name(model, method, first.rate))

    def steps(self, together: Together) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and labels of each step, `(trainings, rows, length)`, on the device."""
        rows = [self.task(run.task)[1]["train"] for run in together.runs]
        lengths = [[len(row["input_ids"]) for row in of_one] for of_one in rows]
        first = together.runs[0]
        batches = side_by_side(lengths, first.steps, self.budget.batch_size, first.seed)
        return [
            self.tensors([[of_one[row] for row in batch] for of_one, batch in zip(rows, step, strict=True)])
            for step in zip(*batches, strict=True)
        ]

    def validation(self, together: Together) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The validation rows in batches; a training with fewer has rows without a target."""
        size = self.budget.batch_size
        rows = [
            sorted(self.task(run.task)[1]["validation"], key=lambda row: len(row["input_ids"]))
            for run in together.runs
        ]
        batches = -(-max(map(len, rows)) // size)
        empty = {"input_ids": [self.tokenizer.pad_token_id], "labels": [IGNORED]}
        filled = [[*of_one, *[empty] * (batches * size - len(of_one))] for of_one in rows]
        return [self.tensors([of_one[n * size : (n + 1) * size] for of_one in filled]) for n in range(batches)]

    def tensors(self, rows: list[list[dict]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of each training as ids and labels, padded on the right."""
        length = max(len(row["input_ids"]) for of_one in rows for row in of_one)
        pad = self.tokenizer.pad_token_id
        ids = [[row["input_ids"] + [pad] * (length - len(row["input_ids"])) for row in of_one] for of_one in rows]
        labels = [[row["labels"] + [IGNORED] * (length - len(row["labels"])) for row in of_one] for of_one in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(labels, device=self.device)

    def untrained_prose(self, dtype: str) -> float:
        """Loss of the base on plain prose."""
        if dtype not in self._prose:
            self._prose[dtype] = prose_loss(self.place.load(dtype).to(self.device), self.tokenizer)
        return self._prose[dtype]


def groups_by_name(model: torch.nn.Module, method: Method, rate: float) -> list[dict[str, Any]] | None:
    """The optimizer's groups with names instead of parameters, where the soft prompt has a rate of its own."""
    prompt_rate = method.rate_of_prompt(rate)
    if prompt_rate is None:
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {"names": [names[id(parameter)] for parameter in group["params"]], "lr": group["lr"]}
        for group in input_tuning_parameter_groups(model, rate, prompt_rate)
    ]
