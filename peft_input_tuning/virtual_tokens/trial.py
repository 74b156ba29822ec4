"""Running a model once while an adapter is added, to see what it does with ids, without leaving a trace on it.

    model(ids)                          what goes by ids: the word embedding, and others
    backbone(ids)  ==  backbone(e)?     whether embeddings give what their ids give
    [ pads | ids ]  ==  [ ids ]?        whether what is masked changes nothing

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
from .backbone import forward_parameters
from .position_table import PositionTable, use_row_positions
from .subclass import extend, unextend
from .unchanged import unchanged

_LENGTH = 2
_TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.05}  # beside the largest value; 0.001 in other types
_SPECIAL = ("pad", "mask", "bos", "image", "video", "audio")


@dataclass(frozen=True)
class WhatSeesIds:
    """What a run of a model shows; None if it could not be run.

    Args:
        embedding: whether the word embedding was asked for the ids' embeddings.
        others: the modules that get ids for something else, and where among their arguments (a number or a name): the
            tables of Gemma 3n's layers, the n-grams of Qwen 4, the experts of DeepSeek V4 that go by ids.
        length_first: whether it was asked for them as `(length, batch)`.
        makes_numbers: whether further tables are asked for numbers that are made of ids (BLT's hashes).
        gives_hidden_states: whether the backbone's output has a state for each place.
        takes_embeddings: whether embeddings that are no rows of the table, as adapted ones, do what the same rows in
            the table would do. Marian scales what it looks up and takes embeddings as they are; others want ids, too.
        honours_mask: whether what is masked changes nothing beside it.
        takes_row_positions: whether its table of positions can be told those of each row.
        looks_ahead: whether states change with what follows, so that none is kept; asked where a table counts places.
    """

    embedding: bool | None = None
    others: tuple[tuple[nn.Module, int | str], ...] = ()
    length_first: bool | None = None
    makes_numbers: bool = False
    gives_hidden_states: bool | None = None
    takes_embeddings: bool | None = None
    honours_mask: bool | None = None
    takes_row_positions: bool | None = None
    looks_ahead: bool | None = None


@torch.no_grad()
def what_sees_ids(
    model: nn.Module,
    backbone: nn.Module | None,
    embedding: nn.Module,
    slack: str = "left",
    first_position: int = 0,
    position_table: str | None = None,
) -> WhatSeesIds:
    """Runs a model on a few ids.

    Args:
        model: with `embedding` somewhere in it.
        backbone: a part of it, or all; None if it has none, and nothing is known.
        embedding: of words, `(batch, length)` ids → `(batch, length, embedding_dim)`.
        slack: on which side of a row its backbone is to have masked places.
        first_position: that it gives to a row's first token.
        position_table: path in the backbone of a table to which positions could be told.
    """
    if backbone is None:
        return WhatSeesIds()
    beside = _modules_beside(backbone, embedding)
    if not weights_are_here(model):
        return WhatSeesIds(others=tuple((one, 0) for one in beside if isinstance(one, nn.Embedding)))
    plain, more = plain_ids(backbone, embedding, _LENGTH), plain_ids(backbone, embedding, 2 * _LENGTH)
    end = getattr(getattr(backbone, "config", None), "eos_token_id", None)
    ids = plain
    if isinstance(end, int) and 0 <= end < base_embedding(embedding).num_embeddings:
        ids = torch.cat([plain, torch.full_like(plain[:, :1], end)], dim=1)  # classifiers of T5 and BART look for it
    asked: list[torch.Size] = []
    with unchanged(model), ExitStack() as stack:
        stack.callback(embedding.register_forward_pre_hook(lambda _, args: asked.append(args[0].shape)).remove)
        if _run(model, ids) is None and (model is backbone or _run(backbone, ids) is None):
            tables = tuple((one, 0) for one in beside if isinstance(one, nn.Embedding))
            return WhatSeesIds(others=tables, honours_mask=False)
        looked_up, length_first = bool(asked), ids.T.shape in asked and ids.shape not in asked
        others, makes_numbers = _modules_with_ids(backbone, embedding, beside, plain)
        seen = WhatSeesIds(looked_up, others, length_first, makes_numbers, gives_hidden_states=False)
        if _hidden_states(backbone, input_ids=ids) is None:
            return seen
        takes = _takes_embeddings(backbone, embedding, ids) if embedding in set(backbone.modules()) else None
        table = None if position_table is None else backbone.get_submodule(position_table)
        ahead = None if table is None else _looks_ahead(backbone, more)
        by_row = table is not None and not ahead and _takes_row_positions(backbone, table, more)
        honours = by_row or _honours_mask(backbone, more, slack, first_position)
    return replace(
        seen,
        gives_hidden_states=True,
        takes_embeddings=takes,
        honours_mask=honours,
        takes_row_positions=by_row,
        looks_ahead=ahead,
    )


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
    hook = embedding.register_forward_hook(lambda _, __, rows: 1.5 * rows)
    try:
        expected = _hidden_states(backbone, input_ids=ids)
        found = _hidden_states(backbone, inputs_embeds=moved)
    except Exception:  # it wants ids, too (Gemma 4, with a table for each layer)
        return False
    finally:
        hook.remove()
    return found is not None and expected is not None and same_but_for_rounding(found, expected)


def _honours_mask(backbone: nn.Module, ids: Tensor, slack: str, first_position: int) -> bool:
    """Whether a row is the same with masked places on the side of slack."""
    parameters = forward_parameters(backbone)
    if "attention_mask" not in parameters:
        return False
    pads = torch.full_like(ids[:, :2], pad_id(backbone))
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pads)
    parts = {"input_ids": (pads, ids), "attention_mask": (zeros, ones)}
    if "position_ids" in parameters:
        at = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) + first_position
        parts["position_ids"] = zeros + first_position, at
    whole = {name: part[1] for name, part in parts.items()}
    padded = {name: torch.cat(part if slack == "left" else part[::-1], dim=1) for name, part in parts.items()}
    try:
        expected, found = _hidden_states(backbone, **whole), _hidden_states(backbone, **padded)
    except Exception:  # it wants rows of other lengths: nothing is known
        return False
    if expected is None or found is None:
        return False
    kept = found[:, 2:] if slack == "left" else found[:, :-2]
    return kept.shape == expected.shape and same_but_for_rounding(kept, expected)


def _looks_ahead(backbone: nn.Module, ids: Tensor) -> bool:
    """Whether a state changes with what follows."""
    same, other = (
        _hidden_states(backbone, input_ids=row) for row in (ids, torch.cat([ids[:, :-1], ids[:, :1]], dim=1))
    )
    return same is None or other is None or not same_but_for_rounding(other[:, :-1], same[:, :-1])


def _takes_row_positions(backbone: nn.Module, table: nn.Module, ids: Tensor) -> bool:
    """Whether a row behind masked places is what it is alone, beside one without, if a table is told the positions of
    both. Not if what it gives is not for the embeddings: RoFormer turns all rows' queries and keys by one table."""
    settings: dict[str, Any] = {"use_cache": False, "return_dict": True}
    at = torch.arange(ids.shape[1], device=ids.device)
    at = torch.cat([at - 2, at]).view(2, -1)
    rows = torch.where(at < 0, pad_id(backbone), ids)
    extend(table, PositionTable)
    try:
        with use_row_positions(at.clamp(min=0)):
            found = backbone(input_ids=rows, attention_mask=(at >= 0).long(), **settings).last_hidden_state
        alone = [backbone(input_ids=row[None], **settings).last_hidden_state for row in (rows[0, 2:], rows[1])]
        return same_but_for_rounding(found[:1, 2:], alone[0]) and same_but_for_rounding(found[1:], alone[1])
    except Exception:
        return False
    finally:
        unextend(table)


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
