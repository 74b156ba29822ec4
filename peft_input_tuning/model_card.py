"""The part of an adapter's model card that PEFT cannot write: how to load it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft.config import PeftConfig

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
