"""Rows for `train.py`: JSON lines or a dataset's name, two columns or chat messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from .task_data import InputError
from .train_and_generate import IGNORED, SEPARATOR


@dataclass(frozen=True)
class Columns:
    """Where a row's texts are: in two columns, or in one of chat messages."""

    source: str
    target: str
    messages: str | None = None


@dataclass(frozen=True)
class Row:
    """Texts of one row; `source` ends where the target begins."""

    source: str
    target: str
    references: list[str]


def read_rows(
    name: str, argument: str, columns: Columns, tokenizer: PreTrainedTokenizerBase, most: int | None = None
) -> list[Row]:
    """The first rows of a file or a dataset.

    Args:
        name: a JSON-lines file, or what `datasets.load_dataset` takes.
        argument: the option that named it: `--train_data` is the dataset's split "train".
        most: how many rows at most; None is all.

    Raises:
        InputError: no such file or columns, or a row without the texts.
    """
    import datasets

    split = argument.removeprefix("--").removesuffix("_data")
    try:
        if Path(name).suffix in (".json", ".jsonl"):
            data = datasets.load_dataset("json", data_files=name, split="train")
        else:
            data = datasets.load_dataset(name, split=split)
    except StopIteration:  # datasets 5.2, of a file without a line
        raise InputError(f"{argument}: {name!r} is empty. Write one JSON object a line.") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = error.__cause__ or error
        raise InputError(f"{argument}: {name!r} cannot be read ({why}). Pass a JSON-lines file.") from None
    missing = [column for column in _needed(columns) if column not in data.column_names]
    if missing:
        raise InputError(
            f"{argument}: {name!r} has no column {missing[0]!r}, but {', '.join(data.column_names)}. "
            "Pass --source_column and --target_column, or --messages_column."
        )
    if columns.messages and tokenizer.chat_template is None:
        raise InputError(
            f"--messages_column: the tokenizer of {tokenizer.name_or_path!r} has no chat template. Pass a chat model "
            "as --model, or --source_column and --target_column."
        )
    chosen = data.select(range(min(most or len(data), len(data))))
    return [to_row(line, f"{argument}: row {n} of {name!r}", columns, tokenizer) for n, line in enumerate(chosen, 1)]


def _needed(columns: Columns) -> list[str]:
    return [columns.messages] if columns.messages else [columns.source, columns.target]


def to_row(line: dict[str, Any], where: str, columns: Columns, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Raises InputError where a text is missing."""
    if columns.messages:
        messages = line[columns.messages]
        if not messages or len(messages) < 2 or not _is_text(messages[-1].get("content")):
            raise InputError(
                f"{where} has no text to learn under {columns.messages!r}, got {messages!r:.80}. The last message of "
                "two or more is the target: write it, or take the row out."
            )
        try:
            source = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise InputError(f"{where} does not fit the chat template of the model ({error}). Mend the row.") from None
        return Row(source, messages[-1]["content"], [messages[-1]["content"]])
    source, target = line[columns.source], line[columns.target]
    references = [target] if isinstance(target, str) else list(target or ())
    if not _is_text(source):
        raise InputError(f"{where} has no text under {columns.source!r}, got {source!r:.80}. Take the row out.")
    if not references or not all(map(_is_text, references)):
        raise InputError(f"{where} has no texts under {columns.target!r}, got {target!r:.80}. Take the row out.")
    return Row(source + SEPARATOR, references[0], references)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def encode(
    rows: list[Row], columns: Columns, max_length: int, tokenizer: PreTrainedTokenizerBase, seq2seq: bool
) -> list[dict]:
    """Features of the rows that are not too long; how many were is said.

    Raises:
        InputError: all are.
    """
    special = not columns.messages  # a chat template writes its special tokens itself
    features = []
    for row in rows:
        source = tokenizer(row.source, add_special_tokens=special).input_ids
        target = [*tokenizer(row.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(source) + len(target) > max_length:
            continue
        if seq2seq:
            features.append({"input_ids": source, "attention_mask": [1] * len(source), "labels": target})
        else:
            ids = source + target
            labels = [IGNORED] * len(source) + target
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not features:
        raise InputError(f"--max_length: no row of {len(rows)} has {max_length} tokens or fewer. Raise it.")
    if len(features) < len(rows):
        print(f"{len(rows) - len(features)} of {len(rows)} rows are longer than {max_length} tokens: left out")
    return features
