"""An adapter's folder, read without its base, as an engine does: what stands in it is what the formula says."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from adapters import adapted
from device import DEVICE
from families import FAMILIES
from oracles import transform
from peft_input_tuning.engines.adapter_folder import is_input_tuning, read_adapter, served_config

LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter_bias": True, "adapter_activation": "gelu"}, {"num_virtual_tokens": 0}, {"adapter_hidden_dim": 0}],
    ids=["plain", "bias, gelu", "no prompt", "prompt only"],
)
def test_what_is_read(tmp_path, changes):
    model, _, weights = adapted(LLAMA, **changes)
    model.save_pretrained(tmp_path)
    assert is_input_tuning(tmp_path)
    e = torch.randn(5, 32, device=DEVICE)
    adapter = read_adapter(tmp_path, "mine", 32, DEVICE)
    assert_close(adapter.adapt(e), transform(weights, e, changes.get("adapter_activation", "relu")))
    assert_close(adapter.prompt, weights.get("prompt.weight", e.new_empty(0, 32)))


@pytest.mark.parametrize("name", ["qwen2.5-e2e", "org/e2e", "keys", "default"])
def test_whatever_the_engine_calls_it(tmp_path, name):
    model, _, weights = adapted(LLAMA)
    model.save_pretrained(tmp_path)
    e = torch.randn(5, 32, device=DEVICE)
    assert_close(read_adapter(tmp_path, name, 32, DEVICE).adapt(e), transform(weights, e))


def test_what_cannot_be_served_is_refused_by_name(tmp_path):
    model, *_ = adapted(LLAMA, adapter_scope="input")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'mine'.*prompt_embeds"):
        served_config(tmp_path, "mine")
    model, *_ = adapted(LLAMA)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"of adapter 'mine' has the shape \(4, 32\) in the file, but this model needs \(4, 16\)"
    ):
        read_adapter(tmp_path, "mine", 16, DEVICE)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="adapter 'mine' cannot be read"):
        read_adapter(tmp_path, "mine", 32, DEVICE)
