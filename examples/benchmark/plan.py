"""Which runs a budget consists of, in the order of their worth: the first ones alone answer the first question.

The plan follows from the results that are there. A method's learning rate is searched on the budget's search tasks
by validation loss; then its main runs are known. Other tasks take the rate that is best over the search tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean

from held_out import HELD_OUT
from methods import METHODS

TASKS = ("e2e", "overnight", "multi30k_cs_en", "dart", "multi30k_de_en", "webnlg", "multi30k_fr_en")
SEARCH_TASKS = ("e2e", "overnight")
FIRST = ("prompt-tuning", "input-tuning")
OTHERS = ("adapter-only", "input-tuning-64", "p-tuning", "prefix-tuning")
SIZES = ("input-tuning-19", "input-tuning-256")
ABLATIONS = tuple(name for name, method in METHODS.items() if method.rates_of)
SHARED = ("prompt-tuning", "input-tuning", "lora", "fine-tuning")  # on all tasks; with less and more training, too
UNSEEN = ("prompt-tuning", "input-tuning", "lora", "lora-embedding", "trainable-tokens")
# Best of the searches at 60 steps of 8 rows, one step of the grid lower: 1,500 steps of 32 want less. No search went
# as far, so these are guesses.
CONVERGED_RATES = {
    "input-tuning": 1e-3,
    "fine-tuning": 1e-4,
    "lora-all-linear": 1e-3,
    "prompt-tuning": 1e-2,
    "lora": 3e-3,
    "lora-embedding": 1e-3,
}
MOST_PASSES = 32  # over fewer rows
GRID = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))


@dataclass(frozen=True)
class Tier:
    """Runs of like worth: each method on each task.

    Args:
        rows: training rows of runs on fewer or more of them. Without, these are main runs.
        seeds: other ones than the budget's.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        steps, batch_size: of a main run; rows without an end, in an order that the seed fixes.
        search_steps: of a run of the search.
        train_rows, validation_rows, test_rows: at most, drawn at random, the same in all runs; None is all.
        seeds: of each run, where its tier names no others; the search has the first.
        tiers: in order; a run that stands in two of them is of the first.
        rates: of methods whose rates are known without a search.
        search_tasks: where the rates of the others are searched.
        together: tasks that `run_together.py` trains side by side: rows of like length.
    """

    name: str
    steps: int
    batch_size: int
    search_steps: int
    train_rows: int | None
    validation_rows: int | None
    test_rows: int | None
    seeds: tuple[int, ...]
    tiers: tuple[Tier, ...]
    rates: Mapping[str, float] = field(default_factory=dict)
    search_tasks: tuple[str, ...] = SEARCH_TASKS
    together: tuple[tuple[str, ...], ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """All that it has runs of."""
        return tuple(dict.fromkeys((*self.search_tasks, *(task for tier in self.tiers for task in tier.tasks))))

    def steps_on(self, rows: int) -> int:
        """Of a run on so many rows: as many as of a main run, but one pass at least, and not too many."""
        one_pass = -(-rows // self.batch_size)
        return max(1, min(max(self.steps, one_pass), MOST_PASSES * rows // self.batch_size))


BUDGETS = {
    "trial": Budget(  # whether everything works
        name="trial",
        steps=8,
        batch_size=2,
        search_steps=2,
        train_rows=16,
        validation_rows=4,
        test_rows=4,
        seeds=(0,),
        tiers=(Tier(FIRST, SEARCH_TASKS), Tier(FIRST, SEARCH_TASKS, rows=(8, 32))),
    ),
    "small": Budget(
        name="small",
        steps=200,
        batch_size=8,
        search_steps=60,
        train_rows=1600,
        validation_rows=60,
        test_rows=200,
        seeds=(0,),
        tiers=(
            Tier(FIRST, TASKS),
            Tier(("fine-tuning",), TASKS),
            Tier(("lora",), SEARCH_TASKS),
            Tier(OTHERS, SEARCH_TASKS),
            Tier(ABLATIONS, SEARCH_TASKS),
            Tier(("lora",), TASKS),
            Tier(SHARED, SEARCH_TASKS, rows=(50, 500)),
            Tier(SIZES, SEARCH_TASKS),
            Tier(SHARED, ("overnight",), rows=(5000,)),  # e2e has not as many
            Tier(FIRST, TASKS, seeds=(1,)),
            Tier(("fine-tuning",), SEARCH_TASKS, seeds=(1,)),
        ),
    ),
    "transfer": Budget(  # what is learned for words and domains that training does not have
        name="transfer",
        steps=150,
        batch_size=8,
        search_steps=60,
        train_rows=1200,
        validation_rows=60,
        test_rows=150,
        seeds=(0, 1, 2),
        tiers=(
            Tier(UNSEEN, HELD_OUT, seeds=(0,)),  # each domain is held out once
            Tier(UNSEEN, ("multi30k_fr_en",)),
        ),
        rates={"prompt-tuning": 3e-2, "input-tuning": 3e-3, "lora": 1e-2},  # the small budget's search found these
        search_tasks=(HELD_OUT[0], "multi30k_fr_en"),
    ),
    "converged": Budget(  # for ten minutes of an accelerator, in one process: run_together.py
        name="converged",
        steps=1500,
        batch_size=32,
        search_steps=0,
        train_rows=None,
        validation_rows=200,
        test_rows=None,
        seeds=(0,),
        tiers=tuple(Tier((method,), TASKS) for method in CONVERGED_RATES),
        rates=CONVERGED_RATES,
        search_tasks=(),
        together=(
            ("multi30k_cs_en", "multi30k_de_en", "multi30k_fr_en"),
            ("e2e", "overnight", "dart", "webnlg"),
        ),
    ),
    "h100": Budget(  # what was run on one accelerator; whatever is missing was not run
        name="h100",
        steps=400,
        batch_size=32,
        search_steps=60,
        train_rows=None,
        validation_rows=64,
        test_rows=300,
        seeds=(0,),
        tiers=(Tier(("prompt-tuning", "input-tuning", "fine-tuning"), TASKS),),
        rates={"prompt-tuning": 3e-2, "input-tuning": 3e-3, "fine-tuning": 1e-4},  # of most tasks
    ),
    "full": Budget(
        name="full",
        steps=3000,
        batch_size=32,
        search_steps=500,
        train_rows=None,
        validation_rows=None,
        test_rows=None,
        seeds=(0, 1, 2),
        tiers=(
            Tier((*FIRST, "fine-tuning", "lora", *OTHERS, *SIZES), TASKS),
            Tier(ABLATIONS, SEARCH_TASKS),
            Tier(SHARED, SEARCH_TASKS, rows=(50, 500)),  # main runs have some 5,000 there
        ),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        stage: "rates" (of the search), "main", or "amounts" (on fewer or more rows than a main run).
        rows: at most, to train on; None is the budget's.
    """

    stage: str
    task: str
    method: str
    seed: int
    rate: float
    steps: int
    rows: int | None = None

    @property
    def name(self) -> str:
        """Of its result file, without the ending."""
        seed = f"seed{self.seed}"
        last = {"rates": f"rate{self.rate:g}", "main": seed, "amounts": f"rows{self.rows}.{seed}"}
        return f"{self.stage}/{self.task}.{self.method}.{last[self.stage]}"


