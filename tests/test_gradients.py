"""Training: gradients are those of the formula, whatever saves memory or precision on the way."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from adapters import adapted, config, randomize
from device import DEVICE
from families import ALL, DECODERS, FAMILIES, build, ids, padded
from oracles import adapter_gradients, adapter_weights, embed, greedy, row_output, transform

each_family = pytest.mark.parametrize("family", ALL, ids=str)
each_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)


def more_inputs(family):
    return {"decoder_input_ids": ids(2, 5, seed=9)} if family.kind == "seq2seq" else {}


def loss_of(logits):
    return logits.float().square().mean()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.feature("forward")
@each_family
def test_gradients_are_those_of_the_formula(family):
    model, base, weights = adapted(family)
    batch = ids(2, 7)
    more = more_inputs(family)
    loss_of(model(input_ids=batch, **more).logits).backward()
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    logits = []
    for i, row in enumerate(batch):
        own = {k: v[i : i + 1] for k, v in more.items()}
        out = base(inputs_embeds=embed(base, leaves, row), **own).logits
        logits.append(out if family.kind == "seq2seq" else out[:, 4:])
    loss_of(torch.cat(logits)).backward()
    got = adapter_gradients(model)
    assert set(got) == set(leaves)
    for name, leaf in leaves.items():
        assert_close(got[name], leaf.grad, atol=1e-4, rtol=2e-3)


@pytest.mark.trains_with("Memory", "gradient checkpointing, reentrant or not: the same gradients")
@pytest.mark.feature("gradient checkpointing")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@each_family
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model, _, _ = adapted(family)
    batch, mask = padded([ids(7), ids(4, seed=1)], "right")
    inputs = {"input_ids": batch, "attention_mask": mask, **more_inputs(family)}
    model.train()
    loss_of(model(**inputs).logits).backward()
    want = gradients(model)
    model.zero_grad(set_to_none=True)
    checkpointed = build(family)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    other = get_peft_model(checkpointed, config(family))
    randomize(other)
    other.train()
    loss_of(other(**inputs).logits).backward()
    got = gradients(other)
    assert set(got) == set(want)
    assert len(got) == 3
    for name, grad in want.items():
        assert_close(got[name], grad, atol=1e-4, rtol=2e-3)


@pytest.mark.trains_with("Memory", "bfloat16 base, adapter in float32")
@pytest.mark.feature("bf16")
@each_family
def test_bf16_base_with_float32_adapter(family):
    """PEFT keeps adapters in float32 over a bfloat16 base: weights and gradients are float32, products bfloat16."""
    model = get_peft_model(build(family).to(torch.bfloat16), config(family)).eval()
    randomize(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    base, weights = build(family).to(torch.bfloat16).requires_grad_(False), adapter_weights(model)
    batch, more = ids(2, 7), more_inputs(family)
    out = model(input_ids=batch, **more).logits
    assert out.dtype == torch.bfloat16
    encoder = base.get_encoder() if family.kind == "seq2seq" else base
    e = encoder.get_input_embeddings()(batch)
    x = model.base_model.layer(batch)
    exact = transform(weights, e.float())
    assert (x - exact).norm() <= 1e-2 * exact.norm()
    x = torch.cat([weights["prompt.weight"].to(torch.bfloat16).expand(2, -1, -1), x], 1)
    want = base(inputs_embeds=x, **more).logits
    assert torch.equal(out, want if family.kind == "seq2seq" else want[:, 4:])
    loss_of(out).backward()
    assert {grad.dtype for grad in gradients(model).values()} == {torch.float32}
    assert all(torch.isfinite(grad).all() and grad.abs().sum() > 0 for grad in gradients(model).values())


@pytest.mark.trains_with("Memory", "bfloat16 base and adapter")
@pytest.mark.feature("bf16")
@each_family
def test_bf16_adapter_without_autocast(family):
    model = get_peft_model(build(family).to(torch.bfloat16), config(family), autocast_adapter_dtype=False).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loss_of(model(input_ids=ids(2, 7), **more_inputs(family)).logits).backward()
    assert len(gradients(model)) == 3


@pytest.mark.feature("bf16")
@each_family
def test_torch_autocast(family):
    model, _, _ = adapted(family)
    batch, more = ids(2, 7), more_inputs(family)
    want = model(input_ids=batch, **more).logits
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = model(input_ids=batch, **more).logits
        loss = loss_of(out)
    loss.backward()
    assert len(gradients(model)) == 3
    scale = want.abs().max()
    assert ((out.float() - want).abs().mean() / scale) < 0.05


@each_family
def test_two_threads_call_one_model(family):
    """Nothing of a call is kept on the model: threads with other inputs, padding and adapters do not meet."""
    model, _, _ = adapted(family)
    calls = []
    for seed in range(4):
        batch, mask = padded([ids(5 + seed, seed=seed), ids(3, seed=seed + 9)], "left" if seed % 2 else "right")
        calls.append({"input_ids": batch, "attention_mask": mask, **more_inputs(family)})
        if family.kind == "seq2seq":
            calls[-1]["decoder_input_ids"] = ids(2, 3 + seed, seed=9)
    with torch.no_grad():
        want = [model(**call).logits for call in calls]
    wrong = []

    def work(call, logits):
        with torch.no_grad():
            for _ in range(8):
                if not torch.equal(model(**call).logits, logits):
                    wrong.append(call)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_threads_with_different_rows():
    from adapters import add

    model, base, weights = adapted(FAMILIES["llama"])
    second = add(model, "b", seed=2, num_virtual_tokens=6)
    model.eval()
    row = ids(7, seed=7)
    want = {"default": greedy(base, weights, row, 5), "b": greedy(base, second, row, 5)}
    wrong = []

    def work(names):
        for _ in range(4):
            out = model.generate(
                input_ids=row.repeat(len(names), 1),
                adapter_names=names,
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                pad_token_id=0,
            )
            wrong.extend(n for n, tokens in zip(names, out, strict=True) if not torch.equal(tokens[7:], want[n]))

    threads = [
        threading.Thread(target=work, args=(names,)) for names in (["default", "b"], ["b"], ["b", "b", "default"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@each_family
def test_a_copy_of_a_model_has_its_own_adapter(family):
    model, base, weights = adapted(family)
    twin = copy.deepcopy(model)
    randomize(model, seed=5)
    row, more = ids(7), {k: v[:1] for k, v in more_inputs(family).items()}
    want = row_output(base, weights, row, **more)
    assert_close(twin(input_ids=row[None], **more).logits[0], want, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(model(input_ids=row[None], **more).logits[0], want, atol=1e-2)
