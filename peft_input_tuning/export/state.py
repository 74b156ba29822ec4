"""The tensors of a plain checkpoint: the adapted table, and the state dict around it without PEFT's names.

    table[i]               = T(embedding(i)) / scale        every word, adapted (`merging.py`)
    table[virtual_ids[j]]  = prompt[j] / scale              every virtual token, a word of its own

The rest of the model is taken as it is: nothing of it is copied but what grows with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..layer import InputTuningLayer
from ..merging import Progress

IMPOSSIBLE = -1e9  # a bias of the head for tokens that must not be generated


@torch.no_grad()
def folded_table(
    layer: InputTuningLayer,
    adapter_name: str,
    virtual_ids: Sequence[int],
    rows: int,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Tensor:
    """The embedding table of the exported model.

    Args:
        layer: the wrapped embedding.
        adapter_name: the adapter to fold.
        virtual_ids: the rows of the virtual tokens.
        rows: rows of the table, at least the vocabulary's.
        dtype: of the result; the arithmetic is in float32.
        progress: called with (rows done, rows in all) after each block.

    Returns:
        `(rows, embedding_dim)` on the CPU; rows that are no token's are zero.
    """
    table = torch.empty(rows, layer.embedding_dim, dtype=dtype)
    layer.fold_into(table, adapter_name, progress)
    table[layer.num_embeddings :] = 0
    if len(virtual_ids):
        prompt = layer.input_tuning_prompt[adapter_name]().float().cpu()
        table[list(virtual_ids)] = (prompt / layer.embed_scale.cpu()).to(dtype)
    return table


def plain_state_dict(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of a model under the names they have without PEFT: the base's, and this adapter's `modules_to_save`.

    Raises:
        ValueError: layers of another method are in the model.
    """
    renamed: dict[str, str | None] = {}  # prefix → its replacement, or None to leave out
    for path, module in model.named_modules():
        if isinstance(module, InputTuningLayer):
            renamed[f"{path}.base_layer."] = f"{path}."
            renamed[f"{path}.input_tuning_"] = None
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for name, _ in module.named_children():
                renamed[f"{path}.{name}."] = f"{path}." if name == "original_module" else None
            if adapter_name in getattr(module, "modules_to_save", {}):
                renamed[f"{path}.original_module."] = None
                renamed[f"{path}.modules_to_save.{adapter_name}."] = f"{path}."
        elif isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"`{path}` is a {type(module).__name__}: the model has adapters of another method too. Merge those "
                "(`merge_and_unload`) and load the input-tuning adapter on the result before exporting."
            )
    longest_first = sorted(renamed, key=len, reverse=True)
    plain = {}
    for key, tensor in model.state_dict().items():
        prefix = next((p for p in longest_first if key.startswith(p)), None)
        if prefix is None:
            plain[key] = tensor
        elif renamed[prefix] is not None:
            plain[renamed[prefix] + key.removeprefix(prefix)] = tensor
    return plain


def grow_vocabulary(state: dict[str, Tensor], names: Sequence[str], rows: int, virtual_ids: Sequence[int]) -> None:
    """Gives tensors of the state dict rows for the virtual tokens, in place; tied tensors stay tied.

    Rows of virtual tokens are zero in a matrix and `IMPOSSIBLE` in a bias.
    """
    grown: dict[int, Tensor] = {}
    for name in names:
        old = state[name]
        key = old.data_ptr()
        if key not in grown:
            dim = old.ndim - 1 if old.shape[0] == 1 or old.ndim == 1 else 0  # BART's bias is (1, words)
            shape = list(old.shape)
            shape[dim] = rows
            new = old.new_zeros(shape)
            new.narrow(dim, 0, old.shape[dim]).copy_(old)
            is_bias = dim == old.ndim - 1
            at = torch.tensor(list(virtual_ids), dtype=torch.long, device=new.device)
            new.index_fill_(dim, at, _impossible(old) if is_bias else 0.0)
            grown[key] = new
        state[name] = grown[key]


def _impossible(bias: Tensor) -> float:
    return max(IMPOSSIBLE, torch.finfo(bias.dtype).min / 2)
