"""What an adapter costs on text that has nothing to do with its task: loss on plain prose with it minus without it.

PEFT's method comparison reports the same figure, over articles of Wikipedia: the mean over tokens of the next token's
cross entropy, in nats. Turned off, an adapter gives back the base model, so that only the loss with it is in doubt.
"""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_input_tuning.familiarity.prose import PLAIN_PROSE

from .train_and_generate import IGNORED

TEXTS = len(PLAIN_PROSE)


@torch.no_grad()
def prose_loss(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, most: int | None = None
) -> float:
    """Mean loss of a token of plain English prose, in nats; the model is as it is, without dropout.

    Args:
        model: a decoder-only language model, with an adapter or without; in several processes, of all at once.
        tokenizer: the model's.
        most: tokens that the model has positions for; of a longer text only these are read. None has no end.

    Returns:
        NaN where not one token can be predicted.
    """
    training = model.training
    model.eval()
    losses = []
    for text in PLAIN_PROSE:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :most].to(model.device)
        if ids.shape[1] < 2:
            continue
        labels = torch.full_like(
            ids, IGNORED
        )  # all of it is input, says this to an adapter of `adapter_scope="input"`
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
        logits = logits[0, -ids.shape[1] :].float()  # PEFT's prompt-tuning gives those of its virtual tokens too
        losses.append(cross_entropy(logits[:-1], ids[0, 1:], reduction="none"))
    model.train(training)
    return float(torch.cat(losses).mean()) if losses else math.nan


def forgetting(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    untrained: float | None = None,
    most: int | None = None,
) -> dict[str, float]:
    """Loss on plain prose, and how much higher it is than without the adapter, or before full fine-tuning.

    Args:
        model: trained, decoder-only.
        tokenizer: the model's.
        untrained: the loss before full fine-tuning; None asks the model without its adapter.
        most: as `prose_loss` has it.
    """
    trained = prose_loss(model, tokenizer, most)
    if untrained is None:
        with model.disable_adapter():
            untrained = prose_loss(model, tokenizer, most)
    return {"prose_loss": trained, "forgetting": trained - untrained}
