"""Writing a folder so that a half-written one is never taken for a whole one.

    a new folder          .NAME.unfinished beside it, renamed at the end
    an empty one          .unfinished inside of it, whose files move up at the end: it may be a mount point, the
                          current folder or behind a link, which cannot be replaced

The unfinished folder is locked while somebody writes it. What a killed process has left is known by its having no
lock, and is cleared by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".unfinished"
_MOVED = ".moved.json"  # names that a finished folder moves up, so that a killed move can be undone
_OF_THE_SYSTEM = {"lost+found"}  # at the root of a new volume


def check_folder_to_write(argument: str, path: str | Path) -> None:
    """Raises if `path` cannot be a folder to write, before any work is done.

    Raises:
        ValueError: it is a file, holds something, cannot be written, or is being written by another process.
    """
    _Unfinished(argument, Path(path)).close()


@contextmanager
def unfinished_folder(argument: str, path: str | Path, last: str) -> Iterator[Path]:
    """A folder to write to, which becomes `path` at the end and goes away if something goes wrong.

    Args:
        argument: what errors call `path`.
        path: a folder that does not exist, or is empty.
        last: the file that says that the folder is whole; it comes last.

    Raises:
        ValueError: as `check_folder_to_write`.
    """
    folder = _Unfinished(argument, Path(path))
    try:
        yield folder.scratch
        folder.finish(last)
    finally:
        folder.close()


class _Unfinished:
    """One folder that is being written, with its lock."""

    def __init__(self, argument: str, path: Path) -> None:
        self.target = path.resolve()  # the place behind links
        self.inside = self.target.exists()
        self.scratch = self.target / _UNFINISHED
        if not self.inside:
            self.scratch = self.target.with_name(f".{self.target.name}{_UNFINISHED}")
        name = f"{argument}: {str(path)!r}"
        if self.inside and (not self.target.is_dir() or self._others()):
            raise ValueError(f"{name} exists and is not an empty folder. Choose a new one.")
        self._made = [parent for parent in self.scratch.parents if not parent.exists()]
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.scratch, os.O_RDONLY) if fcntl else -1
        except OSError as error:
            raise ValueError(f"{name} cannot be written ({error.strerror}). Choose another folder.") from None
        try:
            self._take()
        except OSError:
            self._unlock()
            raise ValueError(
                f"{name} is being written by another process. Wait for it, or choose another folder."
            ) from None

    def _take(self) -> None:
        if fcntl:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._lock), self.scratch.stat()):  # the other has just finished
                raise BlockingIOError
        self._clear()

    def _unlock(self) -> None:
        if fcntl:
            os.close(self._lock)

    def _others(self) -> set[str]:
        """What is in the target and not left there by a killed process."""
        return {entry.name for entry in self.target.iterdir()} - {_UNFINISHED} - _OF_THE_SYSTEM - self._moved()

    def _moved(self) -> set[str]:
        try:
            return set(json.loads((self.scratch / _MOVED).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return set()

    def _clear(self) -> None:
        for left in [self.target / name for name in self._moved()] + list(self.scratch.iterdir()):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def finish(self, last: str) -> None:
        """Moves the folder to its place."""
        if not self.inside:
            self.scratch.rename(self.target)
            self._made = []
            return
        names = sorted((entry.name for entry in self.scratch.iterdir()), key=lambda name: name == last)
        (self.scratch / _MOVED).write_text(json.dumps(names), encoding="utf-8")
        for name in names:
            (self.scratch / name).rename(self.target / name)
        (self.scratch / _MOVED).unlink()

    def close(self) -> None:
        """Takes away what is left of an unfinished folder, and gives the lock back."""
        try:
            if self.scratch.exists():
                self._clear()
                self.scratch.rmdir()
            for parent in self._made:
                with suppress(OSError):  # another is writing there by now
                    parent.rmdir()
        finally:
            self._unlock()
