"""Running a model once while an adapter is added, to see what it does with ids, without leaving a trace on it.

    model(ids)                                      what goes by ids: the word embedding, and others
    backbone(ids)  ==  backbone(e)?                 whether embeddings give what their ids give
    backbone(ids)  ==  backbone(ids, positions)?    from where positions are counted
    [ pads | ids ]  ==  [ ids ]?                    whether what is masked changes nothing

Nothing of it is done, or known, if weights are elsewhere (offloaded, sharded).
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..base_weights import base_embedding, execution_device
from .backbone import BackboneTraits, forward_parameters
from .unchanged import unchanged

_LENGTH, _PADS = 2, 3
_FIRST_POSITIONS = (0, 1, 2)  # BERT, PaliGemma, MRA
_TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.05}  # beside the largest value; 0.001 in other types
_SPECIAL = ("pad", "mask", "bos", "image", "video", "audio")


@dataclass(frozen=True)
class WhatSeesIds:
    """What a run of a model shows; None if it could not be run.

    Args:
        embedding: whether the word embedding was asked for the ids' embeddings.
        others: the modules that get ids for something else, and where among their arguments (a number or a name): the
            tables of Gemma 3n's layers, the n-grams of Qwen 4, the experts of DeepSeek V4 that go by ids.
        makes_numbers: whether further tables are asked for numbers that are made of ids (BLT's hashes).
        gives_hidden_states: whether the backbone's output has a state for each place.
        takes_embeddings: whether embeddings that are no rows of the table, as adapted ones, do what the same rows in
            the table would do. Marian scales what it looks up and takes embeddings as they are; others want ids, too.
        first_position: of a row's first token, as the backbone counts if it is not told; None if it cannot be told.
        honours_mask: whether what is masked changes nothing beside it.
        needs_token_types: whether that holds with token types only (PaliGemma: without them its attention looks ahead
            if nothing is masked, and back if something is).
    """

    embedding: bool | None = None
    others: tuple[tuple[nn.Module, int | str], ...] = ()
    makes_numbers: bool = False
    gives_hidden_states: bool | None = None
    takes_embeddings: bool | None = None
    first_position: int | None = None
    honours_mask: bool | None = None
    needs_token_types: bool = False

    def added_to(self, traits: BackboneTraits) -> BackboneTraits:
        """What was read off a backbone, with what its run has shown."""
        moved = 0 if self.first_position is None else self.first_position - traits.first_position
        return replace(
            traits,
            takes_embeddings=self.takes_embeddings,
            first_position=traits.first_position + moved,
            max_positions=None if traits.max_positions is None else traits.max_positions - moved,
            honours_mask=self.honours_mask,
            needs_token_types=self.needs_token_types,
        )


@torch.no_grad()
def what_sees_ids(
    model: nn.Module, backbone: nn.Module | None, embedding: nn.Module, traits: BackboneTraits | None
) -> WhatSeesIds:
    """Runs a model on a few ids.

    Args:
        model: with `embedding` somewhere in it.
        backbone: a part of it, or all; None if it has none, and nothing is known.
        embedding: of words, `(batch, length)` ids → `(batch, length, embedding_dim)`.
        traits: of the backbone, as they were read off it.
    """
    if backbone is None or traits is None:
        return WhatSeesIds()
    beside = _modules_beside(backbone, embedding)
    if not weights_are_here(model):
        return WhatSeesIds(others=tuple((one, 0) for one in beside if isinstance(one, nn.Embedding)))
    plain = plain_ids(backbone, embedding, _LENGTH)
    end = getattr(getattr(backbone, "config", None), "eos_token_id", None)
    ids = plain
    if isinstance(end, int) and 0 <= end < base_embedding(embedding).num_embeddings:
        ids = torch.cat([plain, torch.full_like(plain[:, :1], end)], dim=1)  # classifiers of T5 and BART look for it
    asked: list[nn.Module] = []
    with unchanged(model), ExitStack() as stack:
        stack.callback(embedding.register_forward_pre_hook(lambda *_: asked.append(embedding)).remove)
        if _run(model, ids) is None and (model is backbone or _run(backbone, ids) is None):
            tables = tuple((one, 0) for one in beside if isinstance(one, nn.Embedding))
            return WhatSeesIds(others=tables, honours_mask=False)
        looked_up = bool(asked)
        others, makes_numbers = _modules_with_ids(backbone, embedding, beside, plain)
        seen = WhatSeesIds(looked_up, others, makes_numbers, gives_hidden_states=False)
        if _hidden_states(backbone, input_ids=ids) is None:
            return seen
        takes = _takes_embeddings(backbone, embedding, ids) if embedding in set(backbone.modules()) else None
        seen = replace(seen, gives_hidden_states=True, takes_embeddings=takes)
        return _with_masks(seen, backbone, plain_ids(backbone, embedding, 2 * _LENGTH + _PADS), traits)


def _modules_beside(backbone: nn.Module, embedding: nn.Module) -> list[nn.Module]:
    """All parts of a backbone but the embedding and what it is a part of."""
    own = set(embedding.modules())
    return [one for one in backbone.modules() if one not in own and embedding not in set(one.modules())]


def _modules_with_ids(
    backbone: nn.Module, embedding: nn.Module, beside: list[nn.Module], ids: Tensor
) -> tuple[tuple[tuple[nn.Module, int | str], ...], bool]:
    """The innermost modules that go by ids, with the argument; and whether tables outside of them get numbers that are
    others for other ids. Words are the same in both runs, so that nothing else makes a difference."""
    words = embedding(ids)
    calls: dict[nn.Module, tuple[int | str, tuple, dict[str, Any]]] = {}
    numbers: list[dict[nn.Module, Tensor]] = [{}, {}]
    for run, these in enumerate((ids, ids.flip(-1))):
        with ExitStack() as stack:
            stack.callback(embedding.register_forward_hook(lambda *_: words).remove)
            for module in beside:
                note = partial(_note, these, calls, numbers[run])
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            _run(backbone, these)
    pad = pad_id(backbone)
    going = {module: call[0] for module, call in calls.items() if _goes_by_ids(module, *call, pad)}
    parts = {module: set(module.modules()) - {module} for module in going}
    others = tuple((module, where) for module, where in going.items() if parts[module].isdisjoint(going))
    inside = {module for module, _ in others}.union(*(parts[module] for module, _ in others))
    first, second = numbers
    made = [one for one, value in first.items() if not torch.equal(second.get(one, value), value)]
    return others, not inside.issuperset(made)


def _note(ids: Tensor, calls: dict, numbers: dict, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Ids are from the upper half of the vocabulary, so that they are no positions or types."""
    for where, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor) and value.dtype in (torch.long, torch.int):
            if bool(torch.isin(ids, value.reshape(-1)).all()):
                calls.setdefault(module, (where, args, kwargs))
            elif isinstance(module, nn.Embedding):
                numbers.setdefault(module, value.clone())


