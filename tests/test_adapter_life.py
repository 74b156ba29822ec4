"""The life of an adapter in a model: added, switched, disabled, deleted, unloaded. The base model never changes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from adapters import adapted, add, config, randomize
from device import DEVICE
from families import ALL, FAMILIES, SEQ2SEQ, VOCAB, build, ids
from oracles import adapter_weights, encoder_of, row_output
from peft_input_tuning import InputTuningLayer

each_family = pytest.mark.parametrize("family", ALL, ids=str)
LLAMA = FAMILIES["llama"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}  # of the formula in another order of sums
TIED = [FAMILIES[name] for name in ("gemma2", "gpt2", "opt", "bloom", "t5", "bart", "bert", "roberta")]


def more(family, batch: int = 2) -> dict:
    return {"decoder_input_ids": ids(batch, 4, seed=9)} if family.kind == "seq2seq" else {}


@torch.no_grad()
def output(model: nn.Module, family=LLAMA, length: int = 6) -> torch.Tensor:
    return model(input_ids=ids(2, length), **more(family)).logits


def frozen(family) -> nn.Module:
    """An untouched base without gradients: kernels differ where they are wanted."""
    return build(family).requires_grad_(False)


def structure(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]


def sharing(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def steps(model: PeftModel, family, count: int = 3) -> None:
    """A few steps of an optimiser that would move whatever it is given."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(count):
        tokens = ids(2, 6, seed=step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# ---- the base is never changed ------------------------------------------------------------------------------------


@pytest.mark.feature("training")
@each_family
def test_training_changes_the_adapter_alone(family):
    """Tied heads and decoders' embeddings share the weight that the adapter wraps."""
    model, base, before = adapted(family)
    before = {name: tensor.clone() for name, tensor in before.items()}
    steps(model, family)
    moved = adapter_weights(model)
    assert not [name for name in before if torch.equal(before[name], moved[name])]
    inside = model.get_base_model()
    assert sharing(inside) == [
        [n.replace(path(family), path(family) + ".base_layer") for n in g] for g in sharing(base)
    ]
    with model.disable_adapter():
        assert torch.equal(output(model, family), output(base, family))
    after = model.unload().state_dict()
    assert {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, after[name])} == set()


def path(family) -> str:
    """Where the wrapped embedding stands."""
    base = build(family)
    encoder = encoder_of(base)
    return next(
        name
        for name, module in base.named_modules(remove_duplicate=False)
        if module is encoder.get_input_embeddings() and (family.kind != "seq2seq" or "encoder" in name)
    )


@pytest.mark.feature("unload")
@each_family
def test_unload_gives_back_what_went_in(family):
    base, fresh = build(family), build(family)
    model = get_peft_model(base, config(family))
    randomize(model)
    output(model, family)
    given_back = model.unload()
    assert given_back is base
    assert structure(given_back) == structure(fresh)
    assert sharing(given_back) == sharing(fresh)
    assert hooks(given_back) == 0
    assert list(given_back.state_dict()) == list(fresh.state_dict())
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(given_back.state_dict()[name], tensor)
    assert torch.equal(output(given_back, family), output(frozen(family), family))


@each_family
def test_a_base_is_wrapped_again_after_unload(family):
    first, _, _ = adapted(family)
    want = output(first, family)
    model = get_peft_model(first.unload(), config(family, num_virtual_tokens=2, adapter_hidden_dim=8)).eval()
    randomize(model, seed=5)
    assert_close(output(model, family)[0], row_of(family, model, ids(2, 6)[0]), **TOLERANCE)
    again = get_peft_model(model.unload(), config(family)).eval()
    randomize(again)
    assert torch.equal(output(again, family), want)


def row_of(family, model, row: torch.Tensor) -> torch.Tensor:
    """The formula for the first row of `output`."""
    own = {name: value[:1] for name, value in more(family).items()}
    return row_output(build(family), adapter_weights(model), row, **own)


