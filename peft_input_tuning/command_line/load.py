"""Loading the adapter that a command names, with its base model and tokenizer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .gguf import dense_weights, gguf_arguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")


def add_adapter(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load_adapter` reads."""
    command.add_argument("adapter", help="folder or hub id of the adapter")
    command.add_argument("--base", help="folder or hub id of the base model (default: the one the adapter names)")
    command.add_argument(
        "--num-labels", type=int, metavar="N", help="of a classifier (default: what the base's config says, else 2)"
    )
    command.add_argument("--gguf-file", help="the base model's file, if its folder has several GGUF files")


def load_adapter(arguments: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    """The adapted model, and its tokenizer unless `--no-tokenizer` was given.

    Raises:
        ValueError: an adapter of another method, or one that names no base model.
    """
    import transformers
    from peft import PeftConfig, PeftModel
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    from ..config import InputTuningConfig
    from ..model_card import task_suffix

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
