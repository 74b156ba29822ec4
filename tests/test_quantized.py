"""Bases with quantized weights: input-tuning on them is the formula on the same quantized base, worked out by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import quantized_bases
from adapters import config, randomize
from families import FAMILIES, ids
from oracles import adapter_gradients, adapter_weights, greedy, transform
from peft_input_tuning import export_model, reuse_prompts
from peft_input_tuning.layer import named_layer
from quantized_bases import BASES, numbers, write_plain
from tokenizers_of_families import tokenizer_of

pytestmark = pytest.mark.slow
LLAMA = FAMILIES["llama"]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
each_base = pytest.mark.parametrize(
    "load",
    [
        pytest.param(
            load,
            marks=pytest.mark.trains_with(
                "Quantized bases", f"{name}: logits, gradients, generation by hand; base untouched; saved = loaded"
            ),
            id=name,
        )
        for name, load in BASES.items()
    ],
)
KBIT = ("bitsandbytes, 4-bit NF4", "bitsandbytes, 8-bit", "torchao, int8 weights", "optimum-quanto, int8 weights")
KBIT += ("HQQ, 4-bit, by HQQ's own loader",)
each_kbit = pytest.mark.parametrize("load", [BASES[name] for name in KBIT], ids=KBIT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write_plain(folder)
    return folder


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cast.* during quantization")
        yield


def adapted(base: nn.Module, **changes) -> PeftModel:
    model = get_peft_model(base, config(LLAMA, **changes)).eval()
    randomize(model)
    return model


def reference(base: nn.Module) -> nn.Module:
    """A base that keeps its weights as they are: bitsandbytes packs those of 4 bits at inference on some CPUs."""
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False
    return base


def by_hand(base: nn.Module, weights: dict[str, Tensor], batch: Tensor, x: Tensor | None = None) -> Tensor:
    """`(batch, length)` ids → logits of [prompt ; x] without the prompt's places; x is T(e), in the dtype of e."""
    x = transform(weights, base.get_input_embeddings()(batch)) if x is None else x
    prompt = weights["prompt.weight"].to(x.dtype).expand(len(batch), -1, -1)
    return base(inputs_embeds=torch.cat([prompt, x], dim=1)).logits[:, prompt.shape[1] :]


def loss_of(logits: Tensor) -> Tensor:
    return logits.float().square().mean()


def gradients_by_hand(base: nn.Module, weights: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loss_of(by_hand(base, leaves, batch)).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert want[name].any()
        assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@each_base
def test_base_is_quantized(load, folder):
    """Otherwise the rest shows nothing: the logits are not those of the plain weights."""
    batch = ids(2, 7)
    with torch.no_grad():
        got, plain = load(folder)(input_ids=batch).logits, quantized_bases._plain(folder)(input_ids=batch).logits
    assert 1e-3 < (got - plain).abs().mean() / plain.abs().mean() < 0.5


@each_base
def test_logits_are_those_of_the_formula(load, folder):
    model, base, batch = adapted(load(folder)), reference(load(folder)), ids(2, 7)
    with torch.no_grad():
        assert_close(model(input_ids=batch).logits, by_hand(base, adapter_weights(model), batch), **CLOSE)


@each_base
def test_gradients_are_those_of_the_formula(load, folder):
    model, base, batch = adapted(load(folder)).train(), load(folder).train(), ids(2, 7)
    loss_of(model(input_ids=batch).logits).backward()
    same(adapter_gradients(model), gradients_by_hand(base, adapter_weights(model), batch), atol=1e-5, rtol=1e-3)


@each_base
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(load, folder):
    model = adapted(load(folder)).train()
    batch, before = ids(4, 7), numbers(model.get_base_model())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    after = numbers(model.get_base_model())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(not tensor.is_floating_point() for tensor in before.values()) or load is quantized_bases.gguf_file


@each_base
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low_cpu_mem_usage"])
def test_saved_is_loaded(load, low_memory, folder, tmp_path):
    model, batch = adapted(load(folder)), ids(2, 7)
    with torch.no_grad():
        want = model(input_ids=batch).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 3
    assert all("input_tuning_" in name for name in saved)
    loaded = PeftModel.from_pretrained(load(folder), tmp_path, low_cpu_mem_usage=low_memory).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=batch).logits, want)


@each_base
def test_generation_is_greedy_search_by_hand(load, folder):
    """Twice, since the second call finds the prompt's keys and values; then with another prompt."""
    model, base, row = adapted(load(folder)), reference(load(folder)), ids(7)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for seed in (1, 2):
        randomize(model, seed=seed)
        want = greedy(base, adapter_weights(model), row, 5)
        with reuse_prompts(model):
            for _ in range(2):
                assert torch.equal(model.generate(input_ids=row[None], **settings)[0, 7:], want)
                assert named_layer(model)[1].prompt_states


