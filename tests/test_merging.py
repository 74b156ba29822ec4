"""Merged = adapted, where that is exact: an input-adapter without virtual tokens becomes the embedding table."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from adapters import adapted, add, config, randomize
from device import DEVICE
from families import ALL, FAMILIES, VOCAB, build, ids
from oracles import adapter_weights, encoder_of, row_output, transform
from peft_input_tuning import InputTuningLayer, export_model

each_family = pytest.mark.parametrize("family", ALL, ids=str)
LLAMA, TIED = FAMILIES["llama"], FAMILIES["gemma2"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}


def more(family) -> dict:
    return {"decoder_input_ids": ids(1, 4, seed=9)} if family.kind == "seq2seq" else {}


@torch.no_grad()
def output(model: nn.Module, family=LLAMA) -> torch.Tensor:
    return model(input_ids=ids(1, 6), **more(family)).logits[0]


def mergeable(family=LLAMA, **changes):
    return adapted(family, num_virtual_tokens=0, **changes)


def want_of(base: nn.Module, weights: dict, family) -> torch.Tensor:
    return row_output(base, weights, ids(1, 6)[0], **more(family))


def head(model: nn.Module) -> torch.Tensor:
    return model.get_output_embeddings().weight


@pytest.mark.feature("merge")
@each_family
def test_merged_and_unmerged(family):
    model, base, weights = mergeable(family)
    want = row_output(base, weights, ids(1, 6)[0], **more(family))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact = output(model, family)
    model.merge_adapter()
    assert model.base_model.layer.merged_adapters == ["default"]
    assert_close(output(model, family), want, **TOLERANCE)
    assert torch.equal(head(model), head(base))
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(output(model, family), exact)


@pytest.mark.feature("merge")
@each_family
def test_merge_and_unload_gives_a_plain_model(family, tmp_path):
    """Its file, read again by transformers alone, is the oracle's model."""
    model, base, weights = mergeable(family)
    want = row_output(base, weights, ids(1, 6)[0], **more(family))
    plain = model.merge_and_unload()
    assert type(plain) is type(base)
    assert not any(isinstance(module, InputTuningLayer) for module in plain.modules())
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert_close(output(plain, family), want, **TOLERANCE)
    plain.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).eval().to(DEVICE)
    assert_close(output(again, family), want, **TOLERANCE)
    assert torch.equal(head(again), head(base))


@pytest.mark.parametrize("family", [LLAMA, TIED], ids=str)
def test_weights_pushed_to_an_engine(family):
    """As trainers do that generate elsewhere: merge, send the named parameters without PEFT's names, unmerge."""
    model, base, weights = mergeable(family)
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = False
    engine = type(base)(config).eval().to(DEVICE)
    model.merge_adapter()
    sent = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if model.prefix not in name and "original_module" not in name
    }
    model.unmerge_adapter()
    assert not engine.load_state_dict(sent, strict=False).missing_keys
    assert_close(output(engine, family), row_output(base, weights, ids(1, 6)[0]), **TOLERANCE)


@pytest.mark.parametrize("family", [FAMILIES["t5"], FAMILIES["bart"]], ids=str)
def test_an_encoder_that_shares_its_embedding_module(family, tmp_path):
    """After a resize the encoder, the decoder and `shared` are one module: only the encoder's table is adapted."""
    base = build(family)
    base.resize_token_embeddings(101)
    base = base.requires_grad_(False).eval()
    model = get_peft_model(copy.deepcopy(base), config(family, num_virtual_tokens=0)).eval()
    randomize(model)
    want = row_output(base, adapter_weights(model), ids(1, 6)[0], **more(family))
    plain = model.merge_and_unload()
    assert_close(output(plain, family), want, **TOLERANCE)
    plain.save_pretrained(tmp_path)
    assert_close(output(type(base).from_pretrained(tmp_path).eval().to(DEVICE), family), want, **TOLERANCE)


