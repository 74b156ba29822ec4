"""The newest versions that the package was tested with, and what it says beside newer ones.

The package leans on names of transformers and PEFT, which change. Beside a version that was never tested it warns
once, on import; adapters with virtual tokens are tried out then when they are added (`virtual_tokens/cache_check.py`).
"""

from __future__ import annotations

import warnings

import peft
import transformers
from packaging.version import Version

NEWEST_TESTED = {"transformers": "5.24", "peft": "0.21"}  # minor versions; tests compare them with constraints.txt


def newer_than_tested() -> list[str]:
    """The packages that are newer than the newest minor version that was tested: "transformers 5.25.1 (tested: 5.24)".

    Empty where all are known.
    """
    installed = {"transformers": transformers.__version__, "peft": peft.__version__}
    return [
        f"{name} {version} (tested: up to {NEWEST_TESTED[name]})"
        for name, version in installed.items()
        if Version(version).release[:2] > Version(NEWEST_TESTED[name]).release
    ]


def warn_of_untested_versions() -> None:
    newer = newer_than_tested()
    if newer:
        warnings.warn(
            f"peft_input_tuning was not tested with {' and '.join(newer)}. Adapters with virtual tokens are tried out "
            "when they are added, and refused where the cache changes the output; nothing else is checked. Look for "
            "a newer peft_input_tuning, or install a tested version.",
            stacklevel=4,  # where the package is imported
        )
