"""An inspection as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..output.html import html_page, table
from ..output.words import shown
from .inspect import AdapterInspection

BINS = 40
WIDTH, HEIGHT = 640, 180


def inspection_page(inspection: AdapterInspection) -> str:
    """The page, as HTML. Words of the vocabulary are escaped."""
    sections = [_facts(inspection), _sizes(inspection)]
    if inspection.virtual_tokens:
        sections += [_virtual_tokens(inspection), _cosines(inspection)]
    if inspection.shift_quantiles:
        sections.append(_shifts(inspection))
    return html_page(f"Input-tuning adapter {inspection.adapter_name}", sections)


def _facts(inspection: AdapterInspection) -> str:
    rows = [("base model", escape(str(inspection.base_model)))]
    rows += [(f"<code>{escape(key)}</code>", escape(str(value))) for key, value in inspection.facts.items()]
    return "<h2>Configuration</h2>" + table(("", ""), rows)


def _sizes(inspection: AdapterInspection) -> str:
    sizes = inspection.sizes
    rows = [
        ("soft prompt", f"{sizes.prompt:,}"),
        ("input-adapter", f"{sizes.input_adapter:,}"),
        ("other trained modules", f"{sizes.other:,}"),
        ("base model, frozen", f"{sizes.base_model:,}"),
        ("share of the adapter", f"{sizes.share:.3%}"),
    ]
    norms = [(f"length of <code>{escape(key)}</code>", f"{norm:.3f}") for key, norm in inspection.weight_norms.items()]
    return "<h2>Parameters</h2>" + table(("", ""), [*rows, *norms])


def _virtual_tokens(inspection: AdapterInspection) -> str:
    rows = [
        (
            str(i),
            f"{token.norm:.3f}",
            ", ".join(f"<code>{escape(shown(w))}</code> {w.value:.2f}" for w in token.nearest),
        )
        for i, token in enumerate(inspection.virtual_tokens)
    ]
    low, _, middle, _, high = inspection.embedding_norms
    bars = _bars([token.norm for token in inspection.virtual_tokens], "virtual token", "length")
    return (
        "<h2>Virtual tokens</h2>"
        + bars
        + f"<p>Words of the base model have lengths from {low:.3f} to {high:.3f}, {middle:.3f} in the middle.</p>"
        + table(("", "length", "nearest words, cosine"), rows)
    )


def _cosines(inspection: AdapterInspection) -> str:
    lines, count = inspection.prompt_cosines, len(inspection.prompt_cosines)
    cell = max(2, min(24, 480 // count))
    squares = "".join(
        f'<rect x="{x * cell}" y="{y * cell}" width="{cell}" height="{cell}" fill="{_colour(value)}">'
        f"<title>{y}, {x}: {value:.2f}</title></rect>"
        for y, line in enumerate(lines)
        for x, value in enumerate(line)
    )
    side = count * cell
    return (
        "<h2>Cosines between virtual tokens</h2><p>Blue is alike, white is unrelated, red is opposite.</p>"
        f'<svg viewBox="0 0 {side} {side}" width="{side}" role="img" aria-label="cosines">{squares}</svg>'
    )


def _colour(cosine: float) -> str:
    faded = round(255 * (1 - min(abs(cosine), 1.0)))
    return f"rgb({faded},{faded},255)" if cosine >= 0 else f"rgb(255,{faded},{faded})"


def _shifts(inspection: AdapterInspection) -> str:
    low, _, middle, _, high = inspection.shift_quantiles
    width = (high - low) / BINS or 1.0
    counts = [0] * BINS
    for shift in inspection.shifts:
        if low <= shift <= high:
            counts[min(int((shift - low) / width), BINS - 1)] += 1
    bars = _bars(counts, f"shift, from {low:.3f} to {high:.3f}", "words")
    pairs = zip(inspection.moved_most, inspection.moved_least, strict=True)
    rows = [
        tuple(part for word in pair for part in (f"<code>{escape(shown(word))}</code>", f"{word.value:.3f}"))
        for pair in pairs
    ]
    return (
        "<h2>What the input-adapter moves</h2><p>The shift of a word is |T(e) − e| / |e|, the length of what the "
        f"adapter adds over the length of the embedding; {middle:.3f} in the middle.</p>"
        + bars
        + table(("moved most", "shift", "moved least", "shift"), rows)
    )


def _bars(values: Sequence[float], across: str, up: str) -> str:
    highest, step = max(values) or 1.0, WIDTH / len(values)
    bars = "".join(
        f'<rect class="bar" x="{i * step:.1f}" y="{HEIGHT - value / highest * HEIGHT:.1f}" width="{step * 0.9:.1f}" '
        f'height="{value / highest * HEIGHT:.1f}"><title>{value:g}</title></rect>'
        for i, value in enumerate(values)
    )
    return (
        f'<svg viewBox="0 -18 {WIDTH} {HEIGHT + 38}" width="{WIDTH}" role="img" aria-label="{escape(up)} by '
        f'{escape(across)}"><text x="0" y="-5">{escape(up)}, up to {highest:g}</text>{bars}'
        f'<text x="{WIDTH}" y="{HEIGHT + 15}" text-anchor="end">{escape(across)}</text></svg>'
    )
