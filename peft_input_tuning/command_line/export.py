"""`peft-input-tuning export ADAPTER OUTPUT`: an adapter and its base model as one plain checkpoint."""

from __future__ import annotations

import argparse

from ..output.folders import check_folder_to_write
from .load import DTYPES, add_adapter, check_adapter_and_base, load_adapter


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_adapter(command)
    command.add_argument("output", help="folder to write; must not exist, or be empty")
    command.add_argument("--dtype", choices=DTYPES, help="of the checkpoint (default: the base model's)")
    command.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")


def check(arguments: argparse.Namespace) -> None:
    check_folder_to_write("OUTPUT", arguments.output)
    check_adapter_and_base(arguments)


def run(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm.auto import tqdm

    from ..export.export import export_model

    model, tokenizer = load_adapter(arguments)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    with tqdm(desc="Folding the table", unit=" rows") as bar:

        def progress(done: int, rows: int) -> None:
            bar.total = rows
            bar.update(done - bar.n)

        report = export_model(model, arguments.output, tokenizer=tokenizer, dtype=dtype, progress=progress)
    ids = report.virtual_token_ids
    print(f"Wrote {report.output_dir} with {len(ids)} virtual tokens" + (f" ({ids[0]} to {ids[-1]})." if ids else "."))
    print(
        f"Loaded it again: outputs differ from the adapter's by at most {report.largest_difference:.2g} "
        f"(largest output {report.largest_output:.3g})."
    )
    return 0
