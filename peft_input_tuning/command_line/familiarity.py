"""`peft-input-tuning familiarity DATA.jsonl --model MODEL`: how familiar the inputs of a file are to a model.

All files are checked before the model is loaded. They are read as streams, line by line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output.files import check_file_to_write, unfinished
from .extras import needs
from .gguf import dense_weights, gguf_arguments
from .load import DTYPES, readable
from .numbers import at_least
from .sources import check_source

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

    from ..familiarity.bigrams import BigramCounts
    from ..familiarity.measure import Familiarity

# A longer line of a corpus or of prose is read in parts; one bigram is lost at each seam.
LINE_CHARACTERS = 1 << 16


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data", type=Path, metavar="DATA.jsonl", help="the inputs: one JSON object a line")
    add("--model", required=True, help="folder or hub id of the frozen model")
    add("--gguf-file", help="the model's file, if its folder has several GGUF files")
    add("--no-weights", action="store_true", help="take the tokenizer only: no bits per byte, for any kind of model")
    add("--field", default="source", help="where in a line's object the input is (default: source)")
    add("--limit", type=at_least(1), metavar="N", help="the first N inputs only")
    corpus = command.add_mutually_exclusive_group()
    corpus.add_argument("--corpus", type=Path, metavar="FILE", help="text to count bigrams in, one text a line")
    corpus.add_argument("--counts", type=Path, metavar="FILE", help="bigrams that --save-counts wrote")
    add("--save-counts", type=Path, metavar="FILE", help="write the bigrams of --corpus")
    add(
        "--prose",
        type=Path,
        metavar="FILE",
        help="text to compare with, one text a line (default: English of our own)",
    )
    add("--html", type=Path, metavar="FILE", help="write it as one HTML page with histograms too")
    add("--least", type=at_least(1), default=10, help="inputs and tokens to list (default: 10)")
    add("--batch-size", type=at_least(1), default=8, help="texts in a batch (default: 8)")
    add("--window", type=at_least(2), metavar="TOKENS", help="tokens that the model reads at once (default: 512)")
    add("--device", help="where the model runs (default: cuda if there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="of the model (default: the one it was saved in)")


def check(arguments: argparse.Namespace) -> None:
    needs("inspect", "rich")
    arguments.total = _checked(arguments)
    check_source("--model", arguments.model)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..familiarity.advice import advice
    from ..familiarity.measure import familiarity
    from ..familiarity.page import familiarity_page

    model, tokenizer, counts = _load(arguments)
    with _bar("Reading inputs", " inputs", arguments.total) as bar:
        found = familiarity(
            inputs(arguments.data, arguments.field, arguments.limit),
            model,
            tokenizer,
            counts,
            None if arguments.prose is None else lines(arguments.prose),
            batch_size=arguments.batch_size,
            window=arguments.window,
            least=arguments.least,
            progress=lambda stage, done: bar.update(done - bar.n) if stage == "inputs" else None,
        )
    model_name = Path(arguments.model).absolute().name if Path(arguments.model).is_dir() else arguments.model
    title = f"Familiarity of {arguments.data.name} to {arguments.gguf_file or model_name}"
    if arguments.html is not None:
        with unfinished(arguments.html) as scratch:
            scratch.write_text(familiarity_page(found, title), encoding="utf-8")
    console = Console()
    for table in _tables(found, title):
        console.print(table)
    console.print(found.reading, markup=False, highlight=False)
    for path in (arguments.save_counts, arguments.html):
        if path is not None:
            print(f"Wrote {path}")
    print(advice(found.inputs, found.prose))
    return 0


def inputs(path: Path, field: str, limit: int | None) -> Iterator[str]:
    """The texts under `field` of a file of JSON lines; lines with nothing but spaces are passed over.

    Raises:
        ValueError: names the first line that is not what it should be.
    """
    with path.open("rb") as file:
        rows = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(rows, limit):
            where = f"line {number} of {str(path)!r}"
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error.msg}). Write one object a line.") from None
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                there = f"its fields are {sorted(row)}" if isinstance(row, dict) else "it is no object"
                raise ValueError(f"{where} has no text under {field!r}: {there:.200}. Name the field with --field.")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{where} has half of a surrogate pair under {field!r}. Repair the text.")
            yield text


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are more than spaces, long ones in parts."""
    with path.open(encoding="utf-8") as file:
        try:
            while line := file.readline(LINE_CHARACTERS):
                if line.strip():
                    yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(path)!r} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None


