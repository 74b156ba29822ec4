"""The two matrices of the LoRA. T(e) = e + W2 · act(W1 · e) + b is a function of the word alone, so with E the table,
s the embedding's scale, h the adapter's inner size, and virtual token i on a word u_i that stands for nothing else:

    A, (rank, words)                        B, (dim, rank)
    A[:h, v]     = act(W1 · s·E[v])         B[:, :h]   = W2 / s
    A[h, v]      = 1                        B[:, h]    = b / s                with a bias only
    A[h+1+i, u_i] = 1                       B[:, h+1+i] = prompt_i / s − E[u_i]

    rank = h + bias + P, but never more than dim: then A = all differences of the table, and B = the identity

A virtual token's column of A has nothing but its own 1. LoRA's product is scaled by s as the table is, in PEFT and in
engines alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layer import InputTuningLayer
from ..merging import BLOCK_ROWS, Progress
from ..modules import activated
from .report import WordErrors


@dataclass(frozen=True)
class Parts:
    """What an adapter's rank is made of."""

    hidden: int
    bias: int
    prompt: int
    dim: int

    @property
    def sum(self) -> int:
        return self.hidden + self.bias + self.prompt

    @property
    def exact_rank(self) -> int:
        return min(self.sum, self.dim)


def parts_of(layer: InputTuningLayer, name: str) -> Parts:
    """Reads an adapter's sizes."""
    hidden, bias = 0, 0
    if name in layer.input_tuning_fc2:
        fc2 = layer.input_tuning_fc2[name]
        hidden, bias = fc2.in_features, int(fc2.bias is not None)
    return Parts(hidden, bias, layer.prompt_length(name), layer.embedding_dim)


