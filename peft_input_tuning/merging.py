"""The input-adapter as part of the embedding table: `table[i] = T(embedding(i)) / scale`.

T is a function of one token's embedding alone, so that a table of adapted embeddings does what the adapter does, at no
cost. `scale` is what some embedding modules multiply their rows with (Gemma, BART). `fold` writes such a table, for
merging (`MergeableTable`) and for exporting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .base_weights import execution_device, is_quantized
from .modules import adapt

INSTEAD_OF_MERGING = (
    "Keep the adapter, or write a plain checkpoint with peft_input_tuning.export_model, which needs neither PEFT nor "
    "this package."
)

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
    """Writes the adapted embedding of every word into `table`, in the dtype of `scale`, `BLOCK_ROWS` rows at a time.

    Args:
        table: `(>= words, embedding_dim)`, of any dtype, on any device; its first `words` rows are written.
        embedding: `(n,)` ids on `scale`'s device → `(n, embedding_dim)`.
        adapter: T in that dtype, `(n, embedding_dim)` → `(n, embedding_dim)`.
        words: number of words.
        scale: what `embedding` multiplies its rows with, a scalar of float32 or more.
        progress: called with (rows done, rows in all) after each block.
    """
    for start in range(0, words, BLOCK_ROWS):
        ids = torch.arange(start, min(start + BLOCK_ROWS, words), device=scale.device)
        table[start : start + len(ids)] = adapter(embedding(ids).to(scale.dtype)) / scale
        if progress is not None:
            progress(start + len(ids), words)


class MergeableTable(nn.Module, BaseTunerLayer):
    """The part of `InputTuningLayer` that folds an adapter into the base's table, for good or until it is unmerged."""

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._unmerged_weight: tuple[nn.Parameter, ...] = ()  # in a tuple, or it would be a parameter of this module
        self.register_state_dict_post_hook(_put_unmerged_weight)
        self.register_load_state_dict_pre_hook(_check_not_merged)

    @property
    def weight(self) -> Tensor:
        """The base's own table, also while another is merged in its place: a head that is tied to it stays so."""
        return self._unmerged_weight[0] if self.merged else super().weight

    def fold_into(self, table: Tensor, name: str, progress: Progress | None = None) -> None:
        """Writes one adapter's T(E) / scale into the first rows of `table`, `(>= num_embeddings, embedding_dim)`."""
        self.check_weights_have_come(name)
        self.check_foldable(name)
        if self.merged:
            raise ValueError(
                f"Adapter {self.merged_adapters[0]!r} is merged into the embedding. Call unmerge_adapter() first."
            )
        fold(table, self.base_layer, self.plain_adapter(name), self.num_embeddings, self.embed_scale, progress)

    def check_foldable(self, name: str) -> None:
        """Raises where a table cannot hold what an adapter does."""
        if name in self.input_only:
            raise ValueError(
                f'Adapter {name!r} has adapter_scope="input": a token has one embedding in the input and another in '
                "the output, and a table holds one for each. Keep the adapter, or train one with "
                'adapter_scope="all".'
            )

    @property
    def embed_scale(self) -> Tensor:
        """What the embedding module multiplies its rows with: a float32 scalar on the device where it runs, or a
        float64 one of a table in float64."""
        scale = self._get_embed_scale()  # PEFT, since 0.18
        device, dtype = execution_device(self.base_layer), torch.promote_types(self.weight.dtype, torch.float32)
        if scale is None:
            return torch.ones((), device=device, dtype=dtype)
        return scale.to(self.weight.dtype).to(device, dtype)

    def plain_adapter(self, name: str) -> Callable[[Tensor], Tensor]:
        """One adapter's T without dropout, with its arithmetic in the dtype of what it is given."""
        if name not in self.input_tuning_fc1:
            return lambda embeddings: embeddings
        fc1, fc2 = self.input_tuning_fc1[name], self.input_tuning_fc2[name]
        activation = self.input_tuning_activation[name]
        return partial(adapt, fc1=fc1, activation=activation, dropout=nn.Identity(), fc2=fc2)

    def check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Raises where adapters (None: the active ones) cannot be merged exactly."""
        names = [name for name in adapter_names or self.active_adapters if self.has_adapter(name)]
        names = list(dict.fromkeys([*self.merged_adapters, *names]))
        if len(names) > 1:
            raise ValueError(f"Only one input-tuning adapter can be merged at a time, got {names}.")
        for name in names:
            self.check_foldable(name)
            if self.prompt_length(name):
                raise ValueError(
                    f"Adapter {name!r} cannot be merged into the base model: its {self.prompt_length(name)} virtual "
                    f"tokens are not weights of the base. {INSTEAD_OF_MERGING}"
                )
            self.check_weights_have_come(name)
        if self.weight.is_meta or is_quantized(self.weight) or self.base_layer is not self.get_base_layer():
            raise ValueError(
                "The embedding is quantized, offloaded, or has an adapter of another method: nothing can be merged "
                "into it. Load the base model in its own dtype on one device, with this adapter alone."
            )

    def check_active_beside(self, adapter_names: list[str] | None) -> None:
        """Raises where the active adapter is not one of these (None: it is) and would put its prompt before a table
        that is another's."""
        active = self.enabled_adapter
        if adapter_names is None or active is None or active in adapter_names or not self.prompt_length(active):
            return
        names = [name for name in adapter_names if self.has_adapter(name)]
        if names:
            raise ValueError(
                f"Adapter {names[0]!r} cannot be merged while {active!r} is active: the {self.prompt_length(active)} "
                f"virtual tokens of {active!r} would stand before its words. Call set_adapter({names[0]!r}) first."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Gives the base embedding the adapted table, as a parameter of its own: a tied head keeps the base's.

        Args:
            safe_merge: whether to look for NaN and infinite values first.
            adapter_names: the adapter; None is the active one.

        Raises:
            ValueError: the adapter has virtual tokens, or the embedding cannot take a new table.
        """
        self.check_mergeable(adapter_names)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not names:
            return
        base = self.get_base_layer()
        table = torch.empty_like(base.weight, requires_grad=False)
        self.fold_into(table, names[0])
        if safe_merge and not torch.isfinite(table).all():
            raise ValueError(f"Adapter {names[0]!r} would bring NaN or infinite values into the embedding.")
        self._unmerged_weight = (base.weight,)
        base.weight = nn.Parameter(table, requires_grad=base.weight.requires_grad)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Gives the base embedding its own table back, bit for bit; a tied head is tied again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        (weight,) = self._unmerged_weight
        weight.data = weight.data.to(base.weight)  # the model may have been moved or cast since
        base.weight = weight
        self._unmerged_weight, self.merged_adapters = (), []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Called by PEFT. Gives back exactly what was wrapped, another method's layer included."""
        if merge:
            self.merge(safe_merge, adapter_names)
        elif self.merged:
            self.unmerge()
        return self.base_layer

    def unadapted(self, input_ids: Tensor) -> Tensor:
        """The base model's own embeddings, also while an adapter is merged."""
        if not self.merged:
            return self.base_layer(input_ids)
        return torch.func.functional_call(self.base_layer, {"weight": self._unmerged_weight[0]}, input_ids)


def _put_unmerged_weight(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Files hold the adapter beside the base it belongs to: beside the merged table it would be applied twice."""
    key = f"{prefix}base_layer.weight"
    if isinstance(layer, MergeableTable) and layer.merged and key in state:
        state[key] = layer._unmerged_weight[0].detach()


def _check_not_merged(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is loaded would be lost at the next unmerging, or be taken for merged."""
    if isinstance(layer, MergeableTable) and layer.merged and f"{prefix}base_layer.weight" in state:
        raise ValueError(
            f"`{prefix}base_layer.weight` cannot be loaded while adapter {layer.merged_adapters[0]!r} is merged into "
            "it. Call unmerge_adapter() first."
        )
