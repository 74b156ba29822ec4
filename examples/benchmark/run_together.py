"""The converged budget in one process: tasks are trained side by side, each method on all of them before the next.

    python examples/benchmark/run_together.py DATA --plan              # what is to be done, and how long it takes here
    python examples/benchmark/run_together.py DATA --minutes 10        # the same command again goes on
    python examples/benchmark/report.py DATA --budget converged

For an accelerator with 80 GB. Methods come in the order of their worth. The weights kept are those of the step with
the lowest validation loss; texts are for all test rows. Nothing is asked of a network if --model is a folder or the
packaged one. DATA is a folder with a folder for each task, as for run_all.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from dense_model import model_label, plain_checkpoint
from ensemble import Ensemble, trained_weights
from generation import generate
from input_tuning_examples.base_model import Base
from input_tuning_examples.forgetting import forgetting, prose_loss
from input_tuning_examples.metrics import PAPER_METRICS
from input_tuning_examples.task_data import InputError
from input_tuning_examples.train_and_generate import IGNORED, SEPARATOR, quiet
from methods import METHODS, Method
from one_run import (
    PACKAGES,
    SAMPLES,
    add_common_arguments,
    check_installed,
    configurations,
    machine,
    peak_memory,
    results_folder,
)
from peft_input_tuning import input_tuning_parameter_groups
from peft_input_tuning.output.files import unfinished
from plan import BUDGETS, Budget, Run, runs
from records import FINAL, Record, read_record, write_outputs, write_record
from row_losses import row_losses
from run_training import MAX_LENGTH, features_of, trainable_model
from tasks import Task, find_tasks, read_task, side_by_side

EVALUATIONS = 15  # of the validation loss in a training, the last one at the end
GENERATED_AT_ONCE = 2048
TIMED_STEPS = 2  # for the estimate


class TimeIsUp(Exception):
    """The minutes are over; what was done is kept."""


@dataclass(frozen=True)
class Together:
    """Runs of one method and one seed on tasks of like length: one ensemble."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        first = self.runs[0]
        return f"{first.method}.seed{first.seed}.{'+'.join(run.task for run in self.runs)}"


def grouped(budget: Budget, known: list[Run]) -> list[Together]:
    """The runs in their order, those that can be trained together in one place."""
    found: dict[tuple, list[Run]] = {}
    for run in known:
        place = next((place for place, tasks in enumerate(budget.together) if run.task in tasks), run.task)
        found.setdefault((run.method, run.seed, run.rate, place), []).append(run)
    return [Together(tuple(some)) for some in found.values()]


