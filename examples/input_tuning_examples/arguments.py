"""Arguments of scripts: a parser whose errors are one line, checked numbers, a folder that can be made."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NoReturn

from .task_data import InputError


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. See --help.\n")


def at_least(smallest: int):
    """As the commands have it; their package brings torch, and `--help` is to be there at once."""

    def integer(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be an integer >= {smallest}, got {text!r}")
        return int(text)

    return integer


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def check_can_be_written(path: str | Path, argument: str = "--output-dir") -> None:
    """Raises InputError where a folder cannot be made or written to; nothing is made yet."""
    folder = Path(path).absolute()
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"{argument}: {str(path)!r} cannot be written ({error.strerror}). Pass a folder in which you may write."
        ) from None


def output_dir(path: str | Path) -> Path:
    """Makes a folder, in which files can be written."""
    check_can_be_written(path)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
