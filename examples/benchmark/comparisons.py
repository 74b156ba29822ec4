"""What the records say: means over seeds, the gap to fine-tuning, and both against the familiarity of the inputs.

Pure functions of records, as `records.py` reads them. Only runs that finished count; where nothing else is said, only
main runs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import correlation, fmean, stdev

from records import Record
from regression import FamiliarityRegression

LOWEST, OURS, HIGHEST = "prompt-tuning", "input-tuning", "fine-tuning"
MOST_TO_PERMUTE = 8  # 8! orders take a second


@dataclass(frozen=True)
class Mean:
    """A figure over seeds: its mean, its sample standard deviation (None for one seed), and the number of seeds."""

    mean: float
    spread: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of one value a seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


Means = Mapping[tuple[str, str], Mean]  # by task and method


def finished(records: Mapping[str, Record], stage: str = "main") -> dict[str, Record]:
    """The runs of a stage that finished, by name."""
    return {
        name: record for name, record in records.items() if (record["stage"], record["status"]) == (stage, "finished")
    }


def means_of(records: Mapping[str, Record], figure: Callable[[Record], float | None]) -> dict[tuple[str, str], Mean]:
    """A figure of each task and method over its seeds; runs for which `figure` is None are left out."""
    values: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for record in finished(records).values():
        value = figure(record)
        if value is not None:
            values[record["task"], record["method"]].append(value)
    return {cell: Mean.of(found) for cell, found in values.items()}


def means(records: Mapping[str, Record], metric: str) -> dict[tuple[str, str], Mean]:
    """A metric of each task and method over its seeds, in the metric's unit."""
    return means_of(records, lambda record: record["metrics"].get(metric))


def in_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Each name once: the known ones in their order, then the others by the alphabet."""
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


# ---- against fine-tuning --------------------------------------------------------------------------------------------


def gap_closed(scores: Means, task: str, method: str) -> float | None:
    """Per cent of the gap between prompt-tuning and fine-tuning that a method closes.

    Returns:
        0 is prompt-tuning's score, 100 fine-tuning's. None where one of the three is missing, or where fine-tuning is
        not above prompt-tuning, so that there is no gap.
    """
    low, own, high = (scores.get((task, one)) for one in (LOWEST, method, HIGHEST))
    if low is None or own is None or high is None or high.mean <= low.mean:
        return None
    return 100 * (own.mean - low.mean) / (high.mean - low.mean)


def relative(scores: Means, task: str, method: str) -> float | None:
    """A method's score in per cent of fine-tuning's, the measure of the paper's figure 3; None without both."""
    own, high = scores.get((task, method)), scores.get((task, HIGHEST))
    return 100 * own.mean / high.mean if own is not None and high is not None and high.mean > 0 else None


def gain(scores: Means, task: str) -> float | None:
    """Input-tuning's score less prompt-tuning's, in the metric's unit; None without both."""
    low, own = scores.get((task, LOWEST)), scores.get((task, OURS))
    return own.mean - low.mean if low is not None and own is not None else None


# ---- against familiarity --------------------------------------------------------------------------------------------


def pairs_of(
    bits: Mapping[str, float], figure: Callable[[str], float | None]
) -> tuple[list[str], list[float], list[float]]:
    """Tasks that have both bits per byte and the figure; their bits per byte; their figures."""
    found = [(task, value, other) for task, value in bits.items() if (other := figure(task)) is not None]
    return [task for task, _, _ in found], [value for _, value, _ in found], [other for _, _, other in found]


def regression(scores: Means, bits: Mapping[str, float]) -> FamiliarityRegression | None:
    """Per cent of fine-tuning's score that prompt-tuning loses, over bits per byte.

    Returns:
        None for fewer than three tasks that have both methods, or where all have the same bits per byte.
    """
    _, values, shares = pairs_of(bits, lambda task: relative(scores, task, LOWEST))
    if len(values) < 3 or len(set(values)) < 2:
        return None
    return FamiliarityRegression.fit(values, [100 - share for share in shares])


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's.

    Args:
        rho: from -1 to 1.
        p_value: share of all orders of one side whose |rho| is as large, exact; None for more than `MOST_TO_PERMUTE`.
        number: of pairs.
    """

    rho: float
    p_value: float | None
    number: int


def ranks(values: Sequence[float]) -> list[float]:
    """From 1, the smallest; equal values share the mean of their ranks."""
    ordered = sorted(values)
    counts = Counter(ordered)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (counts[value] + 1) / 2 for value in values]


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> RankCorrelation | None:
    """Spearman's correlation: Pearson's of the ranks (`method="ranked"` of `statistics` needs Python 3.12).

    Returns:
        None for fewer than three pairs, or where all values of a side are the same.
    """
    if len(xs) < 3 or len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    across, up = ranks(xs), ranks(ys)
    rho = correlation(across, up)
    p_value = None
    if len(xs) <= MOST_TO_PERMUTE:
        # All orders have the same sums of squares: what differs is the sum of products alone.
        middle = len(xs) * fmean(across) * fmean(up)
        least = abs(_product(across, up) - middle) - 1e-9
        orders = [abs(_product(across, order) - middle) >= least for order in permutations(up)]
        p_value = sum(orders) / len(orders)
    return RankCorrelation(rho, p_value, len(xs))


def _product(xs: Sequence[float], ys: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(xs, ys, strict=True))
