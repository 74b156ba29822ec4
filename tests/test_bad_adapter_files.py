"""A file that does not fit is refused at loading, or at the first use where loading is not in our hands: never a
silently wrong result, and never a half-loaded adapter beside one that works."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from adapters import adapted
from device import DEVICE
from families import FAMILIES, build, ids

LLAMA = FAMILIES["llama"]
X = ids(1, 6)
AT = "base_model.model.model.embed_tokens.input_tuning_"


# ---- ways to spoil a file -----------------------------------------------------------------------------------------


def change_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return spoil


def change_config(**changes) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def cut_off(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_off_in_the_header(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def empty(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"")


def no_tensors(tensors: dict) -> None:
    tensors.clear()
    tensors["something.else"] = torch.zeros(1)


def put(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: tensors.update({AT + name: value}))


def drop(name: str) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: tensors.pop(AT + name))


def poison(value: float) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: tensors[AT + "fc2.weight"].view(-1)[3:4].fill_(value))


SPOILED = {
    # what is wrong, and what the message of PEFT's way must hold
    "shape of the prompt": (put("prompt.weight", torch.zeros(5, 32)), ["input_tuning_prompt", "(5, 32)", "(4, 32)"]),
    "shape of a matrix": (put("fc1.weight", torch.zeros(24, 31)), ["input_tuning_fc1", "(24, 31)", "(24, 32)"]),
    "another embedding size": (
        change_tensors(
            lambda t: t.update({k: torch.zeros([48 if n == 32 else n for n in v.shape]) for k, v in t.items()})
        ),
        ["(4, 48)", "embedding size 32", "base model"],
    ),
    "prompt is missing": (drop("prompt.weight"), ["no `input_tuning_prompt.weight`", "incomplete"]),
    "first matrix is missing": (drop("fc1.weight"), ["no `input_tuning_fc1.weight`", "incomplete"]),
    "second matrix is missing": (drop("fc2.weight"), ["no `input_tuning_fc2.weight`", "incomplete"]),
    "nothing that belongs here": (change_tensors(no_tensors), ["no `input_tuning_prompt.weight`", "incomplete"]),
    "a bias too many": (put("fc1.bias", torch.zeros(24)), ["input_tuning_fc1", "bias", "does not have"]),
    "another method's tensor": (
        change_tensors(lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.zeros(2, 32)})),
        ["model.norm.lora_A", "does not have"],
    ),
    "a tensor of the base": (
        change_tensors(lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)})),
        ["model.norm.weight", "does not have"],
    ),
    "embedding of another vocabulary": (
        change_tensors(lambda t: t.update({f"{AT.rpartition('.')[0]}.base_layer.weight": torch.zeros(100, 32)})),
        ["embed_tokens.base_layer.weight", "(100, 32)", "(97, 32)", "resized"],
    ),
    "NaN": (poison(float("nan")), ["input_tuning_fc2.weight", "NaN", "earlier checkpoint"]),
    "infinity": (poison(float("inf")), ["input_tuning_fc2.weight", "infinite", "earlier checkpoint"]),
    "configuration: longer prompt": (change_config(num_virtual_tokens=6), ["(4, 32)", "(6, 32)", "config"]),
    "configuration: other width": (change_config(adapter_hidden_dim=8), ["(24, 32)", "(8, 32)", "config"]),
    "configuration: paper's width": (change_config(adapter_hidden_dim=None), ["(24, 32)", "(64, 32)", "config"]),
    "configuration: biases": (change_config(adapter_bias=True), ["no `input_tuning_fc1.bias`", "config"]),
    "configuration: no adapter": (change_config(adapter_hidden_dim=0), ["input_tuning_fc1", "does not have"]),
    "configuration: no prompt": (change_config(num_virtual_tokens=0), ["input_tuning_prompt", "does not have"]),
}
UNREADABLE = {"cut off": cut_off, "cut off in the header": cut_off_in_the_header, "empty": empty}
each_spoiled = pytest.mark.parametrize(("spoil", "said"), SPOILED.values(), ids=SPOILED)
each_unreadable = pytest.mark.parametrize("spoil", UNREADABLE.values(), ids=UNREADABLE)
each_memory_use = pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])


@pytest.fixture
def file(tmp_path) -> Path:
    """An adapter's folder, good until it is spoiled."""
    adapted(LLAMA)[0].save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def working() -> PeftModel:
    """A model whose adapter works, of another shape than the one in the file."""
    return adapted(LLAMA, seed=5, num_virtual_tokens=3, adapter_hidden_dim=8)[0]


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=X).logits


