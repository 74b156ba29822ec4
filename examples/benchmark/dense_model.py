"""A model out of a GGUF file, written once as a plain checkpoint: reading that takes a second instead of twenty, and
full fine-tuning needs dense weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from input_tuning_examples.packaged_model import find_model


def model_label(model: str) -> str:
    """The name that records have for a model: without its folder or hub organisation. Raises InputError as below."""
    name, gguf_file = find_model(model)
    return Path(gguf_file).stem if gguf_file else Path(name).name


def plain_checkpoint(model: str, work: Path) -> str:
    """The folder or hub id to load; for a GGUF file a folder in `work`, written if it is not there.

    Raises:
        InputError: there is no such model.
    """
    name, gguf_file = find_model(model)
    if not gguf_file:
        return name
    folder = work / "models" / model_label(model)
    if not folder.is_dir():
        import torch

        from input_tuning_examples.train_and_generate import load_base

        scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
        dense, tokenizer = load_base(name, gguf_file, torch.float32)
        dense.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(scratch)
    return str(folder)
