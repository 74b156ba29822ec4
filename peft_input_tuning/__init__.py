"""Input-tuning (An et al., 2022, arXiv 2203.03131) for Hugging Face PEFT.

Importing this package registers the method INPUT_TUNING with PEFT. From then on `InputTuningConfig(...)` goes wherever
a `PeftConfig` goes.

The program `peft-input-tuning` imports the package too, and imports `api.py` when its work begins: `--help` does not
wait for torch, transformers and PEFT.
"""

from typing import TYPE_CHECKING

from .program import is_command_line
from .version import __version__ as __version__

if TYPE_CHECKING or not is_command_line():
    from .api import *  # noqa: F403
    from .api import __all__ as __all__
    from .api import register_method

    register_method()
else:

    def __getattr__(name: str) -> object:
        """A public name, before the command line's work has begun."""
        from importlib import import_module

        api = import_module(f"{__name__}.api")
        api.register_method()
        return getattr(api, name)
