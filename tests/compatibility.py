"""The README's table of what works where, made from the tests.

A test that stands for cells of the table has a marker, the row, and a parameter `family`, the columns:

    @pytest.mark.feature("beams")
    @pytest.mark.parametrize("family", GENERATORS, ids=str)

A cell is ticked where such a test exists and `make test` runs it, so the suite fails when the cell is not true.

    python tests/compatibility.py            write the table into the README (`make compatibility`)
    python tests/compatibility.py --check    say whether the README has it
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

from families import FAMILIES, Family

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- what works where -->\n).*?(?=<!-- end -->)", re.DOTALL)

FEATURES = {  # the markers' names and what the README says
    "forward": "forward: loss, positions, embeddings, hidden states",
    "padding": "left and right padding",
    "training": "training changes the adapter and nothing else",
    "packing": "packed rows: positions that restart",
    "tasks": "without a head; the heads that the family has",
    "generate": "generate: greedy, with and without a cache",
    "beams": "beam search",
    "sampling": "sampling, several returns",
    "static cache": "static cache",
    "prompt lookup": "prompt lookup decoding",
    "assisted": "assistant model",
    "chunked prefill": "prefill in chunks",
    "prompt cache": "a prompt's keys and values computed once",
    "mixed batch": "mixed batches, `adapter_names=[...]`",
    "saving": "save and load",
    "unload": "unload gives the base model back",
    "merge": "merging an adapter without virtual tokens",
    "export": "export to a plain checkpoint",
    "lora": "as a LoRA that stock PEFT loads",
    "transformers adapters": "adapters of transformers: `add_adapter`, `load_adapter`",
    "with LoRA": "together with LoRA",
    "pipeline": "`pipeline()`",
    "gradient checkpointing": "gradient checkpointing",
    "bf16": "bfloat16 base model",
    "torch.compile": "`torch.compile`, one graph",
}


class Cells:
    """A plugin of pytest: the cells that the collected tests stand for."""

    def __init__(self) -> None:
        self.ticked: set[tuple[str, str]] = set()  # (feature, family)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
            if not isinstance(family, Family) or any(item.iter_markers("skip")) or any(item.iter_markers("xfail")):
                continue
            for marker in item.iter_markers("feature"):
                (feature,) = marker.args
                if feature not in FEATURES:
                    raise pytest.UsageError(f"{item.nodeid}: feature {feature!r} is not one of {sorted(FEATURES)}.")
                self.ticked.add((feature, str(family)))


def collect() -> set[tuple[str, str]]:
    """The cells of all tests that `make test` runs on a machine without a GPU."""
    cells, said = Cells(), io.StringIO()
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "not slow and not gpu", str(TESTS)]
    with contextlib.redirect_stdout(said):
        failed = pytest.main(options, plugins=[cells])
    if failed:
        raise SystemExit(f"{said.getvalue()}The tests could not be collected.")
    return cells.ticked


def table(ticked: set[tuple[str, str]]) -> str:
    """The cells as a table of Markdown: a row a feature, a column a family."""
    rows = [["", *FAMILIES], [":--", *(":-:" for _ in FAMILIES)]]
    rows += [
        [says, *("✓" if (feature, family) in ticked else "" for family in FAMILIES)]
        for feature, says in FEATURES.items()
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    readme = README.read_text(encoding="utf-8")
    renewed = BLOCK.sub(lambda _: table(collect()), readme)
    if "--check" not in sys.argv[1:]:
        README.write_text(renewed, encoding="utf-8")
    elif renewed != readme:
        raise SystemExit("The README's table is not what the tests say. Run `make compatibility`.")


if __name__ == "__main__":
    main()
