"""Writing a file so that a half-written one is never found under its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_file_to_write(argument: str, path: Path | None) -> None:
    """Raises ValueError where `path` cannot be a file to write, before any work is done; None is no file."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{argument}: {str(path)!r} is a folder, or in a folder that does not exist. Name a file.")
    try:
        _scratch(path).touch()
        _scratch(path).unlink()
    except OSError as error:
        raise ValueError(
            f"{argument}: {str(path)!r} cannot be written ({error.strerror}). Name another file."
        ) from None


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it becomes `path` at the end, and goes away if something goes wrong."""
    scratch = _scratch(path)
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
