"""The model card of a training run: what it is, how to load it, data, figures with their numbers of rows, versions.

Written anew over the template of PEFT or transformers. It names a base by its name on the hub, and never a folder of
the machine that trained it.
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftConfig
from transformers import TrainingArguments

from input_tuning_examples.forgetting import TEXTS
from input_tuning_examples.packaged_model import PACKAGED, find_model
from peft_input_tuning.model_card import TAGS, loading_section, task_suffix
from train_options import Options

PACKAGES = ("peft-input-tuning", "peft", "transformers", "torch")
SHOWN = 3  # generations
_IN_A_CACHE = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]")


@dataclass(frozen=True)
class Run:
    """What a card says of a run.

    Args:
        name: the card's heading.
        base: the base model's name on the hub; None if it is not known.
        method: "input-tuning", "prompt-tuning", "lora" or "full".
        config: the adapter's; None of full fine-tuning.
        seq2seq: of the base.
        licence: an identifier of the hub, or "unknown".
        data: a sentence on the rows, without folders.
        training: a sentence on steps, rates and time.
        results: figures by name.
        rows: how many rows each figure is of; others are of none.
        generations: rows with "source", "text" and "references".
        gguf_file: that the base was read from.
    """

    name: str
    base: str | None
    method: str
    config: PeftConfig | None
    seq2seq: bool
    licence: str
    data: str
    training: str
    results: Mapping[str, Any]
    rows: Mapping[str, str]
    generations: Sequence[Mapping[str, Any]]
    gguf_file: str | None = None


def card_of(
    options: Options,
    arguments: TrainingArguments,
    seq2seq: bool,
    config: PeftConfig | None,
    results: dict[str, Any],
    counts: dict[str, int],
    generations: list[dict[str, Any]],
) -> str:
    """The model card of a run that has ended."""
    columns = [column for column in (options.messages_column,) if column] or [
        options.source_column,
        options.target_column,
    ]
    splits = ((name, getattr(options, f"{name}_data")) for name in counts)
    data = ", ".join(f"{counts[name]} rows of `{Path(file).name}` ({name})" for name, file in splits)
    prompt = options.prompt_learning_rate or 10 * arguments.learning_rate
    size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    rates = f"learning rate {arguments.learning_rate:g}"
    if options.method == "input-tuning":
        rates += f" ({prompt:g} of the prompt)"
    test = dict.fromkeys(results, f"{counts['test']}") if "test" in counts else {}
    ends = "a line break stands behind the source" if not options.messages_column else "as the chat template writes it"
    return adapter_card(
        Run(
            name=Path(arguments.output_dir).resolve().name,
            base=hub_name(options.model, options.base_name),
            method=options.method,
            config=config,
            seq2seq=seq2seq,
            licence=options.license,
            data=f"{data}; columns {', '.join(f'`{name}`' for name in columns)}, {ends}.",
            training=f"{results['steps']} steps of {size} rows, {rates}, {options.dtype}, seed {arguments.seed}.",
            results=results,
            rows={
                **test,
                **dict.fromkeys(("steps", "train_seconds", "trainable_parameters"), ""),
                "train_loss": str(counts["train"]),
                "validation_loss": str(counts.get("validation", "")),
                **dict.fromkeys(("prose_loss", "forgetting"), f"{TEXTS} sentences"),
            },
            generations=generations,
            gguf_file=find_model(options.model)[1],
        )
    )


def hub_name(model: str, given: str | None) -> str | None:
    """The base's name on the hub; None if `model` is a folder that does not tell.

    Args:
        model: what --model got: a hub id, a folder, or "packaged".
        given: what --base_name got.
    """
    if given:
        return given
    if model == PACKAGED:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    if found := _IN_A_CACHE.search(str(Path(model).absolute())):
        return f"{found[1]}/{found[2]}"
    return None if Path(find_model(model)[0]).expanduser().is_dir() else model


def adapter_card(run: Run) -> str:
    """The whole card, Markdown behind its YAML."""
    tags = [run.method, *(() if run.config is None else TAGS[-1:])]
    data = ModelCardData(
        base_model=run.base,
        library_name="transformers" if run.config is None else "peft",
        license=run.licence,
        pipeline_tag=None if run.seq2seq else "text-generation",
        tags=tags if run.base is None or run.config is None else [*tags, f"base_model:adapter:{run.base}"],
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {run.name}",
        _loading(run).rstrip(),
        *(
            [f'The base was read from a GGUF file: pass `gguf_file="{run.gguf_file}"` to `from_pretrained`.']
            if run.gguf_file
            else []
        ),
        f"## Data and training\n\n{run.data} {run.training}",
        "\n".join(["## Results", "", "| | | rows |", "| :-- | --: | --: |", *_figures(run)]),
        *([_generations(run)] if run.generations else []),
        f"Trained with `examples/training/train.py` and {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(run: Run) -> str:
    base = f"`{run.base}`" if run.base else "the base model"
    if run.config is not None and run.method == "input-tuning":
        config = copy.copy(run.config)
        config.base_model_name_or_path = run.base
        return loading_section(config)
    if run.config is None:
        suffix = "ForSeq2SeqLM" if run.seq2seq else "ForCausalLM"
        what, library, auto = f"Full fine-tuning of {base}.", "transformers", f"AutoModel{suffix}"
    else:
        what, library, auto = f"{run.method} on {base}.", "peft", f"AutoPeftModel{task_suffix(run.config)}"
    what = what[0].upper() + what[1:]
    code = f'from {library} import {auto}\n\nmodel = {auto}.from_pretrained("path or id of this folder")'
    return f"## How to load it\n\n{what}\n\n```python\n{code}\n```"


def _figures(run: Run) -> list[str]:
    figures = {name: value for name, value in run.results.items() if isinstance(value, int | float)}
    shown = {name: f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for name, value in figures.items()}
    return [f"| {name} | {value} | {run.rows.get(name, '')} |" for name, value in shown.items()]


def _generations(run: Run) -> str:
    lines = ["## Generations"]
    for row in run.generations[:SHOWN]:
        lines += ["", f"    input      {row['source']!r}", f"    generated  {row['text']!r}"]
        lines += [f"    reference  {row['references'][0]!r}"]
    return "\n".join(lines)
