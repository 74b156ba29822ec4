"""SmolLM2-135M, and adapters of it that are trained, if for a few steps: weights as they come out of training."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from input_tuning_examples.logic_to_text import make_splits
from input_tuning_examples.packaged_model import find_packaged_model
from input_tuning_examples.task_data import Example
from input_tuning_examples.train_and_generate import encode_rows, pad_rows
from peft_input_tuning import create_input_tuning_optimizer


def packaged() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packaged model in float32, and its tokenizer."""
    folder, file = find_packaged_model()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def logic_rows(rows: int, back: bool = False) -> list[Example]:
    """Rows of the demo's task: from expressions to English, or back."""
    pairs = [(row.source, row.reference) for row in make_splits(rows, 1, 1)["train"]]
    return [Example(target, [source]) if back else Example(source, [target]) for source, target in pairs]


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], steps: int, batch: int = 4
) -> float:
    """Trains the active adapter, at the README's rates. Returns the loss of the last step."""
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=3e-3, prompt_lr=3e-2)
    encoded = encode_rows(tokenizer, random.Random(0).sample(list(rows), steps * batch))
    model.train()
    for step in range(steps):
        loss = model(**pad_rows(encoded[step * batch : (step + 1) * batch])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return float(loss)
