"""Figures of familiarity in plain words.

Comparisons only: what a figure costs a method is known after training alone.
"""

from __future__ import annotations

from .figures import TextFigures


def reading(inputs: TextFigures, prose: TextFigures) -> str:
    """Some sentences on what was measured."""
    sentences = []
    bits, plain_bits = inputs.bits_per_byte, prose.bits_per_byte
    if bits is not None and plain_bits:
        sentences.append(
            f"The model spends {bits:.2f} bits on a byte of these inputs and {plain_bits:.2f} on a byte of plain "
            f"prose: {_compared(bits / plain_bits)}."
        )
        sentences += _share_above(inputs, prose)
    tokens, plain_tokens = inputs.tokens_per_byte, prose.tokens_per_byte
    if tokens is not None and plain_tokens:
        sentences.append(
            f"The tokenizer takes {100 * tokens:.0f} tokens for a hundred bytes of them and {100 * plain_tokens:.0f} "
            f"for prose: {_compared(tokens / plain_tokens)}."
        )
    if inputs.bigram_score is not None and prose.bigram_score is not None:
        sentences.append(
            f"Their bigrams score {inputs.bigram_score:.2f} in the corpus, those of prose {prose.bigram_score:.2f} "
            f"(a step of 1 is ten times as frequent); {inputs.unseen_bigrams:.0%} of them are not in the corpus at "
            f"all, of prose {prose.unseen_bigrams:.0%}."
        )
    return " ".join(sentences)


def _compared(ratio: float) -> str:
    """A ratio in words; within a twentieth it is called the same."""
    if 0.95 <= ratio <= 1.05:
        return "about the same"
    return f"{ratio:.1f} times as many" if ratio >= 1.95 else f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else 'less'}"


def _share_above(inputs: TextFigures, prose: TextFigures) -> list[str]:
    if inputs.bits_spread is None or prose.bits_spread is None:
        return []
    above = prose.bits_spread.highest
    # Bins that begin above the highest prose: an input of the same bin is not counted.
    first = int(above / inputs.bits_spread.width) + 1
    share = sum(inputs.bits_spread.counts[first:]) / sum(inputs.bits_spread.counts)
    return [f"{share:.0%} of the inputs surprise it more, a byte, than any text of the prose."]
