"""Prompts' keys and values, kept with the adapters while a user promises that weights stay as they are.

`virtual_tokens/reuse.py` computes and uses them; here is what forgets them.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class PromptStates(nn.Module):
    """The part of `InputTuningLayer` that keeps states, inside of `reuse_prompts` only.

    Attributes:
        prompt_states: what is kept; None outside.
        reusers: how many `with reuse_prompts(...)` there are now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt_states: dict[Any, Any] | None = None
        self.reusers = 0
        self.register_load_state_dict_pre_hook(_forget)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prompt_states": None, "reusers": 0}  # copies keep none

    def forget_prompt_states(self) -> None:
        if self.prompt_states is not None:
            self.prompt_states.clear()

    def train(self, mode: bool = True) -> PromptStates:
        self.forget_prompt_states()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> PromptStates:
        self.forget_prompt_states()  # the model goes to another device or dtype
        return super()._apply(*args, **kwargs)


def _forget(layer: nn.Module, *_: Any) -> None:
    if isinstance(layer, PromptStates):
        layer.forget_prompt_states()
