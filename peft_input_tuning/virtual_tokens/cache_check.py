"""Trying a model out: whether virtual tokens survive its cache.

    [a b c d] at once, without a cache   ==   [a b], then [c d] on the cache that came back

Run when an adapter is added beside a version of transformers or PEFT that was never tested, where the cache may have
another name: the prompt would be put in again at every token, without an error.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch import nn

from ..call_state import RowAdapters, use_row_adapters
from ..layer import InputTuningLayer
from ..modules import SoftPrompt
from ..tested_versions import newer_than_tested
from .backbone import forward_parameters, is_causal
from .cache_mark import cache_name
from .trial_run import plain_ids, same_but_for_rounding, weights_are_here
from .unchanged import unchanged

_TRIAL = "__trial__"  # an adapter of its own, since the new one's weights may still be in a file
_PROMPT, _FIRST, _ALL = 3, 2, 4  # lengths: of its prompt, of the ids in the first of two steps, of all ids


@torch.no_grad()
def check_cached_equals_uncached(backbone: nn.Module, layer: InputTuningLayer) -> None:
    """Runs a few ids through a backbone with an adapter, in one step without a cache and in two steps with one.

    Args:
        backbone: its embedding is `layer`.
        layer: the wrapped embedding; it has a prompt more while the ids run.

    Raises:
        ValueError: the outputs differ, or the cache is not to be found. Nothing is changed then, either.
    """
    parameters = forward_parameters(backbone)
    if not is_causal(backbone) or "use_cache" not in parameters or not weights_are_here(backbone):
        return
    words = plain_ids(backbone, layer, _PROMPT + _ALL)
    ids = words[:, _PROMPT:]
    prompt = SoftPrompt(_PROMPT, layer.embedding_dim).to(words.device)
    prompt.start_from(layer.unadapted(words[:, :_PROMPT])[0])
    layer.input_tuning_prompt[_TRIAL] = prompt
    try:
        with unchanged(backbone), use_row_adapters(layer, RowAdapters((_TRIAL,), (_PROMPT,))):
            try:
                whole = backbone(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
            except Exception as error:
                warnings.warn(
                    f"{type(backbone).__name__} could not be tried out with a few ids: {error}. Whether its cache "
                    "keeps virtual tokens is not known.",
                    stacklevel=2,
                )
                return
            first = backbone(input_ids=ids[:, :_FIRST], use_cache=True, return_dict=True)
            name, cache = _cache_in(first)
            name = name if name in parameters else cache_name(parameters)
            if cache is None or name is None:
                _refuse(backbone, "has a cache under a name that is not known")
            rest = backbone(input_ids=ids[:, _FIRST:], use_cache=True, return_dict=True, **{name: cache})
    finally:
        del layer.input_tuning_prompt[_TRIAL]
    expected, found = whole[:, _FIRST:], rest.last_hidden_state
    if expected.shape != found.shape or not same_but_for_rounding(found, expected):
        _refuse(backbone, "gives other outputs with its cache than without")


def _cache_in(output: Any) -> tuple[str | None, Any]:
    """The cache of an output and its name there; (None, None) if it has none."""
    found = ((name, value) for name, value in output.items() if hasattr(value, "get_seq_length"))
    return next(found, (None, None))


def _refuse(backbone: nn.Module, what: str) -> NoReturn:
    versions = " and ".join(newer_than_tested())
    raise ValueError(
        f"`num_virtual_tokens` is not 0, and {type(backbone).__name__} {what}, beside {versions}. "
        "Install a tested version or a newer peft_input_tuning, or use num_virtual_tokens=0."
    )
