"""`peft-input-tuning grow-base BASE OUTPUT --virtual-tokens P`: a base model with words for virtual tokens."""

from __future__ import annotations

import argparse
from typing import Any

from ..output.folders import check_folder_to_write
from .gguf import dense_weights, gguf_arguments
from .load import DTYPES, readable
from .numbers import at_least
from .sources import check_source


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("base", help="folder or hub id of the base model")
    command.add_argument("output", help="folder to write; must not exist, or be empty")
    command.add_argument(
        "--virtual-tokens",
        type=at_least(0),
        required=True,
        metavar="P",
        help="length of the longest prompt of its adapters",
    )
    command.add_argument(
        "--untie", action="store_true", help="give the embedding a table apart from the output head's (for llama.cpp)"
    )
    command.add_argument("--dtype", choices=DTYPES, help="of the checkpoint (default: the base model's)")
    command.add_argument("--gguf-file", help="the base model's file, if its folder has several GGUF files")


def check(arguments: argparse.Namespace) -> None:
    check_folder_to_write("OUTPUT", arguments.output)
    check_source("BASE", arguments.base)


def run(arguments: argparse.Namespace) -> int:
    import transformers

    from ..lora_form import grow_base

    more: dict[str, Any] = gguf_arguments(arguments.base, arguments.gguf_file)
    with readable(f"base model {arguments.base}"):
        config = transformers.AutoConfig.from_pretrained(arguments.base, **more)
        named = getattr(transformers, (config.architectures or [""])[0] or "", None)
        fallback = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        kind = named or getattr(transformers, fallback)
        dense = dense_weights(more.get("gguf_file"))
        base = kind.from_pretrained(arguments.base, dtype=arguments.dtype or "auto", **{**more, **dense})
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.base, **more)
    grown = grow_base(base, arguments.output, arguments.virtual_tokens, tokenizer, untie=arguments.untie)
    ids = grown.virtual_token_ids
    print(
        f"Wrote {grown.output_dir} with {grown.rows} words"
        + (f"; virtual tokens are {ids[0]} to {ids[-1]}." if ids else ".")
    )
    return 0
