"""The report's sections on differences: their significance, the gap to fine-tuning, the familiarity of inputs."""

from __future__ import annotations

from blocks import Block, Figure, Heading, Paragraph, Table
from bootstrap import LEVEL
from comparisons import HIGHEST, LOWEST, OURS, gain, gap_closed, pairs_of, rank_correlation, regression, relative
from figures import BITS, gap_bars, relative_performance
from findings import MISSING, Findings, number
from regression import FamiliarityRegression
from significance import Comparison, trained_on

# ---- significance ---------------------------------------------------------------------------------------------------


def significance(found: Findings) -> list[Block]:
    blocks: list[Block] = [Heading("Differences in BLEU")]
    if found.comparisons is None:
        return [*blocks, Paragraph("Not computed: call report.py with DATA.")]
    blocks += [
        Paragraph(
            f"sacrebleu's paired bootstrap over test rows, {found.samples:,} draws. Its p is about half of a "
            f"two-sided p-value: p < {LEVEL} corresponds to 5 %. The smallest p there can be is "
            f"{1 / (found.samples + 1):.4f}. Nothing is corrected for the number of comparisons. The test says how "
            "much the choice of the test rows matters, and nothing of the seed. Rows of several seeds put together "
            "are not independent; their p is too small."
        ),
        Table(
            ("task", "", "against", "seeds", "test rows", "BLEU", "BLEU of the other", "difference", "p", ""),
            [_comparison(one) for one in found.comparisons],
        ),
    ]
    if found.left_out:
        blocks.append(Paragraph("Missing here: " + " ".join(found.left_out) + " Call report.py with DATA."))
    return blocks


def _comparison(one: Comparison) -> list[str]:
    seeds = ", ".join(map(str, one.seeds))
    scored = [f"{one.bleu:.1f}", f"{one.baseline_bleu:.1f}", f"{one.difference:+.1f}", f"{one.p_value:.3f}"]
    trained = trained_on(one.task, one.training_rows)
    return [trained, one.method, one.baseline, seeds, f"{one.rows:,}", *scored, reading(one)]


def reading(one: Comparison) -> str:
    if one.p_value >= LEVEL:
        return "not distinguished"
    return "higher" if one.difference > 0 else "lower"


# ---- the gap, familiarity -------------------------------------------------------------------------------------------


def gap(found: Findings) -> list[Block]:
    methods = [method for method in found.compared if method not in (LOWEST, HIGHEST)]
    rows = [[task, *(number(gap_closed(found.bleu, task, m), ".0f") for m in methods)] for task in found.tasks]
    svg = gap_bars(found.bleu, found.tasks, methods)
    return [
        Heading("Share of the gap between prompt-tuning and fine-tuning"),
        Paragraph(
            "(BLEU - prompt-tuning's) / (fine-tuning's - prompt-tuning's), in per cent. "
            f"{MISSING}: fine-tuning is not above prompt-tuning, or a run is missing."
        ),
        Table(("", *methods), rows),
        *([Figure("gap", "Share of the gap that methods close, by task", svg)] if svg else []),
    ]


def familiarity(found: Findings) -> list[Block]:
    blocks: list[Block] = [Heading("Familiarity")]
    if not found.bits or found.measured_with is None:
        return [*blocks, Paragraph("Not measured: call familiarity_of_tasks.py with DATA.")]
    tasks = sorted((task for task in found.tasks if task in found.bits), key=lambda task: found.bits[task])
    rows = [
        [
            task,
            f"{found.bits[task]:.2f}",
            *(number(relative(found.bleu, task, method), ".1f") for method in (LOWEST, OURS)),
            number(gain(found.bleu, task), "+.1f"),
        ]
        for task in tasks
    ]
    model, inputs = found.measured_with
    svg = relative_performance(found.bleu, found.bits)
    return [
        *blocks,
        Paragraph(
            f"Bits per byte of at most {inputs} test inputs of each task under {model}: the more, the less familiar. "
            "The paper's measure is another one, the frequency of bigrams in the pretraining corpus."
        ),
        Table(
            (
                "task",
                "bits per byte",
                "prompt-tuning, % of fine-tuning",
                "input-tuning, % of fine-tuning",
                "gain, BLEU",
            ),
            rows,
        ),
        *([Figure("relative", f"BLEU in per cent of fine-tuning's over {BITS}", svg)] if svg else []),
        *_models_differ(found, model),
        *_line(regression(found.bleu, found.bits)),
        *_correlations(found),
    ]


def _models_differ(found: Findings, model: str) -> list[Block]:
    others = sorted({run["config"]["model"] for run in found.main.values()} - {model.removesuffix(".gguf")})
    return [Paragraph(f"The runs were made with another model: {', '.join(others)}.")] if others else []


def _line(fitted: FamiliarityRegression | None) -> list[Block]:
    if fitted is None:
        return [Paragraph("Fewer than three tasks have both prompt-tuning and fine-tuning: no line is fitted.")]
    reason = fitted.unsupported
    return [
        Paragraph(
            f"Least squares over {fitted.tasks} tasks: prompt-tuning's loss in per cent of fine-tuning's BLEU = "
            f"{fitted.intercept:.1f} + ({fitted.slope:.1f} ± {fitted.slope_error:.1f}) × bits per byte (± standard "
            f"error of the slope); the tasks' standard deviation around the line is {fitted.residual_error:.1f} %. "
            + (
                f"The line says nothing of other inputs: {reason}."
                if reason
                else f"It may be used between {fitted.lowest:.2f} and {fitted.highest:.2f} bits per byte."
            )
        )
    ]


def _correlations(found: Findings) -> list[Block]:
    figures = {
        "input-tuning's gain in BLEU over prompt-tuning": lambda task: gain(found.bleu, task),
        "prompt-tuning's per cent of fine-tuning's BLEU": lambda task: relative(found.bleu, task, LOWEST),
    }
    blocks: list[Block] = []
    for name, figure in figures.items():
        _, bits, values = pairs_of(found.bits, figure)
        ranked = rank_correlation(bits, values)
        if ranked is not None:
            p_value = "" if ranked.p_value is None else f", exact two-sided p = {ranked.p_value:.3f}"
            said = f"Spearman's correlation of bits per byte with {name}: {ranked.rho:.2f} over {ranked.number} tasks"
            blocks.append(Paragraph(said + p_value + "."))
    return blocks
