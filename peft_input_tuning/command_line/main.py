"""The command line: `peft-input-tuning` with `export ADAPTER OUTPUT`, `to-lora ADAPTER OUTPUT`,
`grow-base BASE OUTPUT`, `inspect ADAPTER`, `familiarity DATA.jsonl --model MODEL`, `compare RUN RUN ...` and
`run PROGRAM ...`.

Each command is a file with `add_arguments`; `check`, which says what is wrong with the arguments; and `run`. Torch,
transformers and PEFT are imported after `check`, so these imports stand inside of functions.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from ..output.words import printable
from ..program import PROGRAM
from ..version import __version__
from . import compare, export, familiarity, grow_base, inspect, run, to_lora

COMMANDS: dict[str, tuple[Any, str, str]] = {  # module, help, description
    "export": (
        export,
        "write an adapter and its base model as one plain checkpoint",
        "Writes an adapter and its base model as one plain checkpoint, which loads with transformers alone and costs "
        "nothing extra at inference.",
    ),
    "to-lora": (
        to_lora,
        "write an adapter as a LoRA, which PEFT and engines load without this package",
        "Writes an adapter, its prompt included, as a LoRA on the word embedding. Stock PEFT loads it, and engines "
        "that serve many LoRAs on one base model do.",
    ),
    "grow-base": (
        grow_base,
        "write a base model with words for the virtual tokens of its LoRAs",
        "Writes a base model with more words, once for all adapters that to-lora makes LoRAs of. Only bases whose "
        "table has no words to spare need it; to-lora says so.",
    ),
    "inspect": (
        inspect,
        "show what an adapter's virtual tokens are near to, and which words it moves",
        "Shows what an adapter has learned, in words of the vocabulary.",
    ),
    "familiarity": (
        familiarity,
        "measure how familiar inputs are to a frozen model",
        "Measures how familiar inputs are to a frozen model: the model's own bits per byte and the tokenizer's tokens "
        "per byte, beside plain prose, and how frequent the inputs' bigrams are in a corpus.",
    ),
    "compare": (
        compare,
        "show training runs side by side: figures, settings that differ, curves",
        "Shows training runs side by side, of train.py or of any transformers Trainer: their figures, the settings "
        "that differ, and their losses.",
    ),
    "run": (
        run,
        "run a program that knows PEFT but not this package: run lm_eval --model hf ...",
        "Runs a program, such as lm_eval, in which PEFT knows input-tuning adapters. Without it, a program that does "
        "not import peft_input_tuning ends with KeyError: 'INPUT_TUNING'.",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 unusable arguments, 130 interrupted.

    An error is one line. `python -X dev -m peft_input_tuning ...` shows where it comes from.
    """
    argv = sys.argv[1:] if argv is None else argv
    runs = argv[:1] == ["run"]  # what follows the name of a program is not ours to parse
    arguments = _parser().parse_args(argv[:2] if runs else argv)
    command = COMMANDS[arguments.command][0]
    try:
        if not runs:
            command.check(arguments)
            if getattr(command, "NEEDS_MODELS", True):
                _register()
            return command.run(arguments)
        _register()
        program = run.prepared(arguments.program, argv[2:])
    except KeyboardInterrupt:
        return _failed(arguments.command, "interrupted", 130)
    except Exception as error:  # of whatever library: a traceback is no answer to a user
        if sys.flags.dev_mode or (runs and isinstance(error, ImportError)):  # which is the program's own
            raise
        expected = isinstance(error, ValueError | OSError | RuntimeError | ImportError)
        said = str(error) if expected else f"{type(error).__name__}: {error}"
        return _failed(arguments.command, said, 2 if isinstance(error, ValueError | OSError) else 1)
    return program()  # its errors are its own


def _register() -> None:
    from ..api import register_method  # and with it torch, transformers and PEFT

    register_method()


def _failed(command: str, message: str, status: int) -> int:
    said = printable(" ".join(_with_options(command, message).split()))  # libraries' messages have several lines
    print(f"{PROGRAM} {command}: {said}", file=sys.stderr)
    return status


def _with_options(command: str, message: str) -> str:
    """A message in which a function names its arguments, with the options instead: --max-rank for `max_rank`."""
    parser = _Parser()
    COMMANDS[command][0].add_arguments(parser)
    for option in re.findall(r"--[a-z-]+", parser.format_help()):
        argument = option.removeprefix("--").replace("-", "_")
        message = message.replace(f"`{argument}`", option)
    return message


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, printable(f"{self.prog}: {message}. See {self.prog} --help.") + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Tools around input-tuning adapters.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary, description) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=description))
    return parser
