"""`peft-input-tuning to-lora ADAPTER OUTPUT`: an adapter as a LoRA on the word embedding."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..output.folders import check_folder_to_write
from .load import DTYPES, add_adapter, check_adapter_and_base, load_adapter
from .numbers import at_least

if TYPE_CHECKING:
    from ..lora_form import LoraReport


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_adapter(command)
    command.add_argument("output", help="folder to write; must not exist, or be empty")
    command.add_argument(
        "--max-rank", type=at_least(1), metavar="N", help="refuse a LoRA of a higher rank (vLLM: 512)"
    )
    command.add_argument(
        "--rank",
        type=at_least(1),
        metavar="R",
        help="write a LoRA of this rank that is not exact, and say how far it is off",
    )
    command.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="lines of text by whose words errors are weighted",
    )
    command.add_argument("--dtype", choices=DTYPES, help="of the file (default: float32)")
    command.add_argument(
        "--virtual-token-ids",
        metavar="ID,ID,…",
        help="words for the virtual tokens (default: what the table can spare)",
    )
    command.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer; needs --virtual-token-ids")


def check(arguments: argparse.Namespace) -> None:
    check_folder_to_write("OUTPUT", arguments.output)
    _ids(arguments.virtual_token_ids)
    _lines(arguments.text)
    check_adapter_and_base(arguments)


def run(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm.auto import tqdm

    from ..lora_form import save_as_lora

    model, tokenizer = load_adapter(arguments)
    with tqdm(desc="Reading the table", unit=" rows") as bar:

        def progress(done: int, rows: int) -> None:
            bar.total = rows
            bar.update(done - bar.n)

        report = save_as_lora(
            model,
            arguments.output,
            tokenizer=tokenizer,
            virtual_token_ids=_ids(arguments.virtual_token_ids),
            max_rank=arguments.max_rank,
            rank=arguments.rank,
            text=_lines(arguments.text),
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            before_writing=_say_errors,
            progress=progress,
        )
    print(f"Wrote {report.output_dir}, a LoRA of rank {report.rank}.")
    print(
        f"vLLM: --max-lora-rank {report.vllm_rank}"
        if report.vllm_rank
        else "vLLM takes ranks up to 512, so not this one; PEFT and llama.cpp do."
    )
    if report.virtual_token_ids:
        print(f"Virtual tokens: {', '.join(map(str, report.virtual_token_ids))}; never to be generated.")
    if report.front:
        print(f"Put this in front of every text (the folder's tokenizer and chat template do):\n  {report.front}")
    return 0


def _say_errors(report: LoraReport) -> None:
    errors = report.errors
    if report.is_exact:
        print(
            f"Exact but for rounding: embeddings are off by at most {errors.largest:.2g} of their length.", flush=True
        )
        return
    print(f"NOT exact: rank {report.rank}, and {report.exact_rank} would be. Embeddings are off, of their length,")
    print(f"        {errors.mean:.2g} in the mean and {errors.largest:.2g} at most, over all words")
    if errors.mean_in_text is not None:
        print(f"        {errors.mean_in_text:.2g} in the mean and {errors.largest_in_text:.2g} at most, in the text")


def _ids(named: str | None) -> list[int] | None:
    if named is None:
        return None
    try:
        return [int(one) for one in named.split(",")]
    except ValueError:
        raise ValueError(f"--virtual-token-ids: {named!r} is no list of ids. Write them as 7,8,9.") from None


def _lines(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--text: {str(path)!r} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
    except OSError as error:
        raise ValueError(f"--text: {str(path)!r} cannot be read ({error.strerror}). Name another file.") from None
