"""Adapters live where the embedding lives, and follow it."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from adapters import adapted, config, randomize
from families import ALL, FAMILIES, PAD, build, ids, padded
from oracles import adapter_weights, greedy, row_output

llama = FAMILIES["llama"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
each_family = pytest.mark.parametrize("family", ALL, ids=str)


def adapter_devices(model) -> set[str]:
    return {p.device.type for name, p in model.named_parameters() if "input_tuning_" in name}


@each_family
def test_follows_the_model_to_a_device_and_a_dtype(family, device):
    model, base, weights = adapted(family)
    rows = [ids(7), ids(4, seed=1)]
    batch, mask = padded(rows, "right")
    more = {"decoder_input_ids": ids(2, 5, seed=9)} if family.kind == "seq2seq" else {}
    model.to(device)
    assert adapter_devices(model) == {device.type}
    on_device = {k: v.to(device) for k, v in {"input_ids": batch, "attention_mask": mask, **more}.items()}
    out = model(**on_device).logits.cpu()
    for i, row in enumerate(rows):
        own = {k: v[i : i + 1] for k, v in more.items()}
        got = out[i] if family.kind == "seq2seq" else out[i][mask[i] == 1]
        assert_close(got, row_output(base, weights, row, **own), atol=1e-3, rtol=1e-3)
    model.to(torch.bfloat16)
    assert torch.isfinite(model(**on_device).logits).all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_is_made_where_the_embedding_is(device):
    model = get_peft_model(build(llama).to(device), config(llama))
    assert adapter_devices(model) == {device.type}
    assert model(input_ids=ids(1, 5).to(device)).logits.device.type == device.type


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@each_family
def test_bf16_on_a_gpu(family, attention):
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    model, base, weights = adapted(family)
    model.to("cuda", torch.bfloat16)
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
        model.get_base_model().set_attn_implementation(attention)
    more = {"decoder_input_ids": ids(1, 5, seed=9)} if family.kind == "seq2seq" else {}
    out = model(input_ids=ids(1, 7).cuda(), **{k: v.cuda() for k, v in more.items()}).logits
    want = row_output(base, weights, ids(7), **more)
    assert ((out[0].float().cpu() - want).abs().mean() / want.abs().mean()) < 0.1


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu")),
    "layers on disk": lambda model, folder: dispatch_model(
        model,
        {
            "model.embed_tokens": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
            "model.layers": "disk",
        },
        main_device="cpu",
        offload_dir=folder,
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_base(offload, tmp_path):
    """The weights of the base are on "meta" between calls; the adapter is not, and starts from real embeddings."""
    base = build(llama)
    offloaded = offload(build(llama), str(tmp_path))
    model = get_peft_model(offloaded, config(llama, num_virtual_tokens=4)).eval()
    assert adapter_devices(model) == {"cpu"}
    table = base.model.embed_tokens.weight
    prompt = adapter_weights(model)["prompt.weight"]
    assert all((table == row).all(-1).any() for row in prompt)
    randomize(model)
    weights, row = adapter_weights(model), ids(7)
    assert_close(model(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)
    out = model.generate(input_ids=row[None], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=PAD)
    assert torch.equal(out[0, 7:], greedy(base, weights, row, 4))


def test_adapter_is_loaded_on_a_base_with_a_device_map(tmp_path):
    model, base, weights = adapted(llama)
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    row = ids(7)
    model = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert_close(model(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)


def partly_on_disk(folder):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map={**places, "model.layers": "disk"}, offload_folder=str(folder / "offload")
    )


@pytest.mark.parametrize("memory", [45_000, 80_000], ids=["adapter on disk too", "adapter in memory"])
def test_adapter_is_loaded_on_a_base_that_is_partly_on_disk(memory, tmp_path, monkeypatch):
    """PEFT takes accelerate's hooks off, loads, and dispatches the model again within `max_memory` bytes."""
    monkeypatch.chdir(tmp_path)  # PEFT writes what it offloads under a path relative to the working directory
    model, base, weights = adapted(llama)
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    row = ids(7)
    model = PeftModel.from_pretrained(
        partly_on_disk(tmp_path),
        tmp_path / "adapter",
        offload_folder=str(tmp_path / "offload"),
        max_memory={"cpu": memory},
    )
    assert ("disk" in {place for part, place in model.hf_device_map.items() if "input_tuning" in part}) == (
        memory < 60_000
    )
    assert_close(model(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)


def test_adapter_of_transformers_on_a_base_that_is_partly_on_disk(tmp_path):
    model, base, weights = adapted(llama)
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    row = ids(7)
    loaded = partly_on_disk(tmp_path)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_close(loaded(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)


def test_adapter_on_a_base_without_weights(tmp_path):
    """A base on "meta" (big-model loading) takes an adapter; it is not used before its weights have come."""
    model, base, weights = adapted(llama)
    with torch.device("meta"):
        empty = type(base)(base.config)
    other = get_peft_model(empty, config(llama)).eval()
    assert adapter_devices(other) == {"meta"}
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    other.get_base_model().load_state_dict(model.get_base_model().state_dict())
    other.get_base_model().model.rotary_emb = model.get_base_model().model.rotary_emb
    row = ids(7)
    assert_close(other(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)