# ---- prepare_model_for_kbit_training --------------------------------------------------------------------------------


@pytest.mark.trains_with(
    "Quantized bases", "prepare_model_for_kbit_training, gradient checkpointing of both kinds: the same gradients"
)
@each_kbit
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
def test_prepared_for_kbit_training(load, reentrant, folder):
    checkpoints = {"use_gradient_checkpointing": reentrant is not None}
    checkpoints["gradient_checkpointing_kwargs"] = {"use_reentrant": bool(reentrant)}
    prepared = prepare_model_for_kbit_training(load(folder), **checkpoints)
    known_to_peft = load is not quantized_bases.quanto_int8
    assert prepared.is_gradient_checkpointing == (reentrant is not None and known_to_peft)
    model, base, batch = adapted(prepared).train(), load(folder).train(), ids(2, 7)
    loss_of(model(input_ids=batch).logits).backward()
    same(adapter_gradients(model), gradients_by_hand(base, adapter_weights(model), batch), atol=1e-5, rtol=1e-3)


@pytest.mark.trains_with("Quantized bases", "prepare_model_for_kbit_training casts a bfloat16 base's embeddings")
@pytest.mark.parametrize("load", [BASES[name] for name in KBIT[:2]], ids=KBIT[:2])
def test_prepared_from_bfloat16(load, folder):
    """Embeddings, norms and the head are float32 afterwards; layers compute in bfloat16 or in what they are given."""
    base, prepared = (prepare_model_for_kbit_training(load(folder, torch.bfloat16), False) for _ in range(2))
    assert prepared.get_input_embeddings().weight.dtype == torch.float32
    model, batch = adapted(prepared).train(), ids(2, 7)
    weights = adapter_weights(model)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    logits = model(input_ids=batch).logits
    assert_close(logits, by_hand(base.train(), weights, batch), **CLOSE)
    loss_of(logits).backward()
    same(adapter_gradients(model), gradients_by_hand(base, weights, batch), atol=1e-4, rtol=1e-2)


@pytest.mark.trains_with("Quantized bases", "bfloat16 base, adapter in float32 (autocast_adapter_dtype) or bfloat16")
@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "bfloat16 adapter"])
@each_kbit
def test_bfloat16_compute(load, autocast, folder):
    model, base = load(folder, torch.bfloat16), load(folder, torch.bfloat16).train()
    model = get_peft_model(model, config(LLAMA), autocast_adapter_dtype=autocast).train()
    randomize(model)
    weights, batch = adapter_weights(model), ids(2, 7)
    assert {value.dtype for value in weights.values()} == {torch.float32 if autocast else torch.bfloat16}
    out = model(input_ids=batch).logits
    assert out.dtype == torch.bfloat16
    loss_of(out).backward()
    assert all(grad.isfinite().all() and grad.any() for grad in adapter_gradients(model).values())
    if autocast:
        x, exact = model.base_model.layer(batch), transform(weights, base.get_input_embeddings()(batch).float())
        assert (x - exact).norm() <= 1e-2 * exact.norm()
        assert torch.equal(out, by_hand(base, weights, batch, x))


