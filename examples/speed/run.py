"""How fast input-tuning is beside PEFT's prompt-tuning, LoRA and the bare base model: ratios measured side by side.

python examples/speed/run.py                            all measures on SmolLM2-135M-Instruct
python examples/speed/run.py --only decode --rounds 15
python examples/speed/run.py --device cuda --dtype bfloat16 --size 8b
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import peft
import torch
import transformers

from input_tuning_examples.extras import needs
from input_tuning_examples.packaged_model import PACKAGED, find_model
from input_tuning_examples.prompt_methods import PEFT_LOSES_CACHES
from input_tuning_examples.rounds import Row, compare, markdown, run_rounds
from input_tuning_examples.task_data import InputError
from measures import MEASURES
from models import SIZES, Bench


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device: there is no CUDA device on this machine. Leave it out for the CPU.", file=sys.stderr)
        return 2
    try:
        needs("demo", "rich")
        if arguments.size == PACKAGED:
            find_model(PACKAGED)  # it is there
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.progress import Progress

    bench = Bench(arguments.size, torch.device(arguments.device), getattr(torch, arguments.dtype))
    transformers.logging.set_verbosity_error()
    header = machine(bench)
    print(header, file=sys.stderr)
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as progress:
        for name in arguments.only:
            task = progress.add_task(name, total=None)
            measure = MEASURES[name](bench)
            rounds = arguments.rounds if measure.rounds_matter else 1
            progress.update(task, total=(rounds + 1) * len(measure.variants))
            figures = run_rounds(
                measure.variants,
                rounds,
                synchronize=bench.synchronize,
                progress=lambda task=task: progress.advance(task),
            )
            rows += compare(measure, figures)
            write(rows, header, arguments)  # after each measure: a later one that fails costs nothing
            del measure
            gc.collect()
    print(markdown(rows))
    return 0


def write(rows: list[Row], header: str, arguments: argparse.Namespace) -> None:
    """Writes the files that were asked for."""
    if arguments.markdown:
        arguments.markdown.write_text(f"{header}\n\n{markdown(rows)}", encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": header, "rows": [asdict(row) for row in rows]}, indent=1))


def machine(bench: Bench) -> str:
    """What everything ran on, in one line."""
    if bench.device.type == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    if PEFT_LOSES_CACHES:
        versions += ". With these versions PEFT's prompt-tuning loses its cache: its times of generation say nothing"
    return f"{bench.size} model, {str(bench.dtype).removeprefix('torch.')}; {where}; {versions}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES), help="measures to run")
    parser.add_argument("--rounds", type=_at_least_one, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help="the base model; all but the first are random")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