def says(error, parts: list[str]) -> None:
    missing = [part for part in parts if part not in str(error.value)]
    assert not missing, str(error.value)


def test_the_unspoiled_file_is_taken(file):
    want = answer(adapted(LLAMA)[0])
    assert torch.equal(answer(PeftModel.from_pretrained(build(LLAMA), file)), want)
    injected = build(LLAMA)
    injected.load_adapter(str(file))
    assert torch.equal(answer(injected), want)


# ---- PeftModel.from_pretrained ------------------------------------------------------------------------------------


@each_memory_use
@each_spoiled
def test_from_pretrained_refuses(file, spoil, said, low_cpu_mem_usage):
    spoil(file)
    with pytest.raises(ValueError, match=r"adapter") as error:
        PeftModel.from_pretrained(build(LLAMA), file, low_cpu_mem_usage=low_cpu_mem_usage)
    says(error, said)


@each_spoiled
def test_a_base_is_given_back_as_it_was(file, spoil, said):
    base = build(LLAMA)
    spoil(file)
    with pytest.raises(ValueError, match=r"adapter"):
        PeftModel.from_pretrained(base, file)
    fresh = build(LLAMA)
    assert [type(module) for module in base.modules()] == [type(module) for module in fresh.modules()]
    assert not [module for module in base.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert torch.equal(answer(base), answer(fresh))


@each_unreadable
def test_from_pretrained_does_not_take_what_it_cannot_read(file, spoil):
    spoil(file)
    with pytest.raises(Exception, match=r"(?i)header|incomplete|too small|deserializ"):
        PeftModel.from_pretrained(build(LLAMA), file)


def test_ignore_mismatched_sizes_does_not_make_up_weights(file):
    """PEFT would leave what does not fit at its first values, which here are none."""
    put("prompt.weight", torch.zeros(5, 32))(file)
    with pytest.raises(ValueError, match=r"\(5, 32\)"):
        PeftModel.from_pretrained(build(LLAMA), file, ignore_mismatched_sizes=True)


def test_a_file_for_another_model_names_both_sizes(file):
    """The whole file is sound, only it was made for embeddings of another size."""
    wide = LlamaForCausalLM(type(build(LLAMA).config)(**{**build(LLAMA).config.to_dict(), "hidden_size": 64})).eval()
    with pytest.raises(ValueError, match=r"shape \(4, 32\) in the file, but this model needs \(4, 64\)") as error:
        PeftModel.from_pretrained(wide, file)
    says(error, ["embedding size 64", "base model that it was trained on"])


# ---- a second adapter beside one that works -----------------------------------------------------------------------


def is_untouched(model: PeftModel, want: torch.Tensor, trainable: list[str]) -> None:
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert not [name for name in model.state_dict() if ".second." in name]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert torch.equal(answer(model), want)
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")


@each_memory_use
@each_spoiled
def test_second_adapter_is_refused_and_the_first_goes_on(file, working, spoil, said, low_cpu_mem_usage):
    want, trainable = answer(working), [name for name, p in working.named_parameters() if p.requires_grad]
    spoil(file)
    with pytest.raises(ValueError, match=r"second") as error:
        working.load_adapter(file, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    says(error, said)
    is_untouched(working, want, trainable)


@each_unreadable
def test_second_adapter_that_cannot_be_read_leaves_the_first_alone(file, working, spoil):
    """Reading fails inside PEFT, after it has made room for the adapter: what is left there must not pass for one."""
    want = answer(working)
    spoil(file)
    with pytest.raises(Exception, match=r"(?i)header|incomplete|too small|deserializ"):
        working.load_adapter(file, "second")
    assert torch.equal(answer(working), want)
    assert working.active_adapters == ["default"]
    if "second" in working.peft_config:
        working.set_adapter("second")
        with pytest.raises(ValueError, match="Adapter 'second' has no usable weights"):
            answer(working)
        working.set_adapter("default")
        with pytest.raises(ValueError, match="Adapter 'second' has no usable weights"):
            working(input_ids=X.repeat(2, 1), adapter_names=["default", "second"])
    assert torch.equal(answer(working), want)


@each_unreadable
def test_a_good_file_can_be_loaded_after_one_that_could_not_be_read(file, working, spoil):
    good = (file / "adapter_model.safetensors").read_bytes()
    spoil(file)
    with pytest.raises(Exception, match=r"(?i)header|incomplete|too small|deserializ"):
        working.load_adapter(file, "second")
    (file / "adapter_model.safetensors").write_bytes(good)
    working.load_adapter(file, "second")
    working.set_adapter("second")
    assert torch.equal(answer(working), answer(adapted(LLAMA)[0]))


IN_THE_TENSORS = {name: entry for name, entry in SPOILED.items() if not name.startswith("configuration")}


@pytest.mark.parametrize(("spoil", "said"), IN_THE_TENSORS.values(), ids=IN_THE_TENSORS)
def test_a_spoiled_file_is_not_loaded_over_an_adapter_that_works(file, spoil, said):
    """Trainers load a checkpoint into the adapter that is there; a bad one must not take away what was good."""
    model, _, _ = adapted(LLAMA, seed=7)
    want = answer(model)
    spoil(file)
    with pytest.raises(ValueError, match=r"default") as error:
        model.load_adapter(file, "default")
    says(error, said)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model), want)


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_spoiled_file_is_not_loaded_over_an_adapter_that_was_loaded_and_never_used(file, offloaded):
    want = answer(PeftModel.from_pretrained(build(LLAMA), file).eval())
    model = PeftModel.from_pretrained(build(LLAMA), file).eval()
    if offloaded:
        cpu_offload(model, execution_device=DEVICE)
    change_tensors(lambda tensors: tensors.pop(next(iter(tensors))))(file)
    with pytest.raises(ValueError, match="The file of adapter 'default' has no"):
        model.load_adapter(file, "default")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model), want)


