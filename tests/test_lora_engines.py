"""Adapters of SmolLM2-135M as LoRAs in stock llama.cpp, chosen by each request. `make test-engines`.

The oracle is the adapter itself, in transformers, on the base as it was before it grew.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import add, config, randomize
from families import FAMILIES
from peft_input_tuning import grow_base, save_as_lora
from test_engines import CONVERTER, TEXTS, pytestmark  # noqa: F401  the same texts, where the engines are

ROOT = Path(__file__).parents[1]
NEW = 24
LENGTHS = {"a": 8, "b": 5}


def packaged() -> tuple[torch.nn.Module, object]:
    from input_tuning_examples.packaged_model import find_packaged_model

    folder, file = find_packaged_model()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def adapted(base: torch.nn.Module) -> PeftModel:
    shape = {"adapter_hidden_dim": 48, "num_virtual_tokens": LENGTHS["a"]}
    model = get_peft_model(base, config(FAMILIES["llama"], **shape), adapter_name="default").eval()
    randomize(model, scale=0.05)
    add(model, "b", seed=2, adapter_hidden_dim=48, num_virtual_tokens=LENGTHS["b"])
    randomize(model, "b", scale=0.05, seed=2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A grown base and two LoRAs for it, as folders and as GGUF files, by the commands of docs/serving.md."""
    folder = tmp_path_factory.mktemp("engines")
    base, tokenizer = packaged()
    grow_base(base, folder / "base", max(LENGTHS.values()), tokenizer, untie=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32))
    for file, name in (("a", "default"), ("b", "b")):
        save_as_lora(model, folder / file, adapter_name=name, tokenizer=tokenizer, max_rank=512)
    to_gguf(folder / "base", "--converter", CONVERTER)
    for file in LENGTHS:
        to_gguf(folder / file, "--base", folder / "base.gguf")
    return folder


def to_gguf(source: Path, *more: object) -> None:
    script = ROOT / "examples" / "serving" / "to_gguf.py"
    command = [sys.executable, script, source, source.with_suffix(".gguf"), *more]
    done = subprocess.run([*map(str, command), "--outtype", "f32"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def server(folder):
    xllamacpp = pytest.importorskip("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(folder / "base.gguf"), 1024, False
    loras = [xllamacpp.CommonAdapterLoraInfo() for _ in LENGTHS]
    for lora, file in zip(loras, LENGTHS, strict=True):
        lora.path, lora.scale = str(folder / f"{file}.gguf"), 0.0
    settings.lora_adapters, settings.lora_init_without_apply = loras, True
    return xllamacpp.Server(settings)


@pytest.fixture(scope="module")
def texts():
    """What each adapter and the base write, greedily, by (name, text)."""
    base, tokenizer = packaged()
    model = adapted(base)
    found = {}
    for text in TEXTS:
        row = tokenizer(text, return_tensors="pt")
        for name in (*LENGTHS, "__base__"):
            names = ["default" if name == "a" else name]
            out = model.generate(**row, adapter_names=names, max_new_tokens=NEW, do_sample=False)
            found[name, text] = tokenizer.decode(out[0, row.input_ids.shape[1] :], skip_special_tokens=True)
    assert len({found[name, TEXTS[0]] for name in (*LENGTHS, "__base__")}) == 3
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*LENGTHS, "__base__"])
def test_llama_cpp_writes_the_adapters_text(server, folder, texts, name, text):
    tokenizer = AutoTokenizer.from_pretrained(folder / (name if name in LENGTHS else "base"))
    ids = tokenizer(text).input_ids
    words = len(tokenizer)
    answer = server.handle_completions(
        {
            "prompt": ids,
            "max_tokens": NEW,
            "temperature": 0,
            "cache_prompt": False,
            "logit_bias": [[id, False] for id in range(words - max(LENGTHS.values()), words)],
            "lora": [{"id": i, "scale": float(file == name)} for i, file in enumerate(LENGTHS)],
        }
    )
    assert answer["choices"][0]["text"] == texts[name, text]
