"""The paper's comparison on real data: every run of a budget, each in a process of its own.

    python examples/benchmark/run_all.py DATA                   # small: about nine hours on two CPU cores
    python examples/benchmark/run_all.py DATA --budget full     # all rows, all methods, three seeds: for accelerators
    python examples/benchmark/report.py DATA                    # tables and plots of what is there

DATA is a folder with a folder for each task, in it train.jsonl, validation.jsonl and test.jsonl. What is done is
skipped, what was interrupted goes on from its last checkpoint; so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from dense_model import model_label, plain_checkpoint
from input_tuning_examples.task_data import InputError
from one_run import add_common_arguments, check_installed, checkpoints_of, results_folder
from plan import BUDGETS, Budget, Run, runs
from records import FINAL, Record, losses, read_record, read_records, write_record
from run_training import PROGRESS
from tasks import find_tasks, hashes_of

ONE_RUN = Path(__file__).resolve().parent / "one_run.py"
LOOK_EVERY = 2.0  # seconds


@dataclass
class Active:
    """A run and its process."""

    run: Run
    process: subprocess.Popen
    log: Path
    output: IO[bytes]
    device: int

    @property
    def steps(self) -> int:
        """How many are done, by the last line about them."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.split() for line in lines if line.startswith(PROGRESS + " ")]
        return int(said[-1][1]) if said else 0


def start(run: Run, options: argparse.Namespace, device: int) -> Active:
    """Starts a run's process on its share of the cores, or on its accelerator."""
    folder = checkpoints_of(run, results_folder(options), options.work)
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(options.data), "--task", run.task, "--method", run.method, "--seed", str(run.seed)]
    arguments += ["--rate", repr(run.rate), "--budget", options.budget, "--model", options.model]
    if run.stage == "amounts":
        arguments += ["--rows", str(run.rows)]
    else:
        arguments += ["--stage", run.stage]
    arguments += ["--dtype", options.dtype, "--results", str(results_folder(options)), "--work", str(options.work)]
    threads = str(max(1, (os.cpu_count() or 1) // options.workers))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if options.accelerators:
        environment["CUDA_VISIBLE_DEVICES"] = str(device % options.accelerators)
    output = log.open("wb")
    process = subprocess.Popen(
        [sys.executable, str(ONE_RUN), *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment
    )
    return Active(run, process, log, output, device)


def end(active: Active, results: Path) -> bool:
    """Sees to the record of a process that has ended; whether the run may be counted as done."""
    active.output.close()
    record = read_record(results, active.run.name)
    if record is not None and record["status"] in FINAL:
        return True
    if record is not None and record["status"] == "running":
        record["errors"] = [*record["errors"], f"the process ended with code {active.process.returncode}"]
        write_record(results, active.run.name, record | {"status": "failed"})
    tqdm.write(f"{active.run.name} failed, see {active.log}")
    return False


def wanted_runs(budget: Budget, options: argparse.Namespace, records: dict[str, Record]) -> list[Run]:
    """The runs that are known by now; learning rates are searched whatever the tasks."""
    known = runs(budget, losses(records))
    return [run for run in known if run.stage == "rates" or run.task in options.tasks]


def run_all(budget: Budget, options: argparse.Namespace) -> int:
    """Runs what is not done; returns how many runs failed."""
    results = results_folder(options)
    active: list[Active] = []
    failed: set[str] = set()
    with tqdm(unit="step", smoothing=0, dynamic_ncols=True) as bar:
        try:
            while True:
                records = read_records(results)
                known = wanted_runs(budget, options, records)
                done = {name for name, record in records.items() if record["status"] in FINAL}
                busy = {one.run.name for one in active}
                waiting = [run for run in known if run.name not in done | busy | failed]
                free = [n for n in range(options.workers) if n not in {one.device for one in active}]
                for run, device in zip(waiting, free, strict=False):
                    active.append(start(run, options, device))
                if not active:
                    break
                _show(bar, active, known, done)
                time.sleep(LOOK_EVERY)
                for one in [one for one in active if one.process.poll() is not None]:
                    active.remove(one)
                    if not end(one, results):
                        failed.add(one.run.name)
        finally:
            for one in active:
                one.process.terminate()
            for one in active:
                one.process.wait()
    return len(failed)


def _show(bar: tqdm, active: list[Active], known: list[Run], done: set[str]) -> None:
    """Steps of all known runs, those that earlier calls have done left out of the pace."""
    finished = sum(run.steps for run in known if run.name in done)
    if bar.total is None:
        bar.initial = bar.n = finished
    bar.total = sum(run.steps for run in known)
    bar.n = finished + sum(one.steps for one in active)
    bar.set_description(f"{sum(run.name in done for run in known)} of {len(known)} runs", refresh=False)
    bar.set_postfix_str(", ".join(f"{one.run.name} {one.steps}/{one.run.steps}" for one in active))


def check(options: argparse.Namespace) -> None:
    """Raises InputError where an argument cannot be used, or where the results are of another model or other data."""
    budget = BUDGETS[options.budget]
    unknown = [task for task in options.tasks if task not in budget.tasks]
    if unknown:
        raise InputError(f"--tasks: {unknown[0]!r} is not one of {', '.join(budget.tasks)}.")
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers must be >= 1, got {options.workers}.")
    check_installed()
    tasks = (*budget.search_tasks, *options.tasks)
    find_tasks(options.data, tasks)
    check_results(options, tasks)


def check_results(options: argparse.Namespace, tasks: Sequence[str]) -> None:
    """Raises InputError where --results has records of another budget, model or type, or of tasks on other data."""
    wanted = {"budget": options.budget, "model": model_label(options.model), "dtype": options.dtype}
    hashes: dict[str, dict[str, str]] = {}
    for name, record in read_records(results_folder(options)).items():
        of_run = {"budget": record.get("budget", options.budget), **record.get("config", {})}
        for argument, value in wanted.items():
            if (found := of_run.get(argument, value)) != value:
                raise InputError(
                    f"--{argument}: {value!r} is wanted, but {name} of --results was run with {found!r}. Choose "
                    "another --results."
                )
        task = record.get("task")
        if task in tasks and "data_hash" in record:
            now = hashes.setdefault(task, hashes_of(options.data, task))
            if changed := [split for split, one in record["data_hash"].items() if now.get(split) != one]:
                raise InputError(
                    f"DATA: {task}/{changed[0]}.jsonl is not the file that {name} of --results was run on. Choose "
                    "another --results."
                )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--workers", type=int, help="runs at once (default: one an accelerator, or one a CPU core)")
    parser.add_argument("--list", action="store_true", help="only say which runs are known, and their state")
    options = parser.parse_args(argv)
    options.tasks = options.tasks or list(BUDGETS[options.budget].tasks)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        check(options)
    except InputError as error:
        print(f"run_all.py: {error}", file=sys.stderr)
        return 2
    budget = BUDGETS[options.budget]
    if options.list:
        records = read_records(results_folder(options))
        for run in wanted_runs(budget, options, records):
            print(f"{records.get(run.name, {}).get('status', 'waiting'):<12} {run.name}  rate {run.rate:g}")
        return 0
    plain_checkpoint(options.model, options.work)  # once, before the runs ask for it
    options.accelerators = torch.cuda.device_count()
    options.workers = options.workers or options.accelerators or os.cpu_count() or 1
    try:
        return 1 if run_all(budget, options) else 0
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
