"""A pretrained model that is found and described before its weights are loaded: of whatever kind, GGUF or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from peft_input_tuning.command_line.gguf import dense_weights

from .packaged_model import find_model
from .task_data import InputError


@dataclass(frozen=True)
class Base:
    """A pretrained model whose weights are still to be loaded."""

    name: str
    gguf_file: str | None
    seq2seq: bool
    tokenizer: PreTrainedTokenizerBase
    positions: int | None = None  # None has no end

    @classmethod
    def find(cls, model: str) -> Base:
        """Raises InputError where there is no such model."""
        name, gguf_file = find_model(model)
        more = {"gguf_file": gguf_file} if gguf_file else {}
        try:
            config = AutoConfig.from_pretrained(name, **more)
            tokenizer = AutoTokenizer.from_pretrained(name, **more)
        except (OSError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise InputError(
                f"--model: {model!r} cannot be read ({why}). Pass a folder that `save_pretrained` wrote, or a hub id."
            ) from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(name, gguf_file, config.is_encoder_decoder, tokenizer, positions)

    def load(self, dtype: str) -> torch.nn.Module:
        auto = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
        return auto.from_pretrained(self.name, dtype=getattr(torch, dtype), **dense_weights(self.gguf_file))