@torch.no_grad()
def lora_tensors(
    layer: InputTuningLayer,
    name: str,
    virtual_ids: Sequence[int],
    rank: int,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The matrices A and B, on the CPU, in float32, or in float64 if the table is.

    Args:
        layer: the wrapped embedding.
        name: the adapter.
        virtual_ids: a word for each virtual token.
        rank: of the result. Below the exact one, words get the nearest matrix of that rank (in the mean square over
            the table), and virtual tokens stay exact; more than their number.
        progress: called with (rows done, rows in all) after each block.

    Returns:
        `(rank, num_embeddings)` and `(embedding_dim, rank)`.
    """
    parts = parts_of(layer, name)
    scale = layer.embed_scale.cpu()
    front = torch.tensor(list(virtual_ids), dtype=torch.long)
    prompt = torch.empty(0, parts.dim, dtype=scale.dtype)
    if parts.prompt:
        prompt = layer.input_tuning_prompt[name]().cpu().to(scale.dtype) / scale
        prompt -= layer.unadapted(front.to(layer.embed_scale.device)).cpu().to(scale.dtype) / scale
    if rank >= parts.exact_rank and parts.sum <= parts.dim:
        return _by_parts(layer, name, front, prompt, progress)
    if rank >= parts.exact_rank:
        a = _by_words(parts.dim, layer)
        for ids, e, adapted in blocks(layer, name, progress):
            a[:, ids] = ((adapted - e) / scale).T
        a[:, front] = prompt.T
        return a, torch.eye(parts.dim, dtype=scale.dtype)
    return _nearest(layer, name, front, prompt, rank, progress)


def _by_parts(
    layer: InputTuningLayer, name: str, front: Tensor, prompt: Tensor, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    parts, scale = parts_of(layer, name), layer.embed_scale.cpu()
    a = _by_words(parts.sum, layer)
    b = torch.empty(parts.dim, parts.sum, dtype=scale.dtype)
    words = parts.hidden + parts.bias
    if parts.hidden:
        fc1, fc2 = layer.input_tuning_fc1[name], layer.input_tuning_fc2[name]
        for ids, e, _ in blocks(layer, name, progress):
            hidden = fc1(e.to(layer.embed_scale.device))
            a[: parts.hidden, ids] = activated(layer.input_tuning_activation[name], hidden).cpu().T
        a[parts.hidden : words] = 1
        b[:, : parts.hidden] = fc2.weight.cpu().to(scale.dtype) / scale
        if parts.bias:
            b[:, parts.hidden] = fc2.bias.cpu().to(scale.dtype) / scale
    a[:, front] = 0
    _put_prompt(a, b, front, prompt)
    return a, b


def _by_words(rank: int, layer: InputTuningLayer) -> Tensor:
    """`(rank, num_embeddings)` zeros, a word's column in one piece of memory: they are written word by word."""
    return torch.zeros(layer.num_embeddings, rank, dtype=layer.embed_scale.dtype).T


def _put_prompt(a: Tensor, b: Tensor, front: Tensor, prompt: Tensor) -> None:
    """The last ranks of A and B."""
    first = len(a) - len(front)
    a[torch.arange(first, len(a)), front] = 1
    b[:, first:] = prompt.T


def _nearest(
    layer: InputTuningLayer, name: str, front: Tensor, prompt: Tensor, rank: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """The projection of all differences on their main directions; those of dim × dim products, a block at a time."""
    scale, dim = layer.embed_scale.cpu(), layer.embedding_dim
    products = torch.zeros(dim, dim, dtype=torch.float64)
    for ids, e, adapted in blocks(layer, name):
        moved = (adapted - e)[~torch.isin(ids, front)].double()
        products += moved.T @ moved
    directions = torch.linalg.eigh(products).eigenvectors.flip(1)[:, : rank - len(front)].to(scale.dtype)
    a = _by_words(rank, layer)
    b = torch.empty(dim, rank, dtype=scale.dtype)
    for ids, e, adapted in blocks(layer, name, progress):
        a[: directions.shape[1], ids] = ((adapted - e) / scale @ directions).T
    b[:, : directions.shape[1]] = directions
    a[:, front] = 0
    _put_prompt(a, b, front, prompt)
    return a, b


def blocks(
    layer: InputTuningLayer, name: str, progress: Progress | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids, `(n,)`, with their embeddings, the base's and the adapted ones, `(n, embedding_dim)`, on the CPU in the
    dtype of `embed_scale`."""
    scale, adapter = layer.embed_scale, layer.plain_adapter(name)
    for start in range(0, layer.num_embeddings, BLOCK_ROWS):
        ids = torch.arange(start, min(start + BLOCK_ROWS, layer.num_embeddings), device=scale.device)
        e = layer.unadapted(ids).to(scale.dtype)
        yield ids.cpu(), e.cpu(), adapter(e).cpu()
        if progress is not None:
            progress(start + len(ids), layer.num_embeddings)


@torch.no_grad()
def word_errors(
    layer: InputTuningLayer, name: str, a: Tensor, b: Tensor, virtual_ids: Sequence[int], counts: Tensor | None
) -> WordErrors:
    """Compares every word's embedding in the LoRA with the adapter's.

    Args:
        a, b: as `lora_tensors` gives them, in any dtype.
        virtual_ids: words that are left out.
        counts: `(num_embeddings,)`, how often each word stands in a text; None without a text.
    """
    scale = layer.embed_scale.cpu()
    a, b = a.to(scale.dtype), b.to(scale.dtype)
    errors = torch.empty(layer.num_embeddings, dtype=scale.dtype)
    for ids, e, adapted in blocks(layer, name):
        off = (e + (a[:, ids].T @ b.T) * scale - adapted).norm(dim=1)
        errors[ids] = torch.where(off == 0, 0, off / adapted.norm(dim=1))  # rows of zeros stay zero
    counted = torch.ones(layer.num_embeddings, dtype=torch.bool)
    counted[list(virtual_ids)] = False
    largest, mean = float(errors[counted].max()), float(errors[counted].mean())
    if counts is None:
        return WordErrors(largest, mean)
    errors, weights = errors.where(counted, 0), counts.to(errors) * counted
    return WordErrors(largest, mean, float(errors[weights > 0].max()), float((errors * weights).sum() / weights.sum()))
