"""However a model is called, the prompt is in: `model(...)`, `.forward(...)`, compiled, copied, by a part of it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from types import MethodType

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch.testing import assert_close

from adapters import adapted, add, config, randomize
from families import ALL, FAMILIES, Family, build, ids
from oracles import adapter_weights, row_output
from peft_input_tuning.virtual_tokens.subclass import Extension

LLAMA = FAMILIES["llama"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
each_family = pytest.mark.parametrize("family", ALL, ids=str)


def inputs_of(family: Family) -> dict[str, torch.Tensor]:
    more = {"decoder_input_ids": ids(2, 5, seed=9)} if family.kind == "seq2seq" else {}
    return {"input_ids": ids(2, 7), **more}


def wanted(family: Family, base, weights) -> torch.Tensor:
    rows = [{key: value[i : i + 1] for key, value in inputs_of(family).items()} for i in range(2)]
    return torch.stack([row_output(base, weights, row.pop("input_ids")[0], **row) for row in rows])


def encoder_output(base, weights) -> torch.Tensor:
    """What the bare backbone gives for `ids(2, 7)`, without the prompt's places."""
    backbone = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
    return torch.stack([row_output(backbone, weights, row) for row in ids(2, 7)])


# ---- ways to call it ------------------------------------------------------------------------------------------------


@torch.no_grad()
@each_family
def test_forward_of_the_model(family):
    model, base, weights = adapted(family)
    assert_close(
        model.get_base_model().forward(**inputs_of(family)).logits, wanted(family, base, weights), **TOLERANCE
    )


@torch.no_grad()
@pytest.mark.parametrize("call", ["module", "forward", "positional"])
@pytest.mark.parametrize("family", [f for f in ALL if f.kind != "seq2seq"], ids=str)
def test_a_bare_backbone(family, call):
    """As sentence-transformers, value heads and chunked losses call it."""
    model, base, weights = adapted(family)
    backbone = model.get_base_model().base_model
    if call == "positional":
        out = backbone.forward(ids(2, 7))
    else:
        out = (backbone if call == "module" else backbone.forward)(input_ids=ids(2, 7))
    assert_close(out.last_hidden_state, encoder_output(base, weights), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("family", [FAMILIES["t5"], FAMILIES["bart"]], ids=str)
def test_an_encoder_keeps_its_virtual_places_for_the_decoder(family):
    model, base, weights = adapted(family)
    outputs = model.get_base_model().get_encoder().forward(input_ids=ids(2, 7))
    assert outputs.last_hidden_state.shape[1] == 11
    out = model.get_base_model().forward(encoder_outputs=outputs, decoder_input_ids=ids(2, 5, seed=9))
    assert_close(out.logits, wanted(family, base, weights), **TOLERANCE)


@torch.no_grad()
@pytest.mark.not_emulated("torch.compile does not know the device")
@pytest.mark.parametrize("part", ["model", "backbone"])
def test_a_compiled_forward(part):
    model, base, weights = adapted(LLAMA)
    module = model.get_base_model() if part == "model" else model.get_base_model().model
    forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
    out = forward(input_ids=ids(2, 7), use_cache=False)[0]
    want = wanted(LLAMA, base, weights) if part == "model" else encoder_output(base, weights)
    assert_close(out, want, **TOLERANCE)


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["bert"]], ids=str)
def test_gradients_come_through_forward(family):
    model, _, _ = adapted(family)
    backbone = model.get_base_model().base_model
    backbone.forward(input_ids=ids(2, 7)).last_hidden_state.sum().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert len(gradients) == 3
    assert all(one is not None and one.abs().sum() > 0 for one in gradients.values())


# ---- what is made of it ---------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole])
@pytest.mark.parametrize("family", [LLAMA, FAMILIES["bart"]], ids=str)
def test_copies_have_all_of_it_and_nothing_in_common(family, copied):
    model, base, weights = adapted(family)
    twin = copied(model)
    want = wanted(family, base, weights)
    assert_close(twin.get_base_model().forward(**inputs_of(family)).logits, want, **TOLERANCE)
    for parameter in twin.parameters():
        parameter.mul_(0)
    assert_close(model(**inputs_of(family)).logits, want, **TOLERANCE)


