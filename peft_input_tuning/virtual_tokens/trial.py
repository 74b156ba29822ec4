"""Running a model once while an adapter is added, to see what it does with ids, without leaving a trace on it.

    model(ids)                                      what goes by ids: the word embedding, and others
    backbone(ids)  ==  backbone(e)?                 whether embeddings give what their ids give
    [ pads | ids ]  ==  [ ids ]?                    what masks and positions do (`trial_of_masks.py`)

Nothing of it is done, or known, if weights are elsewhere (offloaded, sharded).
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base_weights import base_embedding
from .backbone import BackboneTraits, forward_parameters, reads_ids
from .trial_of_masks import WhatMasksDo, what_masks_do
from .trial_run import hidden_states, pad_id, plain_ids, same_but_for_rounding, weights_are_here
from .unchanged import unchanged

_LENGTH = 2


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
        masks: what runs with positions and masks show.
        given_embeddings: parts of the backbone around the embedding that could read ids, and are given embeddings (the
            text model of one that reads images, too).
    """

    embedding: bool | None = None
    others: tuple[tuple[nn.Module, int | str], ...] = ()
    length_first: bool | None = None
    makes_numbers: bool = False
    gives_hidden_states: bool | None = None
    takes_embeddings: bool | None = None
    masks: WhatMasksDo = field(default_factory=WhatMasksDo)
    given_embeddings: tuple[nn.Module, ...] = ()

    def added_to(self, traits: BackboneTraits) -> BackboneTraits:
        """What was read off a backbone, with what its runs have shown."""
        return replace(
            self.masks.added_to(traits), length_first=self.length_first, takes_embeddings=self.takes_embeddings
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
    asked: list[torch.Size] = []
    with unchanged(model), ExitStack() as stack:
        stack.callback(embedding.register_forward_pre_hook(lambda _, args: asked.append(args[0].shape)).remove)
        with_ids = _watch_parts_around(backbone, embedding, stack)
        if _run(model, ids) is None and (model is backbone or _run(backbone, ids) is None):
            tables = tuple((one, 0) for one in beside if isinstance(one, nn.Embedding))
            return WhatSeesIds(others=tables, masks=WhatMasksDo(honours_mask=False))
        looked_up, length_first = bool(asked), ids.T.shape in asked and ids.shape not in asked
        others, makes_numbers = _modules_with_ids(backbone, embedding, beside, plain)
        seen = WhatSeesIds(looked_up, others, length_first, makes_numbers, gives_hidden_states=False)
        if hidden_states(backbone, input_ids=ids) is None:
            return seen
        takes = _takes_embeddings(backbone, embedding, ids) if embedding in set(backbone.modules()) else None
        masks = what_masks_do(backbone, embedding, traits)
    given = tuple(part for part, seen_ids in with_ids.items() if not seen_ids)
    return replace(seen, gives_hidden_states=True, takes_embeddings=takes, masks=masks, given_embeddings=given)


def _watch_parts_around(backbone: nn.Module, embedding: nn.Module, stack: ExitStack) -> dict[nn.Module, bool]:
    """The parts of a backbone around the embedding whose first argument is ids: whether a run has given them some.
    What is not run is not in it."""
    found: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found[module] = found.get(module, False) or first_argument(args, kwargs) is not None

    for part in backbone.modules():
        if part is backbone or embedding not in set(part.modules()) or not reads_ids(part):
            continue
        if forward_parameters(part)[0] == "input_ids":
            stack.callback(part.register_forward_pre_hook(note, with_kwargs=True).remove)
    return found


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The `input_ids` of a call whose first argument they are."""
    return args[0] if args else kwargs.get("input_ids")


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


def _takes_embeddings(backbone: nn.Module, embedding: nn.Module, ids: Tensor) -> bool:
    if "inputs_embeds" not in forward_parameters(backbone):
        return False
    moved = 1.5 * embedding(ids)
    hook = embedding.register_forward_hook(lambda _, __, rows: 1.5 * rows)
    try:
        expected = hidden_states(backbone, input_ids=ids)
        found = hidden_states(backbone, inputs_embeds=moved)
    except Exception:  # it wants ids, too (Gemma 4, with a table for each layer)
        return False
    finally:
        hook.remove()
    return found is not None and expected is not None and same_but_for_rounding(found, expected)
