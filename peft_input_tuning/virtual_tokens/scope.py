"""`adapter_scope="input"`: the input-adapter changes the tokens of the input, and leaves the output's as they are.

    adapter_scope="all"      T(input) T(input) | T(output) T(output)      the default
    adapter_scope="input"    T(input) T(input) |   output    output       as drawn in the paper (figure 2)

Of a decoder-only language model, both go through one embedding. What tells them apart is known at the model's entrance
only: in training a token with a label is the output's; in `generate`, so is every token after those that it was given.
Hence it is there that embeddings are looked up and passed on in place of the ids. If neither is known the call is
refused. All other models read nothing but input: an encoder-decoder's input goes through the encoder, and models
without a language model's head put nothing out that they read again.

One rule: a token is output if it has a label or was generated, in this call or in an earlier one on the same cache;
all else is input, and with it the last token of an answer, which no cache holds yet. A conversation that is given
again as ids, without its cache, is the same with `generate(labels=...)`: -100 at the tokens of the input, anything
else at those of earlier answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..call_state import current_row_adapters
from ..layer import CANNOT_TELL, InputTuningLayer, IsOutput
from .cache_mark import cache_of
from .checks import IGNORED
from .layout import repeat_rows


@dataclass(frozen=True)
class GivenInput:
    """What a `generate` was given; all that follows is output.

    Args:
        length: number of its tokens, those in a cache included.
        is_output: `(batch, length)`, which of them are output of earlier turns; None if none are.
    """

    length: int
    is_output: Tensor | None = None

    def output_at(self, start: Any, ids: Tensor) -> IsOutput:
        """Which of `ids`, `(batch, length)`, are output if the first of them is at the place `start`."""
        on_one_side = isinstance(start, int) and (start >= self.length or start + ids.shape[1] <= self.length)
        if self.is_output is None and on_one_side:
            return start >= self.length
        places = torch.arange(ids.shape[1], device=ids.device) + start
        if self.is_output is None:
            return (places >= self.length).expand(ids.shape[0], -1)
        table = nn.functional.pad(repeat_rows(self.is_output, ids.shape[0]).to(ids.device), (0, 1), value=True)
        return table[:, places.clamp(max=self.length)]


# With the layer that it is about, as in call_state.py: an assistant model has an input of its own.
_given_input: ContextVar[tuple[object, GivenInput | None]] = ContextVar("given_input", default=(None, None))


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
def input_of_generate(layer: InputTuningLayer, arguments: dict[str, Any], labels: Tensor | None) -> Iterator[None]:
    """While `generate` runs on these arguments, later tokens are the output's. Without ids it starts from one.

    Ids are the whole sequence, of which a cache may hold a part, or, if the mask is longer, what follows the cache.

    Raises:
        ValueError: labels of another shape than the ids.
    """
    ids = arguments.get("input_ids") if arguments.get("inputs") is None else arguments["inputs"]
    mask, cache = arguments.get("attention_mask"), cache_of(arguments)
    length = 1 if ids is None else ids.shape[1]
    is_output = None
    if labels is not None:
        _check_labels(labels, ids)
        is_output = labels != IGNORED
    if cache is not None and mask is not None and mask.shape[1] > length:
        before = int(cache.get_seq_length())
        length += before
        is_output = None if is_output is None else nn.functional.pad(is_output, (before, 0))  # nobody asks for those
    token = _given_input.set((layer, GivenInput(length, is_output)))
    try:
        yield
    finally:
        _given_input.reset(token)


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
        _check_labels(labels, ids)
        is_output = labels.to(ids.device) != IGNORED
        _check_rows_have_input(is_output, call.get("attention_mask"), layer)
        return is_output
    owner, given = (None, None) if torch.compiler.is_compiling() else _given_input.get()
    if owner is not layer or given is None:
        raise ValueError(CANNOT_TELL)
    cache = cache_of(call)
    return given.output_at(0 if cache is None else cache.get_seq_length(), ids)


def _check_labels(labels: Tensor, ids: Any) -> None:
    shape = None if ids is None else tuple(ids.shape)
    if tuple(labels.shape) != shape:
        raise ValueError(f"`labels` have the shape {tuple(labels.shape)}, and `input_ids` {shape}.")


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
