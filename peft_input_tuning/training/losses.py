"""A loss for each adapter of a batch: the mean cross-entropy over the labels of its own rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..call_state import on_device

IGNORED = -100


def adapter_losses(
    logits: Tensor,
    labels: Tensor,
    adapter_names: Sequence[str],
    shift_labels: bool = True,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Compute each adapter's mean cross-entropy, for a training loop of one's own.

    Train on their sum: an adapter's gradient is then what it would be without the others' rows.

    Args:
        logits: `(batch, length, vocabulary)` of a language model, or `(batch, classes)` of a classifier.
        labels: `(batch, length)` or `(batch,)`; -100 is none.
        adapter_names: the adapter of each row.
        shift_labels: whether logits at a place are for the label at the next one, as in decoder-only language models;
            False for encoder-decoders and classifiers.
        label_smoothing: as in torch's `cross_entropy`.

    Returns:
        A scalar for each adapter in the batch; 0 for one without a label.

    Raises:
        ValueError: shapes that do not fit, labels that are no classes.
    """
    sums, counts = row_losses(logits, labels, shift_labels, label_smoothing)
    if len(adapter_names) != len(sums):
        raise ValueError(f"`adapter_names` has {len(adapter_names)} names for a batch of {len(sums)} rows.")
    names = list(dict.fromkeys(adapter_names))
    losses = sum_by_adapter(sums, adapter_names, names) / sum_by_adapter(counts, adapter_names, names).clamp(min=1)
    return dict(zip(names, losses.unbind(), strict=True))


def sum_by_adapter(values: Tensor, row_names: Sequence[str], names: Sequence[str]) -> Tensor:
    """Add up a value of each row, `(batch,)`, by adapter: `(names,)`, in the order of `names`."""
    index = on_device([names.index(name) for name in row_names], values.device)
    return values.new_zeros(len(names)).index_add(0, index, values)


def row_losses(
    logits: Tensor, labels: Tensor, shift_labels: bool, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of each row, and how many labels it is of: `(batch,)` each."""
    check_classes(logits, labels)
    if shift_labels:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    each = nn.functional.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return each.view(len(labels), -1).sum(-1), count_labels(labels)


def count_labels(labels: Tensor, shift_labels: bool = False) -> Tensor:
    """Number of labels in each row, `(batch,)`; those of a first place are none if labels are shifted."""
    labels = labels[:, 1:] if shift_labels else labels
    return labels.ne(IGNORED).view(len(labels), -1).sum(-1)


def check_classes(logits: Tensor, labels: Tensor) -> None:
    if logits.shape[:-1] != labels.shape or labels.is_floating_point():
        raise ValueError(
            f"`labels` are {labels.dtype} of the shape {tuple(labels.shape)}, for logits {tuple(logits.shape)}. The "
            "loss is a cross-entropy: pass the number of a class for each row, or for each place of it."
        )
