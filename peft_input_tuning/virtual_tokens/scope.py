"""`adapter_scope="input"`: the input-adapter changes the tokens of the input, and leaves the output's as they are.

    adapter_scope="all"      T(input) T(input) | T(output) T(output)      the default
    adapter_scope="input"    T(input) T(input) |   output    output       as drawn in the paper (figure 2)

Of a decoder-only language model, both go through one embedding. What tells them apart is known at the model's entrance
only: in training a token with a label is the output's; in `generate`, so is every token after those that it was given.
Hence it is there that embeddings are looked up and passed on in place of the ids. If neither is known the call is
refused. All other models read nothing but input: an encoder-decoder's input goes through the encoder, and
models without a language model's head put nothing out that they read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..call_state import current_row_adapters
from ..layer import CANNOT_TELL, InputTuningLayer, IsOutput
from .cache_mark import cache_of
from .start import IGNORED

# With the layer that it is about, as in call_state.py: an assistant model has an input of its own.
_input_end: ContextVar[tuple[object, int] | None] = ContextVar("input_end", default=None)


def tells_input_from_output(model: nn.Module) -> bool:
    """Whether a model has tokens of both kinds in one sequence: a decoder-only language model.

    Raises:
        ValueError: the model is none of transformers', so that nothing is known of its output.
    """
    if not hasattr(model, "can_generate") or not hasattr(model, "config"):
        raise ValueError(
            f'`adapter_scope` "input" needs a model of transformers, got {type(model).__name__}, of which nothing '
            'says which tokens are its output. Use adapter_scope="all".'
        )
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


@contextmanager
def input_of_generate(layer: InputTuningLayer, arguments: dict[str, Any]) -> Iterator[None]:
    """While `generate` runs on these arguments, later tokens are the output's. Without ids it starts from one.

    Ids are the whole sequence, of which a cache may hold a part, or, if the mask is longer, what follows the cache.
    """
    ids = arguments.get("input_ids") if arguments.get("inputs") is None else arguments["inputs"]
    mask, cache = arguments.get("attention_mask"), cache_of(arguments)
    length = 1 if ids is None else ids.shape[1]
    if cache is not None and mask is not None and mask.shape[1] > length:
        length += int(cache.get_seq_length())
    token = _input_end.set((layer, length))
    try:
        yield
    finally:
        _input_end.reset(token)


def embeddings_in_scope(call: dict[str, Any], layer: InputTuningLayer) -> dict[str, Any]:
    """The arguments of a call with embeddings for its ids, adapted if they are the input's."""
    ids = call.get("input_ids")
    if ids is None or call.get("inputs_embeds") is not None:
        return call
    return {**call, "input_ids": None, "inputs_embeds": layer(ids, is_output=output_tokens(call, ids, layer))}


def output_tokens(call: dict[str, Any], ids: Tensor, layer: InputTuningLayer) -> IsOutput:
    """Which of a call's tokens are the output's: `(batch, length)` booleans, or one for all.

    Raises:
        ValueError: nothing tells, or a row of the first labels has one at every token.
    """
    labels = call.get("labels")
    if labels is not None:
        if labels.shape != ids.shape:
            raise ValueError(f"`labels` have the shape {tuple(labels.shape)}, and `input_ids` {tuple(ids.shape)}.")
        is_output = labels.to(ids.device) != IGNORED
        _check_rows_have_input(is_output, call.get("attention_mask"), layer)
        return is_output
    owner, end = (None, 0) if torch.compiler.is_compiling() else _input_end.get() or (None, 0)
    if owner is not layer:
        raise ValueError(CANNOT_TELL)
    cache = cache_of(call)
    start = 0 if cache is None else cache.get_seq_length()
    if isinstance(start, int) and (start >= end or start + ids.shape[1] <= end):
        return start >= end
    return (torch.arange(ids.shape[1], device=ids.device) + start >= end).expand(ids.shape[0], -1)


def _check_rows_have_input(is_output: Tensor, mask: Any, layer: InputTuningLayer) -> None:
    """Looks at the first labels that adapters get, in training and outside of it: a GPU would have to wait each time,
    and rows that are made wrong are wrong from the first batch on."""
    rows = current_row_adapters(layer)
    names = [layer.enabled_adapter] if rows is None else rows.names
    known = {(name, layer.training) for name in layer.input_only.intersection(names)}
    if torch.compiler.is_compiling() or known <= layer.seen_labels:
        return
    is_input = ~is_output
    if isinstance(mask, Tensor) and mask.shape == is_output.shape:
        is_input = is_input & (mask.to(is_input.device) != 0)
    if not (is_input.any(dim=-1) | ~is_output.any(dim=-1)).all():
        raise ValueError(
            '`adapter_scope` is "input", but a row of `labels` has a label at every token, so there is no input to '
            'adapt. Set the labels of the input\'s tokens to -100, or use adapter_scope="all".'
        )
    layer.seen_labels |= known
