"""The input-adapters of a mixed batch: each row goes through its own, and a row without one is left as it is.

    rows   0 1 2 3 4 5                 ┌ a: 1 4 ┐   one product for all      ┌ 1 4 ┐
           b a - b a -   ── pick ──►   └ b: 0 3 ┘   adapters of a kind  ──►  └ 0 3 ┘   ── put ──►   the batch

For that, the adapters' weights have to lie side by side. `generate` copies them once, in the dtype of the embeddings,
for all of its steps; a copy never outlives it, since weights may change between calls. Adapters run one after another
in calls of the model itself, where a copy would cost more than it saves, and wherever their own modules have to run:
for gradients and autocast, with hooks (accelerate and DeepSpeed bring weights in by them), with weights in the
activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .call_state import BASE, RowAdapters, on_device
from .modules import InputDtypeLinear, adapt, autocasts
from .pending_weights import PendingWeights

MOST_PADDING = 2  # where adapters have unequal numbers of rows: how many times these may be computed


@dataclass(frozen=True)
class StackedAdapters:
    """The weights of adapters of one kind, side by side.

    Args:
        w1: `(adapters, embedding_dim, hidden_dim)`.
        bias1: `(adapters, 1, hidden_dim)`, or None.
        activation: element-wise, without weights, the same for all.
        w2: `(adapters, hidden_dim, embedding_dim)`.
        bias2: `(adapters, 1, embedding_dim)`, or None.
    """

    w1: Tensor
    bias1: Tensor | None
    activation: nn.Module
    w2: Tensor
    bias2: Tensor | None

    def __call__(self, embeddings: Tensor) -> Tensor:
        """T of equally many rows for each adapter, `(adapters * rows, length, embedding_dim)` → the same shape."""
        x = embeddings.reshape(self.w1.shape[0], -1, embeddings.shape[-1])
        hidden = self.activation(_product(x, self.w1, self.bias1))
        if self.bias2 is None:
            return torch.baddbmm(x, hidden, self.w2).view(embeddings.shape)
        return (x + _product(hidden, self.w2, self.bias2)).view(embeddings.shape)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


@dataclass(frozen=True)
class RowGroup:
    """Adapters that run together, and their rows.

    Args:
        names: the adapters.
        rows: numbers of their rows, adapter by adapter, as many for each: `(adapters * rows,)`. One that has fewer has
            its last row repeatedly, which is computed, and written, again. None for all rows as they stand.
        stacked: the weights of several adapters; None where the modules of the only one run.
    """

    names: list[str]
    rows: Tensor | None
    stacked: StackedAdapters | None


class MixedRows(PendingWeights):
    """The part of `InputTuningLayer` that runs input-adapters: one of them, or each for its rows."""

    def adapt(self, embeddings: Tensor, name: str) -> Tensor:
        """One adapter's T(e), `(..., embedding_dim)` → `(..., embedding_dim)` (paper, figure 4)."""
        self.check_weights_have_come(name)
        return adapt(embeddings, *self._parts(name)) if name in self.input_tuning_fc1 else embeddings

    def adapt_rows(self, embeddings: Tensor, rows: RowAdapters, is_output: Tensor | bool | None) -> Tensor:
        """Each row's T(e) by its adapter, `(batch, length, embedding_dim)` → the same shape; other rows as they are.

        `is_output` is that of `InputTuningLayer.forward`.
        """
        scope = None if isinstance(is_output, Tensor) else is_output
        stacks = rows.in_generate and not (torch.is_grad_enabled() or autocasts(embeddings))
        key = ("groups", embeddings.shape[0], embeddings.device, embeddings.dtype, scope, stacks)
        adapted = embeddings
        for group in rows.kept(key, lambda: self._groups(embeddings, rows, scope, stacks)):
            own = embeddings if group.rows is None else embeddings.index_select(0, group.rows)
            if group.stacked is not None:
                own = group.stacked(own)
            else:
                of_rows = is_output
                if isinstance(is_output, Tensor) and group.rows is not None:
                    of_rows = is_output.index_select(0, group.rows)
                own = self.adapt_in_scope(own, group.names[0], of_rows)
            adapted = own if group.rows is None else adapted.index_copy(0, group.rows, own)
        return adapted

    def _groups(self, embeddings: Tensor, rows: RowAdapters, scope: bool | None, stacks: bool) -> list[RowGroup]:
        """Which adapters run together. `scope` is `is_output` where it is one for all tokens, or None."""
        batch = embeddings.shape[0]
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(rows.names_of(batch)):
            rows_of.setdefault(name, []).append(row)
        alike: dict[Any, list[str]] = {}
        for name in rows_of:
            if name == BASE:
                continue
            self.check_weights_have_come(name)
            if name not in self.input_tuning_fc1 or (scope is True and name in self.input_only):
                continue
            one_for_all = name not in self.input_only or scope is not None
            alike.setdefault(self._kind(name) if stacks and one_for_all else name, []).append(name)
        groups = []
        for names in chain.from_iterable(_without_much_padding(names, rows_of) for names in alike.values()):
            most = max(len(rows_of[name]) for name in names)
            places = [row for name in names for row in _filled(rows_of[name], most)]
            index = None if places == list(range(batch)) else on_device(places, embeddings.device)
            groups.append(RowGroup(names, index, self._stacked(names, embeddings.dtype) if len(names) > 1 else None))
        return groups

    def _parts(self, name: str) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """An adapter's W1, activation, dropout and W2."""
        containers = self.input_tuning_fc1, self.input_tuning_activation, self.input_tuning_dropout
        return (*(container[name] for container in containers), self.input_tuning_fc2[name])

    def _kind(self, name: str) -> Any:
        """What adapters that can be stacked have in common; an adapter's own name if it runs by its modules."""
        fc1, activation, dropout, fc2 = parts = self._parts(name)
        plain = all(type(fc) is InputDtypeLinear and type(fc.weight) is nn.Parameter for fc in (fc1, fc2))
        if not plain or activation.state_dict() or dropout.training or any(map(_is_hooked, parts)):
            return name
        settings = {key: value for key, value in vars(activation).items() if not key.startswith("_")}
        return fc1.weight.shape, fc1.bias is None, type(activation), repr(settings)

    def _stacked(self, names: list[str], dtype: torch.dtype) -> StackedAdapters:
        parts = [self._parts(name) for name in names]
        (w1, bias1), (w2, bias2) = (_side_by_side([one[at] for one in parts], dtype) for at in (0, 3))
        w1 = w1.contiguous()  # on a CPU, a fifth faster with the few rows of a step; W2 gains nothing by it
        return StackedAdapters(w1, bias1, parts[0][1], w2, bias2)


