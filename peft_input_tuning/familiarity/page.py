"""The familiarity of inputs as one HTML page."""

from __future__ import annotations

from html import escape

from ..output.html import html_page, table
from ..output.words import shown
from .figures import Distribution
from .measure import Familiarity

BARS = 40
WIDTH, HEIGHT = 640, 180
_PROSE_STYLE = ":root { --prose: #c9a227 } .prose { fill: var(--prose) } td:first-child { white-space: nowrap }"
NOT_MEASURED = "–"


def familiarity_page(found: Familiarity, title: str) -> str:
    """The page, as HTML. The title, the inputs and the tokens are escaped."""
    sections = [f"<p>{escape(found.reading)}</p>", _figures(found)]
    for heading, name in (("Bits per byte", "bits_spread"), ("Bigram score", "score_spread")):
        inputs, prose = getattr(found.inputs, name), getattr(found.prose, name)
        if inputs is not None:
            sections.append(f"<h2>{heading} of each text</h2>" + _histogram(inputs, prose, heading.lower()))
    sections += [_inputs(found), _tokens(found)]
    return html_page(title, sections, _PROSE_STYLE)


def figure_rows(found: Familiarity) -> list[tuple[str, str, str]]:
    """What is in the table of figures: name, of the inputs, of prose."""

    def row(name: str, figure: str, form: str) -> tuple[str, str, str]:
        values = (getattr(figures, figure) for figures in (found.inputs, found.prose))
        inputs, prose = (NOT_MEASURED if value is None else format(value, form) for value in values)
        return name, inputs, prose

    return [
        row("texts", "texts", ","),
        row("bytes", "bytes", ","),
        row("tokens", "tokens", ","),
        row("tokens per byte", "tokens_per_byte", ".3f"),
        row("bits per byte", "bits_per_byte", ".3f"),
        ("… of a text, quartiles", _quartiles(found.inputs.bits_spread), _quartiles(found.prose.bits_spread)),
        row("bits per token", "bits_per_token", ".2f"),
        row("bigram score", "bigram_score", ".3f"),
        row("bigrams: mean in a million", "bigrams_per_million", ",.1f"),
        row("bigrams not in the corpus", "unseen_bigrams", ".1%"),
    ]


def input_rows(found: Familiarity) -> list[tuple[str, str, str, str]]:
    """Number, bits per byte, bigram score and text of each listed input, with line ends and the like made visible."""
    return [
        (str(entry.number), _number(entry.bits_per_byte), _number(entry.bigram_score), repr(entry.text)[1:-1])
        for entry in found.least_familiar_inputs
    ]


def token_rows(found: Familiarity) -> list[tuple[str, str, str]]:
    """Token, its value and how often it was measured."""
    return [(shown(t.word), f"{t.word.value:.2f}", f"{t.occurrences:,}") for t in found.least_familiar_tokens]


def token_value(found: Familiarity) -> str:
    """What the tokens' values are."""
    return "score of the bigrams that it ends" if found.inputs.bits_per_byte is None else "bits"


def prose_name(found: Familiarity) -> str:
    return "plain prose (English, the package's own)" if found.own_prose else "plain prose (yours)"


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}"


def _quartiles(spread: Distribution | None) -> str:
    return NOT_MEASURED if spread is None else ", ".join(f"{spread.quantile(q):.2f}" for q in (0.25, 0.5, 0.75))


def _figures(found: Familiarity) -> str:
    corpus = ""
    if found.corpus_bigrams is not None:
        corpus = (
            f"<p>The corpus has {found.corpus_bigrams:,} bigrams of tokens. A count can be too low by "
            f"{found.corpus_undercount:,} at the most. The score of a bigram is log10(1 + occurrences among a "
            "million); it compares inputs by one corpus and one tokenizer, and not with the figures of the paper.</p>"
        )
    return "<h2>Figures</h2>" + table(("", "inputs", prose_name(found)), figure_rows(found)) + corpus


def _inputs(found: Familiarity) -> str:
    rows = [(number, bits, score, f"<code>{escape(text)}</code>") for number, bits, score, text in input_rows(found)]
    return "<h2>Least familiar inputs</h2>" + table(("number", "bits per byte", "bigram score", "text"), rows)


def _tokens(found: Familiarity) -> str:
    rows = [(f"<code>{escape(token)}</code>", value, count) for token, value, count in token_rows(found)]
    head = ("token", f"mean {token_value(found)}", "occurrences")
    return "<h2>Least familiar tokens</h2>" + table(head, rows)


def _histogram(inputs: Distribution, prose: Distribution | None, across: str) -> str:
    """Share of the inputs and of the prose in each bin, side by side."""
    series = [("bar", inputs), *([("prose", prose)] if prose is not None else [])]
    first = min(_ends(spread)[0] for _, spread in series)
    last = max(_ends(spread)[1] for _, spread in series) + 1
    joined = -(-(last - first) // BARS)  # bins in a bar
    bars = -(-(last - first) // joined)
    shares = [(css, _shares(spread, first, joined, bars)) for css, spread in series]
    highest = max(max(values) for _, values in shares)
    step = WIDTH / bars
    each = step * 0.9 / len(series)

    def edge(bar: int) -> float:
        return (first + bar * joined) * inputs.width

    drawn = "".join(
        f'<rect class="{css}" x="{bar * step + place * each:.1f}" y="{HEIGHT * (1 - share / highest):.1f}" '
        f'width="{each:.1f}" height="{HEIGHT * share / highest:.1f}">'
        f"<title>{edge(bar):.2f} to {edge(bar + 1):.2f}: {share:.1%}</title></rect>"
        for place, (css, values) in enumerate(shares)
        for bar, share in enumerate(values)
        if share
    )
    marks = "".join(
        f'<text x="{bar * step:.1f}" y="{HEIGHT + 15}">{edge(bar):.2f}</text>'
        for bar in range(0, bars, max(1, -(-bars // 10)))
    )
    legend = "".join(
        f'<rect class="{css}" x="{x}" y="-26" width="10" height="10"/><text x="{x + 14}" y="-17">{name}</text>'
        for css, x, name in (("bar", 200, "inputs"), ("prose", 280, "plain prose"))[: len(series)]
    )
    return (
        f'<svg viewBox="0 -32 {WIDTH} {HEIGHT + 70}" width="{WIDTH}" role="img" aria-label="texts by {across}">'
        f'<text x="0" y="-17">share of texts, up to {highest:.0%}</text>{legend}{drawn}{marks}'
        f'<text x="{WIDTH}" y="{HEIGHT + 32}" text-anchor="end">{across}</text></svg>'
    )


def _ends(spread: Distribution) -> tuple[int, int]:
    filled = [i for i, count in enumerate(spread.counts) if count]
    return filled[0], filled[-1]


def _shares(spread: Distribution, first: int, joined: int, bars: int) -> list[float]:
    total = sum(spread.counts)
    starts = [first + bar * joined for bar in range(bars)]
    return [sum(spread.counts[start : start + joined]) / total for start in starts]
