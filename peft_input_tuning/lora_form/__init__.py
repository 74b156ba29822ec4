"""An adapter as a LoRA on the word embedding, which PEFT and engines load without this package."""

from .grow import GrownBase, grow_base
from .load import from_lora
from .report import LoraReport
from .save import save_as_lora

__all__ = ["GrownBase", "LoraReport", "from_lora", "grow_base", "save_as_lora"]
