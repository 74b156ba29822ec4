"""The training of one run: its rows as tensors, its model, its Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from input_tuning_examples.checkpoints import CheckpointFolders, is_complete, last_complete_checkpoint
from input_tuning_examples.faults import StopAtNonFinite
from input_tuning_examples.task_data import Example
from input_tuning_examples.train_and_generate import IGNORED, SEPARATOR
from input_tuning_examples.training_rows import Columns, Row, encode
from input_tuning_examples.validation_loss import TokenMeanTrainer, filled_up
from methods import METHODS, VIRTUAL_TOKENS, Method
from peft_input_tuning import InputTuningConfig, input_tuning_parameter_groups
from plan import Budget, Run
from tasks import in_order_of_steps

MAX_LENGTH = 512  # tokens of a row
EVALUATIONS = {"rates": 1, "main": 4, "amounts": 8}  # of the validation loss at most, the last one at the end
PROGRESS = "step"  # first word of a line that says how far training is


class SayStep(TrainerCallback):
    """A line for `run_all.py` after each step."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        print(PROGRESS, state.global_step, state.max_steps, flush=True)


def features_of(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, seq2seq: bool, max_length: int = MAX_LENGTH
) -> list[dict]:
    """Features of the rows that are not longer than `max_length` tokens."""
    columns = Columns("source", "references")
    rows = [Row(example.source + SEPARATOR, example.references[0], list(example.references)) for example in examples]
    return encode(rows, columns, max_length, tokenizer, seq2seq, "DATA")


def trainable_model(base: PreTrainedModel, method: Method, words: Iterable[int] = ()) -> PreTrainedModel | PeftModel:
    """The base with the method on it: what is trained is float32, what is frozen keeps its type.

    Args:
        base: in float32 for full fine-tuning, which trains all of it.
        words: ids of the words that training has, for a method with a row of its own for each.
    """
    if method.config is None:
        return base
    task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    config = method.config(task_type)
    if isinstance(config, TrainableTokensConfig):
        config.token_indices = sorted(set(words))
    model = get_peft_model(base, config)
    if method.prompt_rate is not None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        prompt = InputTuningConfig(
            task_type=task_type, num_virtual_tokens=VIRTUAL_TOKENS, adapter_hidden_dim=0, prompt_scale=1.0
        )
        model = get_peft_model(model, prompt, adapter_name="prompt")
        for parameter in trained:  # the prompt around a model freezes what is in it
            parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT leaves some in the base's type
    return model


def make_trainer(
    model: torch.nn.Module,
    run: Run,
    budget: Budget,
    features: dict[str, list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> TokenMeanTrainer:
    """Trainer with AdamW and linear decay; the rows come in their order, the same for all methods."""
    method = METHODS[run.method]
    interval = -(-run.steps // EVALUATIONS[run.stage])
    arguments = TrainingArguments(
        output_dir=str(folder.resolve()),  # checkpoints remember it, and may be read from elsewhere
        max_steps=run.steps,
        per_device_train_batch_size=budget.batch_size,
        per_device_eval_batch_size=budget.batch_size,
        learning_rate=run.rate,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        warmup_steps=max(1, run.steps // 20),
        train_sampling_strategy="sequential",
        logging_steps=max(1, run.steps // 40),
        eval_strategy="steps",
        eval_steps=interval,
        # Of two adapters around each other a checkpoint has the outer one alone; such a run begins anew.
        save_strategy="steps" if method.prompt_rate is None else "no",
        save_steps=interval,
        load_best_model_at_end=run.stage == "amounts",  # few rows are soon learned by heart
        use_cpu=not torch.cuda.is_available(),
        bf16=model.dtype == torch.bfloat16 or method.config is None,
        seed=run.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    optimizer = None
    prompt_rate = method.rate_of_prompt(run.rate)
    if prompt_rate is not None:
        groups = input_tuning_parameter_groups(model, run.rate, prompt_rate)
        optimizer = (torch.optim.AdamW, {"params": groups, "lr": run.rate})
    lengths = [len(row["input_ids"]) + len(row["labels"]) for row in features["train"]]
    order = in_order_of_steps(lengths, run.steps, budget.batch_size, run.seed)
    return TokenMeanTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        train_dataset=[features["train"][row] for row in order],
        eval_dataset=filled_up(features["validation"], arguments.eval_batch_size),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[StopAtNonFinite(), CheckpointFolders(keep=1), SayStep()],
    )


def train(trainer: TokenMeanTrainer, folder: Path) -> dict[str, list[list[float]]]:
    """Trains, from the last checkpoint if there is one; returns the losses of training and validation by step.

    Raises:
        RuntimeError: the weights of the best step were to be taken, and are gone.
    """
    checkpoint, _ = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.args.load_best_model_at_end and not is_complete(Path(trainer.state.best_model_checkpoint or folder)):
        raise RuntimeError(f"the checkpoint of the best step is not there. Remove {folder} and run it again.")
    history = trainer.state.log_history
    curves = {"train": "loss", "validation": "eval_loss"}
    return {name: [[log["step"], round(log[key], 5)] for log in history if key in log] for name, key in curves.items()}
