"""Mixed batches: `adapter_names=[...]` gives each row of a batch its adapter, in training too: only the embedding
differs between rows, so each adapter gets the gradient of its own rows and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..call_state import BASE, RowAdapters, current_row_adapters, use_row_adapters
from ..layer import InputTuningLayer


@contextmanager
def mixed_batch(
    model: nn.Module, layer: InputTuningLayer, names: Sequence[str], known: Sequence[str]
) -> Iterator[None]:
    """Inside, calls of `model` give each row its adapter.

    Args:
        model: the module that is called; `layer` is in it.
        layer: its wrapped embedding.
        names: an adapter's name for each row, or `"__base__"`.
        known: the names of all of the model's adapters.

    Raises:
        ValueError: names that cannot be used, or a model that cannot use them now.
    """
    rows = _row_adapters(layer, names, known)
    with ExitStack() as stack:
        stack.enter_context(use_row_adapters(layer, rows))
        _check_not_compiling()
        if model.training:
            _check_not_run_again(model)
        else:
            stack.enter_context(_run_eagerly())
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save, a classification head
                hook = partial(_pass_adapter_names, layer=layer)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _row_adapters(layer: InputTuningLayer, names: Sequence[str], known: Sequence[str]) -> RowAdapters:
    if not names:
        raise ValueError("`adapter_names` is empty. Pass one name a row.")
    if layer.merged:
        raise ValueError(
            "`adapter_names` cannot be used while an adapter is merged into the base model. Call "
            "unmerge_adapter() first."
        )
    known = [BASE, *sorted(known)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"`adapter_names` has the unknown name {unknown[0]!r}. Known: {known}.")
    return RowAdapters(tuple(names), tuple(layer.prompt_length(name) for name in names))


REFUSAL = "`adapter_names` cannot be used inside torch.compile. Call the model outside of it."


def _check_not_compiling() -> None:
    if torch.compiler.is_compiling():
        raise ValueError(REFUSAL)


def _check_not_run_again(model: nn.Module) -> None:
    """A layer whose activations are checkpointed runs once more in the backward pass, after the call with its rows."""
    for path, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            inside = (name for name, one in layer.named_modules() if isinstance(one, AuxiliaryTrainingWrapper))
            if (name := next(inside, None)) is not None:
                raise ValueError(
                    f"`modules_to_save` has `{path}.{name}`, in a layer that gradient checkpointing runs again in the "
                    "backward pass, where it is not known which adapter a row has. Call "
                    "model.gradient_checkpointing_disable(), or train these adapters one by one."
                )


_eager_calls = 0
_eager_stance = ExitStack()
_eager_lock = Lock()


@contextmanager
def _run_eagerly() -> Iterator[None]:
    """Compiled code would have to leave its graph for the rows of a call, which `fullgraph=True` forbids: at inference
    calls with `adapter_names` run without it. A stance is the whole process's: the first such call sets it, the last
    one under way puts back what was before."""
    global _eager_calls
    with _eager_lock:
        if not _eager_calls:
            try:
                _eager_stance.enter_context(torch.compiler.set_stance("force_eager"))
            except RuntimeError as error:  # torch: a stance cannot be set inside a compiled region
                raise ValueError(REFUSAL) from error
        _eager_calls += 1
    try:
        yield
    finally:
        with _eager_lock:
            _eager_calls -= 1
            if not _eager_calls:
                _eager_stance.close()


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, layer: InputTuningLayer):
    """The hook is on the module for all threads; the rows are those of this thread's call."""
    rows = current_row_adapters(layer)
    if rows is None or not args:
        return None
    return args, {**kwargs, "adapter_names": rows.names_of(args[0].shape[0])}
