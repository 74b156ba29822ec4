"""The models that are measured, each variant on a base of its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
import transformers
from peft import LoraConfig, PeftConfig, PromptTuningConfig, PromptTuningInit, get_peft_model
from torch import nn

from input_tuning_examples.packaged_model import PACKAGED, find_model
from peft_input_tuning import InputTuningConfig
from peft_input_tuning.command_line.gguf import dense_weights

# SmolLM2's architecture at other sizes, with random weights: enough for timing.
SCALED = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
SIZES = (PACKAGED, *SCALED)


@dataclass(frozen=True)
class Bench:
    """Where and on what everything is measured.

    Args:
        size: "packaged" (SmolLM2-135M-Instruct) or one of `SCALED`.
        device: where.
        dtype: of the base model.
    """

    size: str
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def _base(self) -> nn.Module:
        if self.size == PACKAGED:
            folder, gguf = find_model(PACKAGED)
            return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, **dense_weights(gguf))
        sizes = SCALED[self.size]
        heads = max(1, sizes["num_attention_heads"] // 4)
        words = 500 if self.size == "tiny" else 49152
        config = transformers.LlamaConfig(
            **sizes,
            num_key_value_heads=heads,
            vocab_size=words,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        config.pad_token_id = 0
        torch.manual_seed(0)
        with torch.device(self.device):
            return transformers.LlamaForCausalLM(config).to(self.dtype)

    def base(self) -> nn.Module:
        """A fresh copy of the frozen base model."""
        model = copy.deepcopy(self._base).to(self.device).eval()
        model.generation_config.eos_token_id = None  # rows that end early would be timed as fast ones
        return model.requires_grad_(False)

    def adapted(self, config: PeftConfig) -> nn.Module:
        """A copy of the base with an adapter whose weights are random and not at identity."""
        torch.manual_seed(1)
        model = get_peft_model(self.base(), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
        return model

    def ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random ids `(rows, length)`."""
        generator = torch.Generator().manual_seed(seed)
        words = self._base.config.vocab_size
        return torch.randint(3, words, (rows, length), generator=generator).to(self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def input_tuning(virtual_tokens: int) -> InputTuningConfig:
    return InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens, prompt_tuning_init="RANDOM")


def prompt_tuning(virtual_tokens: int) -> PromptTuningConfig:
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens, prompt_tuning_init=PromptTuningInit.RANDOM
    )


def lora(all_linear: bool = False) -> LoraConfig:
    modules = "all-linear" if all_linear else ["q_proj", "v_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=modules)