def run_on(budget: Budget, rows: int | None, task: str, method: str, seed: int, rate: float) -> Run:
    """A run on so many training rows; without, a main run."""
    if rows is None:
        return Run("main", task, method, seed, rate, budget.steps)
    return Run("amounts", task, method, seed, rate, budget.steps_on(rows), rows)


def rates_to_try(start: float, losses: Mapping[float, float]) -> list[float]:
    """The start and its two neighbours on the grid; while the best of them is at an end, one further.

    Args:
        start: a rate of `GRID`.
        losses: validation loss of each rate that was tried, infinite where training diverged.

    Returns:
        All rates that are known to be needed; the search has ended when all of them are in `losses`.
    """
    low = high = GRID.index(start)
    low, high = low - 1, high + 1
    while all(rate in losses for rate in GRID[low : high + 1]):
        best = min(range(low, high + 1), key=lambda place: losses[GRID[place]])
        if best == low > 0:
            low -= 1
        elif best == high < len(GRID) - 1:
            high += 1
        else:
            break
    return list(GRID[low : high + 1])


def best_rate(budget: Budget, task: str, method: str, losses: Mapping[str, float]) -> float | None:
    """The rate of the main runs; None while the search goes on.

    Args:
        losses: validation loss of each finished run, by its name.
    """
    method = METHODS[method].rates_of or method
    if method in budget.rates:
        return budget.rates[method]
    searched = [_losses_of(budget, one, method, losses) for one in budget.search_tasks]
    if any(rate not in found for found in searched for rate in rates_to_try(METHODS[method].start, found)):
        return None
    if task in budget.search_tasks:
        searched = [searched[budget.search_tasks.index(task)]]
    common = set.intersection(*(set(found) for found in searched))
    return min(sorted(common), key=lambda rate: fmean(found[rate] for found in searched))


def _losses_of(budget: Budget, task: str, method: str, losses: Mapping[str, float]) -> dict[float, float]:
    tried = {rate: _search_run(budget, task, method, rate).name for rate in GRID}
    return {rate: losses[name] for rate, name in tried.items() if name in losses}


def _search_run(budget: Budget, task: str, method: str, rate: float) -> Run:
    return Run("rates", task, method, budget.seeds[0], rate, budget.search_steps)


def runs(budget: Budget, losses: Mapping[str, float]) -> list[Run]:
    """All runs that are known by now, done or not, in order, each once.

    Args:
        losses: validation loss of each finished run, by its name; infinite where training diverged.
    """
    return list(dict.fromkeys(_runs_of_tiers(budget, losses)))


def _runs_of_tiers(budget: Budget, losses: Mapping[str, float]) -> Iterator[Run]:
    for tier in budget.tiers:
        for method in tier.methods:
            if METHODS[method].rates_of is None and method not in budget.rates:
                for task in budget.search_tasks:
                    for rate in rates_to_try(METHODS[method].start, _losses_of(budget, task, method, losses)):
                        yield _search_run(budget, task, method, rate)
        seeds = tier.seeds or budget.seeds
        for seed, task, rows, method in product(seeds, tier.tasks, tier.rows or (None,), tier.methods):
            rate = best_rate(budget, task, method, losses)
            if rate is not None:
                yield run_on(budget, rows, task, method, seed, rate)
