"""The device that the suite runs on: the CPU, or `make test DEVICE=cuda`.

Tests name it where they make a tensor. As torch's default device it would hold for the package's own tensors too, and
hide one that is made on the wrong device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

_NAME = os.environ.get("DEVICE", "cpu")
if _NAME == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Trainer, accelerate and scripts take a GPU if they see one
if _NAME == "cuda":  # gradients that are compared bit for bit: attention's backward pass adds in any order otherwise
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
if _NAME == "emulated":
    import emulated_device

    emulated_device.register()
    os.environ["ACCELERATE_TORCH_DEVICE"] = _NAME  # it would take a GPU by itself

DEVICE = torch.device(_NAME)
# TensorFloat-32 has 10 bits of mantissa; the tolerances of the tests are for float32.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a collator or a tokenizer has made, with its tensors on the device."""
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
