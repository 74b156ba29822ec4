"""How familiar inputs are to a frozen language model: by a corpus, and by the model itself.

The paper finds that prompt-tuning falls behind fine-tuning most where the inputs are unlike the text that the model
was pretrained on. Three figures say how unlike, each beside the same figure for plain prose:

    bigram score      how frequent the inputs' bigrams are in a reference corpus: the paper's measure (its scaling is
                      not known; `bigrams.py` says what is done here)
    bits per byte     how surprised the model itself is: no corpus needed, and any tokenizer's model compares
    tokens per byte   how finely the tokenizer has to cut

Texts are read as a stream, in batches; memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..output.words import Word
from .bigrams import BigramCounts
from .figures import Tally, TextFigures, UnfamiliarInput, UnfamiliarToken
from .prose import PLAIN_PROSE
from .reading import reading
from .surprisal import DEFAULT_WINDOW, base_alone, check_causal, longest_window, token_bits
from .tokens import Tokens, start_tokens, token_stream

# Texts of so many batches are sorted by length together, and then reported as done.
BATCHES_AT_ONCE = 8

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Familiarity:
    """What `familiarity` found.

    Args:
        inputs: figures of the inputs.
        prose: the same figures of the prose they are compared with.
        own_prose: whether that is the prose of this package, see `prose.py`.
        least_familiar_inputs: the least familiar first: by bits per byte, without a model by bigram score.
        least_familiar_tokens: the same, by mean surprisal or by mean score of the bigrams that they end.
        corpus_bigrams: bigrams that were counted in the corpus; None without counts.
        corpus_undercount: by how much a count can be too low, see `BigramCounts`; None without counts.
        reading: all this in plain words.
    """

    inputs: TextFigures
    prose: TextFigures
    own_prose: bool
    least_familiar_inputs: tuple[UnfamiliarInput, ...]
    least_familiar_tokens: tuple[UnfamiliarToken, ...]
    corpus_bigrams: int | None
    corpus_undercount: int | None
    reading: str


def familiarity(
    texts: Iterable[str],
    model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    counts: BigramCounts | None = None,
    prose: Iterable[str] | None = None,
    *,
    batch_size: int = 8,
    window: int | None = None,
    least: int = 10,
    occurrences: int = 5,
    progress: Progress | None = None,
) -> Familiarity:
    """Measures how familiar texts are to a frozen model.

    Args:
        texts: the inputs, any iterable; it is read once.
        model: a decoder-only language model, with an adapter or without. Measured is the base model alone, as it is;
            nothing of it is changed. None leaves bits per byte out, for models of other kinds.
        tokenizer: the model's.
        counts: bigrams of a reference corpus; None leaves the bigram score out.
        prose: texts of the kind that the model can read; None is the English prose of this package.
        batch_size: texts in a batch, or windows of long texts.
        window: tokens that the model reads at once; longer texts are read in windows that overlap by a half. None is
            512, or what the model can take.
        least: how many of the least familiar inputs and tokens are listed.
        occurrences: how often a token must have been measured in the inputs to be listed.
        progress: called with "prose" or "inputs" and the number of texts done.

    Raises:
        ValueError: an argument that cannot be used, no texts, a text that is no string, a model that is not
            decoder-only, or counts of another tokenizer.
    """
    for name, number, lowest in (
        ("batch_size", batch_size, 1),
        ("window", window, 2),
        ("least", least, 0),
        ("occurrences", occurrences, 1),
    ):
        if number is not None and number < lowest:
            raise ValueError(f"`{name}` must be >= {lowest}, got {number}.")
    if counts is not None:
        counts.check_tokenizer(tokenizer)
    start = start_tokens(tokenizer)
    if model is not None:
        check_causal(model)
        window = _checked_window(model, start, window)

    def tally(texts: Iterable[str], stage: str, argument: str, least: int) -> Tally:
        found = Tally(max(tokenizer.get_vocab().values()) + 1, least)
        for group in token_stream(texts, tokenizer, argument, BATCHES_AT_ONCE * batch_size):
            _measure(found, group, model, counts, start, window or 0, batch_size)
            if progress is not None:
                progress(stage, group[-1].number)
        if not found.texts:
            raise ValueError(f"`{argument}` is empty. Pass at least one text.")
        return found

    beside = tally(PLAIN_PROSE if prose is None else prose, "prose", "prose", 0)
    found = tally(texts, "inputs", "texts", least)
    order = sorted(found.token_means(occurrences), key=lambda item: item[1], reverse=model is not None)
    inputs, plain = found.figures(), beside.figures()
    return Familiarity(
        inputs=inputs,
        prose=plain,
        own_prose=prose is None,
        least_familiar_inputs=found.least_familiar_inputs(),
        least_familiar_tokens=tuple(
            UnfamiliarToken(Word(token, tokenizer.decode([token]), value), count)
            for token, value, count in order[:least]
        ),
        corpus_bigrams=None if counts is None else counts.total,
        corpus_undercount=None if counts is None else counts.undercount,
        reading=reading(inputs, plain),
    )


def _checked_window(model: nn.Module, start: list[int], window: int | None) -> int:
    longest = longest_window(model, start)
    if window is None:
        return DEFAULT_WINDOW if longest is None else min(DEFAULT_WINDOW, longest)
    if longest is not None and window > longest:
        raise ValueError(f"`window` is {window}, but the model takes {longest} tokens. Pass at most that.")
    return window


def _measure(
    found: Tally,
    group: list[Tokens],
    model: nn.Module | None,
    counts: BigramCounts | None,
    start: list[int],
    window: int,
    batch_size: int,
) -> None:
    bits: list[Tensor] | list[None] = [None] * len(group)
    if model is not None:
        with base_alone(model):
            bits = token_bits(model, [row.ids for row in group], start, window, batch_size)
    for row, surprisal in zip(group, bits, strict=True):
        per_million = None if counts is None else counts.per_million(torch.tensor(row.ids, dtype=torch.int64))
        found.add(row, surprisal, per_million)
