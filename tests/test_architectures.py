"""A sample of what `make test-architectures` tries with every text architecture of transformers."""

from __future__ import annotations

import pytest

from architectures.build import architectures
from architectures.cells import CELLS, run
from architectures.sample import SAMPLE

CHOSEN = ("forward", "cache by hand, padded", "generate, padded", "mixed batch, padded")
REFUSED = set()  # by an error that names the reason
KNOWN = architectures()


@pytest.mark.parametrize("name", SAMPLE.values(), ids=SAMPLE.keys())
def test_an_adapter_gives_what_the_oracle_gives(name):
    if name not in KNOWN:
        pytest.skip(f"this transformers has no {name}")
    cells = run(KNOWN[name], lambda cell: cell in CHOSEN)
    allowed = {"exact", "lacks", *(["refused"] if name in REFUSED else [])}
    wrong = {key: cell for key, cell in cells.items() if cell.status not in allowed}
    assert not wrong
    assert any(cell.status == "exact" for cell in cells.values()) or name in REFUSED


def test_the_sample_has_classes_that_differ():
    assert len(set(SAMPLE.values())) == len(SAMPLE) >= 40
    assert set(CHOSEN) <= set(CELLS)