@each_family
def test_classes_look_as_they_did_and_come_back(family):
    model, base, _ = adapted(family)
    for path, ours in model.get_base_model().named_modules():
        if isinstance(ours, Extension):
            kind = ours.extended_class
            assert isinstance(ours, kind), path
            assert (type(ours).__name__, type(ours).__module__) == (kind.__name__, kind.__module__)
            assert inspect.signature(ours.forward) == inspect.signature(kind.forward.__get__(ours))
    before = {path: type(module) for path, module in base.named_modules()}
    plain = model.unload()
    assert {path: type(module) for path, module in plain.named_modules()} == before
    assert not any("input_tuning" in name for module in plain.modules() for name in vars(module))


@torch.no_grad()
def test_its_class_called_again_makes_a_model_without_an_adapter(tmp_path):
    """As TRL's callbacks do."""
    build(LLAMA).save_pretrained(tmp_path)
    model, plain, _ = adapted(LLAMA)
    base = model.get_base_model()
    for part in (base, base.model):
        made = type(part)(base.config).eval()
        loaded = type(part).from_pretrained(tmp_path, dtype=torch.float32).eval()
        for one in (made, loaded):
            assert not isinstance(one, Extension)
            assert type(one) is type(plain if part is base else plain.model)
        loaded = loaded.to(base.device)
        want = plain if part is base else plain.model
        assert_close(loaded(ids(2, 5))[0], want(ids(2, 5))[0], **TOLERANCE)


def test_a_saved_base_names_its_own_class(tmp_path):
    model, _, _ = adapted(LLAMA)
    model.get_base_model().save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]


# ---- a forward on the instance --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("order", ["hook first", "adapter first"])
def test_modules_with_a_hook_of_accelerate(order):
    """It puts a `forward` on the instance, which would go past the class's."""
    base, plain = build(LLAMA), build(LLAMA)
    if order == "hook first":
        add_hook_to_module(plain.model, ModelHook())
    model = get_peft_model(plain, config(LLAMA)).eval()
    if order == "adapter first":
        add_hook_to_module(plain.model, ModelHook())
    randomize(model)
    want = wanted(LLAMA, base, adapter_weights(model))
    assert_close(model(input_ids=ids(2, 7)).logits, want, **TOLERANCE)
    if order == "hook first":
        model.unload()
        assert_close(plain(input_ids=ids(2, 7)).logits, base(input_ids=ids(2, 7)).logits)
        remove_hook_from_module(plain.model)
        assert_close(plain(input_ids=ids(2, 7)).logits, base(input_ids=ids(2, 7)).logits)
    else:
        remove_hook_from_module(plain.model)
        assert_close(model(input_ids=ids(2, 7)).logits, want, **TOLERANCE)


def test_a_forward_of_somebody_else_s_on_the_instance_is_refused():
    plain = build(LLAMA)
    plain.model.forward = MethodType(lambda self, **kwargs: type(self).forward(self, **kwargs), plain.model)
    with pytest.raises(ValueError, match=r"`forward` of this LlamaModel was replaced by .*Add the adapter first"):
        get_peft_model(plain, config(LLAMA))
    assert not any("input_tuning" in key for key in plain.state_dict())
    assert not any(isinstance(module, Extension) for module in plain.modules())


# ---- `adapter_names` that nobody else reads -------------------------------------------------------------------------


@torch.no_grad()
@each_family
@pytest.mark.parametrize("way", ["base model", "forward"])
def test_adapter_names_of_a_bare_base_model(family, way):
    model, base, weights = adapted(family)
    other = add(model, "other", seed=3)
    model.eval()
    inner = model.get_base_model()
    call = inner if way == "base model" else inner.forward
    out = call(**inputs_of(family), adapter_names=["other", "default"]).logits
    assert_close(out[0], wanted(family, base, other)[0], **TOLERANCE)
    assert_close(out[1], wanted(family, base, weights)[1], **TOLERANCE)


@torch.no_grad()
def test_adapter_names_of_a_model_whose_class_peft_calls_otherwise():
    """PEFT hands all arguments of an MPT model on, `adapter_names` too."""
    torch.manual_seed(0)
    settings = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=97)
    base = transformers.MptForCausalLM(settings).eval()
    model = get_peft_model(copy.deepcopy(base), config(LLAMA)).eval()
    randomize(model)
    out = model(input_ids=ids(2, 7), adapter_names=["__base__", "default"]).logits
    assert_close(out[0], base(input_ids=ids(2, 7)[:1]).logits[0], **TOLERANCE)
    assert_close(out[1], row_output(base, adapter_weights(model), ids(2, 7)[1]), **TOLERANCE)


