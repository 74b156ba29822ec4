"""Faults that end training: a loss that is not finite, and a disk that is full."""

from __future__ import annotations

import errno
import math
import re

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from .checkpoints import RESUME, last_complete_checkpoint

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_WORDS = re.compile(
    r"no space left|disk quota|file too large|\bos error (27|28|122)\b"  # of the system, Python and Rust
    r"|file write failed|PytorchStreamWriter failed|iostream error",  # of torch, which does not say why
    re.IGNORECASE,
)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what to do."""


class CheckedTrainer(Trainer):
    """Ends training at the step whose loss is NaN or infinite, before the optimizer uses it. And goes on where Trainer
    does not: from the last step without one more, and with early stopping that the checkpoint knows nothing of.

    `logging_nan_inf_filter` must be off: it replaces such losses. Both look at each loss, and a GPU is waited for.
    """

    def _run_epoch(self, *args, **kwargs) -> None:  # Trainer's, as of transformers 5.23: it counts after a step only
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # Trainer's next save raises KeyError where its name is missing
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            _stop(self.state.global_step + 1, self.optimizer, f"the loss is {loss.item()}")
        return loss


class StopAtNonFinite(TrainerCallback):
    """Ends training where a validation loss or a trained weight is NaN or infinite, before it is saved or taken for
    the best."""

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs) -> None:
        loss = (logs or {}).get("eval_loss", 0.0)
        if not math.isfinite(loss):
            _stop(state.global_step, optimizer, f"eval_loss is {loss}")

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if control.should_save or control.should_evaluate or control.should_training_stop:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            if name := _first_not_finite(trained):
                _stop(state.global_step, optimizer, f"the weight `{name}` is NaN or infinite")

    on_epoch_end = on_step_end


def _stop(step: int, optimizer: torch.optim.Optimizer | None, what: str) -> None:
    rates = sorted({group["lr"] for group in optimizer.param_groups}) if optimizer else []
    at = f" (learning rate {' and '.join(f'{rate:.3g}' for rate in rates)})" if rates else ""
    raise TrainingError(
        f"At step {step}{at} {what}. Nothing was saved of this step. Lower --learning_rate or --max_grad_norm, "
        f"look for broken rows in the data, or train in float32; then {RESUME}."
    )


def _first_not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    parts = {name: _part(tensor) for name, tensor in tensors.items()}
    # One number for all of them, so that a GPU is waited for once.
    if math.isfinite(torch.nn.utils.get_total_norm(parts.values(), norm_type=math.inf)):
        return None
    return next(name for name, part in parts.items() if not torch.isfinite(part).all())


@torch.no_grad()
def _part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of it, with DeepSpeed's ZeRO-3 and with FSDP."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def is_out_of_room(error: BaseException) -> bool:
    """Whether a write failed because the disk or the quota is full. Libraries wrap the error of the system."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            return True
        if isinstance(seen, OSError | RuntimeError | SafetensorError) and _NO_ROOM_WORDS.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def out_of_room(error: BaseException, output_dir: str) -> str:
    """What to tell the user."""
    _, incomplete = last_complete_checkpoint(output_dir)
    useless = f" ({', '.join(map(str, incomplete))}: incomplete, can be deleted)" if incomplete else ""
    return f"--output_dir: no room left to write in {output_dir!r}: {error}. Free some{useless}; then {RESUME}."
