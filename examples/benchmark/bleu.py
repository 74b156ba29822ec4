"""BLEU of texts as all of the benchmark has it: the quick one of `paper_metrics.py`'s metrics."""

from __future__ import annotations

from collections.abc import Sequence


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """sacrebleu's, of lower case, in per cent.

    Args:
        references: of each text, at least one.
    """
    import sacrebleu

    from input_tuning_examples.metrics.generation_metrics import by_position

    return sacrebleu.corpus_bleu(list(texts), by_position(references), lowercase=True).score
