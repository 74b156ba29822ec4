"""Tests in engines that are not transformers, in an environment of their own: `make test-engines`."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from adapters import config
from families import FAMILIES
from trained import logic_rows, packaged, train


@pytest.fixture(scope="session")
def tokenizer():
    return packaged()[1]


@pytest.fixture(scope="session")
def model(tokenizer):
    """SmolLM2-135M with two trained adapters: "default", expressions to English, and "back", the other way."""
    family = FAMILIES["llama"]
    model = get_peft_model(packaged()[0], config(family, num_virtual_tokens=8, adapter_hidden_dim=48))
    train(model, tokenizer, logic_rows(200), steps=30)
    other = {"num_virtual_tokens": 5, "adapter_hidden_dim": 32, "adapter_bias": True, "adapter_activation": "gelu"}
    model.add_adapter("back", config(family, **other))
    model.set_adapter("back")
    train(model, tokenizer, logic_rows(200, back=True), steps=30)
    model.set_adapter("default")
    return model
