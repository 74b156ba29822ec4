"""What an adapter has learned, in words of the vocabulary: what its virtual tokens are near to, and which words the
input-adapter moves.

    shift of a word = |T(e) - e| / |e|            e: the base model's embedding of the word

Everything is worked out in float32, a block of the embedding table at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..layer import InputTuningLayer, named_layer
from ..merging import BLOCK_ROWS, Progress
from ..output.words import Word, word_of

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_FACTS = (
    "num_virtual_tokens",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "prompt_scale",
    "adapter_hidden_dim",
    "adapter_activation",
    "adapter_bias",
    "adapter_dropout",
    "adapter_scope",
    "modules_to_save",
)


@dataclass(frozen=True)
class VirtualToken:
    """One row of the soft prompt.

    Args:
        norm: its length.
        nearest: words of the base model's table by cosine, the nearest first.
        started_from: the word that it started from, whose value is how far it has moved from there, |p − e| / |e|;
            None where that is not known.
    """

    norm: float
    nearest: tuple[Word, ...]
    started_from: Word | None = None


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and the share of the adapter in all of them."""

    prompt: int
    input_adapter: int
    other: int
    base_model: int
    share: float
    bytes: int


@dataclass(frozen=True)
class AdapterInspection:
    """What `inspect_adapter` found.

    Args:
        adapter_name: the adapter.
        base_model: name of the base model, as the configuration has it.
        facts: fields of the configuration that describe the training.
        sizes: numbers of parameters. `other` counts `modules_to_save`.
        embedding_norms: minimum, quartiles and maximum of the words' lengths in the base model.
        weight_norms: length (Frobenius) of each weight of the input-adapter.
        virtual_tokens: the rows of the soft prompt, in order.
        prompt_cosines: cosine of each virtual token with each.
        moved_most, moved_least: words by shift; empty without an input-adapter.
        shift_quantiles: minimum, quartiles and maximum of all words' shifts; empty without an input-adapter.
        shifts: all words' shifts, by token id; empty without an input-adapter. A word whose embedding is zero
            (padding) has the shift 0 if it stays zero, else NaN; the lists and quantiles leave it out.
    """

    adapter_name: str
    base_model: str | None
    facts: dict[str, Any]
    sizes: Sizes
    embedding_norms: tuple[float, ...]
    weight_norms: dict[str, float]
    virtual_tokens: tuple[VirtualToken, ...]
    prompt_cosines: tuple[tuple[float, ...], ...]
    moved_most: tuple[Word, ...]
    moved_least: tuple[Word, ...]
    shift_quantiles: tuple[float, ...]
    shifts: tuple[float, ...]

    @property
    def start(self) -> str:
        """In words, where the virtual tokens started."""
        if any(token.started_from for token in self.virtual_tokens):
            return (
                "Each virtual token started from a word of the vocabulary. How far it has moved is given in lengths "
                "of its embedding."
            )
        if self.facts["prompt_tuning_init"] == "RANDOM":
            return "The virtual tokens started from no words."
        return "Which words the virtual tokens started from is not recorded with this adapter."


