"""The part of an adapter's model card that PEFT cannot write: how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from .config import InputTuningConfig

HEADING = "## How to load this adapter"
TAGS = ("input-tuning", "peft")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def loading_section(config: InputTuningConfig) -> str:
    """The section as Markdown."""
    task = config.task_type
    auto_class = _AUTO_CLASSES.get(getattr(task, "value", task) or "", "AutoPeftModel")
    hidden = config.adapter_hidden_dim
    adapter = "2 x the embedding size" if hidden is None else hidden
    base = f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "the base model"
    return f"""{HEADING}

An input-tuning adapter (arXiv 2203.03131) of {base}: {config.num_virtual_tokens} virtual tokens and an input-adapter
of inner size {adapter}. PEFT loads it once the package that brings the method is imported:

```python
# pip install peft-input-tuning
import peft_input_tuning  # registers INPUT_TUNING with PEFT; without it PEFT raises KeyError: 'INPUT_TUNING'
from peft import {auto_class}

model = {auto_class}.from_pretrained("path or id of this adapter")
```
"""


def update_model_card(directory: str, config: InputTuningConfig) -> None:
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
    card.save(path)


def _new_card_data(config: InputTuningConfig) -> str:
    return ModelCardData(base_model=config.base_model_name_or_path or None).to_yaml()
