"""What `train.py` can be told: its options, those of `TrainingArguments`, and the checks of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PromptTuningConfig
from transformers import HfArgumentParser, TrainingArguments

from input_tuning_examples.arguments import check_can_be_written
from input_tuning_examples.packaged_model import PACKAGED
from input_tuning_examples.task_data import InputError
from input_tuning_examples.training_rows import Columns
from peft_input_tuning import InputTuningConfig

# Of each method, and its rate where none is given: what docs/which-method.md found; of LoRA a step less, as its best
# rate stood beside one that diverged.
LEARNING_RATES = {"input-tuning": 3e-3, "prompt-tuning": 3e-2, "lora": 3e-3, "full": 1e-4}


@dataclass
class Options:
    """What this script adds to `TrainingArguments`."""

    train_data: str = field(metadata={"help": "JSON-lines file, or a name for `datasets.load_dataset`"})
    validation_data: str | None = field(default=None, metadata={"help": "the same; for --eval_strategy"})
    test_data: str | None = field(default=None, metadata={"help": "the same; rows to generate and score at the end"})
    source_column: str = field(default="source", metadata={"help": "column of the input"})
    target_column: str = field(default="references", metadata={"help": "column of the target: a text, or a list"})
    messages_column: str | None = field(default=None, metadata={"help": "column of chat messages, instead of these"})
    train_rows: int | None = field(default=None, metadata={"help": "at most"})
    test_rows: int | None = field(default=None, metadata={"help": "at most"})
    model: str = field(default=PACKAGED, metadata={"help": "hub id or folder (default: SmolLM2-135M-Instruct)"})
    dtype: str = field(default="float32", metadata={"help": "of the weights", "choices": ["float32", "bfloat16"]})
    method: str = field(default="input-tuning", metadata={"choices": list(LEARNING_RATES)})
    num_virtual_tokens: int = field(default=20, metadata={"help": "of input-tuning and prompt-tuning"})
    adapter_hidden_dim: int | None = field(default=None, metadata={"help": "of input-tuning (default: the paper's)"})
    prompt_learning_rate: float | None = field(
        default=None, metadata={"help": "of input-tuning's soft prompt (default: 10 x --learning_rate)"}
    )
    lora_rank: int = field(default=8, metadata={"help": "of LoRA"})
    max_length: int = field(default=512, metadata={"help": "tokens of a row, of source and target together"})
    max_new_tokens: int = field(default=64, metadata={"help": "of a generation"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "evaluations without a better loss; needs --load_best_model_at_end"}
    )

    base_name: str | None = field(default=None, metadata={"help": "of the base on the hub, for the model card"})
    license: str = field(default="unknown", metadata={"help": "of the adapter, for the card: as hubs name it"})

    @property
    def columns(self) -> Columns:
        return Columns(self.source_column, self.target_column, self.messages_column)

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens if self.method in ("input-tuning", "prompt-tuning") else 0


def check(options: Options, arguments: TrainingArguments) -> None:
    """Raises InputError where options cannot be used, or not together."""
    for name in ("max_length", "max_new_tokens", "lora_rank", "train_rows", "test_rows", "early_stopping_patience"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be >= 1, got {value}. Raise it, or leave it out.")
    numbers = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name in numbers:
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be >= 1, got {getattr(arguments, name)}. Raise it, or leave it out.")
    if arguments.seed < 0:
        raise InputError(f"--seed must be >= 0, got {arguments.seed}. Raise it, or leave it out.")
    if arguments.max_steps == 0 or (arguments.max_steps < 0 and not arguments.num_train_epochs > 0):
        raise InputError("--max_steps, --num_train_epochs: there is nothing to train. Raise them, or leave them out.")
    if options.method == "prompt-tuning" and options.num_virtual_tokens < 1:
        raise InputError(f"--num_virtual_tokens must be >= 1 in prompt-tuning, got {options.num_virtual_tokens}.")
    for name, rate in (("prompt_", options.prompt_learning_rate), ("", arguments.learning_rate)):
        if rate is not None and not rate > 0:
            raise InputError(f"--{name}learning_rate must be > 0, got {rate}. Pass something like 1e-3.")
    if options.early_stopping_patience is not None and not arguments.load_best_model_at_end:
        raise InputError("--early_stopping_patience needs --load_best_model_at_end. Pass it too.")
    if not options.validation_data and str(arguments.eval_strategy.value) != "no":
        raise InputError("--eval_strategy needs --validation_data. Pass it too.")
    if Path(arguments.output_dir).exists() and not Path(arguments.output_dir).is_dir():
        raise InputError(f"--output_dir: {arguments.output_dir!r} is a file. Pass a folder.")
    check_can_be_written(arguments.output_dir, "--output_dir")


def peft_config(options: Options, seq2seq: bool) -> PeftConfig | None:
    """Raises InputError where the method cannot have such sizes."""
    task: Any = {"task_type": "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"}
    if options.method == "input-tuning":
        sizes = {"num_virtual_tokens": options.num_virtual_tokens, "adapter_hidden_dim": options.adapter_hidden_dim}
        try:
            return InputTuningConfig(**task, **sizes, prompt_scale=1.0)  # the prompt has a rate of its own
        except ValueError as error:
            raise InputError(f"--method input-tuning: {error}") from None
    if options.method == "prompt-tuning":
        init: Any = "SAMPLE_VOCAB"
        return PromptTuningConfig(**task, num_virtual_tokens=options.num_virtual_tokens, prompt_tuning_init=init)
    if options.method == "lora":
        return LoraConfig(**task, r=options.lora_rank)
    return None


def parse_arguments(argv: list[str] | None, description: str | None = None) -> tuple[Options, TrainingArguments]:
    """Raises ValueError at an option that nobody knows, or TrainingArguments that do not go together."""
    parser = HfArgumentParser((Options, TrainingArguments), description=description)
    parser.set_defaults(logging_steps=10)  # transformers' 500 leaves short runs without a curve
    parser.set_defaults(learning_rate=None)  # not transformers' default, which is far too low for a prompt
    method = parser.parse_known_args(argv)[0].method
    parser.set_defaults(learning_rate=LEARNING_RATES[method])
    return parser.parse_args_into_dataclasses(argv)
