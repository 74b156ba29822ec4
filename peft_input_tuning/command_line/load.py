"""Loading the adapter that a command names, with its base model and tokenizer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gguf import dense_weights, gguf_arguments
from .numbers import at_least
from .sources import check_adapter, check_source

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from ..config import InputTuningConfig

DTYPES = ("float32", "bfloat16", "float16")


def add_adapter(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load_adapter` reads."""
    command.add_argument("adapter", help="folder or hub id of the adapter")
    command.add_argument("--base", help="folder or hub id of the base model (default: the one the adapter names)")
    command.add_argument(
        "--num-labels",
        type=at_least(1),
        metavar="N",
        help="of a classifier (default: what the base's config says, else 2)",
    )
    command.add_argument("--gguf-file", help="the base model's file, if its folder has several GGUF files")


def check_adapter_and_base(arguments: argparse.Namespace) -> None:
    """Checks what can be said of an adapter's and a base model's names before anything is loaded.

    Raises:
        ValueError: a folder that is not there, or no adapter's.
    """
    check_adapter(arguments.adapter)
    if arguments.base:
        check_source("--base", arguments.base)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turns what a broken file makes libraries raise into an error that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} cannot be read: it holds no JSON ({error}).") from error
    except SafetensorError as error:
        raise ValueError(
            f"{what} cannot be read: its weights are cut off, or no safetensors file ({error}). Get the file again."
        ) from error
    except (ValueError, OSError, RuntimeError, ImportError):  # which say what is wrong
        raise
    except Exception as error:  # what a wrong type or a missing field ends in, somewhere in a library
        raise ValueError(f"{what} cannot be read: {type(error).__name__}: {error}. Get its files again.") from error


def read_config(adapter: str) -> InputTuningConfig:
    """An adapter's configuration.

    Raises:
        ValueError: a file that is no configuration, or one of another method.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from ..config import InputTuningConfig

    config: Any = None
    with readable(f"adapter_config.json of {adapter}"):
        folder = Path(adapter)
        if (folder / "adapter_config.json").is_file():
            fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"adapter_config.json of {adapter} holds a {type(fields).__name__}, not fields.")
            method = fields.get("peft_type")
            if method not in [*PEFT_TYPE_TO_CONFIG_MAPPING]:
                raise ValueError(f"{adapter} is an adapter of a method that PEFT does not know ({method!r}).")
        config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, InputTuningConfig):
        raise ValueError(f"{adapter} is an adapter of another method ({config.peft_type}), not INPUT_TUNING.")
    return config


def load_adapter(arguments: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    """The adapted model, and its tokenizer unless `--no-tokenizer` was given.

    Raises:
        ValueError: an adapter of another method, or one that names no base model.
    """
    import transformers
    from peft import PeftModel
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    from ..model_card import task_suffix

    config = read_config(arguments.adapter)
    base_name = arguments.base or config.base_model_name_or_path
    if not base_name:
        raise ValueError(f"{arguments.adapter} does not name its base model. Pass it with --base.")
    if not isinstance(base_name, str):
        raise ValueError(f"{arguments.adapter} names {base_name!r} as its base model. Pass its name with --base.")
    if not arguments.base:
        check_source(f"base model of {arguments.adapter} (--base names another)", base_name)
    auto_mapping: dict[str, Any] = config.auto_mapping or {}
    suffix = task_suffix(config)
    name = f"AutoModel{suffix}" if suffix else auto_mapping.get("base_model_class") or ""
    auto_class = getattr(transformers, name, transformers.AutoModel)
    more: dict[str, Any] = gguf_arguments(base_name, arguments.gguf_file)
    if not arguments.base and config.revision:
        more["revision"] = config.revision
    labels = {} if arguments.num_labels is None else {"num_labels": arguments.num_labels}
    dense = dense_weights(more.get("gguf_file"))
    with readable(f"base model {base_name}"):
        base = auto_class.from_pretrained(base_name, dtype="auto", **{**more, **dense}, **labels)
    tokenizer = None
    if not arguments.no_tokenizer:
        has_own = bool(get_tokenizer_config(arguments.adapter))
        source, more = (arguments.adapter, {}) if has_own else (base_name, more)
        with readable(f"tokenizer of {source}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **more)
        if has_own and len(tokenizer) > base.get_input_embeddings().num_embeddings:
            # As AutoPeftModel does. New rows that are not in the adapter's file are random.
            base.resize_token_embeddings(len(tokenizer))
    with readable(f"adapter {arguments.adapter}"):
        return PeftModel.from_pretrained(base, arguments.adapter), tokenizer
