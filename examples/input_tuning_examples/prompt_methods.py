"""Greedy text of PEFT's prompt methods, which is right beside transformers 5.24 too.

transformers 5.24 calls the cache of a generation `cache`. PEFT 0.21 looks for `past_key_values`, finds none, and puts
the prompt in again at every new token. What prompt-tuning, p-tuning and prefix-tuning then write is wrong, without an
error. Logits are right. transformers 5.24 asks for PEFT 0.22, which is not released.
"""

from __future__ import annotations

import peft
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, PrefixTuningConfig
from torch import Tensor

RENAMED, KNOWN = Version("5.24"), Version("0.22")
PEFT_LOSES_CACHES = Version(transformers.__version__) >= RENAMED and Version(peft.__version__) < KNOWN


def generate_greedily(
    model: torch.nn.Module, ids: Tensor, mask: Tensor, max_new_tokens: int, pad: int, eos: int
) -> Tensor:
    """What `model.generate` gives for (batch, length) ids; without a cache if a prompt of PEFT's needs that.

    Returns:
        (batch, length + new) ids, of an encoder-decoder model the decoder's.
    """
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad, "eos_token_id": eos}
    prompt = model.active_peft_config if isinstance(model, PeftModel) else None
    if PEFT_LOSES_CACHES and prompt is not None and prompt.is_prompt_learning:
        if isinstance(prompt, PrefixTuningConfig):  # its prompt is a cache
            return _by_forward_passes(model, ids, mask, max_new_tokens, pad, eos)
        options["use_cache"] = False
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@torch.no_grad()
def _by_forward_passes(model: PeftModel, ids: Tensor, mask: Tensor, max_new_tokens: int, pad: int, eos: int) -> Tensor:
    done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    seq2seq = model.config.is_encoder_decoder
    text = torch.full_like(ids[:, :1], model.config.decoder_start_token_id) if seq2seq else ids
    for _ in range(max_new_tokens):
        inputs = {"input_ids": ids, "decoder_input_ids": text} if seq2seq else {"input_ids": text}
        new = model(**inputs, attention_mask=mask, use_cache=False).logits[:, -1:].argmax(-1).masked_fill(done, pad)
        text = torch.cat([text, new], dim=1)
        if not seq2seq:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        done |= new == eos
        if done.all():
            break
    return text
