"""Adapters live where the embedding lives, and follow it."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from peft import PeftModel, get_peft_model
from torch.ao.quantization import quantize_dynamic
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import adapted, config, randomize
from device import DEVICE
from families import ALL, FAMILIES, PAD, build, ids, padded
from oracles import adapter_gradients, adapter_weights, embed, greedy, row_output

llama = FAMILIES["llama"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
PROCESSES = "accelerate and processes"
each_family = pytest.mark.parametrize("family", ALL, ids=str)


def adapter_devices(model) -> set[str]:
    return {p.device.type for name, p in model.named_parameters() if "input_tuning_" in name}


@each_family
def test_follows_the_model_to_a_device_and_a_dtype(family):
    model, base, weights = adapted(family)
    rows = [ids(7), ids(4, seed=1)]
    batch, mask = padded(rows, "right")
    more = {"decoder_input_ids": ids(2, 5, seed=9)} if family.kind == "seq2seq" else {}
    on_device = {"input_ids": batch, "attention_mask": mask, **more}
    model.cpu()
    assert adapter_devices(model) == {"cpu"}
    model.to(DEVICE)
    assert adapter_devices(model) == {DEVICE.type}
    out = model(**on_device).logits
    for i, row in enumerate(rows):
        own = {k: v[i : i + 1] for k, v in more.items()}
        got = out[i] if family.kind == "seq2seq" else out[i][mask[i] == 1]
        assert_close(got, row_output(base, weights, row, **own), atol=1e-3, rtol=1e-3)
    model.to(torch.bfloat16)
    assert torch.isfinite(model(**on_device).logits).all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_is_made_where_the_embedding_is():
    model = get_peft_model(build(llama), config(llama))
    assert adapter_devices(model) == {DEVICE.type}
    assert model(input_ids=ids(1, 5)).logits.device.type == DEVICE.type


KERNELS = {
    "sdpa": None,
    "sdpa's flash kernel": SDPBackend.FLASH_ATTENTION,
    "sdpa's efficient kernel": SDPBackend.EFFICIENT_ATTENTION,
    "flash_attention_2": None,
}


@pytest.mark.parametrize("kernel", KERNELS)
@each_family
def test_bf16_with_each_kernel_of_attention(family, kernel):
    """An adapter runs on a kernel where the base alone runs on it, with as many embeddings."""
    model, base, weights = adapted(family)
    more = {"decoder_input_ids": ids(1, 5, seed=9)} if family.kind == "seq2seq" else {}
    want = row_output(base, weights, ids(7), **more)
    x = embed(base, weights, ids(7)).bfloat16()
    model.bfloat16()
    base.bfloat16()
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn")
        model.get_base_model().set_attn_implementation(kernel)
    with torch.no_grad(), sdpa_kernel(KERNELS[kernel]) if KERNELS[kernel] else nullcontext():
        try:
            base(inputs_embeds=x, **more)
        except RuntimeError as error:
            if not re.search("No available kernel|No viable backend", str(error)):  # of CUDA, of the CPU
                raise
            pytest.skip(f"{kernel} does not run {family} on {DEVICE.type}, with or without an adapter")
        out = model(input_ids=ids(1, 7), **more).logits
    assert ((out[0].float() - want).abs().mean() / want.abs().mean()) < 0.1


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=DEVICE),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=DEVICE),
    "layers on disk": lambda model, folder: dispatch_model(
        model,
        {
            **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), DEVICE),
            "model.layers": "disk",
        },
        main_device=DEVICE,
        offload_dir=folder,
    ),
}


@pytest.mark.trains_with(PROCESSES, "a base whose weights are offloaded: the same logits and generation")
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_base(offload, tmp_path):
    """The weights of the base are on "meta" between calls; the adapter is not, and starts from real embeddings."""
    base = build(llama)
    offloaded = offload(build(llama), str(tmp_path))
    model = get_peft_model(offloaded, config(llama, num_virtual_tokens=4)).eval()
    assert adapter_devices(model) == {DEVICE.type}
    table = base.model.embed_tokens.weight
    prompt = adapter_weights(model)["prompt.weight"]
    assert all((table == row).all(-1).any() for row in prompt)
    randomize(model)
    weights, row = adapter_weights(model), ids(7)
    assert_close(model(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)
    out = model.generate(input_ids=row[None], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=PAD)
    assert torch.equal(out[0, 7:], greedy(base, weights, row, 4))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "disable_compile": True}
    static = model.generate(input_ids=row[None], cache_implementation="static", pad_token_id=PAD, **options)
    assert torch.equal(static, out)


def gradients(model) -> dict[str, torch.Tensor]:
    batch = ids(2, 7).to(next(p.device for p in model.parameters() if p.requires_grad))
    model.train()(input_ids=batch, labels=batch).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 3
    return found


def trained(model, steps: int = 3) -> dict[str, torch.Tensor]:
    """The adapter after some steps, and the base's logits after that."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        gradients(model)
        optimizer.step()
    with torch.no_grad(), model.eval().disable_adapter():
        weights = adapter_weights(model)
        return {**weights, "base": model(input_ids=ids(2, 7).to(weights["prompt.weight"].device)).logits}


