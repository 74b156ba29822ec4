"""Tiny models of every text architecture of transformers, built from their configurations alone.

Sizes are set by rules over the names of fields (`sizes.py`), so that a model which did not exist when this was written
is built too. Lists with an entry a layer are cut to their distinct entries: each kind of layer is there once. Weights
are large and the same each time, so that a wrong position, mask or prompt shows in the outputs.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, modeling_outputs
from transformers.models.auto import modeling_auto

from .sizes import BOS, OVERRIDES, SETTINGS, SIGLIP, by_rule

# The first mapping that has a class says what it is.
MAPPINGS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "masked": "MASKED_LM",
    "image": "IMAGE_TEXT_TO_TEXT",
}
HEADS = {
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "token classification": "TOKEN_CLASSIFICATION",
    "question answering": "QUESTION_ANSWERING",
}
MOST_LAYERS = 6
_BASE_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}


@dataclass
class Architecture:
    """A class of transformers.

    Args:
        name: of the class.
        model_type: of its configuration.
        mapping: "causal", "seq2seq", "masked" or "image", the first that has it.
    """

    name: str
    model_type: str
    mapping: str

    @property
    def config_class(self) -> type:
        """Of the class, which may be for a part of what its type is for."""
        return getattr(transformers, self.name).config_class

    @cached_property
    def overrides(self) -> dict[str, Any]:
        return {**OVERRIDES.get(self.config_class.model_type, {}), **OVERRIDES.get(self.name, {})}

    @property
    def has_heads(self) -> bool:
        """Whether heads are tried with it: with one class of each type, the masked one if there is one."""
        for mapping in ("masked", "seq2seq", "causal", "image"):
            if names := _names(MAPPINGS[mapping]).get(self.model_type):
                return self.name == names[0]
        return False


def _names(task: str) -> dict[str, list[str]]:
    """Model types and their classes in one of transformers' mappings."""
    found = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    return {kind: [names] if isinstance(names, str) else list(names) for kind, names in found.items()}


def architectures() -> dict[str, Architecture]:
    """All of them by the names of their classes, in alphabetical order."""
    found: dict[str, Architecture] = {}
    for mapping, task in MAPPINGS.items():
        for kind, names in _names(task).items():
            for name in names:
                if name not in found or kind.replace("_", "") in name.lower():
                    found[name] = Architecture(name, kind, found[name].mapping if name in found else mapping)
    return {name: found[name] for name in sorted(found)}


def tiny_config(arch: Architecture) -> PreTrainedConfig:
    overrides = {key: value for key, value in arch.overrides.items() if key not in SETTINGS}
    if arch.mapping == "causal":
        overrides = {"?is_decoder": True, **overrides}
    config = _tiny(arch.config_class, _default(arch.config_class, overrides), overrides)
    if arch.overrides.get("vision") == "siglip":  # what it comes with is not of transformers alone
        vision = transformers.SiglipVisionConfig(**SIGLIP)
        for name in ("vocab_size", "vocab_offset", "rms_norm_eps", "model_args"):
            if hasattr(config.vision_config, name):
                setattr(vision, name, getattr(config.vision_config, name))
        vars(config)["vision_config"] = vision
    config._attn_implementation = arch.overrides.get("attention", config._attn_implementation)
    config._experts_implementation = "eager"  # grouped products have no float64
    return config


