"""The command line: `peft-input-tuning` with `export ADAPTER OUTPUT`, `to-lora ADAPTER OUTPUT`,
`grow-base BASE OUTPUT`, `inspect ADAPTER`, `familiarity DATA.jsonl --model MODEL` and `run PROGRAM ...`.

Imports that only one command needs stand inside of its `run`.
"""

from __future__ import annotations

import argparse
import sys

from ..output.words import printable
from ..version import __version__
from . import export, familiarity, grow_base, inspect, run, to_lora


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 unusable arguments."""
    argv = sys.argv[1:] if argv is None else argv
    runs = argv[:1] == ["run"]  # what follows the name of a program is not ours to parse
    arguments = _parser().parse_args(argv[:2] if runs else argv)
    try:
        if not runs:
            return arguments.run(arguments)
        program = run.prepared(arguments.program, argv[2:])
    except (ValueError, OSError, RuntimeError) as error:
        said = printable(" ".join(str(error).split()))  # libraries' messages have several lines
        print(f"peft-input-tuning {arguments.command}: {said}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1
    return program()  # its errors are its own


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-input-tuning", description="Tools around input-tuning adapters.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "export",
        help="write an adapter and its base model as one plain checkpoint",
        description="Writes an adapter and its base model as one plain checkpoint, which loads with transformers "
        "alone and costs nothing extra at inference.",
    )
    export.add_arguments(command)
    command.set_defaults(run=export.run)
    command = commands.add_parser(
        "to-lora",
        help="write an adapter as a LoRA, which PEFT and engines load without this package",
        description="Writes an adapter, its prompt included, as a LoRA on the word embedding. Stock PEFT loads it, "
        "and engines that serve many LoRAs on one base model do.",
    )
    to_lora.add_arguments(command)
    command.set_defaults(run=to_lora.run)
    command = commands.add_parser(
        "grow-base",
        help="write a base model with words for the virtual tokens of its LoRAs",
        description="Writes a base model with more words, once for all adapters that to-lora makes LoRAs of. Only "
        "bases whose table has no words to spare need it; to-lora says so.",
    )
    grow_base.add_arguments(command)
    command.set_defaults(run=grow_base.run)
    command = commands.add_parser(
        "inspect",
        help="show what an adapter's virtual tokens are near to, and which words it moves",
        description="Shows what an adapter has learned, in words of the vocabulary.",
    )
    inspect.add_arguments(command)
    command.set_defaults(run=inspect.run)
    command = commands.add_parser(
        "familiarity",
        help="measure how familiar inputs are to a frozen model",
        description="Measures how familiar inputs are to a frozen model: the model's own bits per byte and the "
        "tokenizer's tokens per byte, beside plain prose, and how frequent the inputs' bigrams are in a corpus.",
    )
    familiarity.add_arguments(command)
    command.set_defaults(run=familiarity.run)
    command = commands.add_parser(
        "run",
        help="run a program that knows PEFT but not this package: run lm_eval --model hf ...",
        description="Runs a program, such as lm_eval, in which PEFT knows input-tuning adapters. Without it, a "
        "program that does not import peft_input_tuning ends with KeyError: 'INPUT_TUNING'.",
    )
    run.add_arguments(command)
    return parser
