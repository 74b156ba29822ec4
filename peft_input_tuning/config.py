"""`InputTuningConfig`: what a user chooses. Checks every value before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.tuners.p_tuning import PromptEncoderConfig
from peft.tuners.prompt_tuning import PromptTuningConfig, PromptTuningInit

from .model_card import update_model_card
from .registration import add_peft_type

MAX_VIRTUAL_TOKENS = 65_536
# About what a soft prompt's learning rate should be over the input-adapter's. A power of two: dividing by it and
# multiplying with it changes no bit.
DEFAULT_PROMPT_SCALE = 8.0
ADAPTER_SCOPES = ("all", "input")


def _check_count(name: str, value: Any, zero_means: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` must be an integer, got {value!r}. Use 0 for {zero_means}.")
    if value < 0:
        raise ValueError(f"`{name}` must be >= 0, got {value}. Use 0 for {zero_means}.")


@dataclass
class InputTuningConfig(PeftConfig):
    """Configuration of input-tuning (An et al., 2022, arXiv 2203.03131): a soft prompt and an input-adapter.

    Fields have PEFT's names where PEFT's `PromptTuningConfig` has one.

    Args:
        num_virtual_tokens: length of the soft prompt; 0 trains the input-adapter only.
        prompt_tuning_init: what the prompt starts from, "SAMPLE_VOCAB" (random vocabulary rows, the paper's),
            "TEXT" or "RANDOM", as in PEFT's `PromptTuningConfig`.
        prompt_tuning_init_text: the text for "TEXT"; cut or repeated to `num_virtual_tokens`.
        tokenizer_name_or_path: the tokenizer for "TEXT".
        tokenizer_kwargs: further arguments of `AutoTokenizer.from_pretrained` for "TEXT".
        prompt_scale: the trained parameter is the prompt divided by this, so that Adam with one learning rate moves
            the prompt this many times as fast as the input-adapter. It belongs to the weights, as LoRA's alpha does.
            None becomes 8. In a saved configuration that does not name it, from before there was such a field, it
            becomes 1: there the parameter is the prompt itself.
        adapter_hidden_dim: inner size h of the input-adapter; None is the paper's h = 2e, 0 is no adapter (plain
            prompt-tuning), small values give ADePT's shape.
        adapter_activation: any activation that transformers knows (`transformers.activations.ACT2FN`).
        adapter_bias: whether W1 and W2 have biases; the paper draws none.
        adapter_dropout: dropout over the adapter's activations, in [0, 1).
        adapter_scope: which tokens of a decoder-only language model the adapter changes: "all" that enter it, or those
            of the "input" only, as the paper draws it: in training those without a label, in `generate` those that it
            was given. Other models read input only, so that both are the same.
        init_weights: True starts with W2 = 0, so that training begins as plain prompt-tuning; False starts with a
            random W2, for tests.
        modules_to_save: further modules to train and save, as in PEFT; never the embedding.
        prompt_start: set in saved configurations: ids of the words that the prompt started from. None where it started
            from no words, or where they are not known.
        weights_in_checkpoint: set in saved configurations. The adapter's weights come from its file, so nothing is
            initialised and no tokenizer is read.

    Raises:
        ValueError: a value that cannot work; the message names the field, the value and the remedy.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Length of the soft prompt; 0 = adapter only."})
    prompt_tuning_init: PromptTuningInit | str = field(
        default=PromptTuningInit.SAMPLE_VOCAB,
        metadata={"help": 'What the prompt starts from: "SAMPLE_VOCAB", "TEXT" or "RANDOM".'},
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": 'The text the prompt starts from, with prompt_tuning_init="TEXT".'}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": 'The tokenizer of that text, with prompt_tuning_init="TEXT".'}
    )
    tokenizer_kwargs: dict | None = field(
        default=None, metadata={"help": 'Arguments of AutoTokenizer.from_pretrained, with prompt_tuning_init="TEXT".'}
    )
    prompt_scale: float | None = field(
        default=None,
        metadata={
            "help": "The parameter is the prompt divided by this: with one rate, Adam moves the prompt so many times "
            "as fast as the adapter. None = 8, and 1 in saved configurations without it."
        },
    )
    adapter_hidden_dim: int | None = field(
        default=None,
        metadata={"help": "Inner size of the input-adapter; None = 2 x embedding size (the paper's), 0 = no adapter."},
    )
    adapter_activation: str = field(
        default="relu", metadata={"help": "Activation of the input-adapter, a name that transformers knows."}
    )
    adapter_bias: bool = field(default=False, metadata={"help": "Whether the input-adapter has biases."})
    adapter_dropout: float = field(default=0.0, metadata={"help": "Dropout over the input-adapter's activations."})
    adapter_scope: str = field(
        default="all",
        metadata={"help": 'Which tokens of a decoder-only language model are adapted: "all", or the "input" only.'},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: W2 = 0, training starts from plain prompt-tuning. False: random, for tests."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules apart from the adapter to train and save, for example a classification head."},
    )
    prompt_start: list[int] | None = field(
        default=None, metadata={"help": "Set in saved configurations: ids of the words that the prompt started from."}
    )
    weights_in_checkpoint: bool = field(
        default=False,
        metadata={"help": "Set in saved configurations: the weights come from a file, nothing is initialised."},
    )

    # The embedding is found through the model, not by name: a name here would make PEFT save the base embedding.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("INPUT_TUNING")
        self._check_prompt()
        self._resolve_prompt_scale()
        self._check_adapter()
        if not self.num_virtual_tokens and self.adapter_hidden_dim == 0:
            raise ValueError(
                "`num_virtual_tokens` and `adapter_hidden_dim` are both 0, so there is nothing to train. "
                "Set at least one of them."
            )

    def _check_prompt(self) -> None:
        _check_count("num_virtual_tokens", self.num_virtual_tokens, "an adapter without a prompt")
        if self.num_virtual_tokens > MAX_VIRTUAL_TOKENS:
            raise ValueError(
                f"`num_virtual_tokens` is {self.num_virtual_tokens}, more than {MAX_VIRTUAL_TOKENS}. "
                "Prompts of 5 to 200 virtual tokens are usual."
            )
        start = self.prompt_start
        if start is not None and not (isinstance(start, list) and all(type(word) is int for word in start)):
            raise ValueError(
                f"`prompt_start` must be a list of ids, got {start!r:.80}. Leave it out: it is set by saving."
            )
        known = [init.value for init in PromptTuningInit]
        if self.prompt_tuning_init not in known:
            raise ValueError(f"`prompt_tuning_init` must be one of {known}, got {self.prompt_tuning_init!r}.")
        self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        if self.tokenizer_kwargs is not None and not isinstance(self.tokenizer_kwargs, dict):
            raise ValueError(
                f"`tokenizer_kwargs` must be a dict, got {self.tokenizer_kwargs!r}. "
                "Write the arguments of AutoTokenizer.from_pretrained as {name: value}."
            )
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            raise ValueError(
                "`tokenizer_kwargs` holds trust_remote_code, which is refused: a configuration that was downloaded "
                "could run code with it. Remove it, and use a tokenizer that needs no code of its own."
            )
        if self.prompt_tuning_init is not PromptTuningInit.TEXT:
            if self.tokenizer_kwargs:
                raise ValueError(
                    f'`tokenizer_kwargs` is used with prompt_tuning_init="TEXT" only, got '
                    f'prompt_tuning_init="{self.prompt_tuning_init.value}". Remove it, or choose "TEXT".'
                )
            return
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if not getattr(self, name):
                raise ValueError(f'`{name}` is needed with prompt_tuning_init="TEXT", got {getattr(self, name)!r}.')

    def _resolve_prompt_scale(self) -> None:
        if self.prompt_scale is None:
            self.prompt_scale = 1.0 if self.weights_in_checkpoint else DEFAULT_PROMPT_SCALE
        scale = self.prompt_scale
        if isinstance(scale, bool) or not isinstance(scale, Real) or not 1e-4 <= scale <= 1e4:
            raise ValueError(
                f"`prompt_scale` must be a positive finite number (0.0001 to 10000), got {scale!r}. Leave it out for "
                f"{DEFAULT_PROMPT_SCALE:g}, or use 1.0 for a parameter that is the prompt itself."
            )
        self.prompt_scale = float(scale)

    def _check_adapter(self) -> None:
        from transformers.activations import ACT2FN

        if self.adapter_hidden_dim is not None:
            _check_count("adapter_hidden_dim", self.adapter_hidden_dim, "prompt-tuning without an input-adapter")
        if not isinstance(self.adapter_activation, str) or self.adapter_activation not in ACT2FN:
            raise ValueError(
                f"`adapter_activation` must be an activation that transformers knows, got "
                f"{self.adapter_activation!r}. Known: {', '.join(sorted(ACT2FN))}."
            )
        dropout = self.adapter_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= dropout < 1:
            raise ValueError(f"`adapter_dropout` must be a number in [0, 1), got {dropout!r}. Use 0.0 for none.")
        if self.adapter_scope not in ADAPTER_SCOPES:
            raise ValueError(f"`adapter_scope` must be one of {list(ADAPTER_SCOPES)}, got {self.adapter_scope!r}.")
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"`modules_to_save` must be a list of names, got the string {self.modules_to_save!r}. "
                f"Write [{self.modules_to_save!r}]."
            )

    @classmethod
    def from_prompt_tuning(cls, config: PromptTuningConfig | PromptEncoderConfig, **changes: Any) -> InputTuningConfig:
        """The configuration that goes on where one of PEFT's prompt-tuning stands.

        `peft_input_tuning.from_prompt_tuning` does the same for a trained adapter, weights included.

        Args:
            config: a configuration of PEFT's prompt-tuning, or of its P-tuning, which names no start of the prompt.
            **changes: fields to set otherwise, for example `adapter_hidden_dim=64`.
        """
        if not isinstance(config, (PromptTuningConfig, PromptEncoderConfig)):
            raise ValueError(
                f"`config` must be a PromptTuningConfig or a PromptEncoderConfig of PEFT, got {type(config).__name__}."
            )
        shared = (
            "num_virtual_tokens",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
            "task_type",
            "base_model_name_or_path",
            "revision",
            "modules_to_save",
        )
        return cls(**{**{name: getattr(config, name) for name in shared if hasattr(config, name)}, **changes})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves `adapter_config.json` as PEFT does, and says in the model card to import this package first."""
        in_checkpoint = self.weights_in_checkpoint
        self.weights_in_checkpoint = True
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.weights_in_checkpoint = in_checkpoint
        update_model_card(save_directory, self)
