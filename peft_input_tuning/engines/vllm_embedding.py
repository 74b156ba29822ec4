"""vLLM's word embedding with an adapter for each slot, kept by word.

    token id, slot ──► slot < 0, or nothing in it:  E[id]                      the base's own embedding
                       else:                        table[slot, id]            one lookup

    table[slot] = [ T(E) ; prompt ]       (words + most virtual tokens, embedding_dim), in the base's dtype

T is a function of the word alone, so that all of T(E) is worked out when an adapter gets its slot. A step then costs
one lookup more than the base's, however large h is and however many adapters stand in the batch. Shapes are static
and nothing depends on data, as torch.compile and CUDA graphs want it. Products with W1 and W2 would read the weights
of each adapter of a batch in every step: 32 adapters with h = 2e have a third as many as SmolLM2-135M itself.

It costs memory, for each slot of `--max-loras` as much as the base's own embedding table, and the time to fill a slot.
A LoRA on the embedding is a function of the word too, and is kept the same way.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

from ..merging import fold
from .adapter_folder import Adapter
from .vllm_engine import check_engine, embedding_scale, slots_of_tokens


class EmbeddingByWord(VocabParallelEmbeddingWithLoRA):
    """A word embedding that serves input-tuning adapters and LoRAs, a table for each.

    vLLM makes one for an embedding that `--lora-target-modules` names, and its own class for others.
    """

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, lora_config, packed_modules_list, model_config=None) -> bool:
        named = lora_config.target_modules is not None
        return named and super().can_replace_layer(source_layer, lora_config, packed_modules_list, model_config)

    def create_lora_weights(self, max_loras: int, lora_config, model_config=None) -> None:
        """Called by vLLM, once, before it measures what memory is left."""
        most = check_engine(self.base_layer)
        self.words = self.base_layer.org_vocab_size
        self.most_virtual_tokens = most
        self.scale = float(
            torch.tensor(embedding_scale(model_config), dtype=lora_config.lora_dtype)
        )  # as transformers
        shape = (max_loras, self.words + most, self.base_layer.embedding_dim)
        device = self.base_layer.weight.device
        self.tables = torch.zeros(shape, dtype=lora_config.lora_dtype, device=device)
        self.in_use = torch.zeros(max_loras, dtype=torch.bool, device=device)
        # vLLM reads the dtype of its stand-ins for a warm-up off these.
        self.lora_a_stacked = self.lora_b_stacked = self.tables

    def reset_lora(self, index: int) -> None:
        self.in_use[index] = False

    @torch.inference_mode()
    def set_lora(self, index: int, lora_a: Tensor | Adapter, lora_b: Tensor | Adapter) -> None:
        """Fills a slot: with an `Adapter`, given twice, or a LoRA, `(rank, words)` and `(embedding_dim, rank)`."""
        self.reset_lora(index)
        table = self.tables[index]
        if isinstance(lora_a, Adapter):
            scale = torch.tensor(self.scale, dtype=torch.float32, device=table.device)
            fold(table, lambda ids: self.base_layer(ids) * self.scale, lora_a.adapt, self.words, scale)
            table[self.words :].zero_()
            table[self.words : self.words + len(lora_a.prompt)] = lora_a.prompt / scale
        elif not cast(Tensor, lora_b).any():
            return  # the base's own embeddings, as in vLLM's warm-up
        else:
            a, b = (cast(Tensor, factor).to(table.device) for factor in (lora_a, lora_b))
            for ids in torch.arange(a.shape[1], device=table.device).split(8192):
                table[ids] = (self.base_layer(ids).float() + a[:, ids].T.float() @ b.T.float()).to(table.dtype)
        self.in_use[index] = True

    def forward(self, x: Tensor) -> Tensor:
        """`(tokens,)` ids → `(tokens, embedding_dim)`. Ids of `words` and above are the virtual tokens of a slot."""
        slots = slots_of_tokens(self.punica_wrapper, x.shape[0])
        own = slots.clamp(min=0)
        rows = self.tables.shape[1]
        adapted = nn.functional.embedding(own * rows + x.clamp(max=rows - 1), self.tables.flatten(0, 1))
        words = self.base_layer(x.clamp(max=self.words - 1))
        return torch.where(((slots >= 0) & self.in_use[own]).unsqueeze(-1), adapted, words)
