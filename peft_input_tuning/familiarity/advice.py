"""What to train, by how familiar the inputs are.

The sentences rest on seven tasks with one model, SmolLM2-135M-Instruct (docs/which-method.md). Bits per byte of
different models do not compare, so what decides is the ratio to plain prose:

    1.2  1.3                1.5                                2.9
     |----|------------------|----------------------------------|
     three tasks             four tasks
     +2 to +6 BLEU           +6 to +12 BLEU of input-tuning over prompt-tuning
"""

from __future__ import annotations

from .figures import TextFigures

# Of the inputs' bits per byte over those of prose; between 1.3 and 1.5 there was no task.
SOMEWHAT_UNFAMILIAR, UNFAMILIAR = 1.2, 1.5


def advice(inputs: TextFigures, prose: TextFigures) -> str:
    """What to do next, in one or two sentences."""
    if inputs.bits_per_byte is None or not prose.bits_per_byte:
        return (
            "Next: without bits per byte nothing is recommended. Measure with a decoder-only model's weights, or "
            "train prompt-tuning and input-tuning and compare them."
        )
    ratio = inputs.bits_per_byte / prose.bits_per_byte
    if ratio >= UNFAMILIAR:
        return (
            "Next: train input-tuning. On the four of our tasks that were as unfamiliar to their model, prompt-tuning "
            "was 6 to 12 BLEU behind it; LoRA, which changes layers, was level with it on three and behind on one."
        )
    if ratio >= SOMEWHAT_UNFAMILIAR:
        return (
            "Next: train input-tuning, and prompt-tuning to compare. On the three of our tasks that were about as "
            "familiar to their model, input-tuning was 2 to 6 BLEU ahead, and with only 50 training rows behind."
        )
    return (
        "Next: train prompt-tuning, then input-tuning, and keep what is better on your validation rows. None of our "
        "tasks was as familiar to its model as your inputs, so nothing is known of the gain."
    )
