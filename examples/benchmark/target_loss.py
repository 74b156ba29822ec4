"""The loss of a decoder-only model on the labelled places alone.

transformers makes float32 logits of every place before it leaves out those without a label; where sources are long and
targets short, that is most of a step's time and memory on a CPU. The value and the gradients are the same.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel


def loss_on_targets(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """Cross-entropy of the next token, as transformers' `ForCausalLMLoss` defines it.

    Args:
        logits: `(batch, length, vocabulary)`.
        labels: `(batch, length)`, `ignore_index` where there is no loss.
        num_items_in_batch: what the sum is divided by; None is the number of labelled places.
    """
    following = functional.pad(labels, (0, 1), value=ignore_index)[:, 1:].to(logits.device)
    labelled = following != ignore_index
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = functional.cross_entropy(logits[labelled].float(), following[labelled], reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def use_loss_on_targets(model: PreTrainedModel) -> None:
    """Gives a model this loss, through the setter of `PreTrainedModel.loss_function`."""
    if not model.config.is_encoder_decoder:  # there only targets have logits
        model.loss_function = loss_on_targets