@pytest.mark.parametrize("family", [f for f in ALL if f.name not in ("bert", "roberta")], ids=str)
def test_tie_weights_after_wrapping_changes_nothing(family):
    """T5 assigns to `.weight` of its embeddings there, which on a wrapper raised "attribute already exists".

    BERT and RoBERTa look parameters up by pattern there, and raise for an embedding that any method of PEFT wraps.
    """
    model, base, _ = adapted(family)
    want = output(model, family)
    model.get_base_model().tie_weights()
    assert torch.equal(output(model, family), want)
    assert sharing(model.unload()) == sharing(base)


def test_tie_weights_after_wrapping_a_tied_llama():
    llama_config = LLAMA.config()
    llama_config.tie_word_embeddings = True
    base = LLAMA.heads["lm"](llama_config).eval().to(DEVICE)
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, config(LLAMA)).eval()
    randomize(model)
    want = output(model)
    base.tie_weights()
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight
    assert torch.equal(output(model), want)
    assert_close(want[0], row_output(fresh, adapter_weights(model), ids(2, 6)[0]), **TOLERANCE)


# ---- adding, switching, disabling, deleting -----------------------------------------------------------------------


@each_family
def test_each_adapter_is_the_formula_with_its_own_weights(family):
    model, _, _ = adapted(family)
    add(model, "second", seed=5, num_virtual_tokens=2, adapter_hidden_dim=8)
    add(model, "prompt only", seed=6, adapter_hidden_dim=0)
    add(model, "adapter only", seed=7, num_virtual_tokens=0)
    for name in ("default", "second", "prompt only", "adapter only"):
        model.set_adapter(name)
        assert model.active_adapter == name
        own = {key: value[:1] for key, value in more(family).items()}
        want = row_output(build(family), adapter_weights(model, name), ids(2, 6)[0], **own)
        assert_close(output(model, family)[0], want, **TOLERANCE)


@each_family
def test_disabled_is_the_base_bit_for_bit(family):
    model, base, _ = adapted(family)
    want = output(model, family)
    with model.disable_adapter():
        assert torch.equal(output(model, family), output(base, family))
    assert torch.equal(output(model, family), want)


def test_disabled_even_after_an_error():
    model, _, _ = adapted(LLAMA)
    want = output(model)
    with pytest.raises(RuntimeError, match="stop"), model.disable_adapter():
        raise RuntimeError("stop")
    assert torch.equal(output(model), want)


def test_only_the_active_adapter_is_trained():
    model, _, _ = adapted(LLAMA)
    add(model, "second", seed=5)
    for active, other in (("default", "second"), ("second", "default")):
        model.set_adapter(active)
        ours = {name: p.requires_grad for name, p in model.named_parameters() if "input_tuning" in name}
        assert {wanted for name, wanted in ours.items() if f".{active}." in name} == {True}
        assert {wanted for name, wanted in ours.items() if f".{other}." in name} == {False}


def test_set_adapter_for_inference_leaves_nothing_to_train():
    model, _, _ = adapted(LLAMA)
    add(model, "second", seed=5)
    model.set_adapter("second", inference_mode=True)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_deleting_another_adapter_leaves_the_active_one():
    model, _, _ = adapted(LLAMA)
    want = output(model)
    add(model, "second", seed=5)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if ".second." in name]
    assert torch.equal(output(model), want)


def test_deleting_the_active_adapter_activates_the_one_that_is_left():
    model, _, _ = adapted(LLAMA)
    add(model, "second", seed=5)
    model.set_adapter("second")
    want = output(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(output(model), want)


@each_family
def test_deleting_the_last_adapter_leaves_the_base(family):
    """PEFT's model has no configuration to go by then, whatever the method was; the base model in it works."""
    model, base, _ = adapted(family)
    model.delete_adapter("default")
    assert torch.equal(output(model.base_model.model, family), output(base, family))
    model.add_adapter("again", config(family))
    randomize(model, "again")
    model.set_adapter("again")
    assert torch.equal(output(model, family), output(adapted(family)[0], family))


def test_an_adapter_can_be_added_again_under_a_deleted_name():
    model, _, _ = adapted(LLAMA)
    add(model, "second", seed=5)
    model.delete_adapter("second")
    weights = add(model, "second", seed=6, num_virtual_tokens=2)
    model.set_adapter("second")
    assert_close(output(model)[0], row_output(build(LLAMA), weights, ids(2, 6)[0]), **TOLERANCE)


UNKNOWN = {
    "set_adapter": lambda model: model.set_adapter("nobody"),
    "set_adapter of the tuner": lambda model: model.base_model.set_adapter("nobody"),
    "delete_adapter": lambda model: model.delete_adapter("nobody"),
    "adapter_names": lambda model: model(input_ids=ids(2, 6), adapter_names=["default", "nobody"]),
}


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_adapter_is_refused(call):
    model, _, _ = adapted(LLAMA)
    want = output(model)
    with pytest.raises(ValueError, match="nobody"):
        call(model)
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model), want)


