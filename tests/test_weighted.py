"""The weighted sum of adapters is exact: its prompt is the sum of the prompts, and what it adds to an embedding is the
sum of what they add."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from adapters import adapted, add
from families import ALL, FAMILIES, build, ids
from oracles import adapter_weights, encoder_of, transform

LLAMA = FAMILIES["llama"]
ROWS = ids(2, 6)
WEIGHTS = [0.7, -1.3, 0.5]
NAMES = ["default", "second", "third"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
each_family = pytest.mark.parametrize("family", ALL, ids=str)


def three(family=LLAMA, *, shared: bool, each: tuple[dict, dict, dict] = ({}, {}, {}), **changes):
    """A model with three adapters, of one W1 if `shared`; its base; their weights for the oracle."""
    model, base, _ = adapted(family, **changes, **each[0])
    for seed, name in enumerate(NAMES[1:], start=5):
        add(model, name, seed=seed, **changes, **each[seed - 4])
    if shared:
        share_first_layer(model)
    return model, base, [adapter_weights(model, name) for name in NAMES]


def share_first_layer(model: nn.Module) -> None:
    layer = model.base_model.layer
    for key in ("input_tuning_fc1", "input_tuning_activation"):
        for name in NAMES[1:]:
            if name in getattr(layer, key):
                getattr(layer, key)[name].load_state_dict(getattr(layer, key)["default"].state_dict())


@torch.no_grad()
def want(base: nn.Module, adapters: list[dict[str, Tensor]], family, activation: str = "relu") -> Tensor:
    """The base's output for the summed prompt and the summed changes of the embeddings."""
    e = encoder_of(base).get_input_embeddings()(ROWS)
    x = e + sum(w * (transform(one, e, activation) - e) for w, one in zip(WEIGHTS, adapters, strict=True))
    virtual = 0
    if "prompt.weight" in adapters[0]:
        prompt = sum(w * one["prompt.weight"] for w, one in zip(WEIGHTS, adapters, strict=True))
        x = torch.cat([prompt.expand(len(x), -1, -1).to(x), x], dim=1)
        virtual = 0 if family.kind == "seq2seq" else len(prompt)
    more = {"decoder_input_ids": ids(2, 4, seed=9)} if family.kind == "seq2seq" else {}
    return base(inputs_embeds=x, **more).logits[:, virtual:]


@torch.no_grad()
def got(model: PeftModel, family=LLAMA, name: str = "sum") -> Tensor:
    model.set_adapter(name)
    more = {"decoder_input_ids": ids(2, 4, seed=9)} if family.kind == "seq2seq" else {}
    return model.eval()(input_ids=ROWS, **more).logits


@each_family
def test_linear_is_exact_with_one_first_matrix(family):
    model, base, adapters = three(family, shared=True)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    assert_close(got(model, family), want(base, adapters, family), **TOLERANCE)


@each_family
def test_cat_is_exact_with_any_first_matrices(family):
    model, base, adapters = three(family, shared=False)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="cat")
    assert model.peft_config["sum"].adapter_hidden_dim == 3 * 24
    assert_close(got(model, family), want(base, adapters, family), **TOLERANCE)


SHAPES = {
    "biases": ({"adapter_bias": True}, ({}, {}, {})),
    "gelu": ({"adapter_activation": "gelu"}, ({}, {}, {})),
    "no adapter": ({"adapter_hidden_dim": 0}, ({}, {}, {})),
    "no prompt": ({"num_virtual_tokens": 0}, ({}, {}, {})),
    "scales of its own for each prompt": ({}, ({"prompt_scale": 1.0}, {"prompt_scale": 3.0}, {"prompt_scale": 16.0})),
    "one without an adapter": ({}, ({}, {"adapter_hidden_dim": 0}, {})),
    "the first without an adapter": ({}, ({"adapter_hidden_dim": 0, "prompt_scale": 2.0}, {}, {"prompt_scale": 1.0})),
}


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
@pytest.mark.parametrize(("changes", "each"), SHAPES.values(), ids=SHAPES)
def test_every_shape_of_the_method(changes, each, combination_type):
    model, base, _ = three(shared=False, each=each, **changes)
    if combination_type == "linear":
        layer = model.base_model.layer
        holders = [name for name in NAMES if name in layer.input_tuning_fc1]
        for name in holders[1:]:
            layer.input_tuning_fc1[name].load_state_dict(layer.input_tuning_fc1[holders[0]].state_dict())
    adapters = [adapter_weights(model, name) for name in NAMES]
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type)
    activation = changes.get("adapter_activation", "relu")
    assert_close(got(model), want(base, adapters, LLAMA, activation), **TOLERANCE)


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_an_activation_with_a_weight_is_kept(combination_type):
    model, _, _ = three(shared=True, adapter_activation="prelu")
    own = model.base_model.layer.input_tuning_activation["default"].weight.detach()
    assert not torch.equal(own, torch.tensor([0.25]))
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type)
    assert torch.equal(got(model), got(model, name="default"))


