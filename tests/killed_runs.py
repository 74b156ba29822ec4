"""A run of `examples/training/train.py` that is killed again and again, started by `tests/test_faults.py`.

    python tests/killed_runs.py KILLS SEED OPTION...

Each life of the run is a fork of this process, which has imported everything already, and is ended with SIGKILL at a
random moment between two new checkpoints, a few after its start: moments go by the pace of the machine. Every fourth
is ended soon after its start, mostly while it loads; the last one is let alone. Prints one line of JSON: how each life
ended, and which checkpoints were incomplete after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "training"))

import torch

import train
from input_tuning_examples.checkpoints import checkpoints_in, last_complete_checkpoint

torch.set_num_threads(1)
SOON = 0.6  # seconds after a start
PATIENCE = 60.0  # seconds; a life that has not begun its checkpoints by then is killed all the same


def live(options: list[str]) -> int:
    """One life of the run, in a process of its own; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    with contextlib.suppress(SystemExit), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = train.main([*options, "--resume_from_checkpoint", "last"])
    os._exit(status)


def wait_for_checkpoints(count: int, output_dir: Path, before: list[Path]) -> float:
    """Until so many new ones were begun; returns the seconds from one to the next."""
    seen, begun, deadline = set(before), [], time.monotonic() + PATIENCE
    while len(begun) < count and time.monotonic() < deadline:
        if new := set(checkpoints_in(output_dir)) - seen:
            seen |= new
            begun.append(time.monotonic())
        time.sleep(0.002)
    return (begun[-1] - begun[0]) / (len(begun) - 1) if len(begun) > 1 else 0.0


def main() -> None:
    kills, seed, *options = sys.argv[1:]
    output_dir = Path(options[options.index("--output_dir") + 1])
    moments, lives = random.Random(int(seed)), []
    for number in range(int(kills) + 1):
        before = checkpoints_in(output_dir)
        pid = live(options)
        if number < int(kills):
            longest = wait_for_checkpoints(moments.randint(2, 12), output_dir, before) if number % 4 < 3 else SOON
            time.sleep(moments.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        complete, incomplete = last_complete_checkpoint(output_dir)
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        left = {"complete": complete and complete.name, "incomplete": [path.name for path in incomplete]}
        lives.append({"ended": how, **left})
    print(json.dumps(lives))


if __name__ == "__main__":
    main()
