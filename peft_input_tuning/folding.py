"""Folding the input-adapter into the embedding table: `table[i] = T(embedding(i)) / scale`.

T is a function of one token's embedding alone, so that a table of adapted embeddings does what the adapter does, at no
cost. `scale` is what some embedding modules multiply their rows with (Gemma, BART). Knows torch only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# With all that the adapter needs for a block, still less memory than 8,192 rows of float32 embeddings.
BLOCK_ROWS = 256

Progress = Callable[[int, int], None]


@torch.no_grad()
def fold(
    table: Tensor,
    embedding: Callable[[Tensor], Tensor],
    adapter: Callable[[Tensor], Tensor],
    words: int,
    scale: Tensor,
    progress: Progress | None = None,
) -> None:
    """Writes the adapted embedding of every word into `table`, worked out in float32, `BLOCK_ROWS` rows at a time.

    Args:
        table: `(>= words, embedding_dim)`, of any dtype, on any device; its first `words` rows are written.
        embedding: `(n,)` ids on `scale`'s device → `(n, embedding_dim)`.
        adapter: T in float32, `(n, embedding_dim)` → `(n, embedding_dim)`.
        words: number of words.
        scale: what `embedding` multiplies its rows with, a float32 scalar.
        progress: called with (rows done, rows in all) after each block.
    """
    for start in range(0, words, BLOCK_ROWS):
        ids = torch.arange(start, min(start + BLOCK_ROWS, words), device=scale.device)
        table[start : start + len(ids)] = adapter(embedding(ids).float()) / scale
        if progress is not None:
            progress(start + len(ids), words)
