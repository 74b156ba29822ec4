"""How low the rank of an adapter's LoRA may be: the loss of a task's validation rows at each rank.

    python examples/benchmark/lower_ranks.py DATA ADAPTER --task overnight --ranks 8 16 32 64 128

ADAPTER is a saved adapter, DATA the folder of the tasks. `save_as_lora` writes the nearest LoRA of each rank, and
stock PEFT reads it. Ranks are those of the words: each virtual token adds one.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dense_model import plain_checkpoint
from input_tuning_examples.base_model import Base
from input_tuning_examples.extras import needs
from input_tuning_examples.task_data import InputError, limit, read_json_lines
from input_tuning_examples.train_and_generate import IGNORED, quiet
from peft_input_tuning import grow_base, save_as_lora
from row_losses import row_losses
from run_training import features_of
from saved_adapter import check_adapter, parser_for_adapter

BATCH = 8
ROWS = 60  # of the validation rows, at most


def measured(
    data: Path, adapter: str, task: str, ranks: Sequence[int], model: str, work: Path
) -> dict[int | None, float]:
    """The loss at each rank, nats for a target token; at None of the adapter itself.

    Raises:
        InputError: DATA, the model or the adapter cannot be read.
    """
    rows = limit(read_json_lines(str(data / task / "validation.jsonl"), "DATA"), ROWS, 0)
    check_adapter(adapter)
    place = Base.find(plain_checkpoint(model, work))
    prompt = PeftConfig.from_pretrained(adapter).num_virtual_tokens
    with tempfile.TemporaryDirectory() as folder:
        grow_base(place.load("float32"), f"{folder}/base", prompt, place.tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/base")
        base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), adapter)
    features = features_of(rows, place.tokenizer, place.seq2seq)

    def loss(tuned: PeftModel, front: Sequence[int] = ()) -> float:
        each = row_losses(tuned, [_behind(front, row) for row in features], place.tokenizer, BATCH)
        return sum(one for one, _ in each) / sum(count for _, count in each)

    found: dict[int | None, float] = {None: loss(adapted)}
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder:
            lora = Path(folder) / "lora"
            report = save_as_lora(adapted, lora, tokenizer=tokenizer, rank=prompt + rank)
            tuned = PeftModel.from_pretrained(base, lora)
            found[rank] = loss(tuned, report.virtual_token_ids)
            base = tuned.unload()
        print(f"rank {rank}: {found[rank]:.3f}", file=sys.stderr, flush=True)
    return found


def _behind(front: Sequence[int], row: dict) -> dict:
    """A row with words before it that have no loss."""
    before = {"input_ids": [*front], "attention_mask": [1] * len(front), "labels": [IGNORED] * len(front)}
    return {name: [*before[name], *values] for name, values in row.items()}


def main(argv: list[str] | None = None) -> int:
    parser = parser_for_adapter(__doc__, "validation rows")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="of the words (%(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        needs("benchmark", "datasets")
        if (lowest := min(options.ranks)) < 1:
            raise InputError(f"--ranks must be >= 1, got {lowest}.")
        quiet()
        found = measured(options.data, options.adapter, options.task, options.ranks, options.model, options.work)
    except InputError as error:
        print(f"lower_ranks.py: {error}", file=sys.stderr)
        return 2
    print("| rank of the words | loss |\n| :-- | --: |")
    for rank, loss in found.items():
        print(f"| {'the adapter itself' if rank is None else rank} | {loss:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