def test_the_scope_goes_over():
    model, _, _ = three(shared=True, adapter_scope="input")
    model.add_weighted_adapter(["default"], [1.0], "sum")
    how = {"input_ids": ROWS, "max_new_tokens": 5, "do_sample": False}
    model.eval().set_adapter("default")
    of_the_first = model.generate(**how)
    model.set_adapter("sum")
    assert torch.equal(model.generate(**how), of_the_first)
    assert model.peft_config["sum"].adapter_scope == "input"


def test_the_others_stay_as_they_are_and_active():
    model, _, adapters = three(shared=True)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    assert model.active_adapters == ["default"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    for name, weights in zip(NAMES, adapters, strict=True):
        after = adapter_weights(model, name)
        assert all(torch.equal(after[key], value) for key, value in weights.items())


def test_the_sum_shares_no_memory_with_what_it_was_made_of():
    model, _, _ = three(shared=True)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    before = adapter_weights(model)
    for name, parameter in model.named_parameters():
        if ".sum." in name:
            parameter.data.zero_()
    assert all(torch.equal(adapter_weights(model)[key], value) for key, value in before.items())


def test_the_sum_can_be_trained():
    model, _, _ = three(shared=True)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    model.set_adapter("sum")
    model.train()(input_ids=ROWS, labels=ROWS).loss.backward()
    graded = {name.rpartition("input_tuning_")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert graded == {"prompt.sum.weight", "fc1.sum.weight", "fc2.sum.weight"}


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_the_sum_is_saved_and_loaded(tmp_path, combination_type):
    model, _, _ = three(shared=True, each=({"prompt_scale": 1.0}, {}, {}))
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "sum", adapter_name="sum")
    assert torch.equal(got(loaded), got(model))


REFUSED = {
    "lengths": (({}, {"num_virtual_tokens": 3}, {}), {}, "one `num_virtual_tokens` .* 'second': 3"),
    "no prompt beside one": (({}, {"num_virtual_tokens": 0}, {}), {}, "one `num_virtual_tokens`"),
    "activations": (({}, {}, {"adapter_activation": "gelu"}), {}, "one `adapter_activation` .* 'third': 'gelu'"),
    "scopes": (({}, {"adapter_scope": "input"}, {}), {}, "one `adapter_scope` .* 'second': 'input'"),
    "biases": (({"adapter_bias": True}, {}, {}), {}, "one `adapter_bias` .*'default': True"),
    "sizes": (({}, {"adapter_hidden_dim": 8}, {}), {}, '`input_tuning_fc1.weight` is not the same.*"cat"'),
    "first matrices": (({}, {}, {}), {}, "'default' and 'second', whose `input_tuning_fc1.weight` .*\"cat\""),
    "svd": (({}, {}, {}), {"combination_type": "svd"}, r"`combination_type` must be one of .*, got 'svd'"),
    "a weight too few": (({}, {}, {}), {"weights": [1.0]}, "`adapters` has 3 names and `weights` has 1"),
    "none": (({}, {}, {}), {"adapters": [], "weights": []}, "`adapters` has 0 names"),
    "no number": (({}, {}, {}), {"weights": [1.0, float("nan"), 1.0]}, "`weights` must be finite numbers, got nan"),
    "unknown": (({}, {}, {}), {"adapters": ["default", "fourth", "third"]}, "unknown name 'fourth'. Known"),
    "a name in use": (({}, {}, {}), {"adapter_name": "third"}, "`adapter_name` 'third' is in use"),
    "a name that cannot be": (({}, {}, {}), {"adapter_name": "keys", "combination_type": "cat"}, "is 'keys'"),
}


@pytest.mark.parametrize(("each", "arguments", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_be_exact_is_refused_and_nothing_is_added(each, arguments, said):
    model, _, _ = three(shared=False, each=each)
    before, names = model.state_dict().keys(), list(model.peft_config)
    with pytest.raises(ValueError, match=said):
        model.add_weighted_adapter(**{"adapters": NAMES, "weights": WEIGHTS, "adapter_name": "sum", **arguments})
    assert model.state_dict().keys() == before
    assert list(model.peft_config) == names


def test_activations_with_other_weights_are_refused():
    model, _, _ = three(shared=False, adapter_activation="prelu")
    with pytest.raises(ValueError, match=r"whose `input_tuning_activation.weight` is not the same"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "sum", "cat")


def test_trained_heads_are_refused():
    model, _, _ = adapted(LLAMA, "seq_cls", task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"has 'default', which has trained .*score.* too"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_adapters_that_wait_for_their_file_are_refused():
    model, _, _ = adapted(LLAMA)
    model.add_adapter("waiting", type(model.peft_config["default"])(inference_mode=True, num_virtual_tokens=4))
    with pytest.raises(ValueError, match="Adapter 'waiting' has no usable weights"):
        model.add_weighted_adapter(["default", "waiting"], [1.0, 1.0], "sum", "cat")
