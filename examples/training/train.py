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

import io
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from input_tuning_examples.base_model import Base
from input_tuning_examples.checkpoints import CheckpointFolders, find_checkpoint, write_whole
from input_tuning_examples.extras import needs
from input_tuning_examples.faults import StopAtNonFinite, TrainingError, is_out_of_room, out_of_room
from input_tuning_examples.metrics import GENERATION_METRICS
from input_tuning_examples.packaged_model import PACKAGED
from input_tuning_examples.task_data import InputError
from input_tuning_examples.train_and_generate import IGNORED
from input_tuning_examples.training_rows import Columns, Row, encode, read_rows
from input_tuning_examples.validation_loss import TokenMeanTrainer, filled_up
from peft_input_tuning import InputTuningConfig, input_tuning_parameter_groups

# Of each method, and its rate where none is given: what docs/which-method.md found; of LoRA a step less, as its best
# rate stood beside one that diverged.
LEARNING_RATES = {"input-tuning": 3e-3, "prompt-tuning": 3e-2, "lora": 3e-3, "full": 1e-4}
SHOWN = 5  # generations in the model card


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

    @property
    def columns(self) -> Columns:
        return Columns(self.source_column, self.target_column, self.messages_column)


def check(options: Options, arguments: TrainingArguments) -> None:
    """Raises InputError where options cannot be used, or not together."""
    for name in ("max_length", "max_new_tokens", "lora_rank", "train_rows", "test_rows", "early_stopping_patience"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be >= 1, got {value}. Raise it, or leave it out.")
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


# ---- model ----------------------------------------------------------------------------------------------------------


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
    callbacks: list = [StopAtNonFinite(), CheckpointFolders(arguments.save_total_limit)]
    arguments.save_total_limit = None  # CheckpointFolders sees to it
    arguments.restore_callback_states_from_checkpoint = True  # how long early stopping has been patient
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


# ---- generation and report ------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: Options) -> list[str]:
    """Greedy texts for the rows, in their order; each process takes a part of them."""
    model, seq2seq = trainer.model.eval(), trainer.model.config.is_encoder_decoder
    size, special = trainer.args.per_device_eval_batch_size, not options.messages_column
    with trainer.accelerator.split_between_processes([row.source for row in rows], apply_padding=True) as mine:
        texts: list[str] = []
        for start in tqdm(range(0, len(mine), size), desc="Generating", disable=not trainer.is_world_process_zero()):
            inputs = tokenizer(
                mine[start : start + size],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=special,
                return_token_type_ids=False,
            ).to(trainer.args.device)
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=options.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            new = out if seq2seq else out[:, inputs.input_ids.shape[1] :]
            texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    own, extra = divmod(len(rows), trainer.args.world_size)
    texts = texts[: own + (trainer.args.process_index < extra)]  # the rest repeats a row, to keep processes in step
    return gather_object(texts) if trainer.args.world_size > 1 else texts


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(log["step"], log[key]) for log in history if key in log]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss per target token")
    if axes.lines:  # a short run has logged nothing
        axes.legend()
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())
    plt.close(figure)


def write_card(folder: Path, options: Options, results: dict[str, Any], generations: list[dict]) -> None:
    """Adds the figures to the model card that PEFT or transformers wrote."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n---\n\n# {folder.name}\n")
    lines = ["## Results", "", "| | |", "| :-- | --: |"]
    lines += [f"| {name} | {value:.4g} |" for name, value in results.items() if isinstance(value, int | float)]
    lines += [
        "",
        f"Trained with `examples/training/train.py`, method {options.method}, on `{Path(options.train_data).name}`.",
    ]
    for row in generations[:SHOWN]:
        lines += ["", f"    input      {row['source']!r}", f"    generated  {row['text']!r}"]
        lines += [f"    reference  {row['references'][0]!r}"]
    card.text = f"{card.text.rstrip()}\n\n" + "\n".join(lines) + "\n"
    write_whole(path, str(card))


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
    features = {
        name: encode(some, columns, options.max_length, tokenizer, base.seq2seq) for name, some in rows.items()
    }
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
    if trainer.is_world_process_zero():
        (Path(arguments.output_dir) / "results.json").unlink(missing_ok=True)  # this run has not ended yet
    train_output = trainer.train(resume_from_checkpoint=checkpoint)

    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    results: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "train_loss": fmean(losses) if losses else train_output.training_loss,  # its own is of this life only
        "train_seconds": train_output.metrics["train_runtime"],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if "validation" in features:
        results["validation_loss"] = trainer.evaluate()["eval_loss"]
    texts = generate(trainer, tokenizer, test, options) if test else []
    trainer.save_model()  # with FSDP and ZeRO-3, all processes take part
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
    write_card(folder, options, results, generations)
    report = {"options": asdict(options), "results": results, "curve": trainer.state.log_history}
    write_whole(folder / "results.json", json.dumps(report, indent=1, ensure_ascii=False))
    print(", ".join(f"{name} {value:.4g}" for name, value in results.items()))
    return results


def parse_arguments(argv: list[str] | None) -> tuple[Options, TrainingArguments]:
    """Raises ValueError at an option that nobody knows, or TrainingArguments that do not go together."""
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__)
    parser.set_defaults(learning_rate=None)  # not transformers' default, which is far too low for a prompt
    method = parser.parse_known_args(argv)[0].method
    parser.set_defaults(learning_rate=LEARNING_RATES[method])
    return parser.parse_args_into_dataclasses(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        options, arguments = parse_arguments(argv)
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
