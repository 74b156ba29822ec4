"""Greedy texts for the test rows, in batches as large as each method is right in."""

from __future__ import annotations

from collections import defaultdict

import torch
from peft import PeftModel, PromptTuningConfig
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from input_tuning_examples.prompt_methods import generate_greedily
from peft_input_tuning import from_prompt_tuning

MAX_NEW_TOKENS = 64
GENERATED_AT_ONCE = 64


def for_padded_batches(model: torch.nn.Module) -> tuple[torch.nn.Module, bool]:
    """The model to generate with, and whether its batches may be padded.

    PEFT's prompt methods put what they add before the padding, where it has wrong positions. A soft prompt of PEFT's
    prompt-tuning goes to this package, which gives it the same logits beside any padding; p-tuning and prefix-tuning,
    and encoder-decoder models with a prompt for the decoder too, are left as they are.
    """
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return model, True
    if isinstance(model.active_peft_config, PromptTuningConfig) and not model.config.is_encoder_decoder:
        return from_prompt_tuning(model, adapter_hidden_dim=0), True
    return model, False


def batches_of(prompts: list[list[int]], padded: bool, at_once: int) -> list[list[int]]:
    """Which rows are generated together: those of like length, or of one length where nothing may be padded."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        groups[0 if padded else len(prompts[row])].append(row)
    return [rows[start : start + at_once] for rows in groups.values() for start in range(0, len(rows), at_once)]


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    at_once: int = GENERATED_AT_ONCE,
) -> list[str]:
    """Texts of at most `MAX_NEW_TOKENS` tokens for the prompts, in their order; `at_once` in a batch at most."""
    model, padded = for_padded_batches(model.eval())
    model.eval()
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc="Generating", mininterval=5) as bar:
        for rows in batches_of(prompts, padded, at_once):
            longest = max(len(prompts[row]) for row in rows)
            pads = [longest - len(prompts[row]) for row in rows]
            ids = [[tokenizer.pad_token_id] * pad + prompts[row] for row, pad in zip(rows, pads, strict=True)]
            mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
            if model.config.is_encoder_decoder:  # BART numbers the places of a row, and new tokens stand elsewhere
                ids = [row[pad:] + row[:pad] for row, pad in zip(ids, pads, strict=True)]
                mask = [row[::-1] for row in mask]
            out = generate_greedily(
                model,
                torch.tensor(ids, device=model.device),
                torch.tensor(mask, device=model.device),
                MAX_NEW_TOKENS,
                pad=tokenizer.pad_token_id,
                eos=tokenizer.eos_token_id,
            )
            new = out if model.config.is_encoder_decoder else out[:, longest:]
            for row, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[row] = text.strip()
            bar.update(len(rows))
    return texts
