"""What input-tuning should give, without a line of the package: the same base with P more words in its table.

    table of the base     E[0] … E[V-1]
    table of the oracle   T(E[0]) … T(E[V-1])  prompt[0] … prompt[P-1]         T(e) = e + W2 · relu(W1 · e)

A row is fed as `[V … V+P-1 ; ids]`, so that a model may do with ids what it likes: scale them, number them, look them
up elsewhere. Other tables that see the ids (a vector a layer, token types) give new words what they give to padding.
Heads that share their weight with the table keep the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sizes import PAD

Weights = dict[str, Tensor]  # "prompt" (P, dim), "fc1" (h, dim), "fc2" (dim, h)


def transform(weights: Weights, e: Tensor) -> Tensor:
    """T(e), `(..., dim)` → `(..., dim)`."""
    return e + torch.relu(e @ weights["fc1"].T) @ weights["fc2"].T


def tables(model: nn.Module, run: Callable[[nn.Module], Any], ids: Tensor) -> list[str]:
    """The paths of the embeddings that are called with the ids when the model runs, in the order of the calls."""
    wanted = ids.flatten().sort().values  # a model may transpose or flatten them
    found: list[str] = []
    handles = []
    for path, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and hasattr(module, "num_embeddings"):

            def note(_module, args, kwargs, path=path):
                given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
                if given is not None and torch.equal(given.flatten().sort().values, wanted):
                    found.append(path)

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(found))


@dataclass
class Oracle:
    """A base with more words.

    Args:
        model: the grown base.
        table: the path of its word table.
        weights: of the adapter, as the model is to see them.
        scale: what the table's module multiplies its rows with.
        words: V, the number of words before.
    """

    model: nn.Module
    table: str
    weights: Weights
    scale: float
    words: int

    @classmethod
    def of(cls, base: nn.Module, table: str, others: list[str], weights: Weights) -> Oracle:
        """Grows a copy of the base.

        Args:
            base: the model.
            table: the path of its word table.
            others: the paths of further tables that see the ids.
            weights: of the adapter.
        """
        model = copy.deepcopy(base)
        module = model.get_submodule(table)
        words, scale = module.weight.shape[0], scale_of(module)
        one = cls(model, table, weights, scale, words)
        _set_rows(module, one.rows(weights).detach())
        for path in others:
            other = model.get_submodule(path)
            if other.weight.shape[0] == words and path != table:
                _set_rows(other, torch.cat([other.weight, other.weight[PAD].expand(one.length, -1)]).detach())
        return one

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return len(self.weights["prompt"]) if "prompt" in self.weights else 0

    def rows(self, weights: Weights) -> Tensor:
        """The table's rows, `(V + P, dim)`, as a function of the weights."""
        base_rows = self.base_rows
        e = transform(weights, base_rows * self.scale)
        return torch.cat([e, weights["prompt"]] if "prompt" in weights else [e]) / self.scale

    @property
    def base_rows(self) -> Tensor:
        module = self.model.get_submodule(self.table)
        if not hasattr(self, "_base_rows"):
            self._base_rows = module.weight.detach().clone()
        return self._base_rows

    def widen(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`(batch, length)` ids and mask with the prompt's ids between left pads and tokens."""
        batch, length = ids.shape
        prompt = torch.arange(self.words, self.words + self.length, device=ids.device)
        pads = [0] * batch if mask is None else mask.int().argmax(-1).tolist()
        rows = [torch.cat([row[:n], prompt, row[n:]]) for row, n in zip(ids, pads, strict=True)]
        if mask is None:
            return torch.stack(rows), None
        ones = torch.ones(self.length, dtype=mask.dtype)
        masks = [torch.cat([row[:n], ones, row[n:]]) for row, n in zip(mask, pads, strict=True)]
        return torch.stack(rows), torch.stack(masks)

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Meanwhile heads over a bidirectional backbone see the tokens' places only: a first place is a token's."""
        length, backbone = self.length, self.model.base_model
        last = getattr(backbone, "encoder", backbone)  # poolers come behind it

        def cut(_module: nn.Module, _args: Any, out: Any) -> Any:
            hidden = out[0][:, length:]
            if isinstance(out, tuple):
                return (hidden, *out[1:])
            out.last_hidden_state = hidden
            return out

        handles = [last.register_forward_hook(cut)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def widening(self) -> Iterator[None]:
        """Meanwhile the encoder alone sees the prompt, and what makes the decoder's input of the encoder's does not."""

        def widen(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            return (), {**kwargs, "input_ids": self.widen(ids)[0]}

        handle = self.model.get_encoder().register_forward_pre_hook(widen, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def gradients(self) -> Weights:
        """What the adapter's weights get, from what the table got in a backward pass."""
        table = self.model.get_submodule(self.table).weight
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.weights.items()}
        found = torch.autograd.grad(self.rows(leaves), list(leaves.values()), table.grad)
        return dict(zip(leaves, found, strict=True))


def scale_of(module: nn.Module) -> float:
    """What an embedding multiplies its rows with.

    Raises:
        ValueError: it does something else.
    """
    ids = torch.arange(5, 25)
    with torch.no_grad():
        out, rows = module(ids), module.weight[ids]
    scale = float((out * rows).sum() / (rows * rows).sum())
    if not torch.allclose(out, rows * scale, rtol=1e-6, atol=1e-9):
        raise ValueError(f"{type(module).__name__} is no table of rows times a number")
    return scale


def _set_rows(module: nn.Module, rows: Tensor) -> None:
    module.weight = nn.Parameter(rows, requires_grad=False)  # a head that shared the old one keeps it
    module.num_embeddings = len(rows)