def _goes_by_ids(module: nn.Module, where: int | str, args: tuple, kwargs: dict[str, Any], pad: int) -> bool:
    """Whether virtual tokens must be padding to a module: to one that might look ids up, whatever it finds. Not to one
    that counts what is no padding, as M2M100 counts positions: padding makes a difference to it, other ids do not."""
    given = kwargs[where] if isinstance(where, str) else args[where]

    def output_for(ids: Tensor) -> list[Tensor]:
        if isinstance(where, str):
            return _tensors(module(*args, **{**kwargs, where: ids}))
        return _tensors(module(*args[:where], ids, *args[where + 1 :], **kwargs))

    try:
        here = output_for(given)
        same = [
            all(torch.equal(one, other) for one, other in zip(here, output_for(ids), strict=True))
            for ids in (given.flip(-1), torch.full_like(given, pad))
        ]
    except Exception:  # it needs more around it than its arguments
        return True
    return same != [True, False]


def pad_id(backbone: nn.Module) -> int:
    """The id of padding; 0 if a model has none."""
    pad = getattr(backbone.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _tensors(output: Any) -> list[Tensor]:
    output = list(output.values()) if isinstance(output, dict) else output
    return [one for one in output if isinstance(one, Tensor)] if isinstance(output, list | tuple) else [output]


def _run(module: nn.Module, ids: Tensor) -> Any:
    """The output for ids alone; None, with a warning, of a module that wants more (images, a second input)."""
    settings: dict[str, Any] = {"use_cache": False, "decoder_input_ids": ids}
    parameters = forward_parameters(module)
    try:
        return module(input_ids=ids, **{name: value for name, value in settings.items() if name in parameters})
    except Exception as error:
        warnings.warn(
            f"{type(module).__name__} could not be tried out with a few ids ({type(error).__name__}: {error}). That "
            "its input goes through the word embedding is taken for granted.",
            stacklevel=2,
        )
        return None


def _hidden_states(backbone: nn.Module, **inputs: Tensor) -> Tensor | None:
    """The last hidden state for an input, `(batch, length, dim)`; None if the output has none."""
    settings: dict[str, Any] = {"return_dict": True}
    if "use_cache" in forward_parameters(backbone):
        settings["use_cache"] = False
    return getattr(backbone(**inputs, **settings), "last_hidden_state", None)


def _takes_embeddings(backbone: nn.Module, embedding: nn.Module, ids: Tensor) -> bool:
    if "inputs_embeds" not in forward_parameters(backbone):
        return False
    moved = 1.5 * embedding(ids)
    hook = embedding.register_forward_hook(lambda *_: moved)
    try:
        expected = _hidden_states(backbone, input_ids=ids)
        found = _hidden_states(backbone, inputs_embeds=moved)
    except Exception:  # it wants ids, too (Gemma 4, with a table for each layer)
        return False
    finally:
        hook.remove()
    return found is not None and expected is not None and same_but_for_rounding(found, expected)


def _with_masks(seen: WhatSeesIds, backbone: nn.Module, ids: Tensor, traits: BackboneTraits) -> WhatSeesIds:
    """Adds what calls with positions and masks show; `ids` are a row, `(1, length)`."""
    positions = "position_ids" in traits.parameters
    first = _first_position(backbone, ids, traits.first_position) if positions else traits.first_position
    if first is None or "attention_mask" not in traits.parameters:
        return replace(seen, first_position=first, honours_mask=False)
    given = replace(traits, first_position=first)
    honours, needs_types = _honours_mask(backbone, ids, given), False
    if not honours and "token_type_ids" in traits.parameters:
        honours = needs_types = _honours_mask(backbone, ids, given, token_types=True)
    return replace(seen, first_position=first, honours_mask=honours, needs_token_types=needs_types)


def _first_position(backbone: nn.Module, ids: Tensor, likely: int) -> int | None:
    """From where a backbone counts positions; the likely one if it cannot be told apart (rotary positions)."""
    at = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    expected = _states_or_none(backbone, input_ids=ids)
    for first in dict.fromkeys((likely, *_FIRST_POSITIONS)):
        if _is_same(_states_or_none(backbone, input_ids=ids, position_ids=at + first), expected):
            return first
    return None


def _honours_mask(backbone: nn.Module, ids: Tensor, traits: BackboneTraits, token_types: bool = False) -> bool:
    """Whether a row that has masked places, where slack stands in mixed batches, is the same as that row alone. Beside
    it there is a row without any, so that rows which get the masks of others show."""
    short, pads = ids[:, :-_PADS], torch.full_like(ids[:, -_PADS:], pad_id(backbone))
    on_left = traits.slack == "left"

    def both(whole: Tensor, here: Tensor, masked: Tensor) -> Tensor:
        return torch.cat([whole, torch.cat([masked, here] if on_left else [here, masked], dim=1)])

    ones, zeros = torch.ones_like(ids), torch.zeros_like(pads)
    padded = {"input_ids": both(ids, short, pads), "attention_mask": both(ones, ones[:, :-_PADS], zeros)}
    if "position_ids" in traits.parameters:
        at = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) + traits.first_position
        padded["position_ids"] = both(at, at[:, :-_PADS], zeros + traits.first_position)
    types = {"token_type_ids": torch.zeros_like(padded["input_ids"])} if token_types else {}
    found = _states_or_none(backbone, **padded, **types)
    if found is None or found.shape[:2] != padded["input_ids"].shape:
        return False
    kept = found[1:, _PADS:] if on_left else found[1:, :-_PADS]
    return all(
        _is_same(one, _states_or_none(backbone, input_ids=row, **{k: v[:1, : row.shape[1]] for k, v in types.items()}))
        for row, one in ((ids, found[:1]), (short, kept))
    )


