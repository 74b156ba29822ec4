"""What a user names as an adapter or a model: a folder, or an id on a model hub.

A name that cannot be an id is answered at once. A hub that cannot be reached is asked for half a minute.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # as PEFT names them
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # NAME or OWNER/NAME


def check_source(argument: str, name: str) -> None:
    """Raises if `name` is no model's folder here and no id on a hub either. A name whose first part is a folder is no
    id.

    Args:
        argument: what errors call it.
        name: as it was given.

    Raises:
        ValueError: there is no such folder.
    """
    if Path(name).is_dir():
        if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
            raise ValueError(f"{argument}: {name!r} holds an adapter. Name the folder of its base model.")
        return
    first, slash, _ = name.partition("/")
    if Path(name).exists():
        raise ValueError(f"{argument}: {name!r} is a file. Name the folder that it is in.")
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{argument}: there is no folder {name!r}, and it is no id of a model hub.")
    if slash and Path(first).is_dir():
        raise ValueError(f"{argument}: there is no folder {name!r}. {first!r} is one, so no model hub is asked.")
    print(f"{argument}: there is no folder {name!r} here, so a model hub is asked.", file=sys.stderr)


def check_adapter(name: str) -> None:
    """Raises if `name` is no adapter's folder and no OWNER/NAME on a hub, where adapters have no shorter names.

    Raises:
        ValueError: there is no such folder, or it holds no adapter.
    """
    if Path(name).is_dir():
        if not (Path(name) / "adapter_config.json").is_file():
            raise ValueError(f"ADAPTER: {name!r} has no adapter_config.json. Name a folder that holds an adapter.")
        if not any((Path(name) / file).is_file() for file in WEIGHTS):
            raise ValueError(
                f"ADAPTER: {name!r} has no {WEIGHTS[0]}, only the configuration. Get the folder again, or save the "
                "adapter again."
            )
    elif "/" not in name and not Path(name).exists():
        raise ValueError(f"ADAPTER: there is no folder {name!r}. On a model hub, adapters are named OWNER/NAME.")
    else:
        check_source("ADAPTER", name)
