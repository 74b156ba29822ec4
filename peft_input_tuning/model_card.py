"""The part of an adapter's model card that PEFT cannot write: how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from peft.config import PeftConfig

if TYPE_CHECKING:
    from .export import ExportReport

HEADING = "## How to load this adapter"
_FACTS = r"An input-tuning adapter \(arXiv 2203\.03131\) of .*\nof inner size [^.\n]*\."
TAGS = ("input-tuning", "peft")
# What PEFT's `AutoPeftModel…` and, but for the last, transformers' `AutoModel…` are called after.
TASK_SUFFIXES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}


def task_suffix(config: PeftConfig) -> str:
    """The end of an Auto class's name for the task of a configuration; empty without a task."""
    task = config.task_type
    return TASK_SUFFIXES.get(getattr(task, "value", task) or "", "")


def _auto_class(config: PeftConfig) -> str:
    return f"AutoPeftModel{task_suffix(config)}"


def _facts(config: PeftConfig) -> str:
    hidden = config.adapter_hidden_dim
    adapter = "2 x the embedding size" if hidden is None else hidden
    base = f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "the base model"
    return f"""\
An input-tuning adapter (arXiv 2203.03131) of {base}: {config.num_virtual_tokens} virtual tokens and an input-adapter
of inner size {adapter}."""


def loading_section(config: PeftConfig) -> str:
    """The section as Markdown."""
    auto_class = _auto_class(config)
    return f"""{HEADING}

{_facts(config)} PEFT loads it once the package that brings the method is imported:

```python
# of the package peft-input-tuning
import peft_input_tuning  # registers INPUT_TUNING with PEFT; without it PEFT raises KeyError: 'INPUT_TUNING'
from peft import {auto_class}

model = {auto_class}.from_pretrained("path or id of this adapter")
```
"""


def update_model_card(directory: str, config: PeftConfig) -> None:
    """Adds the section to `README.md` in `directory`, or makes the card; what else the card says is kept."""
    path = Path(directory) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\n{_new_card_data(config)}\n---\n\n# Adapter\n")
    card.data["library_name"] = "peft"
    # PEFT takes the base model from the model's configuration, where it is empty for a model that was never on a hub.
    base = card.data.get("base_model") or config.base_model_name_or_path or None
    card.data["base_model"] = base
    tags = {*(card.data.get("tags") or []), *TAGS} - {"base_model:adapter:"}
    card.data["tags"] = sorted(tags | {f"base_model:adapter:{base}"} if base else tags)
    if HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{loading_section(config)}"
    else:  # of an adapter that was saved here before; what was written beside these words is kept
        before, _, section = card.text.partition(HEADING)
        section = re.sub(_FACTS, lambda _: _facts(config), section, count=1)
        card.text = before + HEADING + re.sub(r"\bAutoPeftModel(For\w+)?\b", _auto_class(config), section, count=2)
    card.save(path)


def _new_card_data(config: PeftConfig) -> str:
    return ModelCardData(base_model=config.base_model_name_or_path or None).to_yaml()


EXPORT_CARD = """\
---
{data}
---

# {title}

A plain checkpoint that was exported from an input-tuning adapter (arXiv 2203.03131) and its base model. It loads with
`Auto*.from_pretrained` of transformers and needs neither PEFT nor the package that made it.

- base model: {base}
- adapter: `{adapter}`, {count} virtual tokens{ids}
- largest difference from the adapter when it was exported: {difference:.2g} (largest output: {largest:.3g})

## What is different from the base model

- The input-adapter is part of the embedding table, so the table and the output head are two tensors.
- {front}
- The virtual tokens stand in `generation_config.json` under `suppress_tokens`: engines that do not read it should be
  told not to generate them.
- Do not call `tie_weights()` or `resize_token_embeddings()` on this model, and do not set `tie_word_embeddings`: that
  would replace the adapted table.
"""


def write_export_card(directory: Path, base: Any, report: ExportReport, has_tokenizer: bool) -> None:
    """Writes `README.md` of an exported checkpoint."""
    source = base.config._name_or_path or None
    ids = report.virtual_token_ids
    front = (
        "The tokenizer puts the virtual tokens in front of every text, and its chat template does; do not turn "
        "`add_special_tokens` off for plain text, and do not tokenize the text of a chat template with it on."
        if has_tokenizer
        else "The virtual tokens must be put in front of every input; this folder has no tokenizer."
    )
    card = EXPORT_CARD.format(
        data=ModelCardData(base_model=source, tags=["input-tuning"]).to_yaml(),
        title=report.output_dir.name,
        base=f"`{source}`" if source else type(base).__name__,
        adapter=report.adapter_name,
        count=len(ids),
        ids=f" (ids {ids[0]} to {ids[-1]})" if ids else "",
        difference=report.largest_difference,
        largest=report.largest_output,
        front=front if ids else "There are no virtual tokens: inputs are those of the base model.",
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