@pytest.mark.parametrize("name", ["x", "model", "norm", "weight"])
def test_a_name_that_occurs_in_paths_does_not_open_the_base(file, name):
    change_tensors(lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.full((32,), 7.0)}))(
        file
    )
    base = build(LLAMA)
    before = base.model.norm.weight.clone()
    with pytest.raises(ValueError, match=r"holds `model.norm.weight`, which this adapter does not have"):
        PeftModel.from_pretrained(base, file, adapter_name=name)
    assert torch.equal(base.model.norm.weight, before)


# ---- state dicts in memory ----------------------------------------------------------------------------------------


def test_set_peft_model_state_dict_is_as_strict():
    model, _, _ = adapted(LLAMA)
    want = answer(model)
    tensors = get_peft_model_state_dict(model)
    tensors.pop(AT + "fc1.weight")
    with pytest.raises(ValueError, match=r"no `input_tuning_fc1.weight`"):
        set_peft_model_state_dict(model, tensors)
    assert torch.equal(answer(model), want)


# ---- transformers' load_adapter -----------------------------------------------------------------------------------

REFUSED_AT_LOAD = (
    "shape",
    "another embedding size",
    "configuration: longer",
    "configuration: other",
    "configuration: paper",
)
REPORTED = ("a bias too many", "another method's tensor", "configuration: no adapter", "configuration: no prompt")
# transformers itself takes tensors of the base model from any adapter file, of any method.
THEIRS = ("a tensor of the base", "embedding of another")


def of(names: tuple[str, ...]) -> dict:
    return {name: spoil for name, (spoil, _) in SPOILED.items() if name.startswith(names)}


ELSEWHERE = of(REFUSED_AT_LOAD + REPORTED + THEIRS)
AT_FIRST_USE = {name: spoil for name, (spoil, _) in SPOILED.items() if name not in ELSEWHERE}


@pytest.mark.parametrize("spoil", of(REFUSED_AT_LOAD).values(), ids=of(REFUSED_AT_LOAD))
def test_transformers_refuses_shapes_and_what_is_left_is_no_adapter(file, spoil):
    model = build(LLAMA)
    spoil(file)
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes"):
        model.load_adapter(str(file))
    with pytest.raises(ValueError, match="has no usable weights"):
        answer(model)
    model.delete_adapter("default")
    assert torch.equal(answer(model), answer(build(LLAMA)))


