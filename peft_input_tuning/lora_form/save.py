"""From an adapter to a LoRA folder, which stock PEFT loads on the untouched base model.

output_dir/    adapter_config.json, adapter_model.safetensors     the LoRA
               tokenizer, chat template                           put the virtual tokens in front
               generation_config.json                             never generates them
               README.md
               input_tuning/                                      the adapter itself, for `from_lora`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..checkpoint import PEFT_PREFIX
from ..export.export import refuse_words_for_prompt
from ..export.plain_model import suppress
from ..layer import InputTuningLayer, named_layer
from ..merging import Progress
from ..output.folders import unfinished_folder
from ..virtual_tokens.subclass import class_of
from .card import write_lora_card
from .load import ADAPTER_FOLDER, write_origin
from .places import Places, find_places
from .report import LoraReport
from .tensors import Parts, lora_tensors, parts_of, word_errors

LORA_FILE = "adapter_model.safetensors"


def save_as_lora(
    model: nn.Module,
    output_dir: str | Path,
    adapter_name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    virtual_token_ids: list[int] | None = None,
    max_rank: int | None = None,
    rank: int | None = None,
    text: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    before_writing: Callable[[LoraReport], Any] | None = None,
    progress: Progress | None = None,
) -> LoraReport:
    """Writes an adapter as a LoRA on the word embedding: the same logits in PEFT and in engines, without this package.

    Args:
        model: a `PeftModel`, or a model of transformers with the adapter, on the base that the LoRA is for. It is not
            changed.
        output_dir: a folder that does not exist, or is empty.
        adapter_name: the adapter; None is the active one.
        tokenizer: the base model's. It tells which words are free, and its copy in the folder puts the virtual tokens
            in front. None needs `virtual_token_ids` if there are virtual tokens.
        virtual_token_ids: words for the virtual tokens that no text has; None looks for free ones.
        max_rank: what an engine takes (vLLM: 512 at most); an adapter that needs more is refused.
        rank: for a LoRA that is not exact, with the nearest embeddings of that rank. Virtual tokens stay exact.
        text: lines by whose words the report weighs the errors; needs `tokenizer`.
        dtype: of the file; None is float32, or float64 if the base is.
        before_writing: called with the report before anything is written; what it raises ends the call.
        progress: called with (rows done, rows in all) while the table is read.

    Returns:
        Ranks, the ids of the virtual tokens, and the errors of the embeddings.

    Raises:
        ValueError: `adapter_scope="input"`, a rank above `max_rank`, no words for virtual tokens, or another thing
            that a LoRA cannot hold; nothing is written.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    path, layer = named_layer(base)
    name = _checked_name(base, layer, adapter_name)
    _check_not_resized(base)
    parts = parts_of(layer, name)
    chosen = _chosen_rank(parts, name, max_rank, rank)
    if text is not None and tokenizer is None:
        raise ValueError("`text` is given without `tokenizer`, which says what its words are. Pass both.")
    configs = [base.config, *([base.generation_config] if base.can_generate() else [])]
    places = find_places(parts.prompt, layer.num_embeddings, configs, tokenizer, virtual_token_ids)

    with unfinished_folder("`output_dir`", output_dir, last="adapter_config.json") as folder:
        a, b = lora_tensors(layer, name, places.ids, chosen, progress)
        dtype = dtype or a.dtype
        a, b = a.to(dtype), b.to(dtype)
        counts = None if text is None or tokenizer is None else _counts(tokenizer, text, layer.num_embeddings)
        errors = word_errors(layer, name, a, b, places.ids, counts)
        report = LoraReport(Path(output_dir), name, chosen, parts.exact_rank, places.ids, places.front, errors)
        if before_writing is not None:
            before_writing(report)
        _write(folder, model, base, path, report, places, {"A": a, "B": b})
    return report


def _checked_name(base: nn.Module, layer: InputTuningLayer, wanted: str | None) -> str:
    name = wanted or layer.enabled_adapter
    if name is None or not layer.has_adapter(name):
        raise ValueError(
            f"`adapter_name` is {wanted!r}, but no such adapter is there. Adapters: {layer.adapter_names}."
        )
    if name in layer.input_only:
        raise ValueError(
            f'Adapter {name!r} has adapter_scope="input": a word has one embedding in the input and another in the '
            "output, and a LoRA gives it one. Give an engine the input's embeddings, "
            'peft_input_tuning.prompt_embeds(model, input_ids), or train an adapter with adapter_scope="all".'
        )
    layer.check_weights_have_come(name)
    others = (m for m in base.modules() if isinstance(m, BaseTunerLayer) and m is not layer)
    other = next((m for m in others if not isinstance(m, AuxiliaryTrainingWrapper)), None)
    if other is not None or layer.base_layer is not layer.get_base_layer():
        raise ValueError(
            "`model` has adapters of another method too, which would not be in the LoRA. Merge those "
            "(`merge_and_unload`) and load the input-tuning adapter on the result."
        )
    refuse_words_for_prompt(base, layer.prompt_length(name))
    return name


