"""Early stopping of each adapter by itself, while the others train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optimizer import parameters_of_adapters


def trained_adapters(model: nn.Module) -> list[str]:
    """The adapters that train: those with a parameter that requires a gradient."""
    return [name for name, own in parameters_of_adapters(model).items() if any(p.requires_grad for p in own)]


class EarlyStoppingOfEach(TrainerCallback):
    """Stop each adapter when its own validation loss goes down no more, and give it its best weights back.

    What it reads is `eval_<adapter>_loss`, which Trainer measures with `eval_dataset={"<adapter>": rows, ...}`. Rows
    of a stopped adapter leave the batches of `ManyAdapters`; when all have stopped, training ends. At the end of
    training every adapter that was evaluated has the weights of its best evaluation.

    A run that is resumed from a checkpoint starts with all adapters again, and counts anew.

    Args:
        patience: how many evaluations in a row may be no better.
        threshold: by how much a loss must be lower to be better.
    """

    def __init__(self, patience: int = 3, threshold: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"`patience` must be >= 1, got {patience}.")
        self.patience, self.threshold = patience, threshold
        self.best: dict[str, tuple[float, list[torch.Tensor]]] = {}
        self.waited: dict[str, int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.best, self.waited = {}, {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        model, metrics = kwargs["model"], kwargs["metrics"]
        for name in trained_adapters(model):
            loss = metrics.get(f"eval_{name}_loss")
            if loss is None:
                continue
            if name not in self.best or loss < self.best[name][0] - self.threshold:
                self.best[name] = loss, [p.detach().clone() for p in parameters_of_adapters(model)[name]]
                self.waited[name] = 0
                continue
            self.waited[name] += 1
            if self.waited[name] >= self.patience:
                model.set_requires_grad([name], requires_grad=False)
                self._restore(model, name)
        if not trained_adapters(model):
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name in self.best:
            self._restore(kwargs["model"], name)

    @torch.no_grad()
    def _restore(self, model: nn.Module, name: str) -> None:
        for parameter, value in zip(parameters_of_adapters(model)[name], self.best[name][1], strict=True):
            parameter.copy_(value)
