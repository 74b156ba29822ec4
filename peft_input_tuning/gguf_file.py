"""Base models in GGUF files: transformers wants the file's name beside the folder's."""

from __future__ import annotations

from pathlib import Path


def gguf_arguments(base: str, gguf_file: str | None = None) -> dict[str, str]:
    """What `from_pretrained` needs beside the base's name: nothing for a plain checkpoint.

    Args:
        base: folder or hub id of the base model.
        gguf_file: as the user named it. Without, the folder's only GGUF file is taken, if it has no config.json.
    """
    if gguf_file:
        return {"gguf_file": gguf_file}
    folder = Path(base)
    files = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
    return {"gguf_file": files[0].name} if len(files) == 1 else {}