# ---- trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.trains_with("Quantized bases", "transformers Trainer: the steps of a loop by hand")
@pytest.mark.parametrize("load", [BASES[name] for name in KBIT[:4]], ids=KBIT[:4])
def test_trainer(load, folder, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in ids(8, 7)]
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
    trainer = Trainer(adapted(load(folder)), TrainingArguments(str(tmp_path), **settings), train_dataset=data)
    trainer.train()
    got = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    model = adapted(load(folder)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    want = []
    for rows in ids(8, 7).split(2):
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        want.append(float(loss))
    assert got == pytest.approx(want, rel=1e-3)
    for name, value in adapter_weights(trainer.model).items():
        assert_close(value, adapter_weights(model)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.trains_with(
    "Quantized bases", "TRL's SFTTrainer on bitsandbytes, 4-bit: it casts the adapter to bfloat16"
)
def test_sft_trainer(folder, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL 1.15 and newer need Python 3.11")
    data = Dataset.from_list([{"input_ids": row.tolist()} for row in ids(8, 7)])
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    trainer = trl.SFTTrainer(
        model=quantized_bases.bitsandbytes_4bit(folder),
        args=trl.SFTConfig(str(tmp_path), **settings),
        train_dataset=data,
        processing_class=tokenizer_of(LLAMA),
        peft_config=config(LLAMA),
    )
    randomize(trainer.model)
    weights = adapter_weights(trainer.model)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    batch = next(iter(trainer.get_train_dataloader()))
    weights = {name: value.float() for name, value in weights.items()}
    logits = by_hand(quantized_bases.bitsandbytes_4bit(folder).train(), weights, batch["input_ids"])
    want = cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    trainer.model.train()
    assert float(trainer.compute_loss(trainer.model, dict(batch))) == pytest.approx(float(want), rel=1e-2)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]


# ---- CPUs with bfloat16 instructions, where bitsandbytes packs 4-bit weights at inference --------------------------
# Packed weights pass no gradients on, and unpacked again by `state_dict()` they are others. Elsewhere none is packed.

GOES_ON = "bitsandbytes, 4-bit: training goes on after an evaluation, and after saving; the base stays as it was"


def packs() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


@pytest.mark.trains_with("Quantized bases", GOES_ON)
def test_training_goes_on_after_an_evaluation(folder, tmp_path):
    base, batch = quantized_bases.bitsandbytes_4bit(folder), ids(2, 7)
    before = numbers(base)
    model = adapted(base)
    model.generate(input_ids=batch, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    loss_of(model.train()(input_ids=batch).logits).backward()
    other = quantized_bases.bitsandbytes_4bit(folder).train()
    same(adapter_gradients(model), gradients_by_hand(other, adapter_weights(model), batch), atol=1e-5, rtol=1e-3)
    after = numbers(model.get_base_model())
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.trains_with("Quantized bases", GOES_ON)
def test_a_base_that_was_used_for_inference(folder):
    """Refused where its weights are packed; elsewhere it trains as a new one does."""
    base, batch = quantized_bases.bitsandbytes_4bit(folder), ids(2, 7)
    with torch.no_grad():
        base(input_ids=batch)
    if packs():
        with pytest.raises(ValueError, match=r"has been used for inference.*Load the base model again"):
            get_peft_model(base, config(LLAMA))
        return
    model, other = adapted(base).train(), quantized_bases.bitsandbytes_4bit(folder).train()
    loss_of(model(input_ids=batch).logits).backward()
    same(adapter_gradients(model), gradients_by_hand(other, adapter_weights(model), batch), atol=1e-5, rtol=1e-3)


@pytest.mark.trains_with("Quantized bases", GOES_ON)
def test_an_adapter_is_loaded_beside_one_in_use(folder, tmp_path):
    adapted(quantized_bases.bitsandbytes_4bit(folder)).save_pretrained(tmp_path)
    model, batch = PeftModel.from_pretrained(quantized_bases.bitsandbytes_4bit(folder), tmp_path).eval(), ids(2, 7)
    with torch.no_grad():
        want = model(input_ids=batch).logits
        model.load_adapter(tmp_path, "other")
        assert torch.equal(model(input_ids=batch).logits, want)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.trains_with("Quantized bases", "bitsandbytes' quantized embeddings are refused: they cannot be saved")
@pytest.mark.parametrize("kind", ["Embedding4bit", "Embedding8bit"])
def test_an_embedding_that_cannot_be_saved_is_refused(kind, folder):
    quantized_bases._needs("bitsandbytes")
    import bitsandbytes as bnb

    model = quantized_bases._plain(folder)
    plain = model.get_input_embeddings()
    embedding = getattr(bnb.nn, kind)(plain.num_embeddings, plain.embedding_dim, dtype=torch.float32)
    embedding.load_state_dict(plain.state_dict())
    model.set_input_embeddings(embedding.to("cpu"))
    assert not embedding.weight.is_floating_point()
    with pytest.raises(ValueError, match=rf"word embedding of `model` is a {kind}.*Leave the embedding"):
        get_peft_model(model, config(LLAMA))
    assert model.get_input_embeddings() is embedding


@pytest.mark.trains_with("Quantized bases", "export_model refuses a quantized base")
@pytest.mark.parametrize("load", [load for load in BASES.values() if load is not quantized_bases.gguf_file])
def test_export_is_refused(load, folder, tmp_path):
    with pytest.raises(ValueError, match=r"`model` is quantized.*export that, and quantize the result"):
        export_model(adapted(load(folder)), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_export_of_dequantized_weights(folder, tmp_path):
    report = export_model(adapted(quantized_bases.gguf_file(folder)), tmp_path / "exported")
    assert report.largest_difference < 1e-4


@pytest.mark.trains_with("Quantized bases", "merging an adapter without virtual tokens into a plain embedding")
@each_kbit
def test_merging_into_a_plain_embedding(load, folder):
    model, batch = adapted(load(folder), num_virtual_tokens=0), ids(2, 7)
    with torch.no_grad():
        want = model(input_ids=batch).logits
        assert_close(model.merge_and_unload()(input_ids=batch).logits, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("load", [quantized_bases.torchao_int8_embedding, quantized_bases.gguf_embedding])
def test_merging_into_a_quantized_embedding_is_refused(load, folder):
    model = adapted(load(folder), num_virtual_tokens=0)
    with pytest.raises(ValueError, match="embedding is quantized"):
        model.merge_adapter()
