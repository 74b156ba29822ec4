"""The report's answer in three sentences, before any table; what has no runs is left out."""

from __future__ import annotations

from statistics import fmean

from bootstrap import LEVEL
from comparisons import HIGHEST, LOWEST, OURS, gain, gap_closed, pairs_of, rank_correlation
from findings import Findings

RIVAL = "lora"
SHOWN = 0.05  # of an exact two-sided p


def in_short(found: Findings) -> str:
    """What input-tuning is beside prompt-tuning, its rivals, and the familiarity of inputs."""
    return " ".join(sentence for part in (_beside_lowest, _beside_rivals, _familiarity) if (sentence := part(found)))


def _beside_lowest(found: Findings) -> str:
    gains = [one for task in found.tasks if (one := gain(found.bleu, task)) is not None]
    if not gains:
        return ""
    told = [c for c in found.comparisons or () if _is(c, LOWEST)]
    higher = sum(one.difference > 0 and one.p_value < LEVEL for one in told)
    tested = f"; {higher} of {len(told)} comparisons tell them apart (p < {LEVEL}, 5 %)" if told else ""
    return (
        f"Input-tuning has more BLEU than prompt-tuning on {sum(one > 0 for one in gains)} of {len(gains)} tasks, "
        f"{fmean(gains):+.1f} in the mean{tested}."
    )


def _beside_rivals(found: Findings) -> str:
    said = []
    for method, name in ((RIVAL, "LoRA (queries and values)"), (HIGHEST, "full fine-tuning")):
        both = [
            (found.bleu[task, OURS].mean, found.bleu[task, method].mean)
            for task in found.tasks
            if (task, OURS) in found.bleu and (task, method) in found.bleu
        ]
        if both:
            said.append(f"{name} on {sum(ours > theirs for ours, theirs in both)} of {len(both)}")
    if not said:
        return ""
    shares = [one for task in found.tasks if (one := gap_closed(found.bleu, task, OURS)) is not None]
    closed = f"; of the gap from prompt-tuning to full fine-tuning it closes {_span(shares)} %" if shares else ""
    return f"It is above {' and above '.join(said)}{closed}."


def _familiarity(found: Findings) -> str:
    _, bits, gains = pairs_of(found.bits, lambda task: gain(found.bleu, task))
    ranked = rank_correlation(bits, gains)
    if ranked is None or ranked.p_value is None:
        return ""
    shown = "shown" if ranked.p_value < SHOWN else "not shown"
    return (
        f"That it gains more where inputs are less familiar is {shown}: Spearman's correlation is {ranked.rho:.2f} "
        f"over {ranked.number} tasks, p = {ranked.p_value:.2f}."
    )


def _is(comparison, baseline: str) -> bool:
    """Whether it is of main runs of one seed, ours and the baseline's."""
    wanted = (OURS, baseline, None, 1)
    return (comparison.method, comparison.baseline, comparison.training_rows, len(comparison.seeds)) == wanted


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"
