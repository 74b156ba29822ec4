"""Text of PEFT's prompt methods is that of their logits, beside a transformers whose cache PEFT loses too."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from families import FAMILIES, PAD, build, ids
from input_tuning_examples import prompt_methods

KINDS = [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig]
NEW = 8


def prompted(kind: type, family: str) -> PeftModel:
    task_type = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    model = get_peft_model(build(FAMILIES[family]), kind(task_type=task_type, num_virtual_tokens=4)).eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def one_by_one(model: PeftModel, row: Tensor) -> list[int]:
    """New tokens of one row, by full forward passes."""
    seq2seq = model.config.is_encoder_decoder
    text = [model.config.decoder_start_token_id] if seq2seq else row.tolist()
    start = len(text)
    for _ in range(NEW):
        grown = torch.tensor([text], device=row.device)
        inputs = {"input_ids": row[None], "decoder_input_ids": grown} if seq2seq else {"input_ids": grown}
        text.append(model(**inputs, use_cache=False).logits[0, -1].argmax().item())
    return text[start:]


@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_text_is_that_of_the_logits(kind, family, loses, monkeypatch):
    """One row ends early, and padding follows it."""
    if prompt_methods.PEFT_LOSES_CACHES and not loses:
        pytest.skip("PEFT loses the cache of this transformers")
    monkeypatch.setattr(prompt_methods, "PEFT_LOSES_CACHES", loses)
    model, rows = prompted(kind, family), ids(2, 6)
    texts = [one_by_one(model, row) for row in rows]
    eos = texts[0][2]  # of which the first row has one, soon
    want = [text[: text.index(eos) + 1] if eos in text else text for text in texts]
    longest = max(map(len, want))
    out = prompt_methods.generate_greedily(model, rows, torch.ones_like(rows), NEW, pad=PAD, eos=eos)
    new = out[:, 1 if family == "t5" else 6 :].tolist()
    assert new == [text + [PAD] * (longest - len(text)) for text in want]