@pytest.mark.trains_with(PROCESSES, "a base whose weights are offloaded, CPU and disk: training is the same")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_training_on_an_offloaded_base(offload, checkpointing, tmp_path):
    model, *_ = adapted(llama)
    offloaded = get_peft_model(offload(build(llama), str(tmp_path)), config(llama))
    randomize(offloaded)
    if checkpointing:
        offloaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(p.is_meta for p in offloaded.parameters())
    got, want = gradients(offloaded), gradients(model)
    for name, grad in want.items():
        assert_close(got[name], grad, atol=1e-5, rtol=1e-4)
    got, want = trained(offloaded), trained(model)
    for name, value in want.items():
        assert_close(got[name], value, atol=1e-4, rtol=1e-3)


def dispatched(folder, way: str):
    """A saved base in big-model loading: nothing is in memory twice, and much of it on the disk."""
    offload = {"offload_folder": str(folder / "offload")}
    if way == "device_map":
        return AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": 45_000}, **offload)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return load_checkpoint_and_dispatch(
        model,
        str(folder / "model.safetensors"),
        device_map="auto",
        max_memory={"cpu": 45_000},
        no_split_module_classes=["LlamaDecoderLayer"],
        **offload,
    )


@pytest.mark.trains_with(
    PROCESSES, "big-model loading (device_map, load_checkpoint_and_dispatch): training is the same"
)
@pytest.mark.parametrize("way", ["device_map", "load_checkpoint_and_dispatch"])
def test_training_on_a_base_of_big_model_loading(way, tmp_path):
    model, *_ = adapted(llama)
    build(llama).save_pretrained(tmp_path)
    other = get_peft_model(dispatched(tmp_path, way), config(llama))
    randomize(other)
    assert "disk" in other.get_base_model().hf_device_map.values()
    got = trained(other)
    want = trained(model.to(got["base"].device))  # accelerate decides where a base runs that is partly on the disk
    for name, value in want.items():
        assert_close(got[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.trains_with(PROCESSES, "low_cpu_mem_usage: an adapter that is loaded without being made first")
def test_adapter_is_loaded_without_being_made_first(tmp_path):
    model, base, weights = adapted(llama)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(llama), tmp_path, low_cpu_mem_usage=True, is_trainable=True).eval()
    model.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    row = ids(7)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_close(model(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)
    gradients(model)


@pytest.mark.trains_with(PROCESSES, "an adapter is loaded on a dispatched base, partly on disk")
def test_adapter_is_loaded_on_a_base_with_a_device_map(tmp_path):
    model, base, weights = adapted(llama)
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": str(DEVICE)})
    row = ids(7)
    model = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert_close(model(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)


def partly_on_disk(folder):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map={**places, "model.layers": "disk"}, offload_folder=str(folder / "offload")
    )


@pytest.mark.trains_with(PROCESSES, "an adapter is loaded on a dispatched base, partly on disk")
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


@pytest.mark.trains_with(PROCESSES, "an adapter is loaded on a dispatched base, partly on disk")
def test_adapter_of_transformers_on_a_base_that_is_partly_on_disk(tmp_path):
    model, base, weights = adapted(llama)
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    row = ids(7)
    loaded = partly_on_disk(tmp_path)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_close(loaded(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)


@pytest.mark.trains_with(PROCESSES, "an adapter on a base without weights, which come later")
def test_adapter_on_a_base_without_weights(tmp_path):
    """A base on "meta" (big-model loading) takes an adapter; it is not used before its weights have come."""
    model, base, weights = adapted(llama)
    with torch.device("meta"):
        empty = type(base)(base.config)
    other = get_peft_model(empty, config(llama)).eval()
    assert adapter_devices(other) == {"meta"}
    other.to_empty(device=DEVICE)
    other.load_state_dict(model.state_dict())
    other.get_base_model().load_state_dict(model.get_base_model().state_dict())
    other.get_base_model().model.rotary_emb = model.get_base_model().model.rotary_emb
    row = ids(7)
    assert_close(other(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)


# ---- other ways to run a model: torch's dynamic quantization, DataParallel ------------------------------------------


@pytest.mark.not_emulated("quantized kernels are the CPU's")
@pytest.mark.parametrize("family", [llama, FAMILIES["t5"], FAMILIES["bart"]], ids=str)
def test_dynamic_quantization_of_linear_layers(family):
    """The base's layers are quantized, the adapter's are not: the formula over the quantized base."""
    model, base, weights = adapted(family)
    model, base = (quantize_dynamic(one.cpu(), {torch.nn.Linear}, dtype=torch.qint8).eval() for one in (model, base))
    row, more = ids(6).cpu(), {"decoder_input_ids": ids(1, 4, seed=9).cpu()} if family.kind == "seq2seq" else {}
    x = embed(base, {name: value.cpu() for name, value in weights.items()}, row)
    with torch.no_grad():
        found = model(input_ids=row[None], **more).logits
        if family.kind == "seq2seq":
            want = base(inputs_embeds=x, **more).logits
        else:  # the head quantizes what it is given, which are the tokens alone
            want = base.lm_head(base.model(inputs_embeds=x).last_hidden_state[:, 4:])
    assert_close(found, want, **TOLERANCE)


def replicas(model: torch.nn.Module, count: int, monkeypatch) -> list[torch.nn.Module]:
    """What DataParallel makes of a model for each of its devices, here all on one."""
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)

    def copied(tensors, devices, detach=False):
        return [[one.detach().clone() if detach else one.clone() for one in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copied)
    return module.replicate(model, list(range(count)))


@pytest.mark.parametrize("family", [llama, FAMILIES["t5"], FAMILIES["bert"]], ids=str)
def test_replicas_of_data_parallel(family, monkeypatch):
    model, base, weights = adapted(family)
    rows = [ids(6), ids(6, seed=1)]
    more = {"decoder_input_ids": ids(1, 4, seed=9)} if family.kind == "seq2seq" else {}
    found = parallel_apply_on_threads(
        [
            partial(one, input_ids=row[None], **more)
            for one, row in zip(replicas(model, 2, monkeypatch), rows, strict=True)
        ]
    )
    for row, output in zip(rows, found, strict=True):
        assert_close(output.logits[0], row_output(base, weights, row, **more), **TOLERANCE)
    sum(output.logits.square().mean() for output in found).backward()
    got = adapter_gradients(model)
    model.zero_grad()
    sum(model(input_ids=row[None], **more).logits.square().mean() for row in rows).backward()
    for name, gradient in adapter_gradients(model).items():
        assert_close(got[name], gradient, **TOLERANCE)


def test_replicas_of_data_parallel_refuse_the_names_of_the_whole_batch(monkeypatch):
    """DataParallel gives each replica its rows, and all names."""
    model, _, _ = adapted(llama)
    one, _ = replicas(model, 2, monkeypatch)
    with pytest.raises(ValueError, match="`adapter_names` has 4 names for a batch of 2 rows"):
        one(input_ids=ids(2, 6), adapter_names=["default", "default", "__base__", "__base__"])


def parallel_apply_on_threads(calls: list) -> list:
    """As DataParallel calls its replicas: each on a thread of its own, all at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [one.result() for one in [pool.submit(call) for call in calls]]
