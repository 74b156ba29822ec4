"""Tries input-tuning on every text architecture of transformers.

    python -m tests.architectures [--only REGEX] [--cells REGEX] [--jobs N] [--out FILE.jsonl] [--page] [--again]

Each architecture runs in a process of its own with a time limit. Results go into a file, a line each; a later call
goes on where that file ends. The package comes from PYTHONPATH if that is set, and not from the folder that this runs
in.
"""

from __future__ import annotations

import os
import sys

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # tiny models
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("PYTHONPATH"):  # `-m` puts the current folder in front of it
    _here = sys.path.pop(0)
    sys.path.append(_here)

from tests.architectures.runner import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
