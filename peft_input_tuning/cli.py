"""The command line: `peft-input-tuning export ADAPTER OUTPUT`, `peft-input-tuning inspect ADAPTER` and
`peft-input-tuning familiarity DATA.jsonl --model MODEL`.

Imports that only one command needs stand inside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import familiarity_command
from .extras import needs
from .gguf_file import dense_weights, gguf_arguments
from .output.files import check_file_to_write, unfinished

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from .inspection.inspect import AdapterInspection

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 unusable arguments."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"peft-input-tuning {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-input-tuning", description="Tools around input-tuning adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export",
        help="write an adapter and its base model as one plain checkpoint",
        description="Writes an adapter and its base model as one plain checkpoint, which loads with transformers "
        "alone and costs nothing extra at inference.",
    )
    _add_adapter(export)
    export.add_argument("output", help="folder to write; must not exist, or be empty")
    export.add_argument("--dtype", choices=DTYPES, help="of the checkpoint (default: the base model's)")
    export.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    export.set_defaults(run=_export)
    inspect = commands.add_parser(
        "inspect",
        help="show what an adapter's virtual tokens are near to, and which words it moves",
        description="Shows what an adapter has learned, in words of the vocabulary.",
    )
    _add_adapter(inspect)
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write it as one HTML page with plots too")
    inspect.add_argument("--nearest", type=int, default=5, help="words for each virtual token (default: 5)")
    inspect.add_argument("--most", type=int, default=10, help="words that are moved most and least (default: 10)")
    inspect.add_argument("--no-tokenizer", action="store_true", help="show ids instead of words")
    inspect.set_defaults(run=_inspect)
    familiarity = commands.add_parser(
        "familiarity",
        help="measure how familiar inputs are to a frozen model",
        description="Measures how familiar inputs are to a frozen model: the model's own bits per byte and the "
        "tokenizer's tokens per byte, beside plain prose, and how frequent the inputs' bigrams are in a corpus.",
    )
    familiarity_command.add_arguments(familiarity, DTYPES)
    familiarity.set_defaults(run=familiarity_command.run)
    return parser


def _add_adapter(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", help="folder or hub id of the adapter")
    command.add_argument("--base", help="folder or hub id of the base model (default: the one the adapter names)")
    command.add_argument(
        "--num-labels", type=int, metavar="N", help="of a classifier (default: what the base's config says, else 2)"
    )
    command.add_argument("--gguf-file", help="the base model's file, if its folder has several GGUF files")


def _export(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm.auto import tqdm

    from .export.export import export_model

    model, tokenizer = _load(arguments)
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


def _inspect(arguments: argparse.Namespace) -> int:
    needs("inspect", "rich")
    from rich.console import Console
    from tqdm.auto import tqdm

    from .inspection.inspect import inspect_adapter
    from .inspection.page import inspection_page

    page: Path | None = arguments.html
    check_file_to_write("--html", page)
    model, tokenizer = _load(arguments)
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

    from .output.words import shown

    about = Table(title=escape(f"Adapter {found.adapter_name}"), show_header=False)
    sizes, norms = found.sizes, found.embedding_norms
    about.add_row("base model", escape(str(found.base_model)))
    for key, fact in found.facts.items():
        about.add_row(key, escape(str(fact)))
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
        tokens = Table("", "length", "nearest words, cosine", title="Virtual tokens")
        for i, token in enumerate(found.virtual_tokens):
            near = ", ".join(f"{escape(shown(word))} {word.value:.2f}" for word in token.nearest)
            tokens.add_row(str(i), f"{token.norm:.3f}", near)
        yield tokens
    if found.moved_most:
        moved = Table("moved most", "shift", "moved least", "shift", title="What the input-adapter moves")
        for most, least in zip(found.moved_most, found.moved_least, strict=True):
            moved.add_row(escape(shown(most)), f"{most.value:.3f}", escape(shown(least)), f"{least.value:.3f}")
        yield moved


def _load(arguments: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    import transformers
    from peft import PeftConfig, PeftModel
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    from .config import InputTuningConfig
    from .model_card import task_suffix

    config = PeftConfig.from_pretrained(arguments.adapter)
    if not isinstance(config, InputTuningConfig):
        raise ValueError(
            f"{arguments.adapter} is an adapter of another method ({config.peft_type}), not INPUT_TUNING."
        )
    base_name = arguments.base or config.base_model_name_or_path
    if not base_name:
        raise ValueError(f"{arguments.adapter} does not name its base model. Pass it with --base.")
    auto_mapping: dict[str, Any] = config.auto_mapping or {}
    suffix = task_suffix(config)
    name = f"AutoModel{suffix}" if suffix else auto_mapping.get("base_model_class") or ""
    auto_class = getattr(transformers, name, transformers.AutoModel)
    more: dict[str, Any] = gguf_arguments(base_name, arguments.gguf_file)
    if not arguments.base and config.revision:
        more["revision"] = config.revision
    labels = {} if arguments.num_labels is None else {"num_labels": arguments.num_labels}
    dense = dense_weights(more.get("gguf_file"))
    base = auto_class.from_pretrained(base_name, dtype="auto", **{**more, **dense}, **labels)
    tokenizer = None
    if not arguments.no_tokenizer:
        has_own = bool(get_tokenizer_config(arguments.adapter))
        source, more = (arguments.adapter, {}) if has_own else (base_name, more)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **more)
        if has_own and len(tokenizer) > base.get_input_embeddings().num_embeddings:
            # As AutoPeftModel does. New rows that are not in the adapter's file are random.
            base.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(base, arguments.adapter), tokenizer


if __name__ == "__main__":
    sys.exit(main())
