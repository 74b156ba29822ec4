"""Many adapters in one batch, in training: each gets the gradient of its own rows, as if it were alone.

Oracle: the formula of the paper on an untouched base, row by row, in float64.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from adapters import config, randomize
from device import DEVICE
from families import ALL, FAMILIES, build, ids, padded
from oracles import adapter_gradients, adapter_weights, embed
from peft_input_tuning.training import adapter_losses

LLAMA = FAMILIES["llama"]
EXACT = {torch.float64: {"atol": 1e-10, "rtol": 1e-8}, torch.float32: {"atol": 3e-5, "rtol": 1e-4}}
IN_FLOAT32 = ("gemma2", "bloom")  # their eager attention knows no mask in float64: masked rows are NaN in the base
ADAPTERS = {
    "a": {},
    "b": {"num_virtual_tokens": 7, "adapter_hidden_dim": 9, "adapter_activation": "gelu", "adapter_bias": True},
    "c": {"num_virtual_tokens": 0, "adapter_hidden_dim": 40, "adapter_activation": "tanh"},
    "d": {"adapter_hidden_dim": 0},
}
NAMES = ["b", "a", "d", "c", "a", "b", "a"]
LENGTHS = [7, 4, 9, 5, 8, 3, 6]


def many(family=LLAMA, adapters=ADAPTERS, base=None, **task):
    """A model with adapters of all kinds, in training, and its base, in float64."""
    (first, changes), *others = adapters.items()
    settings = {"task_type": family.task_type, **task}
    base = build(family) if base is None else base
    model = get_peft_model(base, config(**settings, **changes), adapter_name=first)
    for name, changes in others:
        model.add_adapter(name, config(**settings, **changes))
    for seed, name in enumerate(adapters):
        randomize(model, name, seed=seed)
    model.set_requires_grad(list(adapters))
    dtype = torch.float32 if family.name in IN_FLOAT32 else torch.float64
    return model.to(dtype).train(), build(family).to(dtype).requires_grad_(False)


def rows_of(lengths) -> list[Tensor]:
    return [ids(length, seed=20 + at) for at, length in enumerate(lengths)]


def activation(name: str) -> str:
    return ADAPTERS[name].get("adapter_activation", "relu")


def decoder_input(family, row: Tensor) -> dict[str, Tensor]:
    return {"decoder_input_ids": row[None, :3]} if family.kind == "seq2seq" else {}


def gradients_by_hand(family, base, model, names, rows) -> dict[str, dict[str, Tensor]]:
    """Of the mean over an adapter's rows of a loss of each row, one row at a time."""
    gradients = {}
    for name in dict.fromkeys(names):
        leaves = {key: value.requires_grad_() for key, value in adapter_weights(model, name).items()}
        own = [row for row, of in zip(rows, names, strict=True) if of == name]
        slots = len(leaves.get("prompt.weight", ()))
        total = 0
        for row in own:
            x = embed(base, leaves, row, activation(name))
            logits = base(inputs_embeds=x, **decoder_input(family, row)).logits[0]
            total = total + loss_of(logits if family.kind == "seq2seq" else logits[slots:]) / len(own)
        total.backward()
        gradients[name] = {key: leaf.grad for key, leaf in leaves.items()}
    return gradients


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().mean()


def backward_of_many(family, model, names, rows, side: str = "left") -> None:
    batch, mask = padded(rows, side)
    more = {}
    if family.kind == "seq2seq":
        more["decoder_input_ids"] = torch.stack([row[:3] for row in rows])
    elif family.name not in ("bloom", "roberta"):  # as they are alone: rotations are worked out in float32
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=batch, attention_mask=mask, adapter_names=names, **more).logits
    losses = {}
    for at, (name, row) in enumerate(zip(names, rows, strict=True)):
        own = logits[at]
        if family.kind != "seq2seq":
            own = own[-len(row) :] if side == "left" else own[: len(row)]
        losses.setdefault(name, []).append(loss_of(own))
    sum(torch.stack(own).mean() for own in losses.values()).backward()


def assert_gradients(model, want) -> None:
    for name, gradients in want.items():
        got = adapter_gradients(model, name)
        assert got.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert gradient.abs().max() > 1e-8, f"{name}, {key}: the case shows nothing"
            assert_close(
                got[key], gradient, **EXACT[gradient.dtype], msg=lambda text, at=f"{name}, {key}": f"{at}: {text}"
            )
    trained = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    assert all("input_tuning_" in key or "modules_to_save" in key for key in trained)


SIDES = [(family, side) for family in ALL for side in ("left", "right") if (family.name, side) != ("bart", "left")]


