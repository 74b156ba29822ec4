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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

import peft_input_tuning

from .build import Architecture, architectures
from .cells import CELLS, run

STATUSES = ("exact", "lacks", "refused", "failure")
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


def records(path: Path) -> dict[str, dict[str, Any]]:
    """What a file holds, by the names of architectures; later lines count."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {record["name"]: record for record in lines}


def worst(record: dict[str, Any]) -> str:
    """What an architecture comes to: the worst of its cells, where what the base lacks does not count."""
    found = {cell["status"] for cell in record["cells"].values()}
    return next((status for status in ("failure", "refused", "exact") if status in found), "lacks")


def summary(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Counts by cell, and the failures."""
    yield f"{'cell':32}" + "".join(f"{status:>9}" for status in STATUSES)
    for name in ["base", *CELLS]:
        counts = Counter(r["cells"][name]["status"] for r in found.values() if name in r["cells"])
        if counts:
            yield f"{name:32}" + "".join(f"{counts[status]:>9}" for status in STATUSES)
    counts = Counter(map(worst, found.values()))
    yield f"{'architectures':32}" + "".join(f"{counts[status]:>9}" for status in STATUSES) + f"   of {len(found)}"
    for status in ("refused", "failure"):
        yield f"\n{status}:"
        for record in found.values():
            said: dict[str, list[str]] = {}
            for name, cell in record["cells"].items():
                if cell["status"] == status:
                    gap = f" (gap {cell['gap']:.1e})" if "gap" in cell else ""
                    said.setdefault(cell.get("note", "") if gap == "" else "wrong value", []).append(name + gap)
            for note, names in said.items():
                yield f"  {record['name']}: {', '.join(names)}: {note}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("--only", default="", help="architectures whose class or model type matches")
    parser.add_argument("--cells", default="", help="cells whose name matches")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, help="file for the results, a line an architecture")
    parser.add_argument("--again", action="store_true", help="also run what is in that file already")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for an architecture")
    given = parser.parse_args(arguments)

    done = records(given.out) if given.out else {}
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
    return int(any(worst(record) == "failure" for record in found.values()))


if __name__ == "__main__":
    sys.exit(main())
