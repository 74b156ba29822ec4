"""The converged budget in one process: tasks are trained side by side, each method on all of them before the next.

    python examples/benchmark/run_together.py DATA --plan              # what is to be done, and how long it takes here
    python examples/benchmark/run_together.py DATA --minutes 10        # the same command again goes on
    python examples/benchmark/rescore.py DATA --budget converged       # metrics other than BLEU: no accelerator's work
    python examples/benchmark/report.py DATA --budget converged

For an accelerator with 80 GB. Methods come in the order of their worth. The weights kept are those of the step with
the lowest validation loss; texts are for all test rows. Nothing is asked of a network if --model is a folder or the
packaged one. DATA is a folder with a folder for each task, as for run_all.py.
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench import Bench, Together, grouped
from bleu import bleu
from ensemble import Ensemble
from generation import generate
from input_tuning_examples.forgetting import forgetting
from input_tuning_examples.task_data import InputError
from input_tuning_examples.train_and_generate import SEPARATOR, quiet
from methods import METHODS
from one_run import add_common_arguments, check_installed, results_folder
from peft_input_tuning.output.files import unfinished
from plan import BUDGETS, Budget, Run, runs
from records import FINAL, Record, read_record, write_outputs, write_record
from row_losses import row_losses
from run_all import check_results
from run_record import SAMPLES, config_of, head_of, peak_memory
from tasks import find_tasks

EVALUATIONS = 15  # of the validation loss in a training, the last one at the end
GENERATED_AT_ONCE = 2048
TIMED_STEPS = 2  # for the estimate


class TimeIsUp(Exception):
    """The minutes are over; what was done is kept."""


# ---- one ensemble ---------------------------------------------------------------------------------------------------


def train(bench: Bench, together: Together, checkpoint: Path, bar: tqdm) -> tuple[Ensemble, dict[str, list], float]:
    """Trains, from the checkpoint if it is there; writes one when time is up, and at the end.

    Returns:
        the ensemble; its curves, of each evaluation the step and the losses of all trainings; the seconds of all
        lives.

    Raises:
        TimeIsUp: and what was done is in the checkpoint.
    """
    ensemble = bench.ensemble(together)
    curves: dict[str, list] = {"train": [], "validation": []}
    seconds = 0.0
    options = bench.options
    of_this = {"runs": [asdict(run) for run in together.runs], "model": options.model, "dtype": options.dtype}
    of_this["data"] = [bench.task(run.task)[0].data_hash for run in together.runs]
    state = torch.load(checkpoint, map_location=bench.device, weights_only=True) if checkpoint.is_file() else {}
    if state.get("of") == of_this:  # else of other rates, or another model
        ensemble.load_state_dict(state["ensemble"])
        curves, seconds = state["curves"], state["seconds"]
    steps, validation = bench.steps(together), bench.validation(together)
    interval = -(-len(steps) // EVALUATIONS)
    began = time.perf_counter()
    bar.update(ensemble.step_number)
    sums: list[torch.Tensor] = []

    def keep() -> None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(checkpoint) as scratch:
            so_far = seconds + time.perf_counter() - began
            state = {"of": of_this, "ensemble": ensemble.state_dict(), "curves": curves, "seconds": so_far}
            torch.save(state, scratch)

    with bench.autocast(together.runs[0].method):
        while ensemble.step_number < len(steps):
            sums.append(ensemble.step(*steps[ensemble.step_number]))
            bar.update()
            at_end = ensemble.step_number == len(steps)
            if ensemble.step_number % interval == 0 or at_end:
                losses = ensemble.validate(iter(validation))
                curves["train"].append([ensemble.step_number, torch.stack(sums).mean(0).tolist()])
                curves["validation"].append([ensemble.step_number, losses.tolist()])
                sums = []
                over = bench.time_is_up()  # asked once: it may come between two questions
                if at_end or over:
                    keep()
                if over and not at_end:
                    raise TimeIsUp
    return ensemble, curves, seconds + time.perf_counter() - began


def measure(bench: Bench, ensemble: Ensemble, member: int, run: Run) -> tuple[Record, list[str]]:
    """Loss on prose and on each test row, texts and their BLEU: of one training, as if it had been alone.

    The other metrics take a processor a minute for these texts, in which an accelerator would wait: `rescore.py`.
    """
    task, features = bench.task(run.task)
    method = METHODS[run.method]
    model = ensemble.give(member)
    found: Record = {"metrics": {"validation_loss": ensemble.best_loss[member].item()}}
    with bench.autocast(run.method):
        found["test_losses"] = row_losses(model, features["test"], bench.tokenizer, bench.budget.batch_size)
    found["metrics"] |= forgetting(
        model, bench.tokenizer, bench.untrained_prose("float32" if method.config is None else bench.options.dtype)
    )
    began = time.perf_counter()
    if method.config is None:
        model = copy.deepcopy(model).to(getattr(torch, bench.options.dtype))
    prompts = [bench.tokenizer(row.source + SEPARATOR).input_ids for row in task.rows["test"]]
    texts = generate(model, bench.tokenizer, prompts, GENERATED_AT_ONCE)
    found["seconds"] = {"generation": round(time.perf_counter() - began, 1)}
    found["metrics"]["bleu"] = bleu(texts, [row.references for row in task.rows["test"]])
    found["samples"] = [{"row": row, "output": text} for row, text in enumerate(texts[:SAMPLES])]
    return found, texts


def run_ensemble(bench: Bench, together: Together, bar: tqdm) -> None:
    """Trains what is not done, measures each training, and leaves a record of each."""
    results = results_folder(bench.options)
    checkpoint = bench.options.work / results.name / "together" / f"{together.name}.pt"
    ensemble, curves, seconds = train(bench, together, checkpoint, bar)
    for member, run in enumerate(together.runs):
        if is_done(results, run):
            continue
        task, _ = bench.task(run.task)
        found, texts = measure(bench, ensemble, member, run)
        record: Record = {
            **head_of(run, bench.budget, task, read_record(results, run.name)),
            "config": {
                **config_of(run, bench.budget, task, ensemble.model, bench.options.model, bench.options.dtype),
                "trained_beside": [other.task for other in together.runs if other != run],
            },
            **found,
            "seconds": {"training": round(seconds / len(together.runs), 1), **found["seconds"]},
            "peak_memory_mb": peak_memory(),
            "trainable_parameters": sum(tensor[0].numel() for tensor in ensemble.weights.values()),
            "curve": {name: [[step, losses[member]] for step, losses in curve] for name, curve in curves.items()},
            "step_kept": int(ensemble.best_step[member]),
            "status": "finished",
        }
        write_outputs(results, run.name, texts)
        write_record(results, run.name, record)
        if bench.time_is_up() and run != together.runs[-1]:
            raise TimeIsUp
    checkpoint.unlink(missing_ok=True)


# ---- all of them ----------------------------------------------------------------------------------------------------


def seconds_of(bench: Bench, together: Together) -> float:
    """Of an ensemble's training, by one step of its longest rows and two of its median ones."""
    steps = bench.steps(together)
    by_length = sorted(steps, key=lambda step: step[0].shape[-1])
    ensemble = bench.ensemble(together)
    with bench.autocast(together.runs[0].method):
        ensemble.step(*by_length[-1])  # the longest first: a lack of memory shows before any work
        _wait(bench.device)
        began = time.perf_counter()
        for _ in range(TIMED_STEPS):
            ensemble.step(*by_length[len(by_length) // 2])
        _wait(bench.device)
    return (time.perf_counter() - began) / TIMED_STEPS * len(steps)


def say_plan(bench: Bench, waiting: list[Together]) -> None:
    """A line for each ensemble, as soon as it is measured, and their sum."""
    whole = 0.0
    for together in waiting:
        seconds = seconds_of(bench, together)
        whole += seconds
        first = together.runs[0]
        print(f"{seconds / 60:6.1f} min  {together.name}  {first.steps} steps, rate {first.rate:g}", flush=True)
    print(f"{whole / 60:6.1f} min of training in all; the test rows' texts come on top")


def run_all(bench: Bench, waiting: list[Together]) -> None:
    """Trains and measures one ensemble after the other.

    Raises:
        TimeIsUp: what was done is kept.
    """
    with tqdm(total=sum(one.runs[0].steps for one in waiting), unit="step", dynamic_ncols=True) as bar:
        for together in waiting:
            bar.set_description(together.name)
            run_ensemble(bench, together, bar)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.set_defaults(budget="converged")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many (default: none)")
    parser.add_argument("--memory", type=float, default=70.0, help="GB of the accelerator at most (%(default)s)")
    parser.add_argument(
        "--plan", action="store_true", help="only say what is to be done, and estimate how long it takes"
    )
    return parser.parse_args(argv)


def check(options: argparse.Namespace, budget: Budget) -> None:
    """Raises InputError where an argument cannot be used."""
    for name in ("minutes", "memory"):
        if not getattr(options, name) > 0:
            raise InputError(f"--{name} must be > 0, got {getattr(options, name)}.")
    if unknown := [m for tier in budget.tiers for m in tier.methods if m not in budget.rates]:
        raise InputError(
            f"--budget: {budget.name} searches the rates of {unknown[0]}, run after run. Use run_all.py for it."
        )
    check_installed()
    find_tasks(options.data, budget.tasks)
    check_results(options, budget.tasks)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quiet()
    budget = BUDGETS[options.budget]
    try:
        check(options, budget)
        bench = Bench(options, budget)
    except InputError as error:
        print(f"run_together.py: {error}", file=sys.stderr)
        return 2
    if bench.device.type == "cuda":
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory * 1e9 / total))
    results = results_folder(options)
    every = grouped(budget, runs(budget, {}))
    waiting = [one for one in every if not all(is_done(results, run) for run in one.runs)]
    try:
        if options.plan:
            say_plan(bench, waiting)
        else:
            run_all(bench, waiting)
    except (TimeIsUp, KeyboardInterrupt) as stop:
        if isinstance(stop, TimeIsUp):
            print("\nTime is up. The same command goes on.", file=sys.stderr)
        else:
            print("\nStopped. The same command begins the trainings under way anew.", file=sys.stderr)
        return 130
    return 0


def is_done(results: Path, run: Run) -> bool:
    record = read_record(results, run.name)
    return record is not None and record["status"] in FINAL


if __name__ == "__main__":
    sys.exit(main())