def test_two_adapters_at_once_are_refused():
    model, _, _ = adapted(LLAMA)
    add(model, "second", seed=5)
    want = output(model)
    with pytest.raises(ValueError, match=r"Only one input-tuning adapter can be active") as error:
        model.base_model.set_adapter(["default", "second"])
    assert "['default', 'second']" in str(error.value)
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model), want)


def test_another_method_cannot_be_added_to_the_peft_model():
    model, _, _ = adapted(LLAMA)
    with pytest.raises(ValueError, match=r"INPUT_TUNING.*LORA"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert list(model.peft_config) == ["default"]


# ---- copies -------------------------------------------------------------------------------------------------------


@each_family
def test_a_copy_lives_on_its_own(family):
    """Hooks find the layer by its path: a copy's hooks must not reach into the original."""
    model, _, _ = adapted(family)
    want = output(model, family)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, family), want)
    randomize(twin, seed=8)
    assert torch.equal(output(model, family), want)
    assert_close(output(twin, family)[0], row_of(family, twin, ids(2, 6)[0]), **TOLERANCE)
    twin.unload()
    assert torch.equal(output(model, family), want)
    assert hooks(twin.get_base_model()) == 0


@each_family
def test_the_whole_model_is_pickled(family):
    model, _, _ = adapted(family)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(output(loaded, family), output(model, family))
    randomize(loaded, seed=8)
    assert_close(output(loaded, family)[0], row_of(family, loaded, ids(2, 6)[0]), **TOLERANCE)


# ---- the embedding before and after -------------------------------------------------------------------------------


@each_family
def test_resized_before_wrapping(family):
    """T5 and BART hold ONE embedding module in three places after a resize: wrapping must take the encoder's only."""
    bases = [build(family), build(family)]
    for base in bases:
        torch.manual_seed(0)
        base.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    model = get_peft_model(bases[0], config(family)).eval()
    randomize(model)
    row = torch.tensor([[VOCAB + 1, 7, VOCAB + 4, 9]], device=DEVICE)
    own = {name: value[:1] for name, value in more(family).items()}
    with torch.no_grad():
        got = model(input_ids=row, **own).logits[0]
    assert_close(got, row_output(bases[1], adapter_weights(model), row[0], **own), **TOLERANCE)
    assert sum(isinstance(module, InputTuningLayer) for module in model.modules()) == 1


@pytest.mark.parametrize("family", SEQ2SEQ, ids=str)
def test_a_resized_shared_embedding_comes_back_shared(family):
    base = build(family)
    base.resize_token_embeddings(VOCAB + 5)
    before, tied = structure(base), sharing(base)
    encoder = base.get_encoder()
    assert encoder.embed_tokens is base.get_input_embeddings()  # the trap: one module in several places
    model = get_peft_model(base, config(family))
    randomize(model)
    assert not isinstance(base.get_decoder().embed_tokens, InputTuningLayer)
    steps(model, family)
    model.unload()
    assert structure(base) == before
    assert sharing(base) == tied
    assert encoder.embed_tokens is base.get_decoder().embed_tokens is base.get_input_embeddings()


RESIZES = {
    "PeftModel": lambda model: model.resize_token_embeddings(VOCAB + 5),
    "the tuner": lambda model: model.base_model.resize_token_embeddings(VOCAB + 5),
    "rounded": lambda model: model.resize_token_embeddings(VOCAB, pad_to_multiple_of=64),
}


