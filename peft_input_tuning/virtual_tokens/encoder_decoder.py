"""Around an encoder with a prompt: its decoder sees the virtual places, the caller does not.

encoder ──► [ prompt | tokens ] ──► decoder, whose mask of the encoder's output gets the prompt's places
                               └──► their parent's output: the caller's copy, without them
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..call_state import current_row_adapters
from ..layer import InputTuningLayer
from .backbone import BackboneTraits, forward_parameters
from .layout import PromptLayout
from .subclass import Extension


class SeesPrompt(Extension):
    """A decoder that reads an encoder's output with virtual places, of which the caller's mask does not know."""

    input_tuning_layer: tuple[InputTuningLayer]
    input_tuning_traits: BackboneTraits  # of the encoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(forward_parameters(self), args, strict=False)) | kwargs
        (layer,), slack = self.input_tuning_layer, self.input_tuning_traits.slack
        hidden, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        rows = current_row_adapters(layer)
        if hidden is not None and (rows is not None or mask is not None) and (mask is None or mask.ndim == 2):
            batch, length = hidden.shape[:2]
            if mask is not None:
                length = mask.shape[1]
            elif rows is not None:
                length -= rows.slots
            layout = encoder_layout(hidden, mask, length, layer, slack)
            if layout is not None:
                call["encoder_attention_mask"] = layout.join_mask(mask, batch, length)
        return super().forward(**call)  # type: ignore[misc]


class HidesPrompt(Extension):
    """The module around encoder and decoder, whose copy of the encoder's output has the caller's length.

    An encoder's output that the caller brought (`encoder_outputs=`) is echoed as it came.
    """

    input_tuning_layer: tuple[InputTuningLayer]
    input_tuning_traits: BackboneTraits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(forward_parameters(self), args, strict=False)) | kwargs
        (layer,), slack = self.input_tuning_layer, self.input_tuning_traits.slack
        as_tuple = call.get("return_dict")
        as_tuple = not (self.config.return_dict if as_tuple is None else as_tuple)  # type: ignore[attr-defined]
        given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
        output = super().forward(**{**call, "return_dict": True})  # type: ignore[misc]
        hidden = getattr(output, "encoder_last_hidden_state", None)
        if hidden is not None and given is not None and call.get("encoder_outputs") is None:
            layout = encoder_layout(hidden, call.get("attention_mask"), given.shape[1], layer, slack)
            if layout is not None:
                output.encoder_last_hidden_state = layout.remove(hidden)
        return output.to_tuple() if as_tuple else output


def encoder_layout(
    hidden: Tensor, mask: Tensor | None, length: int, layer: InputTuningLayer, slack: str
) -> PromptLayout | None:
    """The layout of an encoder's output for `length` tokens of the caller; None if it holds no virtual tokens.

    Raises:
        ValueError: the mask fits neither the input nor the input with a prompt.
    """
    slots = hidden.shape[1] - length
    if not slots:
        return None
    rows = current_row_adapters(layer)
    known = [rows.slots] if rows is not None else [layer.prompt_length(name) for name in layer.adapter_names]
    if slots not in known:
        raise ValueError(
            f"`attention_mask` has {length} places for {hidden.shape[1]} places of the encoder's output. The mask "
            f"must fit the input, without the virtual tokens ({', '.join(map(str, known))})."
        )
    return PromptLayout(
        slots,
        lengths=None if rows is None else rows.lengths_of(hidden.shape[0], hidden.device),
        mask=None if mask is None else mask.to(hidden.device),
        slack=slack,
    )
