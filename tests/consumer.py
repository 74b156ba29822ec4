"""What a user of the package writes, as type checkers see it: mypy (strict) and pyright read it in `make check`.

It is never run. Whatever is public is used once; a type that is wrong or missing in the package is an error here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from peft_input_tuning import (
    AdapterInspection,
    ExportReport,
    GrownBase,
    InputTuningConfig,
    InputTuningLayer,
    InputTuningModel,
    LoraReport,
    __version__,
    create_input_tuning_optimizer,
    export_model,
    from_lora,
    from_prompt_tuning,
    grow_base,
    input_tuning_parameter_groups,
    inspect_adapter,
    prompt_embeds,
    reuse_prompts,
    save_as_lora,
    soft_prompt,
)
from peft_input_tuning.engines import embeds_base64, embeds_prompts
from peft_input_tuning.familiarity import Familiarity, familiarity
from peft_input_tuning.training import EarlyStoppingOfEach, ManyAdapters, adapter_losses


def adapted(base: PreTrainedModel) -> PeftModel:
    config = InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, adapter_scope="all")
    length: int = config.num_virtual_tokens
    assert length == 20
    assert __version__.count(".") == 2
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model


def layers(model: PeftModel) -> list[InputTuningLayer]:
    assert isinstance(model.base_model, InputTuningModel)
    return [module for module in model.modules() if isinstance(module, InputTuningLayer)]


def trained(model: PeftModel) -> torch.optim.AdamW:
    groups = input_tuning_parameter_groups(model, lr=3e-3, prompt_lr=3e-2)
    assert {str(group["name"]) for group in groups} == {"prompt", "adapter"}
    return create_input_tuning_optimizer(model, torch.optim.AdamW, lr=3e-3, prompt_lr=3e-2, weight_decay=0.0)


def used(model: PeftModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    with reuse_prompts(model):
        embeds: Tensor = prompt_embeds(model, ids)
    prompt: Tensor = soft_prompt(model)
    return embeds, prompt


def written(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[int, float]:
    report: ExportReport = export_model(model, folder / "plain", tokenizer=tokenizer)
    lora: LoraReport = save_as_lora(model, folder / "lora", tokenizer=tokenizer)
    difference: float = report.largest_difference
    return lora.rank, difference


def grown(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> tuple[int, ...]:
    found: GrownBase = grow_base(base, folder, 20, tokenizer)
    return found.virtual_token_ids


def looked_at(model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[float, str]:
    found: AdapterInspection = inspect_adapter(model, tokenizer, nearest=3)
    measured: Familiarity = familiarity(texts, model, tokenizer)
    return found.virtual_tokens[0].norm, measured.reading


def started(prompt_tuned: PeftModel, base: PreTrainedModel) -> tuple[PeftModel, PeftModel]:
    return from_prompt_tuning(prompt_tuned, num_virtual_tokens=20), from_lora(base, Path("lora"))


class TrainerOfMany(ManyAdapters, Trainer):
    """As docs/training.md has it."""


def trained_together(trainer: TrainerOfMany, logits: Tensor, labels: Tensor) -> Tensor:
    trainer.add_callback(EarlyStoppingOfEach(patience=3))
    losses = adapter_losses(logits, labels, ["a", "b"], shift_labels=True)
    return losses["a"] + losses["b"]


def served(model: PeftModel, rows: list[list[int]]) -> str:
    return embeds_base64(embeds_prompts(model, rows)[0]["prompt_embeds"])
