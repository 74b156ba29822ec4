"""vLLM serves adapters as they lie in their folders. Imported by vLLM's entry points only.

    vllm.general_plugins     register          in each of vLLM's processes, when it starts
    vllm.logits_processors   SuppressTokens    where it samples (vllm_logits.py)

    request for an adapter ─► [words + 0 … words + P-1 ; ids] ─► EmbeddingByWord ─► the untouched base model
                              vllm_requests.py                   vllm_embedding.py

Virtual tokens are ids above the model's last word. So there is no word that a caller could not use, and none of them
can ever be sampled: the head has no logit for it. vLLM caches them as it caches words, for each adapter its own.

On a version that was not tried nothing of vLLM is changed, and loading an adapter says so. That needs one name of
vLLM, `PEFTHelper.from_dict`, which reads an adapter's configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vllm
from vllm.lora.peft_helper import PEFTHelper

from .around import put_around

TESTED = "0.32"


def register() -> None:
    """Called by vLLM in each process, possibly more than once."""
    if ".".join(vllm.__version__.split(".")[:2]) != TESTED:
        put_around(PEFTHelper, "from_dict", _refuse_untested)
        return
    from .vllm_inside import change_vllm

    change_vllm()


def _refuse_untested(original: Callable, config_dict: dict[str, Any]) -> Any:
    if config_dict.get("peft_type") == "INPUT_TUNING":
        raise RuntimeError(
            f"This is vLLM {vllm.__version__}, and peft_input_tuning's plugin was tested with vLLM {TESTED} only. "
            f"Install vLLM {TESTED}, look for a newer peft_input_tuning, or export the adapter with "
            "`peft-input-tuning export` and serve that."
        )
    return original(config_dict)
