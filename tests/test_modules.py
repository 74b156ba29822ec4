"""The adapter's modules: in which dtype T is computed, and what the prompt's parameter is divided by."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

from adapters import adapted, add, config, randomize
from families import ALL, FAMILIES, build, ids
from oracles import adapter_weights, row_output
from peft_input_tuning.modules import InputDtypeLinear, SoftPrompt, adapt

LLAMA = FAMILIES["llama"]
WIDTH, HIDDEN = 32, 24
HALVES = [torch.bfloat16, torch.float16]


class ProductDtypes(TorchDispatchMode):
    """The dtypes of all that matrices are multiplied with."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.PRODUCTS:
            self.count += 1
            self.seen |= {one.dtype for one in args if isinstance(one, Tensor)}
        return func(*args, **(kwargs or {}))


def layers(cls: type[nn.Linear], bias: bool = False) -> tuple[nn.Linear, nn.Linear]:
    """The same weights for every class."""
    torch.manual_seed(1)
    return cls(WIDTH, HIDDEN, bias=bias), cls(HIDDEN, WIDTH, bias=bias)


def in_dtype_of_weights(embeddings: Tensor, fc1: nn.Linear, activation: nn.Module, fc2: nn.Linear) -> Tensor:
    """T as plain linear layers give it, with no cast of weights."""
    return embeddings + fc2(activation(fc1(embeddings.to(fc1.weight.dtype)))).to(embeddings.dtype)


def output_and_gradients(transform, x: Tensor, *modules: nn.Module) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = transform(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *[p.grad for module in modules for p in module.parameters()]]


def transformed(x: Tensor, bias: bool = False, activation: str = "relu") -> list[Tensor]:
    fc1, fc2 = layers(InputDtypeLinear, bias)
    act = ACT2FN[activation].float()  # PEFT makes all of an adapter float32
    return output_and_gradients(lambda e: adapt(e, fc1, act, nn.Identity(), fc2), x, fc1, fc2, act)


def transformed_by_plain_layers(x: Tensor, bias: bool = False) -> list[Tensor]:
    fc1, fc2 = layers(nn.Linear, bias)
    return output_and_gradients(lambda e: in_dtype_of_weights(e, fc1, nn.ReLU(), fc2), x, fc1, fc2)


# ---- the dtype of T -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("llama", "gemma3", "t5", "bert")], ids=str)
def test_over_a_half_precision_base_all_products_are_in_its_dtype(family, dtype):
    """Forward and backward. In float32 they took a tenth of a training step of a model of 1B parameters on a GPU."""
    model = get_peft_model(build(family).to(dtype), config(family))
    randomize(model)
    with ProductDtypes() as products:
        out = model.base_model.layer(ids(2, 7))
        out.float().square().sum().backward()
    assert out.dtype == dtype
    assert (products.count, products.seen) == (5, {dtype})  # the embeddings need no gradient
    gradients = [p.grad for name, p in model.named_parameters() if "input_tuning_fc" in name]
    assert {grad.dtype for grad in gradients} == {torch.float32}
    assert all(torch.isfinite(grad).all() and grad.any() for grad in gradients)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