ENCODER_DECODERS = [FAMILIES["t5"], FAMILIES["bart"]]
each_encoder_decoder = pytest.mark.parametrize("family", ENCODER_DECODERS, ids=str)
each_tied = pytest.mark.parametrize("family", [*ENCODER_DECODERS, TIED, FAMILIES["bert"]], ids=str)


@pytest.mark.parametrize("family", [*ENCODER_DECODERS, TIED], ids=str)
def test_tying_again_leaves_a_merged_adapter_and_the_head(family):
    model, base, weights = mergeable(family)
    want = want_of(base, weights, family)
    model.merge_adapter()
    model.get_base_model().tie_weights()
    assert torch.equal(head(model), head(base))
    assert_close(output(model, family), want, **TOLERANCE)
    model.unmerge_adapter()
    assert_close(output(model, family), want, **TOLERANCE)
    assert head(model) is model.get_input_embeddings().weight


@each_tied
def test_tying_again_leaves_a_plain_model(family, tmp_path):
    model, base, weights = mergeable(family)
    want = want_of(base, weights, family)
    plain = model.merge_and_unload()
    for recompute in (True, False):
        plain.tie_weights(recompute_mapping=recompute)
        assert torch.equal(head(plain), head(base))
        assert_close(output(plain, family), want, **TOLERANCE)
    copy.deepcopy(plain).save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).eval().to(DEVICE)
    assert_close(output(again, family), want, **TOLERANCE)


@each_encoder_decoder
def test_the_rest_of_a_plain_model_stays_tied(family):
    plain = mergeable(family)[0].merge_and_unload()
    plain.get_input_embeddings().weight = nn.Parameter(torch.ones_like(head(plain)))
    plain.tie_weights()
    assert (head(plain) == 1).all()
    assert (plain.get_decoder().get_input_embeddings().weight == 1).all()
    assert not (plain.get_encoder().get_input_embeddings().weight == 1).any()


@each_encoder_decoder
def test_a_plain_encoder_decoder_cannot_be_resized(family):
    """transformers gives all of it one embedding then, even for the size that it has."""
    model, base, weights = mergeable(family)
    want = want_of(base, weights, family)
    with pytest.warns(UserWarning, match="The encoder has an embedding of its own now"):
        plain = model.merge_and_unload()
    for size in (VOCAB, VOCAB + 3):
        with pytest.raises(ValueError, match=f"`new_num_tokens` is {size}, but an input-adapter was merged"):
            copy.deepcopy(plain).resize_token_embeddings(size)
    assert_close(output(plain, family), want, **TOLERANCE)


def test_a_plain_decoder_is_resized():
    model, base, weights = mergeable(TIED)
    plain = model.merge_and_unload()
    plain.resize_token_embeddings(VOCAB + 3)
    assert_close(output(plain, TIED)[:, :VOCAB], want_of(base, weights, TIED), **TOLERANCE)


@each_encoder_decoder
def test_other_models_of_the_class_are_tied_as_before(family):
    mergeable(family)[0].merge_and_unload()
    other = build(family)
    other.tie_weights()
    assert other.get_encoder().get_input_embeddings().weight is head(other)


def test_bfloat16():
    """The table is worked out in float32 and rounded once."""
    model = get_peft_model(build(LLAMA).bfloat16(), config(LLAMA, num_virtual_tokens=0)).eval()
    randomize(model)
    layer = model.base_model.layer
    want = transform(adapter_weights(model), layer.weight.detach().float()).bfloat16()
    model.merge_adapter()
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert_close(
        layer.base_layer.weight.detach(), want, atol=0, rtol=2**-7
    )  # a sum in another order may round the other way


# ---- while it is merged ---------------------------------------------------------------------------------------------


def test_disabling_unmerges():
    model, base, _ = mergeable()
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(output(model), output(base))
    assert not model.base_model.layer.merged


def test_unloading_gives_the_base_back():
    model, base, _ = mergeable(TIED)
    model.merge_adapter()
    plain = model.unload()
    assert torch.equal(output(plain, TIED), output(base, TIED))
    assert plain.get_input_embeddings().weight is head(plain)