def _default(config_class: type, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A configuration's defaults; what may not be at its defaults (a drafter's) at what is given."""
    try:
        return config_class()
    except Exception:
        return config_class(**{name: value for name, value in overrides.items() if name.isidentifier()})


def _tiny(config_class: type, default: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    plain = _default(config_class, overrides)
    names = [field.name for field in dataclasses.fields(config_class) if field.name not in _BASE_FIELDS]
    values: dict[str, Any] = {}
    for name in names:
        value, unset = _value(default, name), _value(plain, name)
        nested = {key.partition(".")[2]: v for key, v in overrides.items() if key.startswith(f"{name}.")}
        if isinstance(value, PreTrainedConfig):
            values[name] = _tiny(type(value), value, nested)
            continue
        small = by_rule(name, value)
        if small is not value or (_is_plain(value) and value != unset):
            values[name] = small
    values |= _one_layer_of_each_kind(names, default)
    heads, groups = _value(default, "num_attention_heads"), _value(default, "num_key_value_heads")
    if heads == groups and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "num_key_value_heads" in names and groups is None and heads is not None:
        values["num_key_value_heads"] = values.get("num_attention_heads", heads)
    rope = _value(default, "rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    for key, value in overrides.items():
        optional, name = key.startswith("?"), key.lstrip("?")
        if "." not in name and (not optional or name in names):
            values[name] = value
    values.setdefault("pad_token_id", 0)
    return config_class(**values)


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field's value; that of all layers where they differ."""
    try:
        return getattr(config, name, None)
    except AttributeError:
        return None
    except Exception:  # transformers' error for a name that belongs to the layers
        return vars(config).get(name)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _one_layer_of_each_kind(names: list[str], default: PreTrainedConfig) -> dict[str, Any]:
    counts = [name for name in ("num_hidden_layers", "num_layers", "n_layer", "depth") if name in names]
    if not counts:
        return {}
    depth = _value(default, counts[0])
    lists = {
        name: list(value)
        for name in names
        if isinstance(value := _value(default, name), (list, tuple)) and depth and len(value) == depth > 2
    }
    kinds = [value for value in lists.values() if all(isinstance(kind, str) for kind in value)]
    first: dict[tuple, int] = {}
    for i, kind in enumerate(zip(*kinds, strict=True)):
        first.setdefault(kind, i)
    kept = (list(first.values()) or [0, 1])[:MOST_LAYERS]
    kept = kept * 2 if len(kept) == 1 else kept
    return {counts[0]: len(kept), **{name: [value[i] for i in kept] for name, value in lists.items()}}


# ---- weights --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def enlarge(model: nn.Module, seed: int = 0) -> None:
    """Gives weights that were drawn around zero, or are zero, a size at which they matter; others have a meaning."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, weight in model.named_parameters():
        if id(weight) in done or not weight.is_floating_point() or not weight.numel():
            continue
        done.add(id(weight))
        spread, middle = (float(weight.std()), float(weight.mean())) if weight.numel() > 1 else (0.0, float(weight))
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
        if not math.isfinite(spread + middle) or (spread == 0 and middle == 0):
            weight.copy_(noise * (0.3 if weight.ndim < 2 else _fan_in_std(name, weight)))
        elif spread == 0:
            weight.mul_(1 + 0.1 * noise)
        elif weight.ndim >= 2 and abs(middle) < 0.3 * spread:
            weight.copy_(noise * _fan_in_std(name, weight))


def _fan_in_std(name: str, weight: torch.Tensor) -> float:
    if "embed" in name or "wte" in name or "shared" in name:
        return 0.5
    return 1.2 / math.sqrt(
        weight[0].numel() if weight.ndim == 2 else weight.shape[-1] * (weight.ndim > 3) + weight.shape[1]
    )


def build(arch: Architecture, head: str | None = None) -> PreTrainedModel | None:
    """A tiny model in eval mode and float64, the same each time; None where there is no class for the head."""
    config = tiny_config(arch)
    name = arch.name
    if "mended" in arch.overrides:
        kind, _, attribute = arch.overrides["mended"].partition(".")
        setattr(getattr(modeling_outputs, kind), attribute, None)
    if head is not None:
        names = _names(HEADS[head]).get(arch.model_type)
        if names is None:
            return None
        name = names[0]
        config.num_labels = 2 if head == "question answering" else 3
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = BOS
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    enlarge(model)
    model = model.to(torch.float64).eval().requires_grad_(False)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=2, eos_token_id=None)
        model.generation_config.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)
    return model
