"""The figures of `familiarity`, and their sums over a stream of texts: what is kept does not grow with the stream."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..output.words import Word
from .bigrams import score
from .tokens import Tokens

SHOWN_CHARACTERS = 300
BITS_BIN, BITS_BINS = 0.05, 400
SCORE_BIN, SCORE_BINS = 0.05, 121  # a score is 6 at the most


@dataclass(frozen=True)
class Distribution:
    """How a figure of single texts is spread, in bins of one width that start at 0.

    Args:
        width: of a bin.
        counts: texts in each bin; the last one holds all above too.
        lowest, highest: the smallest and the largest figure, exactly.
    """

    width: float
    counts: tuple[int, ...]
    lowest: float
    highest: float

    def quantile(self, q: float) -> float:
        """The figure that a share q of the texts does not exceed, to half a bin."""
        wanted, seen = q * sum(self.counts), 0
        for i, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return min(max((i + 0.5) * self.width, self.lowest), self.highest)
        return self.highest


@dataclass(frozen=True)
class TextFigures:
    """Figures of some texts together; None where it was not measured, or where there is nothing to measure.

    Args:
        texts: number of texts.
        bytes: their UTF-8 bytes.
        tokens: their tokens, without those that the tokenizer puts around a text.
        tokens_per_byte: the tokenizer's fertility. A tokenizer spends many tokens on text unlike its training text.
        bits_per_byte: the model's surprisal at all tokens but each text's first, over the bytes of these.
        bits_per_token: the same over the number of these tokens.
        bigrams_per_million: mean over all bigrams of how often each stands among a million of the corpus.
        bigram_score: mean over all bigrams of log10(1 + occurrences in a million).
        unseen_bigrams: share of the bigrams that the counts do not have.
        bits_spread: bits per byte of each text.
        score_spread: mean bigram score of each text.
    """

    texts: int
    bytes: int
    tokens: int
    tokens_per_byte: float | None
    bits_per_byte: float | None
    bits_per_token: float | None
    bigrams_per_million: float | None
    bigram_score: float | None
    unseen_bigrams: float | None
    bits_spread: Distribution | None
    score_spread: Distribution | None


@dataclass(frozen=True)
class UnfamiliarInput:
    """An input that is less familiar than most.

    Args:
        number: its place among the texts, from 1.
        text: its first `SHOWN_CHARACTERS` characters.
        bits_per_byte, bigram_score: its own; None where not measured.
    """

    number: int
    text: str
    bits_per_byte: float | None
    bigram_score: float | None


@dataclass(frozen=True)
class UnfamiliarToken:
    """A token that is less familiar than most, where it stands in the inputs.

    Args:
        word: the token. Its value is the mean surprisal in bits, or without a model the mean score of the bigrams that
            it ends.
        occurrences: how many were measured.
    """

    word: Word
    occurrences: int


class Spread:
    """A distribution in the making."""

    def __init__(self, width: float, bins: int) -> None:
        self.width, self.counts = width, [0] * bins
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, value: float) -> None:
        self.counts[min(int(value / self.width), len(self.counts) - 1)] += 1
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)

    def done(self) -> Distribution | None:
        return Distribution(self.width, tuple(self.counts), self.lowest, self.highest) if any(self.counts) else None


class Tally:
    """Sums over a stream of texts.

    Args:
        words: ids of the tokenizer are below this.
        least: how many of the least familiar inputs are kept.
    """

    def __init__(self, words: int, least: int) -> None:
        self.texts = self.bytes = self.tokens = 0
        self.scored_bytes = self.scored_tokens = self.bigrams = self.unseen = 0
        self.bits = self.per_million = self.score = 0.0
        self.bits_spread, self.score_spread = Spread(BITS_BIN, BITS_BINS), Spread(SCORE_BIN, SCORE_BINS)
        self.token_counts = torch.zeros(words, dtype=torch.int64)
        self.token_values = torch.zeros(words, dtype=torch.float64)
        self._least = least
        self._inputs: list[tuple[float, int, UnfamiliarInput]] = []

    def add(self, row: Tokens, bits: Tensor | None, per_million: Tensor | None) -> None:
        """Adds a text.

        Args:
            row: the text, n tokens.
            bits: surprisals `(n,)`; None without a model.
            per_million: frequencies of its bigrams `(n - 1,)`; None without counts.
        """
        self.texts += 1
        self.bytes += len(row.text.encode())
        self.tokens += len(row.ids)
        own_bits = own_score = None
        if per_million is not None and len(per_million):
            scores = score(per_million)
            own_score = float(scores.mean())
            self.bigrams += len(scores)
            self.unseen += int((per_million == 0).sum())
            self.per_million += float(per_million.sum())
            self.score += float(scores.sum())
            self.score_spread.add(own_score)
            if bits is None:
                self._add_tokens(row.ids[1:], scores)
        if bits is not None and len(row.ids) > row.context and row.rest_bytes:
            scored = bits[row.context :].double()
            own_bits = float(scored.sum()) / row.rest_bytes
            self.scored_bytes += row.rest_bytes
            self.scored_tokens += len(scored)
            self.bits += float(scored.sum())
            self.bits_spread.add(own_bits)
            self._add_tokens(row.ids[row.context :], scored)
        unfamiliar = own_bits if bits is not None else None if own_score is None else -own_score
        if unfamiliar is not None and self._least:
            text = row.text if len(row.text) <= SHOWN_CHARACTERS else row.text[:SHOWN_CHARACTERS] + "…"
            entry = (unfamiliar, -row.number, UnfamiliarInput(row.number, text, own_bits, own_score))
            (heapq.heappush if len(self._inputs) < self._least else heapq.heappushpop)(self._inputs, entry)

    def _add_tokens(self, ids: list[int], values: Tensor) -> None:
        places = torch.tensor(ids, dtype=torch.int64)
        self.token_counts.index_add_(0, places, torch.ones_like(places))
        self.token_values.index_add_(0, places, values.double())

    def figures(self) -> TextFigures:
        def mean(total: float, count: int) -> float | None:
            return total / count if count else None

        return TextFigures(
            texts=self.texts,
            bytes=self.bytes,
            tokens=self.tokens,
            tokens_per_byte=mean(self.tokens, self.bytes),
            bits_per_byte=mean(self.bits, self.scored_bytes),
            bits_per_token=mean(self.bits, self.scored_tokens),
            bigrams_per_million=mean(self.per_million, self.bigrams),
            bigram_score=mean(self.score, self.bigrams),
            unseen_bigrams=mean(self.unseen, self.bigrams),
            bits_spread=self.bits_spread.done(),
            score_spread=self.score_spread.done(),
        )

    def least_familiar_inputs(self) -> tuple[UnfamiliarInput, ...]:
        """The least familiar first; of equals the first in the stream."""
        return tuple(entry for _, _, entry in sorted(self._inputs, key=lambda item: item[:2], reverse=True))

    def token_means(self, occurrences: int) -> Iterator[tuple[int, float, int]]:
        """Token, mean value, count of each token that was measured at least so often."""
        for token in torch.nonzero(self.token_counts >= occurrences).flatten().tolist():
            count = int(self.token_counts[token])
            yield token, float(self.token_values[token]) / count, count