class Bench:
    """What all trainings share: the base, the tokenizer, the rows, the device, and the time that is left."""

    def __init__(self, options: argparse.Namespace, budget: Budget) -> None:
        self.options, self.budget = options, budget
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.place = Base.find(plain_checkpoint(options.model, options.work))
        if self.place.seq2seq:
            raise InputError(f"--model: {options.model!r} is an encoder-decoder model. Use run_all.py for it.")
        self.tokenizer = self.place.tokenizer
        self.tokenizer.padding_side = "right"
        self.end = time.monotonic() + 60 * options.minutes
        self._tasks: dict[str, tuple[Task, dict[str, list[dict]]]] = {}
        self._prose: dict[str, float] = {}

    def time_is_up(self) -> bool:
        return time.monotonic() > self.end

    def task(self, name: str) -> tuple[Task, dict[str, list[dict]]]:
        """A task and its rows as ids; read once."""
        if name not in self._tasks:
            budget = self.budget
            most = {"train": budget.train_rows, "validation": budget.validation_rows, "test": budget.test_rows}
            task = read_task(self.options.data, name, most)
            features = {
                split: features_of(rows, self.tokenizer, False, sys.maxsize if split == "test" else MAX_LENGTH)
                for split, rows in task.rows.items()
            }
            self._tasks[name] = task, features
        return self._tasks[name]

    def autocast(self, method: str) -> contextlib.AbstractContextManager:
        wanted = self.options.dtype == "bfloat16" or METHODS[method].config is None
        return torch.autocast(self.device.type, torch.bfloat16) if wanted else contextlib.nullcontext()

    def ensemble(self, together: Together) -> Ensemble:
        """The trainings at their start. Each has the start that it would have alone."""
        first = together.runs[0]
        method = METHODS[first.method]
        base = self.place.load("float32" if method.config is None else self.options.dtype).to(self.device)
        members, model = [], base
        for run in together.runs:
            set_seed(run.seed)
            model = trainable_model(copy.deepcopy(base), method).to(self.device)
            members.append(trained_weights(model))
        return Ensemble(model, members, first.rate, first.steps, groups_by_name(model, method, first.rate))

    def steps(self, together: Together) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and labels of each step, `(trainings, rows, length)`, on the device."""
        rows = [self.task(run.task)[1]["train"] for run in together.runs]
        lengths = [[len(row["input_ids"]) for row in of_one] for of_one in rows]
        first = together.runs[0]
        batches = side_by_side(lengths, first.steps, self.budget.batch_size, first.seed)
        return [
            self.tensors([[of_one[row] for row in batch] for of_one, batch in zip(rows, step, strict=True)])
            for step in zip(*batches, strict=True)
        ]

    def validation(self, together: Together) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The validation rows in batches; a training with fewer has rows without a target."""
        size = self.budget.batch_size
        rows = [
            sorted(self.task(run.task)[1]["validation"], key=lambda row: len(row["input_ids"]))
            for run in together.runs
        ]
        batches = -(-max(map(len, rows)) // size)
        empty = {"input_ids": [self.tokenizer.pad_token_id], "labels": [IGNORED]}
        filled = [[*of_one, *[empty] * (batches * size - len(of_one))] for of_one in rows]
        return [self.tensors([of_one[n * size : (n + 1) * size] for of_one in filled]) for n in range(batches)]

    def tensors(self, rows: list[list[dict]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of each training as ids and labels, padded on the right."""
        length = max(len(row["input_ids"]) for of_one in rows for row in of_one)
        pad = self.tokenizer.pad_token_id
        ids = [[row["input_ids"] + [pad] * (length - len(row["input_ids"])) for row in of_one] for of_one in rows]
        labels = [[row["labels"] + [IGNORED] * (length - len(row["labels"])) for row in of_one] for of_one in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(labels, device=self.device)

    def untrained_prose(self, dtype: str) -> float:
        """Loss of the base on plain prose."""
        if dtype not in self._prose:
            self._prose[dtype] = prose_loss(self.place.load(dtype).to(self.device), self.tokenizer)
        return self._prose[dtype]


def groups_by_name(model: torch.nn.Module, method: Method, rate: float) -> list[dict[str, Any]] | None:
    """The optimizer's groups with names instead of parameters, where the soft prompt has a rate of its own."""
    prompt_rate = method.rate_of_prompt(rate)
    if prompt_rate is None:
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {"names": [names[id(parameter)] for parameter in group["params"]], "lr": group["lr"]}
        for group in input_tuning_parameter_groups(model, rate, prompt_rate)
    ]


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
                if at_end or bench.time_is_up():
                    keep()
                if not at_end and bench.time_is_up():
                    raise TimeIsUp
    return ensemble, curves, seconds + time.perf_counter() - began


def measure(bench: Bench, ensemble: Ensemble, member: int, run: Run, metric: Any) -> tuple[Record, list[str]]:
    """Loss on prose and on each test row, texts and their metrics: of one training, as if it had been alone."""
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
    references = [list(row.references) for row in task.rows["test"]]
    found["metrics"] |= metric.compute(predictions=texts, references=references)
    found["samples"] = [{"row": row, "output": text} for row, text in enumerate(texts[:SAMPLES])]
    return found, texts


def head_of(bench: Bench, run: Run) -> Record:
    """What a record has before its run begins."""
    return {
        **asdict(run),
        "budget": bench.budget.name,
        "attempts": (read_record(results_folder(bench.options), run.name) or {}).get("attempts", 0) + 1,
        "errors": [],
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "data_hash": bench.task(run.task)[0].data_hash,
    }


def run_ensemble(bench: Bench, together: Together, metric: Any, bar: tqdm) -> None:
    """Trains what is not done, measures each training, and leaves a record of each."""
    results = results_folder(bench.options)
    checkpoint = bench.options.work / results.name / "together" / f"{together.name}.pt"
    ensemble, curves, seconds = train(bench, together, checkpoint, bar)
    for member, run in enumerate(together.runs):
        if is_done(results, run):
            continue
        task, _ = bench.task(run.task)
        found, texts = measure(bench, ensemble, member, run, metric)
        prompt_rate = METHODS[run.method].rate_of_prompt(run.rate)
        record: Record = {
            **head_of(bench, run),
            "config": {
                "model": model_label(bench.options.model),
                "dtype": bench.options.dtype,
                "peft": configurations(ensemble.model),
                "learning_rate": {"prompt": prompt_rate, "adapter": run.rate} if prompt_rate else run.rate,
                "steps": run.steps,
                "batch_size": bench.budget.batch_size,
                "rows": {split: len(rows) for split, rows in task.rows.items()},
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


def estimate(bench: Bench, waiting: list[Together]) -> list[float]:
    """Seconds of each ensemble's training, from two steps of its longest rows and two of its median ones."""
    found = []
    for together in waiting:
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
        found.append((time.perf_counter() - began) / TIMED_STEPS * len(steps))
    return found


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
    if options.plan:
        seconds = estimate(bench, waiting)
        for together, one in zip(waiting, seconds, strict=True):
            print(
                f"{one / 60:6.1f} min  {together.name}  {together.runs[0].steps} steps, rate {together.runs[0].rate:g}"
            )
        print(f"{sum(seconds) / 60:6.1f} min of training in all; the test rows' texts come on top")
        return 0
    import evaluate

    metric = evaluate.load(PAPER_METRICS)
    try:
        with tqdm(total=sum(one.runs[0].steps for one in waiting), unit="step", dynamic_ncols=True) as bar:
            for together in waiting:
                bar.set_description(together.name)
                run_ensemble(bench, together, metric, bar)
    except (TimeIsUp, KeyboardInterrupt) as stop:
        print(
            "\nTime is up." if isinstance(stop, TimeIsUp) else "\nStopped.",
            "The same command goes on.",
            file=sys.stderr,
        )
        return 130
    return 0


def is_done(results: Path, run: Run) -> bool:
    record = read_record(results, run.name)
    return record is not None and record["status"] in FINAL


if __name__ == "__main__":
    sys.exit(main())
