"""What input-tuning should give, without a line of the package: the same base with P more words in its table.

    table of the base     E[0] … E[V-1]
    table of the oracle   T(E[0]) … T(E[V-1])  prompt[0] … prompt[P-1]         T(e) = e + W2 · relu(W1 · e)

A row is fed as `[V … V+P-1 ; ids]`, so that a model may do with ids what it likes: scale them, number them, look them
up elsewhere. Other tables that see the ids (a vector a layer, token types) give new words what they give to padding.
Heads that share their weight with the table keep the old one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
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
    found: list[str] = []
    handles = []
    for path, module in model.named_modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2:

            def note(_module, args, kwargs, path=path):
                given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
                if given is not None and not given.is_floating_point() and _holds(given, ids):
                    found.append(path)

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(found))


def _holds(given: Tensor, ids: Tensor) -> bool:
    """Whether ids are those of the rows: as they are, flattened, transposed, or padded on the right."""
    if given.numel() == ids.numel():
        return torch.equal(given.flatten().sort().values, ids.flatten().sort().values)
    return given.ndim == 2 and len(given) == len(ids) and torch.equal(given[:, : ids.shape[1]], ids)


@dataclass
class Oracle:
    """A base with more words.

    Args:
        model: the grown base.
        table: the path of its word table.
        weights: of the adapter, as the model is to see them.
        scale: what the table's module multiplies its rows with.
        base_rows: `(V, dim)`, what the table's module gave for each word.
    """

    model: nn.Module
    table: str
    weights: Weights
    scale: float
    base_rows: Tensor

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
        words = module.weight.shape[0]
        with torch.no_grad():
            base_rows = module(torch.arange(words))
        scale = scale_of(module, base_rows)
        if scale is None:  # it does more than multiplying; what comes out of it is looked up instead
            parent, _, name = table.rpartition(".")
            module, scale = nn.Embedding(*base_rows.shape), 1.0
            setattr(model.get_submodule(parent), name, module)
        one = cls(model, table, weights, scale, base_rows)
        _set_rows(module, one.rows(weights).detach())
        for path in others:
            other = model.get_submodule(path)
            if other.weight.shape[0] == words and path != table:
                _set_rows(other, _with_pads(other.weight, one.length))
        for part in model.modules():  # such as the experts of each word
            for value in [*part._parameters.values(), *part._buffers.values()]:
                if value is not None and not value.is_floating_point() and value.ndim and len(value) == words:
                    value.data = _with_pads(value.data, one.length)
        return one

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return len(self.weights["prompt"]) if "prompt" in self.weights else 0

    def rows(self, weights: Weights) -> Tensor:
        """The table's rows, `(V + P, dim)`, as a function of the weights."""
        e = transform(weights, self.base_rows)
        return torch.cat([e, weights["prompt"]] if "prompt" in weights else [e]) / self.scale

    def widen(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`(batch, length)` ids and mask with the prompt's ids between left pads and tokens."""
        batch = len(ids)
        prompt = torch.arange(self.length) + len(self.base_rows)
        pads = [0] * batch if mask is None else mask.int().argmax(-1).tolist()
        rows = [torch.cat([row[:n], prompt, row[n:]]) for row, n in zip(ids, pads, strict=True)]
        if mask is None:
            return torch.stack(rows), None
        ones = torch.ones(self.length, dtype=mask.dtype)
        masks = [torch.cat([row[:n], ones, row[n:]]) for row, n in zip(mask, pads, strict=True)]
        return torch.stack(rows), torch.stack(masks)

    @contextmanager
    def around(self, backbone: nn.Module) -> Iterator[None]:
        """Meanwhile a part of the model is called with the caller's ids and mask, has the prompt inside, and gives its
        outputs without it. For heads: they look at the first place, the last one, or at all that the mask shows."""
        poolers = [part for path, part in backbone.named_modules() if path.rpartition(".")[2] == "pooler"]
        bare = any(isinstance(part, nn.Linear) for part in poolers)  # is given the first place, which is taken outside
        last = backbone.encoder if bare else backbone

        def widen(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            ids, *rest = (*args, kwargs.get("input_ids"))
            mask = rest[0] if args and rest[:-1] else kwargs.get("attention_mask")
            more = {k: v for k, v in kwargs.items() if k not in ("input_ids", "attention_mask")}
            if isinstance(types := more.get("token_type_ids"), Tensor):
                more["token_type_ids"] = torch.cat([types[:, :1].expand(-1, self.length), types], 1)
            if isinstance(sees_all := more.get("global_attention_mask"), Tensor):
                more["global_attention_mask"] = nn.functional.pad(sees_all, (self.length, 0))
            ids, mask = self.widen(ids, mask)
            return (ids, *([mask] if args[1:] else []), *args[2:]), more | (
                {} if args[1:] else {"attention_mask": mask}
            )

        def cut(_module: nn.Module, _args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (out[0][:, self.length :], *out[1:])
            out.last_hidden_state = out.last_hidden_state[:, self.length :]
            return out

        def cut_input(_module: nn.Module, args: tuple) -> tuple:
            return (args[0][:, self.length :], *args[1:])

        handles = [backbone.register_forward_pre_hook(widen, with_kwargs=True), last.register_forward_hook(cut)]
        handles += [pooler.register_forward_pre_hook(cut_input) for pooler in poolers if not bare]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def widening(self) -> Iterator[None]:
        """Meanwhile the encoder alone sees the prompt; what makes the decoder's input of the encoder's does not."""

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


def scale_of(module: nn.Module, out: Tensor) -> float | None:
    """What an embedding multiplies its rows with, from what it gave for all words; None if it does something else."""
    rows = module.weight
    scale = float((out * rows).sum() / (rows * rows).sum())
    return scale if torch.allclose(out, rows * scale, rtol=1e-6, atol=1e-9) else None


def _with_pads(rows: Tensor, count: int) -> Tensor:
    """Adds words that are to a table what padding is."""
    return torch.cat([rows, rows[PAD : PAD + 1].expand(count, *rows.shape[1:])])


def hide_new_words(model: nn.Module, words: int, names: tuple[str, ...]) -> None:
    """Lets parts of a model, and functions of its file, see padding in place of ids from `words` on.

    The functions are wrapped for good; without an oracle there are no such ids.
    """

    def hidden(value: Any) -> Any:
        is_ids = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool
        return torch.where(value >= words, PAD, value) if is_ids else value

    def hide(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tuple(map(hidden, args)), {name: hidden(value) for name, value in kwargs.items()}

    file = sys.modules[type(model).__module__]
    for path, part in model.named_modules():
        if path.rpartition(".")[2] in names:
            part.register_forward_pre_hook(hide, with_kwargs=True)
    for name in names:
        function = getattr(file, name, None)
        if function is not None and not hasattr(function, "__wrapped__"):
            setattr(file, name, wraps(function)(lambda ids, *rest, f=function, **more: f(hidden(ids), *rest, **more)))


def _set_rows(module: nn.Module, rows: Tensor) -> None:
    module.weight = nn.Parameter(rows.detach(), requires_grad=False)  # a head that shared the old one keeps it
    module.num_embeddings = len(rows)
