"""Trained adapters of SmolLM2-135M as LoRAs in stock llama.cpp, chosen by each request. `make test-engines`.

The oracle is the adapter itself, in transformers, on the base as it was before it grew.
"""

from __future__ import annotations

import pytest
from llama_server import CONVERTER, TEXTS, LlamaServer, needs_engines, to_gguf
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_input_tuning import grow_base, save_as_lora
from trained import packaged

pytestmark = needs_engines
NEW = 24
NAMES = ["default", "back"]


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """A grown base and two LoRAs for it, from the adapters' own folders, by the commands of docs/serving.md."""
    folder = tmp_path_factory.mktemp("loras")
    model.save_pretrained(folder / "adapters")
    grow_base(packaged()[0], folder / "base", 8, tokenizer, untie=True)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    loaded = PeftModel.from_pretrained(base, folder / "adapters")
    loaded.load_adapter(folder / "adapters" / "back", "back")
    grown = AutoTokenizer.from_pretrained(folder / "base")
    for name in NAMES:
        save_as_lora(loaded, folder / name, adapter_name=name, tokenizer=grown, max_rank=512)
    to_gguf(folder / "base", folder / "base.gguf", "--converter", CONVERTER)
    for name in NAMES:
        to_gguf(folder / name, folder / f"{name}.gguf", "--base", folder / "base.gguf")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    return LlamaServer(folder / "base.gguf", [folder / f"{name}.gguf" for name in NAMES])


@pytest.fixture(scope="module")
def wanted(model, tokenizer):
    """What each adapter and the base write, greedily, by (name, text)."""
    found = {}
    for text in TEXTS:
        row = tokenizer(text, return_tensors="pt")
        for name in (*NAMES, "__base__"):
            out = model.generate(**row, adapter_names=[name], max_new_tokens=NEW, do_sample=False)
            found[name, text] = tokenizer.decode(out[0, row.input_ids.shape[1] :], skip_special_tokens=True)
    assert len({found[name, TEXTS[0]] for name in (*NAMES, "__base__")}) == 3
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*NAMES, "__base__"])
def test_llama_cpp_writes_the_adapters_text(server, folder, wanted, name, text):
    tokenizer = AutoTokenizer.from_pretrained(folder / (name if name in NAMES else "base"))
    virtual = range(len(tokenizer) - 8, len(tokenizer))
    scales = [{"id": i, "scale": float(lora == name)} for i, lora in enumerate(NAMES)]
    got = server.complete(tokenizer(text).input_ids, NEW, virtual, lora=scales)
    assert got == wanted[name, text]