def test_a_copy_of_a_merged_model_unmerges_alone():
    model, base, weights = mergeable(TIED)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert head(twin) is twin.get_input_embeddings().weight
    assert model.base_model.layer.merged
    assert_close(output(model, TIED), row_output(base, weights, ids(1, 6)[0]), **TOLERANCE)
    assert_close(output(twin, TIED), row_output(base, weights, ids(1, 6)[0]), **TOLERANCE)


def test_saved_while_merged(tmp_path):
    model, _, weights = mergeable()
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(build(LLAMA), tmp_path)
    assert adapter_weights(again).keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in adapter_weights(again).items())
    assert torch.equal(again.get_input_embeddings().weight, build(LLAMA).get_input_embeddings().weight)


def test_saved_while_merged_with_the_embedding_of_a_resized_base(tmp_path):
    """PEFT puts that into the file: the base's own, or the adapter would be applied twice."""
    build(LLAMA).save_pretrained(tmp_path / "base")

    def resized():
        base = LLAMA.heads["lm"].from_pretrained(tmp_path / "base")
        torch.manual_seed(3)
        base.resize_token_embeddings(VOCAB + 3)
        return base.eval().to(DEVICE)

    model = get_peft_model(resized(), config(LLAMA, num_virtual_tokens=0)).eval()
    randomize(model)
    want = output(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    assert_close(output(again), want, **TOLERANCE)


def test_a_state_holds_the_base_and_is_not_loaded_into_a_merged_table():
    model, base, _ = mergeable()
    model.merge_adapter()
    state = model.state_dict()
    (key,) = (key for key in state if key.endswith("embed_tokens.base_layer.weight"))
    assert torch.equal(state[key], base.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=r"cannot be loaded while adapter 'default' is merged.*unmerge_adapter"):
        model.load_state_dict(state)
    model.unmerge_adapter()
    model.load_state_dict(state)
    assert torch.equal(model.base_model.layer.weight, base.get_input_embeddings().weight)


def test_token_types_are_not_adapted():
    """GPT-2 looks them up in the word embedding."""
    model, _, _ = mergeable(FAMILIES["gpt2"])
    inputs = {"input_ids": ids(1, 6), "token_type_ids": ids(1, 6, seed=4)}
    with torch.no_grad():
        want = model(**inputs).logits
        model.merge_adapter()
        assert_close(model(**inputs).logits, want, **TOLERANCE)


def test_merging_twice_changes_nothing():
    model, _, _ = mergeable()
    model.merge_adapter()
    table = model.base_model.layer.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(model.base_model.layer.base_layer.weight, table)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_another_adapter_of_the_model():
    model, base, _ = mergeable()
    weights = add(model, "b", seed=2, num_virtual_tokens=0)
    model.eval()
    model.merge_adapter(adapter_names=["b"])
    assert_close(output(model), row_output(base, weights, ids(1, 6)[0]), **TOLERANCE)


def test_another_adapter_while_one_with_a_prompt_is_active():
    model, base, weights = adapted(LLAMA)
    others = add(model, "b", seed=2, num_virtual_tokens=0)
    model.eval()
    with pytest.raises(
        ValueError, match=r"'b' cannot be merged while 'default' is active: the 4 .*set_adapter\('b'\)"
    ):
        model.merge_adapter(adapter_names=["b"])
    assert_close(output(model), want_of(base, weights, LLAMA), **TOLERANCE)
    model.set_adapter("b")
    model.merge_adapter(adapter_names=["b"])
    assert_close(output(model), want_of(base, others, LLAMA), **TOLERANCE)


def test_unloading_with_another_adapter_than_the_active_one_merged():
    model, base, _ = adapted(LLAMA)
    others = add(model, "b", seed=2, num_virtual_tokens=0)
    plain = model.merge_and_unload(adapter_names=["b"]).eval()
    assert_close(output(plain), want_of(base, others, LLAMA), **TOLERANCE)


# ---- what is refused ------------------------------------------------------------------------------------------------

MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "safe_merge": lambda model: model.merge_adapter(safe_merge=True),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("family", [LLAMA, FAMILIES["t5"]], ids=str)
def test_virtual_tokens_cannot_be_merged_and_nothing_changes(family, merge):
    model, _, _ = adapted(family)
    want, before = output(model, family), [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="4 virtual tokens are not weights of the base") as error:
        merge(model)
    assert "export_model" in str(error.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert torch.equal(output(model, family), want)


def test_values_that_are_not_finite():
    model, base, _ = mergeable()
    model.base_model.layer.input_tuning_fc2["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="Adapter 'default' would bring NaN or infinite values"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.layer.weight, base.get_input_embeddings().weight)
    assert not model.base_model.layer.merged


def test_two_adapters_at_once():
    model, _, _ = mergeable()
    add(model, "b", seed=2, num_virtual_tokens=0)
    with pytest.raises(ValueError, match=r"Only one input-tuning adapter can be merged .*\['default', 'b'"):
        model.merge_adapter(adapter_names=["default", "b"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default', 'b'\]"):
        model.merge_adapter(adapter_names=["b"])


def test_what_needs_the_base_embedding_says_so_while_it_is_merged(tmp_path):
    model, _, _ = mergeable()
    model.merge_adapter()
    calls = {
        "adapter_names": lambda: model(input_ids=ids(1, 6), adapter_names=["__base__"]),
        "add_adapter": lambda: model.add_adapter("b", config(LLAMA)),
        "export": lambda: export_model(model, tmp_path / "plain"),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="unmerge_adapter"):
            call()
    assert not list(tmp_path.iterdir())


def test_an_embedding_on_meta():
    with torch.device("meta"):
        model = get_peft_model(transformers.LlamaForCausalLM(LLAMA.config()), config(LLAMA, num_virtual_tokens=0))
    with pytest.raises(ValueError, match="offloaded"):
        model.merge_adapter()


# ---- memory ---------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active and still alive."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() in self.seen:
            return
        self.seen.add(storage.data_ptr())
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage.data_ptr(), storage.nbytes())

    def _forget(self, pointer: int, size: int) -> None:
        self.seen.discard(pointer)
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folding_needs_less_than_a_block_of_8192_rows_beside_the_table(dtype):
    words, width = 20_000, 64
    layer = InputTuningLayer(nn.Embedding(words, width, dtype=dtype))
    layer.update_layer("default", config(num_virtual_tokens=0, adapter_hidden_dim=None))
    table, done = torch.empty(words, width, dtype=dtype), []
    with LiveBytes(table, *layer.parameters()) as memory:
        layer.fold_into(table, "default", lambda *at: done.append(at))
    assert 0 < memory.peak < 8192 * width * 4
    assert done[-1] == (words, words)
    assert len(done) > 2


def test_the_folded_table():
    model, base, weights = adapted(FAMILIES["gemma2"])
    table = torch.full((101, 32), 7.0, device=DEVICE)
    model.base_model.layer.fold_into(table, "default")
    scale = 32**0.5
    embeddings = encoder_of(base).get_input_embeddings().weight.detach() * scale
    assert_close(table[:97], transform(weights, embeddings) / scale, atol=1e-5, rtol=1e-4)
    assert (table[97:] == 7).all()


def test_a_table_in_float64_is_merged_in_float64():
    base = build(LLAMA).double().eval()
    model = get_peft_model(copy.deepcopy(base), config(LLAMA, num_virtual_tokens=0), autocast_adapter_dtype=False)
    model = model.double().eval()
    randomize(model)
    row = ids(1, 6)
    with torch.no_grad():
        want = model(input_ids=row).logits
        model.merge_adapter()
        assert_close(model(input_ids=row).logits, want, atol=1e-12, rtol=1e-12)