def _states_or_none(backbone: nn.Module, **inputs: Tensor) -> Tensor | None:
    """Hidden states; None also if the backbone wants inputs of other lengths."""
    try:
        return _hidden_states(backbone, **inputs)
    except Exception:
        return None


def _is_same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None or found.shape != expected.shape:
        return False
    return same_but_for_rounding(found, expected)


def same_but_for_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by no more than their dtype's rounding makes of them."""
    bound = _TOLERANCE.get(expected.dtype, 1e-3) * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0, atol=bound, equal_nan=True)


def weights_are_here(module: nn.Module) -> bool:
    """Whether a model can be run now: its weights are neither offloaded nor shards of several processes."""
    return not any(
        one.is_meta or isinstance(one, DTensor) or hasattr(one, "ds_id")  # ds_id: DeepSpeed's ZeRO-3
        for one in module.parameters()
    )


def plain_ids(module: nn.Module, embedding: nn.Module, count: int) -> Tensor:
    """Ids without a special meaning in `module.config`, `(1, count)`; a small vocabulary's repeat."""
    table = base_embedding(embedding)
    config = getattr(module, "config", None)
    special = {getattr(table, "padding_idx", None)}
    special |= {getattr(config, f"{name}_token_id", None) for name in _SPECIAL}
    plain = [number for number in range(table.num_embeddings // 2, table.num_embeddings) if number not in special]
    plain = plain or [0]
    return torch.tensor([(plain * count)[:count]], device=execution_device(table))
