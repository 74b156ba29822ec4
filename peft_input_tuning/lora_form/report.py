"""What `save_as_lora` says to its caller, and which ranks engines take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of its --max-lora-rank, 0.32


@dataclass(frozen=True)
class WordErrors:
    """How far embeddings are from the adapter's, as |LoRA's − T(e)| / |T(e)|.

    Args:
        largest: of all words.
        mean: of all words.
        largest_in_text, mean_in_text: of the words of a text, the mean weighted by how often they stand there; None
            without a text.
    """

    largest: float
    mean: float
    largest_in_text: float | None = None
    mean_in_text: float | None = None


@dataclass(frozen=True)
class LoraReport:
    """What `save_as_lora` writes.

    Args:
        output_dir: the folder.
        adapter_name: the adapter.
        rank: of the LoRA.
        exact_rank: the smallest rank that is exact; larger than `rank` if the caller asked for less.
        virtual_token_ids: ids that stand before every input, in order.
        front: the same as text; None without a tokenizer.
        errors: of the embeddings in the LoRA; rounding alone if it is exact.
    """

    output_dir: Path
    adapter_name: str
    rank: int
    exact_rank: int
    virtual_token_ids: tuple[int, ...]
    front: str | None
    errors: WordErrors

    @property
    def is_exact(self) -> bool:
        return self.rank == self.exact_rank

    @property
    def vllm_rank(self) -> int | None:
        """The smallest `--max-lora-rank` of vLLM that takes it; None if there is none."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)
