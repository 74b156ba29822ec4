"""Runs the trials of many architectures, each in a process of its own, and sums them up."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

import peft_input_tuning

from .build import Architecture, architectures
from .cells import run
from .report import PAGE, STATUSES, page, records, summary, worst

LIMIT = 120  # seconds
MEMORY = 16 << 30  # bytes of address space; a model that is not tiny fails by itself


def _trial(arch: Architecture, pattern: str, answer: Connection) -> None:
    """What the process of one architecture does."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    cells = run(arch, lambda name: re.search(pattern, name) is not None)
    answer.send({name: {k: v for k, v in asdict(c).items() if v not in ("", None)} for name, c in cells.items()})


def trial(arch: Architecture, pattern: str, limit: float) -> dict[str, Any]:
    """The record of an architecture: its cells, or what became of its process."""
    # Forked, a process has everything imported already.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    start, (ours, theirs) = time.monotonic(), context.Pipe(duplex=False)
    process = context.Process(target=_trial, args=(arch, pattern, theirs), daemon=True)
    process.start()
    theirs.close()
    cells: dict[str, Any]
    try:
        if ours.poll(limit):
            cells = ours.recv()
        else:
            cells = {"base": {"status": "failure", "note": f"not done after {limit:.0f} s"}}
    except EOFError:
        process.join()
        cells = {"base": {"status": "failure", "note": f"the process ended with {process.exitcode}"}}
    process.kill()
    process.join()
    seconds = round(time.monotonic() - start, 1)
    return {"name": arch.name, "type": arch.model_type, "mapping": arch.mapping, "seconds": seconds, "cells": cells}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("--only", default="", help="architectures whose class or model type matches")
    parser.add_argument("--cells", default="", help="cells whose name matches")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, help="file for the results, a line an architecture")
    parser.add_argument("--page", action="store_true", help=f"write docs/{PAGE.name} from all that is in that file")
    parser.add_argument("--again", action="store_true", help="also run what is in that file already")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for an architecture")
    given = parser.parse_args(arguments)

    done = records(given.out) if given.out else {}
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = [
        a for a in architectures().values() if re.search(given.only, a.name) or re.search(given.only, a.model_type)
    ]
    left = [a for a in chosen if given.again or a.name not in done]
    print(
        f"{len(left)} of {len(chosen)} architectures of transformers {transformers.__version__} to run, with the "
        f"package from {Path(peft_input_tuning.__file__).parent}",
        flush=True,
    )
    started = time.monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        running = [pool.submit(trial, arch, given.cells, given.limit) for arch in left]
        for number, future in enumerate(as_completed(running), 1):
            record = future.result()
            done[record["name"]] = record
            counts = Counter(cell["status"] for cell in record["cells"].values())
            said = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
            print(f"[{number}/{len(left)}] {record['name']}: {said} ({record['seconds']} s)", flush=True)
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    found = {arch.name: done[arch.name] for arch in chosen}
    print("\n".join(["", *summary(found), "", f"{time.monotonic() - started:.0f} s"]))
    if given.page:
        versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
        PAGE.write_text(page(done, versions), encoding="utf-8")
    return int(any(worst(record) == "failure" for record in found.values()))


if __name__ == "__main__":
    sys.exit(main())
