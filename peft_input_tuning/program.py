"""Whether this process is the command line, which imports torch, transformers and PEFT only when its work begins."""

from __future__ import annotations

import sys
from pathlib import PurePath

PROGRAM = "peft-input-tuning"  # the script that pyproject.toml names


def is_command_line() -> bool:
    """Whether Python was started as `peft-input-tuning …` or `python -m peft_input_tuning …`.

    While Python looks for the module that `-m` names, `sys.argv[0]` is "-m", and the module's name is the word of
    `sys.orig_argv` before the program's own arguments.
    """
    if sys.argv[:1] == ["-m"]:
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == __package__
    return bool(sys.argv) and PurePath(sys.argv[0]).name in (PROGRAM, f"{PROGRAM}.exe")