def _check_not_resized(base: nn.Module) -> None:
    """A LoRA has no place for the rows of a table that was resized after it was loaded."""
    source, words = base.config._name_or_path, getattr(base.config.get_text_config(), "vocab_size", None)
    try:
        saved = AutoConfig.from_pretrained(source, local_files_only=True) if source else base.config
    except (OSError, ValueError):  # no such folder, and nothing of a hub's model is here: nothing to compare with
        return
    if getattr(saved.get_text_config(), "vocab_size", None) != words:
        raise ValueError(
            f"The table of `model` was resized to {words} words after it was loaded from {source!r}, and a LoRA has "
            "no place for its new rows. Save the resized base (save_pretrained), load the adapter on it, and make the "
            "LoRA of that."
        )


def _chosen_rank(parts: Parts, name: str, max_rank: int | None, rank: int | None) -> int:
    exact, more = parts.exact_rank, parts.bias + parts.prompt
    if rank is not None and not parts.prompt < rank:
        raise ValueError(
            f"`rank` is {rank}, and the {parts.prompt} virtual tokens of adapter {name!r} need one each. Choose more."
        )
    chosen = exact if rank is None else min(rank, exact)
    if max_rank is None or chosen <= max_rank:
        return chosen
    fits = f"an adapter_hidden_dim of at most {max_rank - more}" if max_rank > more else "a shorter prompt"
    needs = f"adapter_hidden_dim {parts.hidden}, {parts.prompt} virtual tokens" + (", a bias" if parts.bias else "")
    raise ValueError(
        f"`max_rank` is {max_rank}, but adapter {name!r} needs rank {chosen} to be exact ({needs}; never more than "
        f"the embedding size {parts.dim}). What would fit: {fits}. Write a plain checkpoint with export_model, which "
        "has no rank (`peft-input-tuning export`), or choose `rank` for a LoRA that is not exact."
    )


def _counts(tokenizer: PreTrainedTokenizerBase, text: Iterable[str], rows: int) -> Tensor:
    """How often each word stands in a text, `(rows,)`."""
    counts = torch.zeros(rows, dtype=torch.long)
    for line in text:
        ids = torch.tensor(tokenizer(line, add_special_tokens=False)["input_ids"], dtype=torch.long)
        counts += torch.bincount(ids, minlength=rows)
    if not counts.any():
        raise ValueError("`text` has no words. Give lines of the texts that the adapter is for.")
    return counts


def _write(
    folder: Path,
    model: nn.Module,
    base: nn.Module,
    path: str,
    report: LoraReport,
    places: Places,
    lora: dict[str, Tensor],
) -> None:
    name = report.adapter_name
    own = model.peft_config[name]
    source = base.config._name_or_path or own.base_model_name_or_path
    kind = class_of(base)
    config = LoraConfig(
        task_type=own.task_type,
        auto_mapping=None if own.task_type else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        base_model_name_or_path=source or None,
        revision=own.revision if source == own.base_model_name_or_path else None,
        r=report.rank,
        lora_alpha=report.rank,
        target_modules=[path],
        exclude_modules=[other for other, _ in base.named_modules() if other.endswith(f".{path}")] or None,
        modules_to_save=own.modules_to_save,
        inference_mode=True,
    )
    tensors = {f"{PEFT_PREFIX}{path}.lora_embedding_{key}": tensor.contiguous() for key, tensor in lora.items()}
    for place, wrapper in base.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and name in wrapper.modules_to_save:
            inner = wrapper.modules_to_save[name].state_dict()
            tensors |= {f"{PEFT_PREFIX}{place}.{key}": tensor.cpu().clone() for key, tensor in inner.items()}
    save_file(tensors, folder / LORA_FILE, metadata={"format": "pt"})
    if places.tokenizer is not None:
        places.tokenizer.save_pretrained(folder)
    if base.can_generate() and places.ids:
        generation = copy.deepcopy(base.generation_config)
        suppress(generation, places.ids)
        generation.save_pretrained(folder)
    write_origin(folder / ADAPTER_FOLDER, model, name, folder / LORA_FILE)
    write_lora_card(folder, source or kind.__name__, bool(source), report)
    config.save_pretrained(str(folder))
