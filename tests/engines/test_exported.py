"""A trained and exported SmolLM2-135M in llama.cpp and ONNX Runtime. `make test-engines`.

The oracle is the adapter itself, in transformers, which is not exported.
"""

from __future__ import annotations

import pytest
import torch
from llama_server import CONVERTER, TEXTS, LlamaServer, needs_engines, to_gguf
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_input_tuning import export_model

pytestmark = needs_engines
NEW = 32
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "checkpoint"
    export_model(model, folder, tokenizer=tokenizer)
    return folder


def greedy(model, ids: list[int]) -> list[int]:
    """Greedy tokens of the adapter, which needs no virtual tokens in its input."""
    row = torch.tensor([ids])
    out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False)
    return out[0, len(ids) :].tolist()


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["f32", "f16"])
def llama(request, checkpoint):
    """The checkpoint in llama.cpp, by the commands of docs/serving.md."""
    file = checkpoint.with_name(f"{request.param}.gguf")
    return LlamaServer(to_gguf(checkpoint, file, "--converter", CONVERTER, outtype=request.param))


@pytest.fixture(scope="module")
def exported_tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_llama_cpp_has_the_same_ids(llama, exported_tokenizer):
    front = exported_tokenizer.decode(exported_tokenizer("").input_ids)
    for text in TEXTS:
        assert llama.tokens(f"{front}{text}") == exported_tokenizer(text).input_ids


def test_llama_cpp_gives_the_adapters_greedy_text(llama, model, tokenizer, exported_tokenizer):
    virtual = exported_tokenizer("").input_ids
    front = exported_tokenizer.decode(virtual)
    for text in TEXTS:
        want = tokenizer.decode(greedy(model, tokenizer(text).input_ids), skip_special_tokens=True)
        assert llama.complete(front + text, NEW, virtual) == want, text


def test_llama_cpp_puts_the_prompt_in_front_of_a_chat(llama, model, tokenizer, exported_tokenizer):
    virtual = exported_tokenizer("").input_ids
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    want = tokenizer.decode(greedy(model, ids), skip_special_tokens=True)
    answer = llama.chat(CHAT, NEW, virtual)
    assert answer["usage"]["prompt_tokens"] == len(virtual) + len(ids)
    assert answer["choices"][0]["message"]["content"] == want


# ---- ONNX Runtime ---------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """What is exported: ids and mask in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.fixture(scope="module")
def onnx(checkpoint):
    import onnxruntime

    plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    example = torch.ones(2, 12, dtype=torch.long)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.onnx.export(
        Logits(plain).eval(),
        (example, torch.ones_like(example)),
        dynamo=True,
        dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
    )
    program.save(checkpoint.with_name("model.onnx"), external_data=True)
    return onnxruntime.InferenceSession(checkpoint.with_name("model.onnx"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_onnx_gives_the_adapters_logits(onnx, model, tokenizer, exported_tokenizer, side):
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
    longer = exported_tokenizer(TEXTS, return_tensors="np", padding=True, padding_side=side)
    got = onnx.run(["logits"], {name: longer[name].astype("int64") for name in ("input_ids", "attention_mask")})[0]
    words, real = len(tokenizer), inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs).logits
    # Each row's own tokens stand at its right end, before its right padding.
    tokens = torch.from_numpy(longer["attention_mask"]).bool()
    for row in range(len(TEXTS)):
        count = int(real[row].sum())
        logits = torch.from_numpy(got)[row][tokens[row]][-count:, :words]
        assert_close(logits, want[row][real[row]], atol=1e-3, rtol=1e-3)


def test_onnx_gives_the_adapters_greedy_tokens(onnx, model, tokenizer, exported_tokenizer):
    import numpy as np

    ids = exported_tokenizer(TEXTS[0]).input_ids
    virtual, start = exported_tokenizer("").input_ids, len(ids)
    for _ in range(NEW):
        row = np.array([ids], dtype=np.int64)
        logits = onnx.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0, -1]
        logits[virtual] = -np.inf
        ids.append(int(logits.argmax()))
    want = greedy(model, tokenizer(TEXTS[0]).input_ids)
    assert ids[start : start + len(want)] == want
