"""An inspection as one HTML page."""

from __future__ import annotations

from markupsafe import Markup

from ..output.html import BarPlot, bars_of, code, render
from ..output.words import Word, shown
from .inspect import AdapterInspection, VirtualToken

BINS = 40
LEAD = "What this adapter has learned: which words its virtual tokens are near to, and which its input-adapter moves."


def inspection_page(inspection: AdapterInspection) -> str:
    """The page, as HTML. Whatever comes from the adapter or its vocabulary is escaped."""
    starts = any(token.started_from for token in inspection.virtual_tokens)
    return render(
        "inspection",
        f"Input-tuning adapter {inspection.adapter_name}",
        LEAD,
        found=inspection,
        start=inspection.start,
        starts=starts,
        tokens=[_virtual_token(i, token, starts) for i, token in enumerate(inspection.virtual_tokens)],
        lengths=_lengths(inspection),
        shifts=_shifts(inspection),
        moved=[
            (code(shown(most)), f"{most.value:.3f}", code(shown(least)), f"{least.value:.3f}")
            for most, least in zip(inspection.moved_most, inspection.moved_least, strict=True)
        ],
        sizes=_sizes(inspection),
        facts=[
            ("base model", str(inspection.base_model)),
            *((code(key), str(value)) for key, value in inspection.facts.items()),
        ],
        **_cosines(inspection),
    )


def _virtual_token(number: int, token: VirtualToken, starts: bool) -> list[str]:
    def near(word: Word) -> Markup:
        return Markup("{} {}").format(code(shown(word)), f"{word.value:.2f}")

    start = token.started_from
    started = [] if not starts or start is None else [code(shown(start)), f"{start.value:.3f}"]
    return [str(number), *started, f"{token.norm:.3f}", Markup(", ").join(map(near, token.nearest))]


def _sizes(inspection: AdapterInspection) -> list[tuple[str, str]]:
    sizes = inspection.sizes
    return [
        ("soft prompt", f"{sizes.prompt:,}"),
        ("input-adapter", f"{sizes.input_adapter:,}"),
        ("other trained modules", f"{sizes.other:,}"),
        ("base model, frozen", f"{sizes.base_model:,}"),
        ("share of the adapter", f"{sizes.share:.3%}"),
        *((Markup("length of {}").format(code(key)), f"{norm:.3f}") for key, norm in inspection.weight_norms.items()),
    ]


def _cosines(inspection: AdapterInspection) -> dict[str, object]:
    """The squares of the picture, and how long its side is, in pixels."""
    lines, count = inspection.prompt_cosines, len(inspection.prompt_cosines)
    cell = max(2, min(24, 480 // max(count, 1)))
    squares = [
        {"x": x * cell, "y": y * cell, "cell": cell, "colour": _colour(value), "title": f"{y}, {x}: {value:.2f}"}
        for y, line in enumerate(lines)
        for x, value in enumerate(line)
    ]
    return {"side": count * cell, "squares": squares}


def _colour(cosine: float) -> str:
    faded = round(255 * (1 - min(abs(cosine), 1.0)))
    return f"rgb({faded},{faded},255)" if cosine >= 0 else f"rgb(255,{faded},{faded})"


def _lengths(inspection: AdapterInspection) -> BarPlot | None:
    norms = [token.norm for token in inspection.virtual_tokens]
    return bars_of(norms, "virtual token", "length") if norms else None


def _shifts(inspection: AdapterInspection) -> BarPlot | None:
    """Words by their shift; None without an input-adapter."""
    if not inspection.shift_quantiles:
        return None
    low, high = inspection.shift_quantiles[0], inspection.shift_quantiles[-1]
    width = (high - low) / BINS or 1.0
    counts = [0] * BINS
    for shift in inspection.shifts:
        if low <= shift <= high:
            counts[min(int((shift - low) / width), BINS - 1)] += 1
    return bars_of(counts, f"shift, from {low:.3f} to {high:.3f}", "words")
