"""Base models in GGUF files: transformers wants the file's name beside the folder's, and weights that can be trained
and folded are to be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .extras import needs


def gguf_arguments(base: str, gguf_file: str | None = None) -> dict[str, str]:
    """What `from_pretrained` needs beside the base's name: nothing for a plain checkpoint.

    Args:
        base: folder or hub id of the base model.
        gguf_file: as the user named it. Without, the folder's only GGUF file is taken, if it has no config.json.

    Raises:
        ValueError: it is a GGUF file, and the package that reads it is missing.
    """
    if not gguf_file:
        folder = Path(base)
        files = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            return {}
        gguf_file = files[0].name
    needs("gguf", "gguf")
    return {"gguf_file": gguf_file}


def dense_weights(gguf_file: str | None) -> dict[str, Any]:
    """What a model's `from_pretrained` needs beside its name, so that its weights are plain tensors on every machine.

    Without it transformers keeps them packed where it finds kernels for them, and Trainer refuses the model anyway.

    Args:
        gguf_file: None for a plain checkpoint, which needs nothing.
    """
    if not gguf_file:
        return {}
    from transformers import GgufConfig

    return {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
