"""The loss of a validation set per target token, whatever the size of its batches and the number of processes.

Trainer takes the mean of the batches' means, so that a batch of short targets counts as much as one of long ones; with
several processes it also divides each batch by the targets of all, and counts the rows that fill up the last batches
(seen with transformers 5.23). A best checkpoint, early stopping and a model card should not depend on that.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput

from .faults import CheckedTrainer
from .train_and_generate import IGNORED


class TokenMeanTrainer(CheckedTrainer):
    """A Trainer whose `eval_loss` is the mean over all targets. Its validation rows must be `filled_up`."""

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self.losses_and_targets: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, targets = self.accelerator.reduce(torch.stack(self.losses_and_targets).sum(0)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / targets
        return output

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args, **kwargs) -> tuple:
        labels = inputs["labels"] if self.model.config.is_encoder_decoder else inputs["labels"][:, 1:]
        averaged = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False  # the mean of this process's targets is wanted
        try:
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = averaged
        targets = (labels != IGNORED).sum().to(loss)
        total = torch.where(targets > 0, loss * targets, 0)  # the mean of nothing is NaN
        self.losses_and_targets.append(torch.stack([total, targets]))
        return (loss, *rest)


def filled_up(features: list[dict], size: int) -> list[dict]:
    """The rows, and as many without a target as make their number a multiple of `size`, the rows of a batch of all
    processes: accelerate would take rows a second time."""
    empty = {"input_ids": features[0]["input_ids"][:1], "attention_mask": [1], "labels": [IGNORED]}
    return [*features, *[empty] * (-len(features) % size)]
