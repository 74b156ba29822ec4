"""Input-adapters of a mixed batch, each for its rows: side by side in `generate`, one after another elsewhere."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from adapters import adapted, add
from device import DEVICE
from families import FAMILIES, PAD, ids
from oracles import adapter_weights, transform
from peft_input_tuning.call_state import RowAdapters, use_row_adapters

LLAMA = FAMILIES["llama"]
BASE = "__base__"
CLOSE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}
BATCHES = {
    "two rows each, in order": ["a", "a", "b", "b", "c", "c"],
    "mixed up": ["b", "c", "a", "a", "c", "b"],
    "with rows of the base": ["b", BASE, "a", "c", BASE],
    "unequal numbers of rows": ["c", "a", "b", "a", "c", "c"],
    "unequal, with the base": ["c", BASE, "a", "b", "a", "c", "c"],
    "mostly one": ["a"] * 9 + ["b", "c", BASE],
    "one alone": ["b", "b"],
    "one and the base": ["b", BASE],
    "the base alone": [BASE, BASE],
}


class Products(TorchDispatchMode):
    """All operations; the products of matrices among them, and for how many rows of embeddings in all."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.names: list[str] = []
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        out = func(*args, **(kwargs or {}))
        self.operations.append(name)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.names.append(name)
            self.rows += out.shape[:-1].numel()
        return out


def layer_with(dtype: torch.dtype = torch.float32, others: dict[str, dict] | None = None, **changes):
    """The wrapped embedding of a model with adapters "a", "b" and "c", and each one's weights for the oracle."""
    model, *_ = adapted(LLAMA, **changes)
    add(model, "a", seed=2, **changes)
    add(model, "b", seed=3, **changes)
    add(model, "c", seed=4, **{**changes, **(others or {}).get("c", {})})
    model.eval()
    layer = model.base_model.layer
    layer.base_layer.to(dtype)
    return layer, {name: adapter_weights(model, name) for name in "abc"}


def run(layer, names: list[str], rows: Tensor, in_generate: bool = True, is_output=None) -> tuple[Tensor, Products]:
    call = RowAdapters(tuple(names), tuple(layer.prompt_length(name) for name in names), in_generate)
    with use_row_adapters(layer, call), Products() as products:
        out = layer(rows, is_output=is_output)
    return out, products


def assert_rows(layer, weights: dict, names: list[str], rows: Tensor, out: Tensor, **activations: str) -> None:
    base = layer.base_layer(rows)
    for row, name in enumerate(names):
        if "fc1.weight" in weights.get(name, {}):
            want = transform(weights[name], base[row], activations.get(name, "relu"))
            assert_close(out[row], want, **CLOSE[base.dtype])
        else:
            assert torch.equal(out[row], base[row])


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("in_generate", [True, False], ids=["generate", "forward"])
@torch.no_grad()
def test_each_row_is_what_its_adapter_gives(names, length, in_generate):
    layer, weights = layer_with()
    rows = ids(len(names), length)
    out, _ = run(layer, names, rows, in_generate)
    assert_rows(layer, weights, names, rows, out)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@torch.no_grad()
def test_in_the_dtype_of_the_embeddings(dtype, bias):
    names = BATCHES["unequal, with the base"]
    layer, weights = layer_with(dtype, adapter_bias=bias)
    rows = ids(len(names), 5)
    out, products = run(layer, names, rows)
    assert (out.dtype, products.names.count("mm")) == (dtype, 0)
    assert_rows(layer, weights, names, rows, out)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@torch.no_grad()
def test_a_zero_w2_changes_no_bit(dtype):
    names = BATCHES["unequal, with the base"]
    layer, _ = layer_with(dtype)
    for fc2 in layer.input_tuning_fc2.values():
        fc2.weight.zero_()
    rows = ids(len(names), 5)
    assert torch.equal(run(layer, names, rows)[0], layer.base_layer(rows))


@torch.no_grad()
def test_rows_that_generate_repeats():
    """For beams and return sequences: three of each."""
    layer, weights = layer_with()
    names = ["b", BASE, "a", "a"]
    rows = ids(12, 2)
    out, _ = run(layer, names, rows)
    assert_rows(layer, weights, [name for name in names for _ in range(3)], rows, out)


# ---- how many products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@torch.no_grad()
def test_adapters_of_a_kind_are_one_product(bias):
    layer, _ = layer_with(adapter_bias=bias)
    _, products = run(layer, BATCHES["unequal, with the base"], ids(7, 3))
    assert products.names == ["baddbmm" if bias else "bmm", "baddbmm"]


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
@torch.no_grad()
def test_no_row_is_computed_much_oftener_than_once(names):
    layer, _ = layer_with()
    _, products = run(layer, names, ids(len(names), 3))
    own = sum(name != BASE for name in names) * 3
    assert products.rows <= 2 * 2 * own  # two products


