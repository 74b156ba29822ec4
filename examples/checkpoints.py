"""Faults in training: which checkpoint can be gone on from, and when to stop before a bad one is written.

A checkpoint of transformers' Trainer is a folder that is written file by file, `trainer_state.json` last. A process
that is killed meanwhile, or a disk that is full, leaves a folder that looks like the newest checkpoint and is none.
"""

from __future__ import annotations

import errno
import json
import math
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

RESUME = "go on from the last complete checkpoint with --resume_from_checkpoint last"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_WORDS = re.compile(
    r"no space left|disk quota|file too large|\bos error (27|28|122)\b"  # of the system, Python and Rust
    r"|file write failed|PytorchStreamWriter failed|iostream error",  # of torch, which does not say why
    re.IGNORECASE,
)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what to do."""


# ---- which checkpoint is complete -----------------------------------------------------------------------------------


def last_complete_checkpoint(output_dir: str | Path, processes: int = 1) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that can be gone on from.

    Args:
        output_dir: the folder that has `checkpoint-N` folders; it need not exist.
        processes: how many are to go on from it.

    Returns:
        The folder, or None; and the newer folders that are incomplete, newest first.
    """
    numbered = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    incomplete = []
    for step, path in sorted(numbered, reverse=True):
        if is_complete(path, step, processes):
            return path, incomplete
        incomplete.append(path)
    return None, incomplete


def is_complete(checkpoint: Path, step: int, processes: int = 1) -> bool:
    """Whether everything that Trainer writes is there and whole: its state, which it writes last, the random states
    of all processes, and weights and optimizers whose files are not cut off."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if state.get("global_step") != step:
        return False
    random_states = list(checkpoint.glob("rng_state*.pth"))
    of_several = [path for path in random_states if path.name != "rng_state.pth"]
    if not random_states or (of_several and len(of_several) < max(2, processes)):
        return False
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    pickles = [path for path in files if path.suffix in (".pt", ".pth")]
    return bool(weights) and all(map(_is_whole, weights)) and all(map(zipfile.is_zipfile, pickles))


def _is_whole(path: Path) -> bool:
    """Whether a file of safetensors is as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


# ---- when to stop ---------------------------------------------------------------------------------------------------


class StopAtNonFinite(TrainerCallback):
    """Ends training where a loss, a gradient or a trained weight is NaN or infinite, before it is saved or taken for
    the best.

    Trainer's `logging_nan_inf_filter` must be off: it replaces such losses in the logs.
    """

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                self._stop(state, f"{name} is {value}")

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if not (control.should_save or control.should_evaluate) or model is None:
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(_local(parameter)).all():
                self._stop(state, f"`{name}` holds NaN or infinite values")

    def _stop(self, state, what: str) -> None:
        rates = [log["learning_rate"] for log in state.log_history if "learning_rate" in log]
        rate = f" (learning rate {rates[-1]:.3g})" if rates else ""
        raise TrainingError(
            f"At step {state.global_step}{rate} {what}. Nothing was saved of this step. Lower --learning_rate or "
            f"--max_grad_norm, look for broken rows in --train_data, or train in float32; then {RESUME}."
        )


def _local(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()  # this process's shard


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


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