def _is_hooked(module: nn.Module) -> bool:
    """Whether something runs with a module, or, as accelerate does it, in place of its forward.

    Leans on torch's private tables of hooks (since torch 2.0).
    """
    return bool(module._forward_pre_hooks or module._forward_hooks) or "forward" in vars(module)


def _side_by_side(layers: list[nn.Module], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights `(adapters, in, out)` and biases `(adapters, 1, out)` of linear layers."""
    weight = _stack([layer.weight for layer in layers], dtype).transpose(1, 2)
    return weight, None if layers[0].bias is None else _stack([layer.bias for layer in layers], dtype).unsqueeze(1)


def _stack(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Copied and cast at once."""
    return torch.stack(tensors, out=tensors[0].new_empty((len(tensors), *tensors[0].shape), dtype=dtype))


def _without_much_padding(names: list[str], rows_of: dict[str, list[int]]) -> list[list[str]]:
    """Takes adapters with the most rows out, until filling up to the most is cheap for the others."""
    rest = sorted(names, key=lambda name: len(rows_of[name]), reverse=True)
    alone = []
    while len(rest) * len(rows_of[rest[0]]) > MOST_PADDING * sum(len(rows_of[name]) for name in rest):
        alone.append([rest.pop(0)])
    return [*alone, rest]


def _filled(rows: list[int], count: int) -> list[int]:
    return rows + rows[-1:] * (count - len(rows))