@pytest.mark.parametrize("is_trainable", [False, True], ids=["", "is_trainable"])
@pytest.mark.parametrize("spoil", AT_FIRST_USE.values(), ids=AT_FIRST_USE)
def test_transformers_takes_it_and_the_first_use_refuses_it(file, spoil, is_trainable):
    """transformers only warns; missing tensors stay NaN and are found."""
    model = build(LLAMA)
    spoil(file)
    model.load_adapter(str(file), is_trainable=is_trainable)
    for _ in range(2):
        with pytest.raises(ValueError, match="Adapter 'default' has no usable weights") as error:
            answer(model)
        says(error, ["`input_tuning_", "Load the adapter again from a complete file"])
    with pytest.raises(ValueError, match="has no usable weights"):
        model.generate(X, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("spoil", of(REPORTED).values(), ids=of(REPORTED))
def test_transformers_reports_tensors_that_the_configuration_does_not_have(file, spoil, caplog):
    """Left over at the end of its loading, which no method can hook into: its report names them."""
    model = build(LLAMA)
    spoil(file)
    logging.getLogger("transformers").propagate = True
    try:
        info = model.load_adapter(str(file))
    finally:
        logging.getLogger("transformers").propagate = False
    assert info.unexpected_keys
    assert "UNEXPECTED" in caplog.text


@each_unreadable
def test_transformers_does_not_take_what_it_cannot_read(file, spoil):
    model = build(LLAMA)
    spoil(file)
    with pytest.raises(Exception, match=r"(?i)header|incomplete|too small|deserializ|file size"):
        model.load_adapter(str(file))
    with pytest.raises(ValueError, match="has no usable weights"):
        answer(model)


@pytest.mark.parametrize("spoil", AT_FIRST_USE.values(), ids=AT_FIRST_USE)
def test_transformers_second_adapter_leaves_the_first_alone(file, spoil, tmp_path_factory):
    first = tmp_path_factory.mktemp("first")
    adapted(LLAMA, seed=5)[0].save_pretrained(first)
    model = build(LLAMA)
    model.load_adapter(str(first), "first")
    want = answer(model)
    spoil(file)
    model.load_adapter(str(file), "second")
    model.set_adapter("first")
    assert torch.equal(answer(model), want)
    model.set_adapter("second")
    with pytest.raises(ValueError, match="Adapter 'second' has no usable weights"):
        answer(model)
    model.delete_adapter("second")
    assert torch.equal(answer(model), want)


@pytest.mark.parametrize("spoil", of(("prompt is missing", "NaN")).values(), ids=["prompt is missing", "NaN"])
def test_from_pretrained_of_transformers_with_an_adapter_folder(file, tmp_path_factory, spoil):
    base = tmp_path_factory.mktemp("base")
    build(LLAMA).save_pretrained(base)
    change_config(base_model_name_or_path=str(base))(file)
    spoil(file)
    model = LlamaForCausalLM.from_pretrained(file).to(DEVICE)
    with pytest.raises(ValueError, match="has no usable weights"):
        answer(model)


HEAD_FILES = {
    "adapter is incomplete": (drop("fc1.weight"), ["no `input_tuning_fc1.weight`"]),
    "head of other labels": (
        change_tensors(lambda t: t.update({"base_model.model.score.weight": torch.zeros(5, 32)})),
        ["score", "(5, 32)", "(3, 32)"],
    ),
    "head with NaN": (
        change_tensors(lambda t: t["base_model.model.score.weight"].fill_(float("nan"))),
        ["score", "NaN"],
    ),
}


@pytest.mark.parametrize(("spoil", "said"), HEAD_FILES.values(), ids=HEAD_FILES)
def test_a_refused_adapter_leaves_no_head_behind(tmp_path, spoil, said):
    """A trained head is one more copy beside the adapter; both go."""
    model, _, _ = adapted(LLAMA, "seq_cls", task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    before, want = list(model.state_dict()), answer(model)
    spoil(tmp_path)
    with pytest.raises(ValueError, match="adapter 'second'") as error:
        model.load_adapter(tmp_path, "second")
    says(error, said)
    assert list(model.state_dict()) == before
    assert torch.equal(answer(model), want)
    base = build(LLAMA, "seq_cls")
    with pytest.raises(ValueError, match="adapter 'default'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == list(build(LLAMA, "seq_cls").state_dict())


@pytest.mark.parametrize("head", ["seq_cls", "token_cls"])
def test_a_head_that_is_missing_is_refused(tmp_path, head):
    """PEFT puts the classification head into the file; without it the head would stay at random."""
    task = {"seq_cls": "SEQ_CLS", "token_cls": "TOKEN_CLS"}[head]
    adapted(LLAMA, head, task_type=task)[0].save_pretrained(tmp_path)
    change_tensors(lambda t: [t.pop(name) for name in list(t) if "input_tuning" not in name])(tmp_path)
    with pytest.raises((ValueError, KeyError), match="score"):
        PeftModel.from_pretrained(build(LLAMA, head), tmp_path)
