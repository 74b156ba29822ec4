"""The model card of a LoRA folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from .report import LoraReport

_CARD = """\
---
{data}
---

# {title}

A LoRA on the word embedding that says what an input-tuning adapter (arXiv 2203.03131) says, its prompt included. Stock
PEFT loads it, and so do engines that take LoRAs on the embedding; the package that made it is not needed.

- base model: `{base}`
- rank {rank}, {exactness}
- virtual tokens: {tokens}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or id of this adapter")
```
{front}
- The output head must not change with the embedding. PEFT keeps it apart while the LoRA is loaded, but
  `merge_and_unload` adds to a head that shares the embedding's table: merge on a base that `grow_base(...,
  untie=True)` of peft_input_tuning has written.
- The adapter itself is in `input_tuning/`: `peft_input_tuning.from_lora` loads it.
"""

_FRONT = """
- The virtual tokens must stand in front of every input. The tokenizer in this folder puts them there, and its chat
  template does (tokenize the text of a chat template with `add_special_tokens=False`).{text}
- Logits have a place for each of them too; in training, their labels are -100.
- They must never be generated: pass this folder's `generation_config.json`, whose `suppress_tokens` names them. vLLM
  and llama.cpp do not read it: ban the ids there with `logit_bias`.
"""


def write_lora_card(folder: Path, base: str, is_source: bool, report: LoraReport) -> None:
    """Writes `README.md` of a LoRA folder.

    Args:
        folder: the folder.
        base: name of the base model, or of its class.
        is_source: whether it can be loaded under that name.
        report: of what is in it.
    """
    ids = report.virtual_token_ids
    exactness = "exact but for rounding"
    if not report.is_exact:
        exactness = (
            f"**not exact**: {report.exact_rank} would be. Embeddings are off by {report.errors.mean:.2g} in the mean "
            f"and {report.errors.largest:.2g} at most, of their length"
        )
    text = f"\n  As text: `{report.front}`" if report.front else ""
    card = _CARD.format(
        data=ModelCardData(
            base_model=base if is_source else None, library_name="peft", tags=["input-tuning", "lora", "peft"]
        ).to_yaml(),
        title=report.output_dir.resolve().name,
        base=base,
        rank=report.rank,
        exactness=exactness,
        tokens=f"{len(ids)}, on the ids {', '.join(map(str, ids))}" if ids else "none",
        front=_FRONT.format(text=text) if ids else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
