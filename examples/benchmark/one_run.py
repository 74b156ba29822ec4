"""One run: trains a method on a task, generates for the test rows, measures, and leaves a record.

`run_all.py` starts this script in a process of its own for every run, so that peak memory is the run's, and a crash
costs one run. By hand:

    python examples/benchmark/one_run.py DATA --task e2e --method lora --rate 1e-3 --results outputs/my-runs

A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    set_seed,
)

from dense_model import model_label, plain_checkpoint
from generation import generate
from input_tuning_examples.base_model import Base
from input_tuning_examples.extras import needs
from input_tuning_examples.faults import TrainingError
from input_tuning_examples.forgetting import forgetting, prose_loss
from input_tuning_examples.metrics import PAPER_METRICS
from input_tuning_examples.packaged_model import PACKAGED
from input_tuning_examples.task_data import InputError
from input_tuning_examples.train_and_generate import SEPARATOR, quiet
from methods import METHODS
from plan import BUDGETS, Budget, Run, run_on
from records import RESULTS, Record, read_record, write_outputs, write_record
from row_losses import row_losses
from run_record import SAMPLES, config_of, head_of, peak_memory
from run_training import features_of, make_trainer, train, trainable_model
from target_loss import use_loss_on_targets
from tasks import Task, read_task

# ---- the run --------------------------------------------------------------------------------------------------------


def execute(
    run: Run, budget: Budget, task: Task, model_name: str, dtype: str, work: Path, folder: Path
) -> tuple[Record, list[str]]:
    """Trains, and generates unless it is a run of the search; returns what the record gains, and the texts.

    Args:
        work: where the model may be kept.
        folder: where the run's checkpoints go.
    """
    metric = None
    if run.stage != "rates":
        import evaluate

        metric = evaluate.load(PAPER_METRICS)  # before any work
    place = Base.find(plain_checkpoint(model_name, work))
    tokenizer, method = place.tokenizer, METHODS[run.method]
    tokenizer.padding_side = "right"  # PEFT's prompt methods are wrong beside left padding
    splits = ("train", "validation")
    features = {split: features_of(task.rows[split], tokenizer, place.seq2seq) for split in splits}
    set_seed(run.seed)
    base = place.load("float32" if method.config is None else dtype)
    use_loss_on_targets(base)
    if not torch.cuda.is_available():  # the fused kernel's backward pass is slower than plain products there
        base.set_attn_implementation("eager")
    untrained = prose_loss(base, tokenizer) if metric is not None and not place.seq2seq else None
    words = {word for row in features["train"] for word in row["input_ids"]}
    model = trainable_model(base, method, words)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = config_of(run, budget, task, model, model_name, dtype)
    trainer = make_trainer(model, run, budget, features, tokenizer, folder)
    started = time.perf_counter()
    curve = train(trainer, folder)
    trained = time.perf_counter()
    losses = [loss for _, loss in curve["validation"]]
    metrics: Record = {"validation_loss": min(losses) if run.stage == "amounts" else losses[-1]}
    step_kept = trainer.state.best_global_step if run.stage == "amounts" else run.steps
    if untrained is not None:
        metrics |= forgetting(model, tokenizer, untrained)
    texts: list[str] = []
    test_losses: list[tuple[float, int]] = []
    began = time.perf_counter()
    if metric is not None:
        if not place.seq2seq:
            every = features_of(task.rows["test"], tokenizer, place.seq2seq, max_length=sys.maxsize)
            test_losses = row_losses(model, every, tokenizer, budget.batch_size)
        base.set_attn_implementation("sdpa")
        if method.config is None:
            model = model.to(getattr(torch, dtype))
        prompts = [tokenizer(row.source + SEPARATOR).input_ids for row in task.rows["test"]]
        texts = generate(model, tokenizer, prompts)
        references = [list(row.references) for row in task.rows["test"]]
        metrics |= metric.compute(predictions=texts, references=references)
    ended = time.perf_counter()
    record: Record = {
        "config": config,
        "metrics": metrics,
        "seconds": {"training": round(trained - started, 1), "generation": round(ended - began, 1)},
        "peak_memory_mb": peak_memory(),
        "trainable_parameters": trainable,
        "curve": curve,
        "step_kept": step_kept,
        "test_losses": test_losses,
        "samples": [{"row": row, "output": text} for row, text in enumerate(texts[:SAMPLES])],
    }
    return record, texts


def record_run(run: Run, budget: Budget, data: Path, model: str, dtype: str, results: Path, work: Path) -> int:
    """Executes a run between its two records; returns the exit code."""
    most = {"train": budget.train_rows, "validation": budget.validation_rows, "test": budget.test_rows}
    task = read_task(data, run.task, most, run.rows)
    folder = checkpoints_of(run, results, work)
    record = head_of(run, budget, task, read_record(results, run.name)) | {"status": "running"}
    write_record(results, run.name, record)
    of_this_run = {**asdict(run), "budget": budget.name, "model": model, "dtype": dtype, "data": task.data_hash}
    drop_checkpoints_of_another(folder, of_this_run)
    try:
        gained, texts = execute(run, budget, task, model, dtype, work, folder)
    except KeyboardInterrupt:
        write_record(results, run.name, record | {"status": "interrupted"})
        return 130
    except Exception as error:
        status = "diverged" if isinstance(error, TrainingError) else "failed"
        record["errors"] = [*record["errors"], f"{type(error).__name__}: {error}"]
        write_record(results, run.name, record | {"status": status})
        if status == "failed":
            raise
        print(f"{run.name}: {error}")
        return 0
    if texts:
        write_outputs(results, run.name, texts)
    write_record(results, run.name, record | gained | {"status": "finished"})
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def check_installed() -> None:
    """Raises InputError where a package of the metrics is missing."""
    needs("benchmark", "datasets", "evaluate", "nltk", "pycocoevalcap", "rouge_score", "sacrebleu")


def checkpoints_of(run: Run, results: Path, work: Path) -> Path:
    """The folder of a run's checkpoints: its own, whatever other budgets and models are run in `work`."""
    return work / results.name / run.name