@torch.no_grad()
def test_rows_that_stand_in_order_are_not_moved():
    layer, _ = layer_with()
    assert {"index_select", "index_copy"} <= set(run(layer, BATCHES["mixed up"], ids(6, 3))[1].operations)
    for names in (BATCHES["two rows each, in order"], BATCHES["one alone"]):
        _, products = run(layer, names, ids(len(names), 3))
        assert not {"index_select", "index_copy"} & set(products.operations)


@torch.no_grad()
def test_a_call_of_the_model_itself_copies_no_weights():
    layer, _ = layer_with()
    _, products = run(layer, ["a", "b", "c"], ids(3, 2), in_generate=False)
    assert products.names == ["mm", "addmm"] * 3


KINDS = {
    "another width": {"adapter_hidden_dim": 8},
    "a bias": {"adapter_bias": True},
    "another activation": {"adapter_activation": "gelu"},
}


@pytest.mark.parametrize("difference", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_an_adapter_of_another_kind_runs_by_itself(difference):
    layer, weights = layer_with(others={"c": difference})
    names = ["a", "c", "b", BASE]
    rows = ids(4, 3)
    out, products = run(layer, names, rows)
    assert (products.names.count("bmm"), products.names.count("mm") + products.names.count("addmm")) == (1, 2)
    assert_rows(layer, weights, names, rows, out, c=difference.get("adapter_activation", "relu"))


@torch.no_grad()
def test_activations_with_other_settings_are_another_kind():
    layer, weights = layer_with(adapter_activation="leaky_relu")
    layer.input_tuning_activation["c"].negative_slope = 0.7
    rows = ids(2, 3)
    out, _ = run(layer, ["a", "c"], rows)
    hidden = layer.base_layer(rows)[1] @ weights["c"]["fc1.weight"].T
    want = layer.base_layer(rows)[1] + nn.functional.leaky_relu(hidden, 0.7) @ weights["c"]["fc2.weight"].T
    assert_close(out[1], want, **CLOSE[torch.float32])


@torch.no_grad()
def test_activations_with_weights_are_each_adapters_own():
    layer, weights = layer_with(adapter_activation="prelu")
    layer.input_tuning_activation["c"].weight.fill_(0.7)
    rows = ids(2, 3)
    out, _ = run(layer, ["a", "c"], rows)
    for e, got, name in zip(layer.base_layer(rows), out, "ac", strict=True):
        hidden = nn.functional.prelu(e @ weights[name]["fc1.weight"].T, layer.input_tuning_activation[name].weight)
        assert_close(got, e + hidden @ weights[name]["fc2.weight"].T, **CLOSE[torch.float32])


@torch.no_grad()
def test_an_adapter_without_input_adapter_leaves_its_rows_alone():
    layer, weights = layer_with(others={"c": {"adapter_hidden_dim": 0}})
    names = ["a", "c", "b"]
    rows = ids(3, 2)
    out, _ = run(layer, names, rows)
    assert_rows(layer, weights, names, rows, out)


# ---- where the modules themselves have to run -----------------------------------------------------------------------


@torch.no_grad()
def test_weights_that_accelerate_brings_in():
    """Between calls of their own modules they are on "meta"."""
    layer, weights = layer_with()
    for fc in (layer.input_tuning_fc1["b"], layer.input_tuning_fc2["b"]):
        add_hook_to_module(
            fc, AlignDevicesHook(execution_device=DEVICE, offload=True, weights_map=dict(fc.state_dict()))
        )
    assert layer.input_tuning_fc1["b"].weight.is_meta
    names = ["a", "b", "c", BASE]
    rows = ids(4, 3)
    out, products = run(layer, names, rows)
    assert products.names.count("bmm") == 1  # of a and c
    assert_rows(layer, weights, names, rows, out)


@pytest.mark.parametrize("part", ["input_tuning_fc1", "input_tuning_fc2", "input_tuning_activation"])
@torch.no_grad()
def test_hooks_on_an_adapters_modules_run(part):
    layer, _ = layer_with()
    seen = []
    getattr(layer, part)["b"].register_forward_hook(lambda *_: seen.append(1))
    run(layer, ["a", "b", "c"], ids(3, 2))
    assert seen == [1]


@torch.no_grad()
def test_dropout_that_is_on_draws():
    """As Monte Carlo dropout has it, of a model in eval mode."""
    layer, weights = layer_with(adapter_dropout=0.5)
    layer.input_tuning_dropout["b"].train()
    rows = ids(3, 8)
    out, _ = run(layer, ["a", "b", "c"], rows)
    assert_rows(layer, weights, ["a"], rows[:1], out[:1])
    assert (out[1] - transform(weights["b"], layer.base_layer(rows)[1])).abs().max() > 1e-2


def test_gradients_reach_the_weights():
    layer, weights = layer_with()
    names = BATCHES["unequal, with the base"]
    rows = ids(len(names), 3)
    layer.requires_grad_(True)
    run(layer, names, rows)[0].square().sum().backward()
    for name in "abc":
        own = {key: value.requires_grad_() for key, value in weights[name].items()}
        e = layer.base_layer(rows)[[row for row, other in enumerate(names) if other == name]].detach()
        transform(own, e).square().sum().backward()
        assert_close(layer.input_tuning_fc1[name].weight.grad, own["fc1.weight"].grad, atol=1e-4, rtol=1e-4)
        assert_close(layer.input_tuning_fc2[name].weight.grad, own["fc2.weight"].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.not_emulated("it has no autocast")
@torch.no_grad()
def test_autocast_chooses_the_dtype_of_the_products():
    layer, _ = layer_with()
    names = BATCHES["mixed up"]
    rows = ids(len(names), 3)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out, _ = run(layer, names, rows)
        want, _ = run(layer, names, rows, in_generate=False)
    assert out.dtype == torch.float32
    assert torch.equal(out, want)


@torch.no_grad()
def test_weights_that_have_not_come_are_named():
    layer, _ = layer_with()
    layer.input_tuning_fc2["b"].weight.fill_(float("nan"))
    layer.pending.add("b")
    with pytest.raises(ValueError, match="Adapter 'b' has no usable weights: `input_tuning_fc2"):
        run(layer, ["a", "b"], ids(2, 3))


# ---- adapter_scope="input" ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_generate", [True, False], ids=["generate", "forward"])
@pytest.mark.parametrize("kind", ["input", "output", "some"])
@torch.no_grad()
def test_scopes_of_the_rows(kind, in_generate):
    layer, weights = layer_with(others={"c": {"adapter_scope": "input"}})
    names = ["c", "a", "b", "c", BASE]
    rows = ids(len(names), 4)
    some = torch.arange(4, device=DEVICE).expand(5, -1) >= torch.tensor([1, 2, 3, 3, 2], device=DEVICE)[:, None]
    is_output = {"input": False, "output": True, "some": some}[kind]
    out, _ = run(layer, names, rows, in_generate, is_output)
    base = layer.base_layer(rows)
    for row, name in enumerate(names):
        want = base[row] if name == BASE else transform(weights[name], base[row])
        if name == "c":
            left_alone = some[row] if kind == "some" else torch.full((4,), kind == "output", device=DEVICE)
            want = torch.where(left_alone[:, None], base[row], want)
        assert_close(out[row], want, **CLOSE[torch.float32])


@torch.no_grad()
def test_rows_of_an_adapter_for_the_input_need_to_know_it():
    layer, _ = layer_with(others={"c": {"adapter_scope": "input"}})
    with pytest.raises(ValueError, match='`adapter_scope` is "input"'):
        run(layer, ["a", "b", "c"], ids(3, 2))


# ---- what is kept, and for how long ---------------------------------------------------------------------------------

CALL = {"adapter_names": ["a", "b", BASE, "c"], "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def model_with_three():
    model, *_ = adapted(LLAMA)
    for seed, name in enumerate("abc", start=2):
        add(model, name, seed=seed)
    return model.eval()


def generated(model) -> Tensor:
    return model.generate(input_ids=ids(4, 6), attention_mask=torch.ones_like(ids(4, 6)), pad_token_id=PAD, **CALL)


def test_weights_are_put_side_by_side_once_for_all_steps(monkeypatch):
    model = model_with_three()
    layer = type(model.base_model.layer)
    made, stacked = [], layer._stacked

    def counted(self, *args):
        made.append(weakref.ref(one := stacked(self, *args)))
        return one

    monkeypatch.setattr(layer, "_stacked", counted)
    generated(model)
    gc.collect()
    assert len(made) == 1
    assert made[0]() is None  # nothing outlives the call


@pytest.mark.parametrize("write", ["copy_", "data"])
def test_weights_that_changed_between_calls_are_seen(write):
    model = model_with_three()
    first = generated(model)
    weight = model.base_model.layer.input_tuning_fc2["b"].weight
    with torch.no_grad():
        (weight.data if write == "data" else weight).copy_(torch.randn(weight.shape))
    second = generated(model)
    assert torch.equal(first[[0, 2, 3]], second[[0, 2, 3]])
    assert not torch.equal(first[1], second[1])
    model.set_adapter("b")
    alone = {"input_ids": ids(4, 6)[1:2], "attention_mask": torch.ones_like(ids(1, 6)), "pad_token_id": PAD}
    settings = {key: value for key, value in CALL.items() if key != "adapter_names"}
    assert torch.equal(model.generate(**alone, **settings)[0], second[1])