def _checked(arguments: argparse.Namespace) -> int:
    """Checks all that can be checked without the model; returns the number of inputs."""
    if arguments.save_counts is not None and arguments.corpus is None:
        raise ValueError("--save-counts needs --corpus: there is nothing to count.")
    check_file_to_write("--html", arguments.html)
    check_file_to_write("--save-counts", arguments.save_counts)
    _refuse_lost_files(arguments)
    for name in ("data", "corpus", "counts", "prose"):
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise ValueError(f"{'DATA.jsonl' if name == 'data' else '--' + name}: there is no file {str(path)!r}.")
    for name in ("corpus", "prose"):
        path = getattr(arguments, name)
        if path is not None and next(lines(path), None) is None:
            raise ValueError(f"--{name}: {str(path)!r} is empty. Write one text a line.")
    total = sum(1 for _ in inputs(arguments.data, arguments.field, arguments.limit))
    if not total:
        raise ValueError(f'DATA.jsonl: {str(arguments.data)!r} is empty. Write lines of {{"{arguments.field}": "…"}}.')
    return total


def _refuse_lost_files(arguments: argparse.Namespace) -> None:
    """Raises where a file would be written over one that is read, or over the other one that is written."""
    used: dict[Path, str] = {}
    for name in ("data", "corpus", "counts", "prose", "save_counts", "html"):
        path: Path | None = getattr(arguments, name)
        if path is None:
            continue
        argument = "DATA.jsonl" if name == "data" else f"--{name.replace('_', '-')}"
        other = used.setdefault(path.resolve(), argument)
        if other != argument and name in ("save_counts", "html"):
            raise ValueError(f"{argument}: {str(path)!r} is {other} too, which would be lost. Name another file.")


def _load(arguments: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase, BigramCounts | None]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = _device(arguments.device)
    more = gguf_arguments(arguments.model, arguments.gguf_file)
    if not arguments.no_weights:
        with readable(f"model {arguments.model}"):
            config = AutoConfig.from_pretrained(arguments.model, **more)
        if config.is_encoder_decoder:
            raise ValueError(
                f"--model: {arguments.model!r} is an encoder-decoder model ({config.model_type}) and predicts no "
                "inputs. Pass --no-weights, and --corpus or --counts, for what can be said without its weights."
            )
    with readable(f"tokenizer of {arguments.model}"):
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, **more)
    counts = _counts(arguments, tokenizer)  # first, since the weights take longer than an error in the corpus
    if arguments.no_weights:
        return None, tokenizer, counts
    dtype, dense = arguments.dtype or "auto", dense_weights(more.get("gguf_file"))
    with readable(f"model {arguments.model}"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **{**more, **dense})
    return model.to(device), tokenizer, counts


def _device(name: str | None) -> torch.device:
    """The device of a name, tried out before anything is loaded."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: {name!r} cannot be used ({error}). Leave it out for the CPU.") from None
    return device


def _counts(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> BigramCounts | None:
    from ..familiarity.bigrams import BigramCounts

    if arguments.counts is not None:
        return BigramCounts.load(arguments.counts, tokenizer)
    if arguments.corpus is None:
        return None
    counts = BigramCounts(tokenizer)
    with _bar("Counting bigrams", " texts", None) as bar:
        counts.add(lines(arguments.corpus), lambda done: bar.update(done - bar.n) and None)
    if arguments.save_counts is not None:
        counts.save(arguments.save_counts)
    return counts


@contextmanager
def _bar(what: str, unit: str, total: int | None) -> Iterator[tqdm[Any]]:
    from tqdm.auto import tqdm

    with tqdm(desc=what, unit=unit, total=total) as bar:
        yield bar


def _tables(found: Familiarity, title: str) -> Iterator[Table]:
    from rich.markup import escape
    from rich.table import Table

    from ..familiarity.page import figure_rows, input_rows, prose_name, token_rows, token_value
    from ..output.words import printable

    figures = Table("", "inputs", prose_name(found), title=escape(title))
    for row in figure_rows(found):
        figures.add_row(*row)
    if found.corpus_bigrams is not None:
        figures.add_row("bigrams of the corpus", f"{found.corpus_bigrams:,}")
        figures.add_row("… counts too low by, at most", f"{found.corpus_undercount:,}")
    yield figures
    if found.least_familiar_inputs:
        texts = Table("number", "bits per byte", "bigram score", "text", title="Least familiar inputs")
        for *numbers, text in input_rows(found):
            texts.add_row(*numbers, escape(printable(text if len(text) <= 80 else text[:80] + "…")))
        yield texts
    if found.least_familiar_tokens:
        tokens = Table("token", f"mean {token_value(found)}", "occurrences", title="Least familiar tokens")
        for token, *numbers in token_rows(found):
            tokens.add_row(escape(printable(token)), *numbers)
        yield tokens