@torch.no_grad()
def test_adapter_names_in_generate_of_a_bare_base_model():
    model, base, _ = adapted(LLAMA)
    model.eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    names = ["__base__", "default"]
    out = model.get_base_model().generate(input_ids=ids(2, 7), adapter_names=names, **options)
    assert torch.equal(out, model.generate(input_ids=ids(2, 7), adapter_names=names, **options))
    assert torch.equal(out[:1], base.generate(input_ids=ids(2, 7)[:1], **options))


# ---- what users do to classes and modules ---------------------------------------------------------------------------


class WithALock(transformers.LlamaForCausalLM):
    """Has what cannot be copied, and says what is to be."""

    def __init__(self, settings):
        super().__init__(settings)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "lock"}


@torch.no_grad()
def test_a_class_that_says_what_is_copied():
    torch.manual_seed(0)
    model = get_peft_model(WithALock(LLAMA.config()).eval(), config(LLAMA)).eval()
    randomize(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=ids(2, 7)).logits, model(input_ids=ids(2, 7)).logits)
    assert not hasattr(twin.get_base_model(), "lock")


@torch.no_grad()
def test_a_forward_that_was_wrapped_outlives_unload():
    model, base, weights = adapted(LLAMA)
    backbone = model.get_base_model().model
    forward = backbone.forward
    backbone.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert_close(model(input_ids=ids(2, 7)).logits, wanted(LLAMA, base, weights), **TOLERANCE)
    plain = model.unload()
    assert torch.equal(plain(input_ids=ids(2, 7)).logits, base(input_ids=ids(2, 7)).logits)


def test_a_class_that_somebody_has_made_of_ours_since():
    """As FSDP2 does: it stays what it was, without ours."""
    model, _, _ = adapted(LLAMA)
    backbone = model.get_base_model().model
    mine = type("Mine", (), {"marker": 1})
    backbone.__class__ = type("FSDPLlamaModel", (mine, type(backbone)), {"own": 2})
    plain = model.unload().model
    assert isinstance(plain, mine)
    assert isinstance(plain, transformers.LlamaModel)
    assert not isinstance(plain, Extension)
    assert (type(plain).__name__, plain.own, plain.marker) == ("FSDPLlamaModel", 2, 1)


def test_a_backbone_that_was_replaced_is_named():
    model, _, _ = adapted(LLAMA)
    model.get_base_model().model = build(LLAMA).model
    with pytest.raises(ValueError, match="The backbone `model` was replaced by a LlamaModel after"):
        model(input_ids=ids(2, 7))


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["bert"]], ids=str)
@pytest.mark.parametrize("wrong", [-1, -4, -100, 97])
def test_ids_that_are_none_are_errors_as_in_the_base(family, wrong):
    model, base, _ = adapted(family)
    row = ids(1, 7)
    row[0, 2] = wrong
    for one in (base, model):
        with pytest.raises(IndexError):
            one(input_ids=row)


@torch.no_grad()
def test_a_cache_made_anew_of_its_tensors():
    model, _, _ = adapted(LLAMA)
    cache = transformers.DynamicCache()
    model(input_ids=ids(1, 5), past_key_values=cache)
    again = transformers.DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    mask = torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"4 less, the virtual tokens\. The cache was made anew"):
        model(input_ids=ids(1, 3, seed=2), attention_mask=mask, past_key_values=again)


class AnyArguments(transformers.T5ForConditionalGeneration):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@torch.no_grad()
def test_a_forward_of_any_arguments_called_by_position():
    torch.manual_seed(0)
    base = AnyArguments(FAMILIES["t5"].config()).eval()
    model = get_peft_model(copy.deepcopy(base), config(FAMILIES["t5"])).eval()
    randomize(model)
    row, decoded = ids(1, 7), ids(1, 4, seed=3)
    want = row_output(base, adapter_weights(model), row[0], decoder_input_ids=decoded)
    assert_close(model.get_base_model()(row, None, decoded).logits[0], want, **TOLERANCE)
