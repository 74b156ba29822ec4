"""`peft-input-tuning inspect ADAPTER`: what an adapter has learned, in words of the vocabulary."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..output.files import check_file_to_write, unfinished
from .extras import needs
from .load import add_adapter, check_adapter_and_base, load_adapter
from .numbers import at_least

if TYPE_CHECKING:
    from rich.table import Table

    from ..inspection.inspect import AdapterInspection


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_adapter(command)
    command.add_argument("--html", type=Path, metavar="FILE", help="write it as one HTML page with plots too")
    command.add_argument("--nearest", type=at_least(1), default=5, help="words for each virtual token (default: 5)")
    command.add_argument(
        "--most", type=at_least(1), default=10, help="words that are moved most and least (default: 10)"
    )
    command.add_argument("--no-tokenizer", action="store_true", help="show ids instead of words")


def check(arguments: argparse.Namespace) -> None:
    needs("inspect", "rich")
    check_file_to_write("--html", arguments.html)
    check_adapter_and_base(arguments)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from tqdm.auto import tqdm

    from ..inspection.inspect import inspect_adapter
    from ..inspection.page import inspection_page

    page: Path | None = arguments.html
    model, tokenizer = load_adapter(arguments)
    with tqdm(desc="Reading the table", unit=" rows", leave=False) as bar:

        def progress(done: int, rows: int) -> None:
            bar.total = rows
            bar.update(done - bar.n)

        found = inspect_adapter(model, tokenizer, nearest=arguments.nearest, most=arguments.most, progress=progress)
    if page is not None:
        with unfinished(page) as scratch:
            scratch.write_text(inspection_page(found), encoding="utf-8")
    console = Console()
    for table in _tables(found):
        console.print(table)
    if page is not None:
        print(f"Wrote {page}")
    return 0


def _tables(found: AdapterInspection) -> Iterator[Table]:
    from rich.markup import escape
    from rich.table import Table

    from ..output.words import printable, shown

    about = Table(title=escape(printable(f"Adapter {found.adapter_name}")), show_header=False)
    sizes, norms = found.sizes, found.embedding_norms
    about.add_row("base model", escape(printable(str(found.base_model))))
    for key, fact in found.facts.items():
        about.add_row(key, escape(printable(str(fact))))
    about.add_row(
        "parameters", f"prompt {sizes.prompt:,}, input-adapter {sizes.input_adapter:,}, other {sizes.other:,}"
    )
    about.add_row("share of all", f"{sizes.share:.3%}, {sizes.bytes:,} bytes")
    about.add_row("length of words", f"{norms[0]:.3f} to {norms[-1]:.3f}, median {norms[2]:.3f}")
    for key, norm in found.weight_norms.items():
        about.add_row(f"length of {key}", f"{norm:.3f}")
    if found.shift_quantiles:
        low, _, middle, _, high = found.shift_quantiles
        about.add_row("shift of words", f"{low:.3f} to {high:.3f}, median {middle:.3f}")
    yield about
    if found.virtual_tokens:
        starts = ("started from", "moved") if any(token.started_from for token in found.virtual_tokens) else ()
        tokens = Table("", *starts, "length", "nearest words, cosine", title="Virtual tokens", caption=found.start)
        for i, token in enumerate(found.virtual_tokens):
            near = ", ".join(f"{escape(shown(word))} {word.value:.2f}" for word in token.nearest)
            start = token.started_from
            started = () if start is None else (escape(shown(start)), f"{start.value:.3f}")
            tokens.add_row(str(i), *started, f"{token.norm:.3f}", near)
        yield tokens
    if found.moved_most:
        moved = Table("moved most", "shift", "moved least", "shift", title="What the input-adapter moves")
        for most, least in zip(found.moved_most, found.moved_least, strict=True):
            moved.add_row(escape(shown(most)), f"{most.value:.3f}", escape(shown(least)), f"{least.value:.3f}")
        yield moved
