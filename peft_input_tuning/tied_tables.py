"""After merging, the embedding has a table of its own, where transformers keeps one for several places.

    shared ─┬─ encoder.embed_tokens      merged:   shared ─┬─ decoder.embed_tokens      encoder.embed_tokens = T(E)
            ├─ decoder.embed_tokens                        └─ lm_head
            └─ lm_head

`tie_weights()` would make them one again, and the adapter would be gone. So the merged table is taken out of what this
model ties. A file of it is read as it should be, since transformers (>= 5.0) does not tie what a file holds twice.
Resizing cannot be helped: it puts one new embedding into all places.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel


def keep_merged_table(model: nn.Module, embedding_path: str) -> None:
    """Unties the embedding from the rest of a model that has no adapter any more.

    Leans on `_tied_weights_keys` and `all_tied_weights_keys` of transformers (target → source, since 5.0); on the
    instance, so that other models of the class are as they were.
    """
    embedding = model.get_submodule(embedding_path)
    for path, module in model.named_modules():
        inside = embedding_path.removeprefix(f"{path}." if path else "")
        if not isinstance(module, PreTrainedModel) or not f"{path}.{inside}".endswith(embedding_path):
            continue
        key = f"{inside}.weight"
        module._tied_weights_keys = _without(key, module._tied_weights_keys or {})
        module.all_tied_weights_keys = _without(key, getattr(module, "all_tied_weights_keys", {}))
        if module.get_input_embeddings() is not embedding:
            module.resize_token_embeddings = _refuse_to_resize
    if getattr(model, "resize_token_embeddings", None) is _refuse_to_resize:
        warnings.warn(
            "The encoder has an embedding of its own now, with the input-adapter in it. This model keeps it, and so "
            "does a file that save_pretrained writes. A new model of its class ties it to the decoder's and loses it: "
            "after `load_state_dict`, and after from_pretrained with `tie_weights()` or `resize_token_embeddings`.",
            stacklevel=4,
        )


def _without(key: str, tied: dict[str, str]) -> dict[str, str]:
    """What is tied beside `key`; what was tied to it is tied together."""
    left = {target: source for target, source in tied.items() if key not in (target, source)}
    first, *others = [target for target, source in tied.items() if source == key] or [key]
    return left | dict.fromkeys(others, first)


def _refuse_to_resize(new_num_tokens: int | None = None, *_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        f"`new_num_tokens` is {new_num_tokens}, but an input-adapter was merged into the encoder's embedding, and "
        "transformers gives encoder and decoder one embedding when it resizes. Resize the base model first, then load "
        "the adapter and merge it."
    )
