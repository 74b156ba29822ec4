"""The demo's work with models: load a frozen one, train an adapter with transformers' Trainer, generate.

Nothing here is special to input-tuning but two lines: its configuration and its optimizer. The rest is what a script
for any other PEFT method does.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers import logging as transformers_logging

from peft_input_tuning import InputTuningConfig, create_input_tuning_optimizer
from peft_input_tuning.command_line.gguf import dense_weights

from .prompt_methods import generate_greedily
from .task_data import Example, InputError

IGNORED = -100  # label of places without a loss
SEPARATOR = "\n"  # between source and target


def quiet() -> None:
    """Leaves the progress bars and errors, hides notes about files and settings that a first reader need not judge."""
    transformers_logging.set_verbosity_error()
    logging.getLogger("evaluate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


# ---- the frozen model ----------------------------------------------------------------------------------------------


def load_base(name: str, gguf_file: str | None, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model and its tokenizer.

    Args:
        name: a folder or a hub id.
        gguf_file: the GGUF file in it, if it is one.
        dtype: of the weights.

    Raises:
        InputError: transformers cannot read it, or it is not a decoder-only model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extra: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(name, **extra)
        if config.is_encoder_decoder:
            raise InputError(f"--model: {name!r} is an encoder-decoder model. Pass a decoder-only one.")
        tokenizer = AutoTokenizer.from_pretrained(name, **extra)
        if tokenizer.eos_token_id is None:
            raise InputError(f"--model: the tokenizer of {name!r} has no end-of-text token. Pass another model.")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **dense_weights(gguf_file))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--model: transformers cannot load {name!r} ({reason}). Check the name and the network, or pass a folder."
        ) from None
    return model.to(device), tokenizer


# ---- rows to tensors -----------------------------------------------------------------------------------------------


def encode_source(tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    return tokenizer(source + SEPARATOR, add_special_tokens=False).input_ids


def encode_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Source and first reference as one sequence; the loss is on the reference and the end-of-text token only."""
    rows = []
    for example in examples:
        source = encode_source(tokenizer, example.source)
        target = [*tokenizer(example.references[0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append({"input_ids": source + target, "labels": [IGNORED] * len(source) + target})
    return rows


def check_lengths(
    model: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    argument: str,
    num_virtual_tokens: int,
    new_tokens: int = 0,
) -> None:
    """Refuses rows that the model has no positions for, before any work.

    Raises:
        InputError: a row is too long.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(rows)), key=lambda n: len(rows[n]["input_ids"]))
    length = len(rows[longest]["input_ids"])
    if positions and length + num_virtual_tokens + new_tokens > positions:
        raise InputError(
            f"{argument}: a row has {length} tokens, too many beside {num_virtual_tokens} virtual and {new_tokens} "
            f"new tokens for the {positions} positions of the model. Shorten the rows, or pass another --model."
        )


def pad_rows(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads on the right, where no real token sees it. What a pad is does not matter, so no pad token is needed."""
    longest = max(len(row["input_ids"]) for row in rows)
    pads = [longest - len(row["input_ids"]) for row in rows]
    padded = list(zip(rows, pads, strict=True))
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * pad for row, pad in padded]),
        "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * pad for row, pad in padded]),
        "labels": torch.tensor([row["labels"] + [IGNORED] * pad for row, pad in padded]),
    }


# ---- the two methods -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Learning rates (AdamW, linear decay)."""

    prompt_tuning: float
    prompt: float
    adapter: float


@dataclass
class Result:
    """What one method gave."""

    trainable_parameters: int
    validation_loss: float
    seconds: float
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    validation_curve: list[tuple[int, float]] = field(default_factory=list)


def add_prompt_tuning(
    base: PreTrainedModel, num_virtual_tokens: int, rates: Rates
) -> tuple[PeftModel, torch.optim.Optimizer]:
    """PEFT's own prompt-tuning."""
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"
    )
    model = get_peft_model(base, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trainable, lr=rates.prompt_tuning, weight_decay=0.0)


def add_input_tuning(
    base: PreTrainedModel, num_virtual_tokens: int, rates: Rates
) -> tuple[PeftModel, torch.optim.Optimizer]:
    """The same with another configuration, and an optimizer with a learning rate for each of its two parts."""
    config = InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, prompt_scale=1.0)
    model = get_peft_model(base, config)
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=rates.adapter, prompt_lr=rates.prompt)
    return model, optimizer


METHODS = {"prompt-tuning": add_prompt_tuning, "input-tuning": add_input_tuning}


class LossOnBar(ProgressCallback):
    """Trainer's progress bar with the last loss on it, instead of a printed line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None:
            shown = {name: logs[name] for name in ("loss", "eval_loss") if name in (logs or {})}
            self.training_bar.set_postfix(shown, refresh=True)


def train(
    method: str,
    base: PreTrainedModel,
    train_rows: list[dict[str, list[int]]],
    validation_rows: list[dict[str, list[int]]],
    *,
    num_virtual_tokens: int,
    steps: int,
    batch_size: int,
    seed: int,
    rates: Rates,
    output_dir: str,
) -> tuple[PeftModel, Result]:
    """Trains one method; the seed fixes the start and the order of the rows, the same for both methods."""
    set_seed(seed)
    model, optimizer = METHODS[method](base, num_virtual_tokens, rates)
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 24),
        eval_strategy="steps",
        eval_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        seed=seed,
        remove_unused_columns=False,
        # PEFT's prompt-tuning returns logits that are longer than the labels; the loss needs neither.
        prediction_loss_only=True,
        label_names=["labels"],
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=pad_rows,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossOnBar)
    print(f"\n{method}: {steps} steps of {batch_size} rows")
    seconds = trainer.train().metrics["train_runtime"]
    history = trainer.state.log_history
    curve = [(log["step"], log["loss"]) for log in history if "loss" in log]
    validation = [(log["step"], log["eval_loss"]) for log in history if "eval_loss" in log]
    if not validation or validation[-1][0] != steps:
        validation.append((steps, trainer.evaluate()["eval_loss"]))
    parameters = model.get_nb_trainable_parameters()[0]
    return model, Result(parameters, validation[-1][1], seconds, curve, validation)


def load_adapter(base: PreTrainedModel, folder: str) -> PeftModel:
    """A saved adapter on a fresh base; importing `peft_input_tuning` has made the method known to PEFT."""
    return PeftModel.from_pretrained(base, folder)


# ---- generation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    name: str,
) -> list[str]:
    """Greedy continuations of the sources, in their order.

    Only sources of one length share a batch, so nothing is padded. PEFT's prompt-tuning puts its virtual tokens before
    left padding, where they are cut off from the text and take wrong positions in most model families: with padding
    the comparison would be unfair to it. Input-tuning has no such limit.
    """
    model.eval()
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    encoded = [encode_source(tokenizer, source) for source in sources]
    for row, ids in enumerate(encoded):
        by_length[len(ids)].append(row)
    texts = [""] * len(sources)
    with tqdm(total=len(sources), desc=f"{name}: generating") as bar:
        for length in sorted(by_length):
            rows = by_length[length]
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                ids = torch.tensor([encoded[row] for row in batch], device=model.device)
                eos = tokenizer.eos_token_id
                output = generate_greedily(model, ids, torch.ones_like(ids), max_new_tokens, pad=eos, eos=eos)
                for row, new in zip(batch, output[:, length:], strict=True):
                    texts[row] = tokenizer.decode(new, skip_special_tokens=True).strip()
                bar.update(len(batch))
    return texts