@pytest.mark.parametrize(("family", "side"), SIDES, ids=str)
def test_each_adapter_gets_the_gradient_of_its_own_rows(family, side):
    model, base = many(family)
    rows = rows_of(LENGTHS)
    backward_of_many(family, model, NAMES, rows, side)
    assert_gradients(model, gradients_by_hand(family, base, model, NAMES, rows))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", [LLAMA, FAMILIES["bart"]], ids=str)
def test_gradient_checkpointing(family, reentrant):
    """Layers run again in the backward pass, after the call has ended."""
    base = build(family)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model, base = many(family, base=base)
    rows = rows_of(LENGTHS)
    backward_of_many(family, model, NAMES, rows, "right")
    assert_gradients(model, gradients_by_hand(family, base, model, NAMES, rows))


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["gpt2"]], ids=str)
def test_packed_rows(family):
    """Each row has sequences of one adapter, with its prompt before each of them."""
    model, base = many(family)
    names, lengths = ["b", "a", "c"], [(3, 5), (6, 2), (2, 2, 4)]
    sequences = [[ids(n, seed=40 + 7 * row + at) for at, n in enumerate(own)] for row, own in enumerate(lengths)]
    batch = torch.stack([torch.cat(own) for own in sequences])
    positions = torch.stack([torch.cat([torch.arange(n) for n in own]) for own in lengths]).to(DEVICE)
    logits = model(input_ids=batch, position_ids=positions, use_cache=False, adapter_names=names).logits
    parts = [own.split(sizes) for own, sizes in zip(logits, lengths, strict=True)]
    sum(torch.stack([loss_of(part) for part in own]).mean() for own in parts).backward()
    flat = [(name, row) for name, own in zip(names, sequences, strict=True) for row in own]
    assert_gradients(model, gradients_by_hand(family, base, model, *map(list, zip(*flat, strict=True))))


def test_each_adapter_drops_out_in_its_own_rows():
    """By hand with the units that were dropped: each adapter has its own rate, and one has none."""
    rates = {"a": 0.5, "b": 0.2, "c": 0.0}
    model, base = many(adapters={name: {"num_virtual_tokens": 0, "adapter_dropout": p} for name, p in rates.items()})
    kept = {}
    for name, dropout in model.base_model.layer.input_tuning_dropout.items():
        dropout.register_forward_hook(lambda _, args, out, name=name: kept.update({name: (out != 0) | (args[0] == 0)}))
    names, rows = ["b", "a", "c", "a"], rows_of([5, 5, 5, 5])
    logits = model(input_ids=torch.stack(rows), adapter_names=names).logits
    adapter_mean_losses(logits, names).backward()
    for name, rate in rates.items():
        leaves = {key: value.requires_grad_() for key, value in adapter_weights(model, name).items()}
        own = torch.stack([row for row, of in zip(rows, names, strict=True) if of == name])
        e = base.get_input_embeddings()(own)
        hidden = (e @ leaves["fc1.weight"].T).relu() * kept[name].view(*own.shape, -1) / (1 - rate)
        loss_of(base(inputs_embeds=e + hidden @ leaves["fc2.weight"].T).logits).backward()
        assert bool(kept[name].all()) == (rate == 0)
        assert_gradients(model, {name: {key: leaf.grad for key, leaf in leaves.items()}})


def adapter_mean_losses(logits: Tensor, names: list[str]) -> Tensor:
    return sum(loss_of(logits[[at for at, of in enumerate(names) if of == name]]) for name in dict.fromkeys(names))


def test_an_adapter_for_the_input_only_beside_one_for_all():
    model, base = many(adapters={"a": {"adapter_scope": "input"}, "b": {}})
    names, rows, given = ["a", "b", "a"], rows_of([8, 8, 8]), [3, 5, 6]
    labels = torch.stack(rows).clone()
    for row, length in zip(labels, given, strict=True):
        row[:length] = -100
    logits = model(input_ids=torch.stack(rows), labels=labels, adapter_names=names).logits
    adapter_mean_losses(logits, names).backward()
    want = {}
    for name in "ab":
        leaves = {key: value.requires_grad_() for key, value in adapter_weights(model, name).items()}
        own = [(row, n if name == "a" else None) for row, n, of in zip(rows, given, names, strict=True) if of == name]
        x = torch.cat([embed(base, leaves, row, input_length=n) for row, n in own])
        loss_of(base(inputs_embeds=x).logits[:, 4:]).backward()
        want[name] = {key: leaf.grad for key, leaf in leaves.items()}
    assert_gradients(model, want)


