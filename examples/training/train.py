"""Trains a language model with transformers' Trainer: input-tuning, or the methods that one compares it with.

    python examples/training/train.py --train_data train.jsonl --test_data test.jsonl --output_dir outputs/my-run
    accelerate launch --config_file examples/training/accelerate_configs/ddp_cpu.yaml examples/training/train.py ...

Data are JSON lines, or a dataset's name for `datasets`: a source and a target column, or chat messages of which the
last one is the target. The loss is on the target only. Decoder-only and encoder-decoder models are told apart by their
configuration. All options of `TrainingArguments` can be given too (--max_steps, --learning_rate, --save_steps,
--load_best_model_at_end, --bf16, ...). --learning_rate has a default for each method. `--resume_from_checkpoint last`
goes on from the last complete checkpoint of a run that was interrupted.

What comes out in --output_dir: the adapter with a model card that holds the figures, generations.jsonl, curves.png,
and results.json, which is written last: a run without it did not end.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from adapter_card import card_of
from greedy_texts import greedy_texts
from input_tuning_examples.base_model import Base
from input_tuning_examples.checkpoints import CheckpointFolders, find_checkpoint, write_whole
from input_tuning_examples.extras import needs
from input_tuning_examples.faults import StopAtNonFinite, TrainingError, is_out_of_room, out_of_room
from input_tuning_examples.forgetting import forgetting, prose_loss
from input_tuning_examples.metrics import GENERATION_METRICS
from input_tuning_examples.task_data import InputError
from input_tuning_examples.train_and_generate import IGNORED
from input_tuning_examples.train_seconds import TrainSeconds
from input_tuning_examples.training_rows import Row, check_test_rows, encode, read_rows
from input_tuning_examples.validation_loss import TokenMeanTrainer, filled_up
from loss_plot import plot_curves
from peft_input_tuning import input_tuning_parameter_groups
from train_options import Options, check, parse_arguments, peft_config


def make_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    features: dict[str, list[dict]],
    options: Options,
    arguments: TrainingArguments,
) -> Trainer:
    arguments.remove_unused_columns = False
    arguments.logging_nan_inf_filter = False  # they have to be seen
    arguments.label_names = ["labels"]
    arguments.prediction_loss_only = True  # PEFT's prompt-tuning gives logits that are longer than the labels
    optimizer = None
    if options.method == "input-tuning":
        # As a class and its arguments, not as an object: Trainer makes it where FSDP and DeepSpeed want it made.
        groups = input_tuning_parameter_groups(
            model, arguments.learning_rate, options.prompt_learning_rate, arguments.weight_decay
        )
        optimizer = (torch.optim.AdamW, {"params": groups, "lr": arguments.learning_rate})
    callbacks: list = [StopAtNonFinite(), TrainSeconds(), CheckpointFolders(arguments.save_total_limit)]
    arguments.save_total_limit = None  # CheckpointFolders sees to it
    arguments.restore_callback_states_from_checkpoint = True  # seconds; how long early stopping has been patient
    if options.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
    validation = features.get("validation")
    if validation:
        validation = filled_up(validation, arguments.eval_batch_size * arguments.world_size)
    return TokenMeanTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        train_dataset=features["train"],
        eval_dataset=validation,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
    )


def run(options: Options, arguments: TrainingArguments) -> dict[str, Any]:
    """Trains, evaluates, writes; returns the figures."""
    needs("demo", "datasets", "matplotlib", *(("evaluate", "rouge_score", "sacrebleu") if options.test_data else ()))
    checkpoint = find_checkpoint(arguments)
    base = Base.find(options.model)
    tokenizer, columns = base.tokenizer, options.columns
    rows = {"train": read_rows(options.train_data, "--train_data", columns, tokenizer, options.train_rows)}
    if options.validation_data:
        rows["validation"] = read_rows(options.validation_data, "--validation_data", columns, tokenizer)
    test: list[Row] = []
    if options.test_data:
        test = read_rows(options.test_data, "--test_data", columns, tokenizer, options.test_rows)
    room = base.positions, options.virtual_tokens
    most = None if base.positions is None else base.positions - options.virtual_tokens
    features = {
        name: encode(some, columns, options.max_length, tokenizer, base.seq2seq, f"--{name}_data", *room)
        for name, some in rows.items()
    }
    check_test_rows(test, columns, tokenizer, base.seq2seq, *room, options.max_new_tokens)
    config = peft_config(options, base.seq2seq)
    metric = None
    if test and arguments.process_index == 0:
        import evaluate

        metric = evaluate.load(GENERATION_METRICS)

    set_seed(arguments.seed)
    model = base.load(options.dtype)
    if config is not None:
        model = get_peft_model(model, config)
        model.print_trainable_parameters()
    trainer = make_trainer(model, tokenizer, features, options, arguments)
    untrained = None  # an adapter is turned off later; a whole model is asked now, if one process has all of it
    if config is None and not base.seq2seq and arguments.world_size == 1:
        untrained = prose_loss(model, tokenizer, most)
    if trainer.is_world_process_zero():
        (Path(arguments.output_dir) / "results.json").unlink(missing_ok=True)  # this run has not ended yet
    train_output = trainer.train(resume_from_checkpoint=checkpoint)

    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    results: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "train_loss": fmean(losses) if losses else train_output.training_loss,  # its own is of this life only
        "train_seconds": TrainSeconds.of(trainer),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if "validation" in features:
        results["validation_loss"] = trainer.evaluate()["eval_loss"]
    trainer.save_model()  # before what is only measured; with FSDP and ZeRO-3, all processes take part
    if untrained is not None or (isinstance(model, PeftModel) and not base.seq2seq):
        results |= forgetting(trainer.model, tokenizer, untrained, most)
    special = not options.messages_column
    texts = greedy_texts(trainer, tokenizer, test, options.max_new_tokens, special) if test else []
    if not trainer.is_world_process_zero():
        return results
    folder = Path(arguments.output_dir)
    generations = []
    if metric is not None:
        results |= metric.compute(predictions=texts, references=[row.references for row in test])
        generations = [
            {"source": row.source, "text": text, "references": row.references}
            for row, text in zip(test, texts, strict=True)
        ]
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in generations)
        write_whole(folder / "generations.jsonl", lines)
    plot_curves(trainer.state.log_history, folder / "curves.png")
    counts = {name: len(some) for name, some in features.items()} | ({"test": len(test)} if test else {})
    write_whole(folder / "README.md", card_of(options, arguments, base.seq2seq, config, results, counts, generations))
    report = {"options": asdict(options), "arguments": arguments.to_sanitized_dict(), "results": results}
    report |= {"rows": counts, "curve": trainer.state.log_history}
    write_whole(folder / "results.json", json.dumps(report, indent=1, ensure_ascii=False))
    print(", ".join(f"{name} {value:.4g}" for name, value in results.items()))
    return results


def main(argv: list[str] | None = None) -> int:
    try:
        options, arguments = parse_arguments(argv, __doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        check(options, arguments)
        run(options, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not is_out_of_room(error):
            raise
        print(f"error: {out_of_room(error, arguments.output_dir)}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
