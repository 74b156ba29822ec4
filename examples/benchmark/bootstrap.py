"""Is a difference in BLEU more than the choice of the test rows? sacrebleu's paired bootstrap.

Test rows are drawn anew with replacement, the same rows for both methods; d_i is the difference in BLEU in draw i, and
d the difference on the rows themselves. sacrebleu 2.6 takes

    p = (1 + number of i with |d_i| - mean(|d_i|) > |d|) / (1 + number of draws)

The absolute values come before the mean is taken off. So where d is far from 0, p is the tail on one side, about half
of a two-sided p-value; where d is near 0, p stays below about 0.45. With normal d_i, 11 % of the pairs that do not
differ have p < 0.05, and 5 % have p < 0.025: hence `LEVEL`. Two equal lists of texts would get the smallest p that
there is, as no d_i is above 0; here a difference of 0 has p = 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

SAMPLES = 1000
SEED = 12345  # sacrebleu takes 0 for no seed
LEVEL = 0.025

References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Bootstrap:
    """BLEU of both, in per cent, and the p-value of their difference."""

    bleu: float
    baseline_bleu: float
    p_value: float


@contextmanager
def _seed_of_sacrebleu() -> Iterator[None]:
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(SEED)
    try:
        yield
    finally:
        del os.environ["SACREBLEU_SEED"]
        if before is not None:
            os.environ["SACREBLEU_SEED"] = before


def paired_bootstrap(
    texts: Sequence[str], baseline: Sequence[str], references: References, samples: int = SAMPLES
) -> Bootstrap:
    """Compares two lists of texts for the same rows.

    Args:
        references: of each row, at least one.
        samples: how often rows are drawn.
    """
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    from input_tuning_examples.metrics.generation_metrics import by_position

    with _seed_of_sacrebleu():
        test = PairedTest(
            [("baseline", list(baseline)), ("method", list(texts))],
            {"BLEU": BLEU(lowercase=True)},  # as `bleu` of paper_metrics.py
            by_position(references),
            test_type="bs",
            n_samples=samples,
        )
        _, found = test()
    theirs, ours = found["BLEU"]
    return Bootstrap(ours.score, theirs.score, 1.0 if ours.score == theirs.score else ours.p_value)
