"""The model card of an exported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .report import ExportReport

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
        title=report.output_dir.resolve().name,
        base=f"`{source}`" if source else type(base).__name__,
        adapter=report.adapter_name,
        count=len(ids),
        ids=f" (ids {ids[0]} to {ids[-1]})" if ids else "",
        difference=report.largest_difference,
        largest=report.largest_output,
        front=front if ids else "There are no virtual tokens: inputs are those of the base model.",
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