@torch.no_grad()
def inspect_adapter(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str | None = None,
    nearest: int = 5,
    most: int = 10,
    progress: Progress | None = None,
) -> AdapterInspection:
    """Looks into an adapter of a model.

    Args:
        model: a `PeftModel`, or a model of transformers with the adapter. It is not changed.
        tokenizer: the base model's, for the words; rows of the table that are none of its tokens are left out.
        adapter_name: the adapter; None is the active one.
        nearest: words for each virtual token.
        most: words in each of the lists of moved words.
        progress: called with (rows done, rows in all) while the table is read.

    Raises:
        ValueError: no such adapter, a number below 1, or weights that have not come from their file.
    """
    for argument, number in (("nearest", nearest), ("most", most)):
        if number < 1:
            raise ValueError(f"`{argument}` must be >= 1, got {number}.")
    _, layer = named_layer(model)
    name = adapter_name or layer.enabled_adapter
    if name is None or not layer.has_adapter(name):
        raise ValueError(
            f"`adapter_name` is {adapter_name!r}, but no such adapter is there. Adapters: {layer.adapter_names}."
        )
    layer.check_weights_have_come(name)
    words = torch.arange(layer.num_embeddings)
    if tokenizer is not None:
        words = words[torch.isin(words, torch.tensor(sorted(tokenizer.get_vocab().values())))]
    prompt = torch.empty(0, layer.embedding_dim)
    if layer.prompt_length(name):
        prompt = layer.input_tuning_prompt[name]().float().cpu()
    directions = nn.functional.normalize(prompt, dim=1)
    has_adapter = name in layer.input_tuning_fc1
    norms, shifts, cosines = [], [], []
    for e, adapted in _blocks(layer, name, words, progress):
        norms.append(e.norm(dim=1))
        cosines.append(directions @ nn.functional.normalize(e, dim=1).T)
        if has_adapter:
            shifts.append((adapted - e).norm(dim=1) / e.norm(dim=1))  # 0/0 is NaN: a zero row that stays zero
    lengths = torch.cat(norms)
    shift = torch.cat(shifts).nan_to_num(nan=0.0, posinf=float("nan")) if shifts else torch.empty(0)

    def listed(order: Tensor, values: Tensor) -> tuple[Word, ...]:
        return tuple(word_of(int(words[i]), float(values[i]), tokenizer) for i in order.tolist())

    near = torch.cat(cosines, dim=1)
    counted = torch.nonzero((lengths > 0) & ~shift.isnan()).squeeze(1) if has_adapter else torch.empty(0).long()
    by_shift = counted[shift[counted].argsort(stable=True)] if has_adapter else counted
    config = model.peft_config[name]
    return AdapterInspection(
        adapter_name=name,
        base_model=config.base_model_name_or_path,
        facts={fact: _plain(getattr(config, fact)) for fact in _FACTS},
        sizes=_sizes(model, layer, name),
        embedding_norms=_quantiles(lengths),
        weight_norms={
            key.removeprefix("input_tuning_"): float(parameter.float().norm())
            for key, parameter in layer.named_adapter_parameters(name)
            if "prompt" not in key
        },
        virtual_tokens=tuple(
            VirtualToken(float(row.norm()), listed(line.topk(min(nearest, len(words))).indices, line), start)
            for row, line, start in zip(prompt, near, _starts(layer, name, prompt, tokenizer), strict=True)
        ),
        prompt_cosines=tuple(tuple(line) for line in (directions @ directions.T).tolist()),
        moved_most=listed(by_shift.flip(0)[:most], shift),
        moved_least=listed(by_shift[:most], shift),
        shift_quantiles=_quantiles(shift[counted]) if has_adapter else (),
        shifts=tuple(shift.tolist()),
    )


def _blocks(
    layer: InputTuningLayer, name: str, words: Tensor, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Embeddings of the words, the base model's and the adapted ones, in float32 on the CPU."""
    device = layer.embed_scale.device
    transform: Callable[[Tensor], Tensor] = layer.plain_adapter(name)
    with gather_params_ctx(layer.base_layer.parameters()):
        for start in range(0, len(words), BLOCK_ROWS):
            ids = words[start : start + BLOCK_ROWS].to(device)
            e = layer.unadapted(ids).float()
            yield e.cpu(), transform(e).cpu()
            if progress is not None:
                progress(start + len(ids), len(words))


def _starts(
    layer: InputTuningLayer, name: str, prompt: Tensor, tokenizer: PreTrainedTokenizerBase | None
) -> list[Word | None]:
    """The word that each row of the prompt started from, with how far it has moved from there."""
    words = layer.prompt_start.get(name)
    # As a file has it, which may come from anywhere.
    if words is None or len(words) != len(prompt) or not all(0 <= word < layer.num_embeddings for word in words):
        return [None] * len(prompt)
    with gather_params_ctx(layer.base_layer.parameters()):
        e = layer.unadapted(torch.tensor(words, device=layer.embed_scale.device)).float().cpu()
    moved = (prompt - e).norm(dim=1) / e.norm(dim=1)
    return [word_of(word, float(far), tokenizer) for word, far in zip(words, moved, strict=True)]


def _sizes(model: nn.Module, layer: InputTuningLayer, name: str) -> Sizes:
    ours = dict(layer.named_adapter_parameters(name))
    prompt = sum(p.numel() for key, p in ours.items() if "prompt" in key)
    adapter = sum(p.numel() for key, p in ours.items() if "prompt" not in key)
    saved = [p for key, p in model.named_parameters() if f".modules_to_save.{name}." in key]
    base = sum(
        p.numel()
        for key, p in model.named_parameters()
        if "input_tuning_" not in key and ".modules_to_save." not in key
    )
    own = prompt + adapter + sum(p.numel() for p in saved)
    size = sum(p.numel() * p.element_size() for p in [*ours.values(), *saved])
    return Sizes(prompt, adapter, own - prompt - adapter, base, own / (base + own), size)


def _quantiles(values: Tensor) -> tuple[float, ...]:
    """Like `torch.quantile`, which takes 16 million values at the most."""
    ordered = values.sort().values
    return tuple(float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES) if len(ordered) else ()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", value)
