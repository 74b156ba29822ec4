"""Rows for `train.py`: JSON lines or a dataset's name, two columns or chat messages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from .task_data import InputError
from .train_and_generate import IGNORED, SEPARATOR

NAMED = 5  # rows in a message


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
        if Path(name).is_file() or Path(name).suffix in (".json", ".jsonl"):
            data = datasets.load_dataset("json", data_files=name, split="train")
        else:
            data = datasets.load_dataset(name, split=split)
    except StopIteration:  # datasets 5.2, of a file without a line
        raise InputError(f"{argument}: {name!r} is empty. Write one JSON object a line.") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        _check_lines(Path(name), argument)
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
    try:
        lines = list(chosen)
    except UnicodeDecodeError as error:  # datasets reads some files without a look at their bytes
        _check_lines(Path(name), argument)
        raise InputError(f"{argument}: {name!r} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
    return [to_row(line, f"{argument}: row {n} of {name!r}", columns, tokenizer) for n, line in enumerate(lines, 1)]


def _check_lines(file: Path, argument: str) -> None:
    """Raises InputError for the first line that is no JSON object, which `datasets` does not name. Where the first
    line is the beginning of one document, nothing is said."""
    if not file.is_file():
        return
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if number == 1 and line.strip() in (b"[", b"{"):
            return
        try:
            what = type(json.loads(line)).__name__ if line.strip() else "dict"
        except ValueError as error:  # no JSON, or no UTF-8
            raise InputError(f"{argument}: line {number} of {str(file)!r} is not JSON ({error}). Mend it.") from None
        if what != "dict":
            raise InputError(
                f"{argument}: line {number} of {str(file)!r} holds a {what}. Write one object of fields a line."
            )


def _needed(columns: Columns) -> list[str]:
    return [columns.messages] if columns.messages else [columns.source, columns.target]


def to_row(line: dict[str, Any], where: str, columns: Columns, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Raises InputError where a text is missing."""
    if columns.messages:
        messages = line[columns.messages]
        if not _are_messages(messages) or not _is_text(messages[-1].get("content")):
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


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, dict) for one in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def encode(
    rows: list[Row],
    columns: Columns,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    seq2seq: bool,
    argument: str = "--train_data",
    positions: int | None = None,
    virtual: int = 0,
) -> list[dict]:
    """Features of the rows that are not longer than `max_length`; which were is said.

    Args:
        argument: the option that named the rows.
        positions: of the model; None has no end.
        virtual: tokens that the method puts in front.

    Raises:
        InputError: all are longer, or one that is not has no place in the model; the message names rows and lengths.
    """
    if positions is not None and virtual >= positions:
        raise InputError(
            f"--num_virtual_tokens: {virtual} leave no place for a row in the {positions} positions of the model. "
            "Pass fewer."
        )
    features, left_out, without_place = [], {}, {}
    for number, row in enumerate(rows, 1):
        source = _source_ids(row, columns, tokenizer)
        target = [*tokenizer(row.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        length = len(source) + len(target)
        if length > max_length:
            left_out[number] = length
            continue
        needed = max(len(source) + virtual, len(target)) if seq2seq else length + virtual
        if positions is not None and needed > positions:
            without_place[number] = length
        if seq2seq:
            features.append({"input_ids": source, "attention_mask": [1] * len(source), "labels": target})
        else:
            ids = source + target
            labels = [IGNORED] * len(source) + target
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if without_place:
        raise InputError(
            f"{argument}: {_named(without_place)}, too many beside {virtual} virtual tokens for the {positions} "
            f"positions of the model. Pass --max_length {_most(positions, virtual)} to leave such rows out, fewer "
            "virtual tokens, shorter rows, or another --model."
        )
    if not features:
        raise InputError(f"--max_length: no row of {len(rows)} has {max_length} tokens or fewer. Raise it.")
    if left_out:
        print(f"{argument}: {_named(left_out)}, more than --max_length {max_length}: left out of {len(rows)} rows")
    return features


def check_test_rows(
    rows: list[Row],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    seq2seq: bool,
    positions: int | None,
    virtual: int,
    max_new_tokens: int,
) -> None:
    """Raises InputError where the model has no positions for a test row and its new tokens; names rows and lengths."""
    if positions is None or not rows:
        return
    beside = virtual if seq2seq else virtual + max_new_tokens
    lengths = {number: len(_source_ids(row, columns, tokenizer)) for number, row in enumerate(rows, 1)}
    without_place = {number: length for number, length in lengths.items() if length + beside > positions}
    if without_place:
        raise InputError(
            f"--test_data: {_named(without_place)}, too many beside {virtual} virtual and {beside - virtual} new "
            f"tokens for the {positions} positions of the model. Lower --max_new_tokens, shorten the rows, or pass "
            "another --model."
        )
    if max_new_tokens > positions:
        raise InputError(f"--max_new_tokens: {max_new_tokens} is more than the {positions} positions of the model.")


def _source_ids(row: Row, columns: Columns, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A chat template writes its special tokens itself.
    return tokenizer(row.source, add_special_tokens=not columns.messages).input_ids


def _most(positions: int | None, virtual: int) -> int:
    return max(1, (positions or 0) - virtual)


def _named(lengths: dict[int, int]) -> str:
    """`row 3 has 612 tokens`, or of several the first and how many there are."""
    if len(lengths) == 1:
        ((number, length),) = lengths.items()
        return f"row {number} has {length} tokens"
    first = ", ".join(f"row {number} {length}" for number, length in list(lengths.items())[:NAMED])
    return f"{len(lengths)} rows have up to {max(lengths.values())} tokens ({first}{', ...' * (len(lengths) > NAMED)})"
