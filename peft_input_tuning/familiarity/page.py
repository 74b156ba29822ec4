"""The familiarity of inputs as one HTML page."""

from __future__ import annotations

from ..output.html import HEIGHT, WIDTH, Bar, BarPlot, code, render
from ..output.words import shown
from .figures import Distribution
from .measure import Familiarity

BARS = 40
NOT_MEASURED = "–"
LEAD = (
    "How familiar these inputs are to the model: the more bits a byte costs it, the less they are like what it was "
    "pretrained on."
)


def familiarity_page(found: Familiarity, title: str) -> str:
    """The page, as HTML. The title, the inputs and the tokens are escaped."""
    plots = []
    for heading, name in (("Bits per byte", "bits_spread"), ("Bigram score", "score_spread")):
        inputs, prose = getattr(found.inputs, name), getattr(found.prose, name)
        if inputs is not None:
            plots.append((heading, _histogram(inputs, prose, heading.lower())))
    return render(
        "familiarity",
        title,
        LEAD,
        found=found,
        prose=prose_name(found),
        figures=figure_rows(found),
        plots=plots,
        inputs=[(*figures, code(text)) for *figures, text in input_rows(found)],
        tokens=[(code(token), *figures) for token, *figures in token_rows(found)],
        token_value=token_value(found),
    )


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


def _histogram(inputs: Distribution, prose: Distribution | None, across: str) -> BarPlot:
    """Share of the inputs and of the prose in each bin, side by side."""
    series = [("bar", "inputs", inputs), *([("prose", "plain prose", prose)] if prose is not None else [])]
    first = min(_ends(spread)[0] for *_, spread in series)
    last = max(_ends(spread)[1] for *_, spread in series) + 1
    joined = -(-(last - first) // BARS)  # bins in a bar
    bars = -(-(last - first) // joined)
    shares = [(css, _shares(spread, first, joined, bars)) for css, _, spread in series]
    highest = max(max(values) for _, values in shares)
    step = WIDTH / bars
    each = step * 0.9 / len(series)

    def edge(bar: int) -> float:
        return (first + bar * joined) * inputs.width

    return BarPlot(
        across,
        f"share of texts, up to {highest:.0%}",
        [
            Bar(
                x=bar * step + place * each,
                width=each,
                height=HEIGHT * share / highest,
                title=f"{edge(bar):.2f} to {edge(bar + 1):.2f}: {share:.1%}",
                css=css,
            )
            for place, (css, values) in enumerate(shares)
            for bar, share in enumerate(values)
            if share
        ],
        marks=[(bar * step, f"{edge(bar):.2f}") for bar in range(0, bars, max(1, -(-bars // 10)))],
        legend=[(css, name) for css, name, _ in series],
    )


def _ends(spread: Distribution) -> tuple[int, int]:
    filled = [i for i, count in enumerate(spread.counts) if count]
    return filled[0], filled[-1]


def _shares(spread: Distribution, first: int, joined: int, bars: int) -> list[float]:
    total = sum(spread.counts)
    starts = [first + bar * joined for bar in range(bars)]
    return [sum(spread.counts[start : start + joined]) / total for start in starts]
