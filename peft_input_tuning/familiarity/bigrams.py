"""How often pairs of neighbouring tokens stand in a reference corpus.

The paper measures how familiar inputs are by the average frequency of their bigrams in the pretraining corpus. It does
not say, in what could be read of it, whether words or tokens are paired, nor how the average is scaled. Here:

    bigram = two neighbouring tokens of the model's tokenizer, inside one text
    score  = log10(1 + occurrences among a million bigrams of the corpus)      0: not in the corpus; 6: nothing else

Tokens, because any input has them, also one without words. The 1 is the smoothing: a pair that the corpus lacks is
as familiar as one that is much rarer than once in a million. Figures are comparable for one corpus and one tokenizer
only, and not with those of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..output.files import unfinished
from .tokens import token_stream, vocabulary_hash

MAX_BIGRAMS = 5_000_000
PAIRS_AT_ONCE = 1 << 20
FORMAT = "peft-input-tuning bigram counts, version 1"


class BigramCounts:
    """Counts of bigrams: two sorted columns of integers, 16 bytes a bigram.

    Args:
        tokenizer: whose tokens are counted.
        max_bigrams: how many different bigrams are kept. Whenever there are more, the rarest are dropped. One that
            comes back later starts from zero, so that its count can be too low, never too high. `undercount` is by how
            much at the most.

    Attributes:
        total: bigrams read, those that were dropped included.
        undercount: no count is further below the true one than this. It is the sum, over all times when something was
            dropped, of the largest count that was dropped; 0 if nothing ever was.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_bigrams: int = MAX_BIGRAMS) -> None:
        if max_bigrams < 1:
            raise ValueError(f"`max_bigrams` must be >= 1, got {max_bigrams}.")
        self.max_bigrams = max_bigrams
        self.total = 0
        self.undercount = 0
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary_hash(tokenizer)
        self._keys = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Number of different bigrams that are kept."""
        return len(self._keys)

    def add(self, texts: Iterable[str], progress: Callable[[int], None] | None = None) -> BigramCounts:
        """Counts the bigrams of more texts; memory does not grow with their number.

        Args:
            texts: any iterable, for example the lines of a file, or `(row["text"] for row in stream)` of a stream of
                the `datasets` library.
            progress: called with the number of texts read so far.

        Returns:
            itself.
        """
        waiting: list[Tensor] = []
        size = 0
        for group in token_stream(texts, self._tokenizer):
            keys = torch.cat([_keys(torch.tensor(row.ids, dtype=torch.int64)) for row in group])
            waiting.append(keys)
            size += len(keys)
            if size >= PAIRS_AT_ONCE:
                self._merge(torch.cat(waiting))
                waiting, size = [], 0
            if progress is not None:
                progress(group[-1].number)
        if waiting:
            self._merge(torch.cat(waiting))
        return self

    def _merge(self, pairs: Tensor) -> None:
        new, counts = pairs.unique(return_counts=True)
        keys, places = torch.cat([self._keys, new]).unique(return_inverse=True)
        self._keys = keys
        self._counts = torch.zeros_like(keys).scatter_add_(0, places, torch.cat([self._counts, counts]))
        self.total += len(pairs)
        if len(keys) > self.max_bigrams:
            order = self._counts.argsort(descending=True, stable=True)
            self.undercount += int(self._counts[order[self.max_bigrams]])
            kept = order[: self.max_bigrams].sort().values
            self._keys, self._counts = self._keys[kept], self._counts[kept]

    def of(self, ids: Tensor) -> Tensor:
        """Counts of the bigrams of a text.

        Args:
            ids: tokens, `(n,)`.

        Returns:
            `(n - 1,)`: at i, how often token i + 1 stood behind token i. 0 for what is not kept.
        """
        keys = _keys(ids.to(torch.int64))
        if not len(self._keys):
            return torch.zeros_like(keys)
        places = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[places] == keys, self._counts[places], 0)

    def per_million(self, ids: Tensor) -> Tensor:
        """The same as occurrences among a million bigrams of the corpus, `(n - 1,)` in float64."""
        return self.of(ids).double() * 1e6 / max(self.total, 1)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError if the counts are those of another tokenizer."""
        if vocabulary_hash(tokenizer) != self._vocabulary:
            raise ValueError(
                "`counts` were made with a tokenizer of another vocabulary. Count the corpus again with this one."
            )

    def save(self, path: str | Path) -> None:
        """Writes the counts as a safetensors file."""
        facts = {"total": self.total, "undercount": self.undercount, "max_bigrams": self.max_bigrams}
        metadata = {"format": FORMAT, "vocabulary": self._vocabulary, **{key: str(n) for key, n in facts.items()}}
        with unfinished(Path(path)) as scratch:
            save_file({"keys": self._keys, "counts": self._counts}, scratch, metadata)

    @classmethod
    def load(cls, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> BigramCounts:
        """Reads counts that `save` wrote; more can be added to them.

        Raises:
            ValueError: the file holds something else, is damaged, or belongs to another tokenizer.
            FileNotFoundError: there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r} of bigram counts.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                keys, counts = file.get_tensor("keys"), file.get_tensor("counts")
            facts = {key: int(metadata[key]) for key in ("total", "undercount", "max_bigrams")}
            vocabulary = metadata["vocabulary"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{str(path)!r} holds no bigram counts ({error}). Count the corpus again.") from None
        if not (
            keys.shape == counts.shape
            and keys.dtype == counts.dtype == torch.int64
            and bool((keys.diff() > 0).all())
            and bool((counts > 0).all())
            and int(counts.sum()) <= facts["total"]
        ):
            raise ValueError(f"{str(path)!r} holds damaged bigram counts. Count the corpus again.")
        loaded = cls(tokenizer, facts["max_bigrams"])
        if loaded._vocabulary != vocabulary:
            raise ValueError(f"{str(path)!r} was counted with a tokenizer of another vocabulary. Count again.")
        loaded.total, loaded.undercount = facts["total"], facts["undercount"]
        loaded._keys, loaded._counts = keys, counts
        return loaded


def score(per_million: Tensor) -> Tensor:
    """log10(1 + occurrences among a million)."""
    return torch.log10(1 + per_million)


def _keys(ids: Tensor) -> Tensor:
    """Both tokens of each bigram in one number, `(n - 1,)`; ids are below 2^31."""
    return (ids[:-1] << 31) | ids[1:]
