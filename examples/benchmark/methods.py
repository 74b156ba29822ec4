"""The methods that are compared: a configuration of PEFT or of this package, and the rate where its search starts.

A method is a name. What an ablation varies has a name too, so that every run is a task, a method and a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)

from peft_input_tuning import InputTuningConfig

VIRTUAL_TOKENS = 20


@dataclass(frozen=True)
class Method:
    """How to train.

    Args:
        config: makes the configuration for a task type of PEFT; None is full fine-tuning.
        start: learning rate (AdamW) where the search begins; of input-tuning, the input-adapter's.
        prompt_ratio: of input-tuning, the soft prompt's rate over the input-adapter's.
        rates_of: the method whose rates are taken over instead of a search of its own.
        prompt_rate: of a method that is given input-tuning's soft prompt, so that nothing but what it does to words
            differs: the prompt's learning rate.
    """

    config: Callable[[str], PeftConfig] | None
    start: float
    prompt_ratio: float | None = None
    rates_of: str | None = None
    prompt_rate: float | None = None

    def rate_of_prompt(self, rate: float) -> float | None:
        """The soft prompt's learning rate, where it has one of its own."""
        return rate * self.prompt_ratio if self.prompt_ratio is not None else self.prompt_rate


def _input_tuning(*, ratio: float = 10.0, rates_of: str | None = "input-tuning", **changes: Any) -> Method:
    # The prompt has a rate of its own here, so its parameter is the prompt itself.
    fields = {"num_virtual_tokens": VIRTUAL_TOKENS, "prompt_scale": 1.0, **changes}
    return Method(lambda task_type: InputTuningConfig(task_type=task_type, **fields), 1e-3, ratio, rates_of)


def _peft(kind: type[PeftConfig], start: float, **fields: Any) -> Method:
    return Method(lambda task_type: kind(task_type=task_type, **fields), start)


def _with_prompt(method: Method) -> Method:
    return replace(method, prompt_rate=3e-2)  # the best of input-tuning's prompt and of prompt-tuning's


METHODS: dict[str, Method] = {
    "prompt-tuning": _peft(
        PromptTuningConfig, 1e-1, num_virtual_tokens=VIRTUAL_TOKENS, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "p-tuning": _peft(PromptEncoderConfig, 1e-3, num_virtual_tokens=VIRTUAL_TOKENS),
    "prefix-tuning": _peft(PrefixTuningConfig, 1e-2, num_virtual_tokens=VIRTUAL_TOKENS),
    "input-tuning": _input_tuning(rates_of=None),  # the paper's size, h = 2e
    "input-tuning-19": _input_tuning(rates_of=None, adapter_hidden_dim=19),
    "input-tuning-64": _input_tuning(rates_of=None, adapter_hidden_dim=64),
    "input-tuning-256": _input_tuning(rates_of=None, adapter_hidden_dim=256),
    "input-tuning-236": _input_tuning(rates_of=None, adapter_hidden_dim=236),  # with 20 tokens a LoRA of rank 256
    "input-tuning-380": _input_tuning(rates_of=None, adapter_hidden_dim=380),  # as many numbers as LoRA
    "adapter-only": _input_tuning(rates_of=None, num_virtual_tokens=0),
    "lora": _peft(LoraConfig, 1e-3, r=8, lora_alpha=16),
    "lora-all-linear": _peft(LoraConfig, 1e-3, r=8, lora_alpha=16, target_modules="all-linear"),
    # Two that change word embeddings too, each with input-tuning's prompt: a LoRA as large as input-tuning, and the
    # rows of the words that training has.
    "lora-embedding": _with_prompt(_peft(LoraConfig, 3e-3, r=27, lora_alpha=54, target_modules=["embed_tokens"])),
    "trainable-tokens": _with_prompt(_peft(TrainableTokensConfig, 3e-3)),
    "fine-tuning": Method(None, 1e-4),
    # Ablations of input-tuning: one thing changed. A prompt of 0 virtual tokens is adapter-only.
    "input-tuning-prompt-5": _input_tuning(num_virtual_tokens=5),
    "input-tuning-prompt-100": _input_tuning(num_virtual_tokens=100),
    "input-tuning-gelu": _input_tuning(adapter_activation="gelu"),
    "input-tuning-bias": _input_tuning(adapter_bias=True),
    "input-tuning-random-start": _input_tuning(init_weights=False),
    "input-tuning-ratio-1": _input_tuning(ratio=1.0),
    "input-tuning-ratio-100": _input_tuning(ratio=100.0),
    "input-tuning-scope-input": _input_tuning(adapter_scope="input"),
}
