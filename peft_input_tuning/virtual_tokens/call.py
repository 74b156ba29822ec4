"""One call of the backbone, rewritten: the prompt goes in if a sequence starts, and is counted in if it goes on.

    caller ──► ids, mask, positions get the prompt ──► backbone ──► the prompt's places out again ──► caller

    a sequence starts      [V-P … V-1 ; ids], and mask, positions, token types for them        `start.py`
    ... with its states    the prompt's keys and values go into the cache                    `reuse.py`
    packed sequences       as if one starts, with a prompt before each                       `packed.py`
    a sequence goes on     mask and positions know of the prompt in the cache                `go_on.py`
    afterwards             what came back gets the caller's length, the cache a mark         `outputs.py`

What one call needs later is in its object: nothing is kept on a module, two threads may run one model. What later
calls need travels on the cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layer import InputTuningLayer
from .backbone import BackboneTraits, check_embedding
from .cache_mark import CacheMark, cache_of, has_fixed_size
from .layout import PackedLayout, PromptLayout


class BackboneCall:
    """One call of a backbone.

    Attributes:
        arguments: what it is called with, by name.
        cache: the one that the caller passed, or None.
        layout: of the prompts that were put into the arguments; None if none were.
        places: the length of the rows with their prompts.
        row_positions: `(batch, length)`, for the backbone's table of positions; None if it counts places by itself.
        mark: what the cache is to say afterwards, or None.
        as_tuple: whether the caller asked for a tuple.
    """

    layout: PromptLayout | PackedLayout | None = None
    places = 0
    row_positions: Tensor | None = None
    mark: CacheMark | None = None
    as_tuple = False

    def __init__(
        self,
        backbone: nn.Module,
        traits: BackboneTraits,
        layer: InputTuningLayer,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> None:
        check_embedding(backbone, traits)
        self.backbone = backbone
        self.traits = traits
        self.layer = layer
        self.arguments = dict(zip(traits.parameters, args, strict=False)) | kwargs
        self.cache = cache_of(self.arguments)

    @property
    def given(self) -> Any:
        """The ids or embeddings of the call; None if there are none."""
        embeddings = self.arguments.get("inputs_embeds")
        return self.arguments.get("input_ids") if embeddings is None else embeddings

    def look_up_length_first(self) -> None:
        """The embedding takes `(batch, length)`, of which each row has its adapter: it is asked here in the model's
        place."""
        call = self.arguments
        if self.traits.length_first and call.get("input_ids") is not None and not self.layer.disable_adapters:
            call.update(input_ids=None, inputs_embeds=self.layer(call["input_ids"]))

    @property
    def makes_cache(self) -> bool:
        """Whether the caller, or else the model's configuration, wants a cache."""
        wanted = self.arguments.get("use_cache")
        return bool(getattr(self.backbone.config, "use_cache", False) if wanted is None else wanted)

    def join_input(self, layout: PromptLayout | PackedLayout, virtual: Tensor) -> None:
        """What the caller passed as `inputs_embeds` came out of `get_input_embeddings()`, our layer: it is adapted
        already."""
        call, x = self.arguments, self.arguments.get("inputs_embeds")
        if x is None:
            call["input_ids"] = layout.join(virtual, call["input_ids"])
        else:
            prompts = self.layer(virtual, is_output=False)
            call["inputs_embeds"] = layout.join(prompts, x)

    def add_token_types(self) -> None:
        """GPT-2 looks token types up in the word embedding, where they would pass through the input-adapter: look them
        up in the base embedding here instead."""
        call, types = self.arguments, self.arguments.get("token_type_ids")
        if types is None or not self.traits.adds_token_types or self.layer.disable_adapters:
            return
        x = self.layer(call["input_ids"]) if call.get("inputs_embeds") is None else call["inputs_embeds"]
        call.update(input_ids=None, inputs_embeds=x + self.layer.unadapted(types), token_type_ids=None)

    def set_mask(self, mask: Tensor | None) -> None:
        """Bloom reads positions off the mask, which must cover all places of a cache of a fixed size."""
        if mask is None:
            return
        if has_fixed_size(self.cache) and "position_ids" not in self.traits.parameters:
            places = self.cache.get_max_length()
            mask = nn.functional.pad(mask[:, :places], (0, max(0, places - mask.shape[1])))
        self.arguments["attention_mask"] = mask

    def tell_length_of_prefill(self, slots: int) -> None:
        """A cache whose layers keep a prefill apart from what follows (Unlimited-OCR's) is told its length, by
        `generate` without the prompt; else its first call is the prefill."""
        for layer in getattr(self.cache, "layers", ()):
            announced = getattr(layer, "prefill_length", None)
            if announced is not None:
                layer.prefill_length = None  # it is told once
                layer.set_prefill_length(announced + slots)

    def ask_for_names(self) -> None:
        """Outputs are taken apart by name; a caller who wants a tuple gets it at the end."""
        return_dict = self.arguments.get("return_dict")
        self.as_tuple = not (self.backbone.config.return_dict if return_dict is None else return_dict)
        self.arguments["return_dict"] = True
