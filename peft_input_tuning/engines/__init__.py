"""Engines that serve adapters without transformers. Nothing here is loaded by `import peft_input_tuning`."""

from .embeds_requests import embeds_base64, embeds_prompts

__all__ = ["embeds_base64", "embeds_prompts"]
