"""The loss of each test row on its first reference, so that rows can be compared one by one, and taken apart."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from input_tuning_examples.train_and_generate import IGNORED


@torch.no_grad()
def row_losses(
    model: torch.nn.Module, features: list[dict], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[tuple[float, int]]:
    """Sum of the cross entropy of a row's target tokens in nats, and how many they are; in the order of the rows.

    Args:
        model: a decoder-only language model, with adapters or without.
        features: rows with `input_ids`, `attention_mask` and `labels`.
        tokenizer: pads, on the right.
    """
    model.eval()
    device = next(model.parameters()).device
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    found: list[tuple[float, int]] = [(0.0, 0)] * len(features)
    order = sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = {name: values.to(device) for name, values in collate([features[row] for row in rows]).items()}
        logits = model(**batch).logits[
            :, -batch["labels"].shape[1] :
        ]  # PEFT's prompt-tuning gives its own tokens' too
        following = batch["labels"][:, 1:]
        places = following != IGNORED
        losses = torch.zeros(following.shape, device=device)
        losses[places] = cross_entropy(logits[:, :-1][places].float(), following[places], reduction="none")
        for row, loss, count in zip(rows, losses.sum(1).tolist(), places.sum(1).tolist(), strict=True):
            found[row] = (round(loss, 4), count)
    return found