def test_each_adapter_trains_its_own_head():
    """A classifier's head is a copy for each adapter (`modules_to_save`)."""
    base = build(LLAMA, "seq_cls")
    model, _ = many(base=base, adapters={"a": {}, "b": {"num_virtual_tokens": 2}}, task_type="SEQ_CLS")
    names, rows = ["a", "b", "b"], rows_of([6, 4, 9])
    heads = model.get_base_model().score.modules_to_save
    for seed, name in enumerate("ab"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            nn.init.normal_(heads[name].weight)
    batch, mask = padded(rows, "right")
    adapter_mean_losses(model(input_ids=batch, attention_mask=mask, adapter_names=names).logits, names).backward()
    body = build(LLAMA, "seq_cls").double().requires_grad_(False)
    for name in "ab":
        leaves = {key: value.requires_grad_() for key, value in adapter_weights(model, name).items()}
        head = heads[name].weight.detach().clone().requires_grad_()
        own = [row for row, of in zip(rows, names, strict=True) if of == name]
        states = [body.model(inputs_embeds=embed(body, leaves, row)).last_hidden_state[0, -1] for row in own]
        loss_of(torch.stack(states) @ head.T).backward()
        assert_gradients(model, {name: {key: leaf.grad for key, leaf in leaves.items()}})
        assert_close(heads[name].weight.grad, head.grad, **EXACT[torch.float64])


@pytest.mark.parametrize("reentrant", [False, True])
def test_modules_inside_of_checkpointed_layers_are_refused(reentrant):
    """They run again in the backward pass, where nothing tells whose rows these are."""
    model, _ = many(adapters={"a": {}, "b": {}}, modules_to_save=["down_proj"])
    names, rows = ["a", "b"], ids(2, 5)
    model(input_ids=rows, adapter_names=names)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ValueError, match=r"`modules_to_save` has `.*down_proj`, in a layer that gradient"):
        model(input_ids=rows, adapter_names=names)
    model.eval()
    model(input_ids=rows, adapter_names=names)


def test_a_frozen_neighbour_gets_no_gradient_and_changes_none():
    model, base = many()
    model.set_requires_grad(["b"], requires_grad=False)
    rows = rows_of(LENGTHS)
    backward_of_many(LLAMA, model, NAMES, rows)
    frozen = [p for key, p in model.named_parameters() if ".b." in key]
    assert frozen
    assert all(parameter.grad is None for parameter in frozen)
    want = gradients_by_hand(LLAMA, base, model, NAMES, rows)
    assert_gradients(model, {name: want[name] for name in "acd"})


def test_an_adapter_without_rows_gets_no_gradient():
    """None and not zero, or Adam's moments would go on without it."""
    model, _ = many()
    backward_of_many(LLAMA, model, ["a", "a"], rows_of([4, 6]))
    assert all((p.grad is None) == (".a." not in key) for key, p in model.named_parameters() if p.requires_grad)


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_each_adapter(shift, smoothing):
    logits = torch.randn(5, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = ids(5, 6).cpu() % 9
    labels[0, :4] = labels[2, 3:] = -100
    names = ["x", "y", "x", "z", "y"]
    labels[3] = -100
    got = adapter_losses(logits, labels, names, shift_labels=shift, label_smoothing=smoothing)
    assert list(got) == ["x", "y", "z"]
    assert got["z"] == 0
    for name in "xy":
        total, count = 0, 0
        for row, own in enumerate(names):
            for place in range(6 - shift):
                label = int(labels[row, place + shift])
                if own == name and label != -100:
                    logps = logits[row, place].log_softmax(-1)
                    total, count = total - (1 - smoothing) * logps[label] - smoothing * logps.mean(), count + 1
        assert_close(got[name], total / count, atol=1e-12, rtol=1e-12)


def test_the_loss_of_a_classifier():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    got = adapter_losses(logits, labels, ["x", "y", "y", "y"], shift_labels=False)
    assert_close(got["x"], cross_entropy(logits[:1], labels[:1]))
    assert_close(got["y"], cross_entropy(logits[1:], labels[1:]))


@pytest.mark.parametrize(
    ("logits", "labels", "names", "says"),
    [
        (
            (2, 5, 7),
            torch.zeros(2, 4, dtype=torch.long),
            ["a", "a"],
            r"`labels` are torch.int64 of the shape \(2, 4\)",
        ),
        ((2, 7), torch.zeros(2), ["a", "a"], "pass the number of a class"),
        ((2, 7), torch.zeros(2, dtype=torch.long), ["a"], "`adapter_names` has 1 names for a batch of 2 rows"),
    ],
)
def test_a_loss_that_cannot_be(logits, labels, names, says):
    with pytest.raises(ValueError, match=says):
        adapter_losses(torch.zeros(logits), labels, names, shift_labels=False)
