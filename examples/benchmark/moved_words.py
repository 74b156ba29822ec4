"""Does an adapter move the words more that the model knows less? Shifts over rank and over surprisal; one plot.

    python examples/benchmark/moved_words.py DATA ADAPTER --task overnight --output moved.svg

ADAPTER is a saved adapter, DATA the folder of the tasks. A word's shift is |T(e) - e| / |e|, as `peft-input-tuning
inspect` has it. Two measures of how well a model knows a word:

    rank         a word's id: vocabularies of merged pairs have them by how early, so how often, they were merged
    surprisal    bits of the word under the frozen model, the mean over the places where the task's test inputs have it
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel

from comparisons import rank_correlation
from dense_model import plain_checkpoint
from figures import quantiles_over
from input_tuning_examples.base_model import Base
from input_tuning_examples.extras import needs
from input_tuning_examples.task_data import InputError, limit, read_json_lines
from input_tuning_examples.train_and_generate import SEPARATOR
from peft_input_tuning import inspect_adapter
from peft_input_tuning.familiarity.surprisal import DEFAULT_WINDOW, base_alone, token_bits
from peft_input_tuning.output.files import unfinished
from saved_adapter import check_adapter, parser_for_adapter

INPUTS = 300  # of the test rows, at most
PARTS = 10  # of the words, by rank or surprisal


def surprisals(model: torch.nn.Module, rows: Sequence[list[int]]) -> dict[int, float]:
    """Mean bits of each word under the frozen model, over all places in the rows but each row's first."""
    with base_alone(model):
        bits = token_bits(model, rows, [], DEFAULT_WINDOW, 8)
    found: defaultdict[int, list[float]] = defaultdict(list)
    for row, of_row in zip(rows, bits, strict=True):
        for word, one in zip(row[1:], of_row[1:].tolist(), strict=True):
            found[word].append(one)
    return {word: fmean(values) for word, values in found.items()}


def measured(data: Path, adapter: str, task: str, model: str, work: Path) -> dict[str, list[tuple[float, float]]]:
    """Pairs of a measure and a shift, a pair for each word.

    Raises:
        InputError: DATA, the model or the adapter cannot be read.
    """
    sources = [row.source for row in limit(read_json_lines(str(data / task / "test.jsonl"), "DATA"), INPUTS, 0)]
    place = Base.find(plain_checkpoint(model, work))
    check_adapter(adapter)
    adapted = PeftModel.from_pretrained(place.load("float32"), adapter)
    shifts = inspect_adapter(adapted).shifts
    if not shifts:
        raise InputError(f"ADAPTER: {adapter!r} has a prompt alone, which moves no words. Name one with an adapter.")
    bits = surprisals(adapted, [place.tokenizer(source + SEPARATOR).input_ids for source in sources])
    special = set(place.tokenizer.all_special_ids)
    ranked = [(float(word), shifts[word]) for word in range(len(place.tokenizer)) if word not in special]
    return {
        "rank in the vocabulary": ranked,
        f"bits in inputs of {task}": [(value, shifts[word]) for word, value in bits.items() if word not in special],
    }


def main(argv: list[str] | None = None) -> int:
    parser = parser_for_adapter(__doc__, "test inputs")
    parser.add_argument("--output", type=Path, default=Path("moved.svg"), help="the plot (%(default)s)")
    options = parser.parse_args(argv)
    try:
        needs("benchmark", "matplotlib")
        pairs = measured(options.data, options.adapter, options.task, options.model, options.work)
    except InputError as error:
        print(f"moved_words.py: {error}", file=sys.stderr)
        return 2
    for name, some in pairs.items():
        ranked = rank_correlation([one for one, _ in some], [shift for _, shift in some])
        print(
            f"shift over {name}: Spearman {ranked.rho:.2f}" if ranked else f"{name}: too few", f"({len(some)} words)"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(options.output) as scratch:
        scratch.write_text(quantiles_over(pairs, "shift of a word", PARTS), encoding="utf-8")
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
