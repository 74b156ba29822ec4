"""An inspection as one HTML page that needs nothing but itself: no script, no style sheet, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .inspection import AdapterInspection, Word

BINS = 40
WIDTH, HEIGHT = 640, 180
_STYLE = """
:root { color-scheme: light dark; --bar: #4878cf; --text: #222; --page: #fff; --line: #ccc }
@media (prefers-color-scheme: dark) { :root { --bar: #7aa2f7; --text: #ddd; --page: #16161e; --line: #444 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--text); background: var(--page) }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: left;
       border-bottom: 1px solid var(--line) }
code { white-space: pre-wrap; overflow-wrap: anywhere } svg { max-width: 100%; height: auto; fill: var(--text) }
.bar { fill: var(--bar) } text { font: 12px system-ui, sans-serif }
"""


def inspection_page(inspection: AdapterInspection) -> str:
    """The page, as HTML. Words of the vocabulary are escaped."""
    sections = [_facts(inspection), _sizes(inspection)]
    if inspection.virtual_tokens:
        sections += [_virtual_tokens(inspection), _cosines(inspection)]
    if inspection.shift_quantiles:
        sections.append(_shifts(inspection))
    title = f"Input-tuning adapter {escape(inspection.adapter_name)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def shown(word: Word) -> str:
    """A word so that spaces and line ends are seen; its id where there is no tokenizer."""
    return f"#{word.token_id}" if word.text is None else repr(word.text)[1:-1].replace(" ", "␣") or "(empty)"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return "<table><tr>" + "".join(f"<th>{name}</th>" for name in head) + f"</tr>\n{cells}</table>"


def _facts(inspection: AdapterInspection) -> str:
    rows = [("base model", escape(str(inspection.base_model)))]
    rows += [(f"<code>{escape(key)}</code>", escape(str(value))) for key, value in inspection.facts.items()]
    return "<h2>Configuration</h2>" + _table(("", ""), rows)


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
    return "<h2>Parameters</h2>" + _table(("", ""), [*rows, *norms])


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
        + _table(("", "length", "nearest words, cosine"), rows)
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
        + _table(("moved most", "shift", "moved least", "shift"), rows)
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
