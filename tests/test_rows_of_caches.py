"""Rows of a cache that are dropped, doubled or reordered by hand keep what is known of their prompts."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from adapters import adapted, add
from families import FAMILIES, ids, padded
from oracles import row_output

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
ROWS = [ids(7), ids(3, seed=1), ids(5, seed=2)]
MORE = ids(3, 2, seed=3)  # what comes after
CHOSEN = [[1], [2, 0], [1, 2, 0], [0, 0, 1, 2, 1], [1, 1, 0, 0, 2, 2]]


@torch.no_grad()
@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
@pytest.mark.parametrize("names", [None, ["default", "longer", "default"]], ids=["one adapter", "mixed"])
@pytest.mark.parametrize("family", [FAMILIES["llama"], FAMILIES["opt"], FAMILIES["mistral"]], ids=str)
def test_selected_rows(family, names, chosen):
    model, base, weights = adapted(family)
    longer = add(model, "longer", seed=5, num_virtual_tokens=7)
    model.eval()
    each = [longer if name == "longer" else weights for name in names or [None] * 3]
    batch, mask = padded(ROWS, "left")
    of_rows = {} if names is None else {"adapter_names": names}
    out = model(input_ids=batch, attention_mask=mask, use_cache=True, **of_rows)
    cache = out.past_key_values if hasattr(out, "past_key_values") else out.cache
    if sorted(chosen) == [0, 1, 2]:
        cache.reorder_cache(torch.tensor(chosen))
    else:
        cache.batch_select_indices(torch.tensor(chosen))
    of_rows = {} if names is None else {"adapter_names": [names[at] for at in chosen]}
    for step in range(MORE.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = model(
            input_ids=MORE[chosen, step : step + 1], attention_mask=mask[chosen], past_key_values=cache, **of_rows
        )
        for at, logits in zip(chosen, out.logits, strict=True):
            whole = torch.cat([ROWS[at], MORE[at, : step + 1]])
            assert_close(logits[-1], row_output(base, each[at], whole)[-1], **TOLERANCE)
