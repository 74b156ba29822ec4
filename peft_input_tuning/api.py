"""All that `import peft_input_tuning` brings, and the method's registration with PEFT, which it begins with."""

from .config import InputTuningConfig
from .export import ExportReport, export_model
from .inspection import AdapterInspection, inspect_adapter
from .layer import InputTuningLayer
from .lora_form import GrownBase, LoraReport, from_lora, grow_base, save_as_lora
from .model import InputTuningModel
from .optimizer import create_input_tuning_optimizer, input_tuning_parameter_groups
from .prompt_embeds import prompt_embeds, soft_prompt
from .prompt_tuning import from_prompt_tuning
from .registration import register
from .tested_versions import warn_of_untested_versions
from .version import __version__
from .virtual_tokens.reuse import reuse_prompts

__all__ = [
    "AdapterInspection",
    "ExportReport",
    "GrownBase",
    "InputTuningConfig",
    "InputTuningLayer",
    "InputTuningModel",
    "LoraReport",
    "__version__",
    "create_input_tuning_optimizer",
    "export_model",
    "from_lora",
    "from_prompt_tuning",
    "grow_base",
    "input_tuning_parameter_groups",
    "inspect_adapter",
    "prompt_embeds",
    "reuse_prompts",
    "save_as_lora",
    "soft_prompt",
]


def register_method() -> None:
    """Make PEFT know INPUT_TUNING; warn beside versions that were never tested."""
    register("input_tuning", InputTuningConfig, InputTuningModel)
    warn_of_untested_versions()
