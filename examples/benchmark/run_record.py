"""What a run's record says beside its figures: which run, on what machine, with which versions and configuration."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from dense_model import model_label
from input_tuning_examples.peak_memory import peak_memory_mb
from methods import METHODS
from plan import Budget, Run
from records import Record
from tasks import Task

SAMPLES = 20
PACKAGES = (
    "peft-input-tuning",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "evaluate",
    "sacrebleu",
    "nltk",
    "rouge-score",
    "pycocoevalcap",
)


def machine() -> str:
    """The kind of machine: the accelerator's name, or the processor's and its number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def peak_memory() -> int | None:
    """In MB: the accelerator's, or the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return peak_memory_mb()


def head_of(run: Run, budget: Budget, task: Task, earlier: Record | None) -> Record:
    """What a record has before its run begins.

    Args:
        earlier: what an attempt before it left.
    """
    return {
        **asdict(run),
        "budget": budget.name,
        "attempts": (earlier or {}).get("attempts", 0) + 1,
        "errors": (earlier or {}).get("errors", []),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "data_hash": task.data_hash,
    }


def config_of(run: Run, budget: Budget, task: Task, model: torch.nn.Module, model_name: str, dtype: str) -> Record:
    """With what a run trains.

    Args:
        model: with the method on it.
    """
    prompt_rate = METHODS[run.method].rate_of_prompt(run.rate)
    return {
        "model": model_label(model_name),
        "dtype": dtype,
        "peft": _configurations(model),
        "learning_rate": {"prompt": prompt_rate, "adapter": run.rate} if prompt_rate else run.rate,
        "steps": run.steps,
        "batch_size": budget.batch_size,
        "rows": {split: len(rows) for split, rows in task.rows.items()},
    }


_OF_THE_MACHINE = ("base_model_name_or_path", "peft_version", "weights_in_checkpoint", "inference_mode")


def _configurations(model: torch.nn.Module) -> Any:
    """Of the adapters, from outside to inside: one, or a list of those that lie around each other."""
    found = []
    while isinstance(model, PeftModel):
        found.append(_plain(model.active_peft_config.to_dict()))
        model = model.get_base_model()
    return found if len(found) > 1 else (found or [None])[0]


def _plain(value: Any) -> Any:
    """What JSON can hold, without what a run does not depend on."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None and key not in _OF_THE_MACHINE}
    if isinstance(value, set | list | tuple):
        return sorted(map(_plain, value), key=str)
    return value if isinstance(value, bool | int | float | str) else str(value)