def drop_checkpoints_of_another(folder: Path, run: dict[str, Any]) -> None:
    """Takes checkpoints away that another run (rate, model, data) left under this one's name.

    Args:
        run: all that a run's result depends on; noted in the folder.
    """
    note, text = folder / "run.json", json.dumps(run, sort_keys=True)
    if folder.exists() and not (note.is_file() and note.read_text(encoding="utf-8") == text):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(text, encoding="utf-8")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What this script and `run_all.py` both take."""
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with a folder for each task")
    add("--budget", choices=sorted(BUDGETS), default="small", help="how much is trained (%(default)s)")
    add("--model", default=PACKAGED, help="folder or hub id (default: the packaged SmolLM2-135M-Instruct)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of frozen weights (%(default)s)")
    add("--results", type=Path, help="where the records go (default: results/BUDGET[-MODEL] beside this script)")
    add("--work", type=Path, default=Path("outputs/benchmark"), help="where checkpoints go (%(default)s)")


def results_folder(options: argparse.Namespace) -> Path:
    """Of one budget and one model."""
    if options.results:
        return options.results
    model = "" if options.model == PACKAGED else f"-{model_label(options.model)}"
    return RESULTS / (options.budget + model)


def asked_run(options: argparse.Namespace, budget: Budget) -> Run:
    """Raises InputError where --rows cannot be used."""
    if options.rows is not None and options.rows < 1:
        raise InputError(f"--rows must be >= 1, got {options.rows}.")
    if options.stage == "rates":
        if options.rows is not None:
            raise InputError("--rows: a run of --stage rates takes the budget's. Leave one of the two out.")
        return Run("rates", options.task, options.method, options.seed, options.rate, budget.search_steps)
    return run_on(budget, options.rows, options.task, options.method, options.seed, options.rate)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add = parser.add_argument
    add("--task", required=True, help="a folder of DATA")
    add("--method", required=True, choices=sorted(METHODS))
    add("--seed", type=int, default=0)
    add("--rate", type=float, required=True, help="learning rate")
    add("--stage", choices=("rates", "main"), default="main", help="rates trains shorter and generates nothing")
    add("--rows", type=int, metavar="N", help="train on at most N rows, and keep the step of the lowest loss")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `run_all.py` can interrupt a run
    quiet()
    budget = BUDGETS[options.budget]
    try:
        check_installed()
        run = asked_run(options, budget)
        return record_run(
            run, budget, options.data, options.model, options.dtype, results_folder(options), options.work
        )
    except InputError as error:
        print(f"one_run.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