def test_gradients_are_float32_and_near_to_those_of_float32_arithmetic(dtype, tolerance, bias):
    x = torch.randn(40, WIDTH).to(dtype)
    got, want = transformed(x, bias), transformed_by_plain_layers(x.float(), bias)
    assert [one.dtype for one in got] == [dtype, dtype] + [torch.float32] * (len(want) - 2)
    for ours, exact in zip(got, want, strict=True):
        assert (ours.float() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_over_a_float32_base_t_is_what_plain_layers_give(bias):
    """To the last bits: product and sum are one operation."""
    x = torch.randn(2, 9, WIDTH)
    for ours, plain in zip(transformed(x, bias), transformed_by_plain_layers(x, bias), strict=True):
        assert_close(ours, plain)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("base", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_under_autocast_nothing_changes_by_a_bit(dtype, base, bias):
    x = torch.randn(2, 9, WIDTH).to(base)
    with torch.autocast("cpu", dtype=dtype), ProductDtypes() as products:
        ours = transformed(x, bias)
    with torch.autocast("cpu", dtype=dtype):
        plain = transformed_by_plain_layers(x, bias)
    assert products.seen == {dtype}
    for got, want in zip(ours, plain, strict=True):
        assert torch.equal(got, want)


def test_over_a_float64_base_t_is_in_float64():
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    with ProductDtypes() as products:
        out, *_ = transformed(x)
    assert (out.dtype, products.seen) == (torch.float64, {torch.float64})
    with torch.autocast("cpu", dtype=torch.bfloat16):  # leaves float64 alone
        assert torch.equal(transformed(x)[0], out)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_zero_w2_changes_no_bit(dtype, rows, bias):
    fc1, fc2 = layers(InputDtypeLinear, bias)
    for parameter in fc2.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(rows, WIDTH).to(dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(adapt(x, fc1, nn.ReLU(), nn.Identity(), fc2), x)


class KnowsLinearLayersOnly(nn.Parameter):
    """As torchao's quantized weights are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.addmm, torch.Tensor.t):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_a_tensor_subclass():
    x, (fc1, fc2) = torch.randn(3, WIDTH), layers(InputDtypeLinear)
    want = in_dtype_of_weights(x, fc1, nn.ReLU(), fc2)
    fc2.weight = KnowsLinearLayersOnly(fc2.weight.detach())
    assert torch.equal(adapt(x, fc1, nn.ReLU(), nn.Identity(), fc2), want)


@torch.no_grad()
def test_linear_layers_that_somebody_has_replaced():
    """By layers that take an input alone, as quantizers and float8 training do."""

    class Replaced(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        @property
        def weight(self) -> Tensor:
            return self.linear.weight

        def forward(self, input: Tensor) -> Tensor:
            return self.linear(input)

    model, base, weights = adapted(LLAMA)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Replaced(child))
    assert_close(model(ids(1, 6)).logits[0], row_output(base, weights, ids(1, 6)[0]), atol=2e-4, rtol=1e-3)


def test_shapes_can_be_worked_out_on_meta():
    """A device without autocast."""
    with torch.device("meta"):
        fc1, fc2 = layers(InputDtypeLinear)
        assert adapt(torch.empty(2, 9, WIDTH), fc1, nn.ReLU(), nn.Identity(), fc2).shape == (2, 9, WIDTH)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_weights_of_another_dtype_than_the_base(weights):
    """`autocast_adapter_dtype=False` leaves an adapter in bfloat16, a cast of the base may make that float32 again."""
    fc1, fc2 = (layer.to(weights) for layer in layers(InputDtypeLinear))
    out = adapt(torch.randn(3, WIDTH), fc1, nn.ReLU(), nn.Identity(), fc2)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("activation", ["prelu", "xielu"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_an_activation_with_weights_runs_in_their_dtype(dtype, activation):
    out, grad, *gradients = transformed(torch.randn(2, 9, WIDTH).to(dtype), activation=activation)
    assert (out.dtype, grad.dtype) == (dtype, dtype)
    assert {one.dtype for one in gradients} == {torch.float32}
    assert all(torch.isfinite(one).all() for one in gradients)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_folding_stays_in_float32(dtype):
    """An exported or merged table is rounded once, at its end."""
    model = get_peft_model(build(LLAMA).to(dtype), config(LLAMA, num_virtual_tokens=0))
    layer = model.base_model.layer
    with ProductDtypes() as products:
        layer.fold_into(torch.empty_like(layer.weight), "default")
    assert products.seen == {torch.float32}


# ---- the scale of the prompt ----------------------------------------------------------------------------------------


def test_the_prompt_is_the_parameter_times_the_scale():
    prompt = SoftPrompt(3, 5, scale=4.0)
    start = torch.randn(3, 5)
    prompt.start_from(start)
    assert torch.equal(prompt.weight, start / 4)
    assert torch.equal(prompt(), start)
    assert "scale=4.0" in repr(prompt)


@pytest.mark.parametrize("scale", [1.0, 3.0, 8.0, 0.5])
@pytest.mark.parametrize("family", ALL, ids=str)
def test_a_model_reads_the_scaled_prompt(family, scale):
    more = {"decoder_input_ids": ids(1, 5, seed=9)} if family.kind == "seq2seq" else {}
    model, base, weights = adapted(family, prompt_scale=scale)
    row = ids(7)
    assert model.base_model.layer.input_tuning_prompt["default"].scale == scale
    with torch.no_grad():
        got = model(input_ids=row[None], **more).logits[0]
    assert_close(got, row_output(base, weights, row, **more), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ALL, ids=str)
def test_the_scale_changes_no_bit_of_the_start(family):
    starts = []
    for scale in (1.0, 8.0):
        torch.manual_seed(3)
        model = get_peft_model(build(family), config(family, prompt_scale=scale, init_weights=True)).eval()
        more = {"decoder_input_ids": ids(1, 5, seed=9)} if family.kind == "seq2seq" else {}
        with torch.no_grad():
            starts.append(model(input_ids=ids(1, 7), **more).logits)
    assert torch.equal(*starts)


def test_each_row_has_the_scale_of_its_adapter():
    model, base, weights = adapted(LLAMA, prompt_scale=8.0)
    others = {
        "one": add(model, "one", seed=4, prompt_scale=1.0),
        "three": add(model, "three", seed=5, prompt_scale=3.0),
    }
    model.eval()
    rows = ids(3, 7)
    with torch.no_grad():
        out = model(input_ids=rows, adapter_names=["three", "default", "one"]).logits
    for got, row, own in zip(out, rows, (others["three"], weights, others["one"]), strict=True):
        assert_close(got, row_output(base, own, row), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 8.0, 3.0])
def test_a_file_holds_the_parameter_and_its_configuration_the_scale(scale, tmp_path):
    model, _, weights = adapted(LLAMA, prompt_scale=scale)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert loaded.active_peft_config.prompt_scale == scale
    prompts = [one.base_model.layer.input_tuning_prompt["default"] for one in (model, loaded)]
    assert torch.equal(prompts[0].weight, prompts[1].weight)
    assert torch.equal(adapter_weights(loaded)["prompt.weight"], weights["prompt.weight"])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids(1, 7)).logits, model(input_ids=ids(1, 7)).logits)
