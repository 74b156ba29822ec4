"""Several trainings of one method at once, on one frozen model: tasks, or seeds, side by side.

A small model leaves an accelerator idle, which waits for its next kernel. Here each kernel is for all trainings:
`torch.func.vmap` over what is trained, as in torch's tutorial on ensembles. What is frozen is there once. Each
training is what it is alone: its loss is the mean over its own targets, its gradients are clipped by their own norm,
and AdamW looks at each number for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from input_tuning_examples.train_and_generate import IGNORED

LARGEST_NORM = 1.0  # of a training's gradients, Trainer's default
Weights = dict[str, torch.Tensor]


def trained_weights(model: torch.nn.Module) -> Weights:
    """What is trained of a model, by name; copies."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Ensemble:
    """Trainings of one method, which differ in what is trained and in their rows.

    Args:
        model: with the method on it; what it has frozen is everyone's. It is left as it is until `give` is called.
        members: where each training starts: what is trained, by the names that it has in `model`.
        groups: of the optimizer, as names and options; None is one group of all.
        rate: learning rate of what no group has a rate for.
        steps: of the whole training, of which the first twentieth is a warm-up, and whose rate ends at 0.

    Raises:
        ValueError: members have tensors of different shapes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        members: list[Weights],
        rate: float,
        steps: int,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        shapes = [{name: tuple(tensor.shape) for name, tensor in member.items()} for member in members]
        if any(other != shapes[0] for other in shapes):
            raise ValueError("`members` have tensors of different shapes. Train these apart.")
        self.model = model.eval()  # what is frozen has no dropout
        self.weights = {
            name: torch.stack([member[name] for member in members]).requires_grad_(True) for name in members[0]
        }
        self.best = {name: tensor.detach().clone() for name, tensor in self.weights.items()}
        some = next(iter(self.weights.values()))
        self.best_loss = torch.full((len(members),), torch.inf, device=some.device)
        self.best_step = torch.zeros(len(members), dtype=torch.long, device=some.device)
        self.step_number = 0
        grouped = groups or [{"names": list(self.weights), "lr": rate}]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.weights[name] for name in group["names"]], "lr": group.get("lr", rate)}
                for group in grouped
            ],
            weight_decay=0.0,
            fused=some.is_cuda or None,
        )
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, max(1, steps // 20), steps)
        self._losses: Callable = vmap(self._sums, randomness="error")

    def _sums(self, weights: Weights, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A training's loss over its targets, and how many these are; no word sees the pads, on the right of it."""
        logits = functional_call(self.model, weights, kwargs={"input_ids": ids, "use_cache": False}).logits
        logits = logits[:, -labels.shape[1] :]  # PEFT's prompt-tuning gives those of its virtual tokens too
        following = labels[:, 1:].flatten()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), following, ignore_index=IGNORED, reduction="sum")
        return loss, (following != IGNORED).sum()

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One step of each training; returns their losses, a number for each.

        Args:
            ids, labels: `(trainings, rows, length)`.
        """
        sums, counts = self._losses(self.weights, ids, labels)
        losses = sums / counts
        losses.sum().backward()
        self._clip()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return losses.detach()

    def _clip(self) -> None:
        """As `clip_grad_norm_` for each training by itself."""
        gradients = [tensor.grad for tensor in self.weights.values()]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (LARGEST_NORM / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.reshape(-1, *[1] * (gradient.dim() - 1)))

    @torch.no_grad()
    def validate(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Mean loss over all targets of the batches for each training; keeps what is best of each."""
        total, targets = torch.zeros_like(self.best_loss), torch.zeros_like(self.best_loss)
        for ids, labels in batches:
            sums, counts = self._losses(self.weights, ids, labels)
            total, targets = total + sums, targets + counts
        losses = total / targets
        better = losses < self.best_loss
        for name, tensor in self.weights.items():
            chosen = better.reshape(-1, *[1] * (tensor.dim() - 1))
            self.best[name] = torch.where(chosen, tensor, self.best[name])
        self.best_loss = torch.where(better, losses, self.best_loss)
        self.best_step = torch.where(better, self.step_number, self.best_step)
        return losses

    def give(self, member: int) -> torch.nn.Module:
        """The model with what was best of one training, as if it had been trained alone; until the next call."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.best:
                    parameter.copy_(self.best[name][member])
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """All that a training needs to go on."""
        return {
            "weights": {name: tensor.detach() for name, tensor in self.weights.items()},
            "best": self.best,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "step": self.step_number,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(state["weights"][name])
        self.best, self.best_loss, self.best_step = state["best"], state["best_loss"], state["best_step"]
        self.step_number = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