@pytest.mark.parametrize("resize", RESIZES.values(), ids=RESIZES)
@pytest.mark.parametrize("family", [LLAMA, *TIED], ids=str)
def test_resizing_after_wrapping_is_refused(family, resize):
    model, _, _ = adapted(family)
    want = output(model, family)
    with pytest.raises(ValueError, match=r"cannot be resized once input-tuning wraps it") as error:
        resize(model)
    assert "`new_num_tokens`" in str(error.value)
    assert "Resize the base model first" in str(error.value)
    assert torch.equal(output(model, family), want)


def test_a_resize_to_the_same_size_is_no_resize():
    """Trainers call it whatever the size is."""
    model, _, _ = adapted(LLAMA)
    want = output(model)
    model.resize_token_embeddings(VOCAB)
    assert torch.equal(output(model), want)


@each_family
def test_resizing_the_base_behind_the_wrapper_is_noticed(family):
    """The way round PEFT, and the way of adapters that transformers manages: what comes must not be silently wrong."""
    model = build(family)
    model.add_adapter(config(family))
    randomize(model)

    def resize_and_use():
        model.resize_token_embeddings(VOCAB + 5)
        output(model, family)

    with pytest.raises(ValueError, match=r"`new_num_tokens` is 102.*Resize the base model first"):
        resize_and_use()


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["t5"], FAMILIES["bert"]], ids=str)
def test_replacing_the_embedding_is_noticed_at_the_first_use(family):
    model, base, _ = adapted(family)
    inside = encoder_of(model.get_base_model())
    inside.set_input_embeddings(copy.deepcopy(encoder_of(base).get_input_embeddings()))
    with pytest.raises(ValueError, match="was resized, replaced or wrapped after input-tuning was added"):
        output(model, family)


@pytest.mark.parametrize("family", ALL, ids=str)
def test_the_embedding_in_modules_to_save_is_refused(family):
    name = path(family).rpartition(".")[2]
    base = build(family)
    with pytest.raises(ValueError, match=f"`modules_to_save` names '{name}'") as error:
        get_peft_model(base, config(family, modules_to_save=[name]))
    assert "Remove it" in str(error.value)
    assert structure(base) == structure(build(family))
    assert torch.equal(output(base, family), output(build(family), family))


@pytest.mark.parametrize("family", SEQ2SEQ, ids=str)
def test_the_shared_embedding_in_modules_to_save_is_refused(family):
    """Training T5's and BART's `shared` would train the weight that the adapter wraps, under another name."""
    with pytest.raises(ValueError, match="`modules_to_save` names 'shared'"):
        get_peft_model(build(family), config(family, modules_to_save=["shared"]))


# ---- LoRA on the embedding ----------------------------------------------------------------------------------------


def lora_on(family) -> LoraConfig:
    return LoraConfig(target_modules=[path(family).rpartition(".")[2]], r=4, init_lora_weights=False)


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["gemma2"], FAMILIES["gpt2"]], ids=str)
def test_lora_on_the_embedding_before_input_tuning_works(family):
    """The input-adapter then adapts what LoRA made of the embeddings."""
    torch.manual_seed(1)
    with_lora = build(family)
    with_lora.add_adapter(lora_on(family), "lora")
    model = copy.deepcopy(with_lora)
    model.add_adapter(config(family), "prompt")
    randomize(model, "prompt")
    model.set_adapter(["lora", "prompt"])
    want = row_output(with_lora, adapter_weights(model, "prompt"), ids(2, 6)[0])
    assert_close(output(model, family)[0], want, **TOLERANCE)
    without = row_output(build(family), adapter_weights(model, "prompt"), ids(2, 6)[0])
    assert not torch.allclose(want, without, atol=1e-2)


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["gpt2"], FAMILIES["bert"]], ids=str)
def test_lora_on_the_embedding_after_input_tuning_is_refused(family):
    model = build(family)
    model.add_adapter(config(family), "prompt")
    randomize(model, "prompt")
    model.add_adapter(lora_on(family), "lora")
    for _ in range(2):
        with pytest.raises(ValueError, match="was resized, replaced or wrapped after input-tuning was added") as error:
            output(model, family)
        assert "add other adapters to it, before input-tuning" in str(error.value)
    with pytest.raises(ValueError, match="was resized, replaced or wrapped after input-tuning was added"):
        model.add_adapter(config(family), "another")
