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

from adapters import add, config, randomize
from device import DEVICE
from families import ALL, DECODERS, FAMILIES, PAD, build, ids, padded
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
            assert_close(got[key], gradient, **EXACT[gradient.dtype], msg=lambda text, at=f"{name}, {key}": f"{at}: {text}")
    base = [key for key, parameter in model.named_parameters() if "input_tuning_" not in key and parameter.grad is not None]
    assert not base


SIDES = [(family, side) for family in ALL for side in ("left", "right") if (family.name, side) != ("bart", "left")]


@pytest.mark.parametrize(("family", "side"), SIDES, ids=str)
def test_each_adapter_gets_the_gradient_of_its_own_rows(family, side):
    model, base = many(family)
    rows = rows_of(LENGTHS)
    backward_of_many(family, model, NAMES, rows, side)
    assert_gradients(model, gradients_by_hand(family, base, model, NAMES, rows))
