"""Saved = loaded, on every path that PEFT offers, bit for bit; and the file holds the adapter alone."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from adapters import SIZES, adapted, add, config, randomize
from device import DEVICE
from families import ALL, EOS, FAMILIES, SEQ2SEQ, VOCAB, build, ids
from oracles import adapter_weights, encoder_of
from peft_input_tuning import InputTuningConfig

each_family = pytest.mark.parametrize("family", ALL, ids=str)
LLAMA = FAMILIES["llama"]
EMBEDDING = {  # where the wrapped embedding stands in each model with a language model head
    "gpt2": "transformer.wte",
    "opt": "model.decoder.embed_tokens",
    "bloom": "transformer.word_embeddings",
    "gpt_neox": "gpt_neox.embed_in",
    "t5": "encoder.embed_tokens",
    "bart": "model.encoder.embed_tokens",
    "bert": "bert.embeddings.word_embeddings",
    "roberta": "roberta.embeddings.word_embeddings",
}
HEADS = [(f, head) for f in ALL for head in ("seq_cls", "token_cls", "qa") if head in f.heads]
TASKS = {"seq_cls": "SEQ_CLS", "token_cls": "TOKEN_CLS", "qa": "QUESTION_ANS"}
HEAD_MODULES = {
    "seq_cls": ("score", "classifier", "classification_head"),
    "token_cls": ("score", "classifier"),
    "qa": ("qa_outputs",),
}


@torch.no_grad()
def output(model: nn.Module, family, head: str = "lm") -> torch.Tensor:
    """What a model says to a fixed batch: logits or start logits."""
    more = {"decoder_input_ids": ids(2, 4, seed=9)} if family.kind == "seq2seq" and head == "lm" else {}
    tokens = ids(2, 6)
    tokens[:, -1] = EOS  # where T5 and BART classify
    out = model.eval()(input_ids=tokens, **more)
    return next(out[key] for key in ("logits", "start_logits") if key in out)


def saved(directory: Path, family, head: str = "lm", **changes) -> tuple[torch.Tensor, dict]:
    """Saves an adapter with weights that matter; returns what its model says, and the weights."""
    model, _, weights = adapted(family, head, **changes)
    model.save_pretrained(directory)
    return output(model, family, head), weights


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- PeftModel.from_pretrained ------------------------------------------------------------------------------------

WAYS = {
    "as it is": {},
    "under another name": {"adapter_name": "other"},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "low_cpu_mem_usage, another name": {"low_cpu_mem_usage": True, "adapter_name": "other"},
    "is_trainable": {"is_trainable": True},
}


@pytest.mark.feature("saving")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@each_family
def test_loaded_is_saved(tmp_path, family, way):
    want, _ = saved(tmp_path, family)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, **way)
    assert torch.equal(output(loaded, family), want)


@each_family
def test_the_file_holds_the_adapter_alone(tmp_path, family):
    """Three tensors of the sizes that were asked for, under names without the adapter's name."""
    _, weights = saved(tmp_path, family, prompt_scale=1.0)
    at = f"base_model.model.{EMBEDDING.get(family.name, 'model.embed_tokens')}.input_tuning_"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert set(stored) == {at + name for name in ("prompt.weight", "fc1.weight", "fc2.weight")}
    for name, tensor in stored.items():
        assert torch.equal(tensor.to(DEVICE), weights[name.removeprefix(at)])


@each_family
def test_a_file_from_before_there_was_a_scale_says_what_it_said(tmp_path, family):
    """Its configuration has no `prompt_scale`, its parameter is the prompt."""
    want, _ = saved(tmp_path, family, prompt_scale=1.0)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    del written["prompt_scale"]
    file.write_text(json.dumps(written))
    assert torch.equal(output(PeftModel.from_pretrained(build(family), tmp_path), family), want)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"adapter_hidden_dim": 0}, {"prompt.weight"}),
        ({"num_virtual_tokens": 0}, {"fc1.weight", "fc2.weight"}),
        ({"adapter_bias": True}, {"prompt.weight", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}),
        ({"adapter_activation": "prelu"}, {"prompt.weight", "fc1.weight", "fc2.weight", "activation.weight"}),
    ],
    ids=["prompt only", "adapter only", "bias", "activation with a weight"],
)
def test_other_shapes_of_the_method_are_saved_whole(tmp_path, changes, kept):
    want, _ = saved(tmp_path, LLAMA, **changes)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition("input_tuning_")[2] for name in stored} == kept
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path, adapter_name="other")
    assert torch.equal(output(loaded, LLAMA), want)


@each_family
def test_is_trainable_decides_what_has_gradients(tmp_path, family):
    saved(tmp_path, family)
    frozen = PeftModel.from_pretrained(build(family), tmp_path)
    assert trainable(frozen) == set()
    training = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True, adapter_name="other")
    assert {name.rpartition("input_tuning_")[2] for name in trainable(training)} == {
        "prompt.other.weight",
        "fc1.other.weight",
        "fc2.other.weight",
    }


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_training_goes_on_after_loading(tmp_path, low_cpu_mem_usage):
    saved(tmp_path, LLAMA)
    model = PeftModel.from_pretrained(
        build(LLAMA), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    ).train()
    before = adapter_weights(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    model(input_ids=ids(2, 6), labels=ids(2, 6)).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not [name for name, tensor in adapter_weights(model).items() if torch.equal(tensor, before[name])]


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "bfloat16 adapter"])
@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("llama", "gemma2", "t5", "bert")], ids=str)
def test_on_a_bfloat16_base(tmp_path, family, autocast):
    """PEFT keeps adapters in float32 over a bfloat16 base, unless it is told not to."""
    model = get_peft_model(build(family).bfloat16(), config(family), autocast_adapter_dtype=autocast)
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family).bfloat16(), tmp_path, autocast_adapter_dtype=autocast)
    dtype = torch.float32 if autocast else torch.bfloat16
    assert {tensor.dtype for tensor in adapter_weights(loaded).values()} == {dtype}
    got = output(loaded, family)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, output(model, family))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_several_adapters_are_saved_side_by_side(tmp_path, low_cpu_mem_usage):
    model, _, _ = adapted(LLAMA)
    add(model, "second", seed=5, num_virtual_tokens=2, adapter_hidden_dim=8, adapter_activation="gelu")
    add(model, "default_2", seed=6, num_virtual_tokens=3)  # a name that contains another's
    want = {}
    for name in ("default", "second", "default_2"):
        model.set_adapter(name)
        want[name] = output(model, LLAMA)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("second", "default_2"):
        loaded.load_adapter(tmp_path / name, name, low_cpu_mem_usage=low_cpu_mem_usage)
    for name in want:
        loaded.set_adapter(name)
        assert torch.equal(output(loaded, LLAMA), want[name]), name


def test_one_of_several_adapters_is_saved(tmp_path):
    model, _, _ = adapted(LLAMA)
    add(model, "second", seed=5)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "second"]


def test_bin_files(tmp_path):
    model, _, _ = adapted(LLAMA)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path)
    assert torch.equal(output(loaded, LLAMA), output(model, LLAMA))


def test_saved_twice_is_saved_once(tmp_path):
    """A loaded adapter is saved again as it was."""
    want, _ = saved(tmp_path / "first", LLAMA)
    PeftModel.from_pretrained(build(LLAMA), tmp_path / "first").save_pretrained(tmp_path / "second")
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "second")
    assert torch.equal(output(loaded, LLAMA), want)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_loaded_adapter_can_be_loaded_over(tmp_path):
    """Trainers load the best checkpoint into the adapter that is there."""
    want, _ = saved(tmp_path, LLAMA)
    model, _, _ = adapted(LLAMA, seed=7)
    assert not torch.equal(output(model, LLAMA), want)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(output(model, LLAMA), want)
    assert len(trainable(model)) == 3


# ---- classification heads -----------------------------------------------------------------------------------------


@pytest.mark.feature("saving")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize(("family", "head"), HEADS, ids=str)
def test_heads_are_trained_and_saved_with_the_adapter(tmp_path, family, head, low_cpu_mem_usage):
    """PEFT adds the head to `modules_to_save` for SEQ_CLS, TOKEN_CLS and QUESTION_ANS if it knows its name. What T5
    and BART call `classification_head` is found."""
    model, base, _ = adapted(family, head, task_type=TASKS[head])
    heads = [n for n in trainable(model) if any(f"{name}.modules_to_save.default" in n for name in HEAD_MODULES[head])]
    assert heads
    for name, parameter in model.named_parameters():
        if name in heads:
            parameter.data.normal_()
    want = output(model.requires_grad_(False), family, head)  # kernels differ where gradients are wanted
    model.save_pretrained(tmp_path)
    other = build(family, head)
    assert torch.equal(output(other, family, head), output(base, family, head))
    loaded = PeftModel.from_pretrained(other, tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.to(DEVICE)  # PEFT reads a head without a base to what it takes for the best device
    assert torch.equal(output(loaded, family, head), want)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 3 + len(heads)


@pytest.mark.parametrize("family", SEQ2SEQ, ids=str)
def test_a_head_without_a_name_that_peft_knows(tmp_path, family):
    """As one that it knows: for each adapter, beside other modules, and once if it is named."""

    def heads(model: nn.Module) -> set[str]:
        return {name.partition("classification_head.")[2] for name in trainable(model) if "head." in name}

    dense = {f"modules_to_save.default.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
    for given in (None, ["classification_head"], ["layer_norm"]):
        model, _, _ = adapted(family, "seq_cls", task_type="SEQ_CLS", modules_to_save=given)
        assert heads(model) == dense
        assert model.peft_config["default"].modules_to_save.count("classification_head") == 1
    part = ["classification_head.out_proj"]
    model, _, _ = adapted(family, "seq_cls", task_type="SEQ_CLS", modules_to_save=part)
    assert heads(model) == {"out_proj.modules_to_save.default.weight", "out_proj.modules_to_save.default.bias"}
    model, _, _ = adapted(family, "seq_cls", task_type="SEQ_CLS")
    add(model, "other", seed=3)
    model.set_adapter("other")
    assert heads(model) == {name.replace("default", "other") for name in dense}
    model, _, _ = adapted(family, "seq_cls", task_type="FEATURE_EXTRACTION")
    assert heads(model) == set()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("family", SEQ2SEQ, ids=str)
def test_a_folder_from_before_such_heads_were_found(tmp_path, family, low_cpu_mem_usage):
    """Its head was not trained: that of the base goes on."""
    model, _, _ = adapted(family, "seq_cls", task_type=None)
    want = output(model, family, "seq_cls")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    before = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | before))
    loaded = PeftModel.from_pretrained(build(family, "seq_cls"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded, family, "seq_cls"), want)


def test_other_modules_to_save(tmp_path):
    model, _, _ = adapted(LLAMA, modules_to_save=["norm"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path, adapter_name="other")
    assert torch.equal(output(loaded, LLAMA), output(model, LLAMA))
    assert "base_model.model.model.norm.weight" in load_file(tmp_path / "adapter_model.safetensors")


# ---- state dicts --------------------------------------------------------------------------------------------------


@each_family
def test_state_dict_out_and_in(family):
    model, _, _ = adapted(family)
    tensors = get_peft_model_state_dict(model)
    assert len(tensors) == 3
    other = get_peft_model(build(family), config(family), adapter_name="other")
    result = set_peft_model_state_dict(other, tensors, adapter_name="other")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "input_tuning" in key]
    assert torch.equal(output(other, family), output(model, family))


def test_state_dict_of_one_of_several_adapters():
    model, _, _ = adapted(LLAMA)
    second = add(model, "second", seed=5, prompt_scale=1.0)
    tensors = get_peft_model_state_dict(model, adapter_name="second")
    assert {name.rpartition("input_tuning_")[2] for name in tensors} == set(second)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, second[name.rpartition("input_tuning_")[2]])


# ---- a base that was saved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("llama", "t5", "bart", "bert")], ids=str)
def test_base_in_several_shards(tmp_path, family):
    build(family).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    want, _ = saved(tmp_path / "adapter", family)
    base = family.heads["lm"].from_pretrained(tmp_path / "base").to(DEVICE)
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path / "adapter"), family), want)


AUTO = {
    "CausalLM": (AutoPeftModelForCausalLM, "llama", "lm", "CAUSAL_LM"),
    "Seq2SeqLM": (AutoPeftModelForSeq2SeqLM, "t5", "lm", "SEQ_2_SEQ_LM"),
    "SequenceClassification": (AutoPeftModelForSequenceClassification, "bert", "seq_cls", "SEQ_CLS"),
    "no task type": (AutoPeftModel, "llama", "lm", None),
    "no task type, encoder": (AutoPeftModel, "roberta", "lm", None),
}


@pytest.mark.feature("saving")
@pytest.mark.parametrize(("auto", "name", "head", "task"), AUTO.values(), ids=AUTO)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_auto_classes_find_base_and_adapter(tmp_path, auto, name, head, task, low_cpu_mem_usage):
    family = FAMILIES[name]
    labels = {"num_labels": 3} if head == "seq_cls" else {}
    build(family, head).save_pretrained(tmp_path / "base")
    base = family.heads[head].from_pretrained(tmp_path / "base").to(DEVICE)
    model = get_peft_model(base, config(task_type=task))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    loaded = auto.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage, **labels)
    loaded.to(DEVICE)
    assert torch.equal(output(loaded, family, head), output(model, family, head))


def test_a_resized_base_brings_its_embedding_along(tmp_path):
    """PEFT stores the embeddings of a base whose vocabulary is not that of its checkpoint: the file is then whole."""
    build(LLAMA).save_pretrained(tmp_path / "base")
    base = LLAMA.heads["lm"].from_pretrained(tmp_path / "base").to(DEVICE)
    base.resize_token_embeddings(VOCAB + 3)
    model = get_peft_model(base, config(LLAMA))
    randomize(model)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    again = LLAMA.heads["lm"].from_pretrained(tmp_path / "base").to(DEVICE)
    again.resize_token_embeddings(VOCAB + 3)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(output(loaded, LLAMA), output(model, LLAMA))


def resized(folder: Path) -> torch.nn.Module:
    base = LLAMA.heads["lm"].from_pretrained(folder).to(DEVICE)
    torch.manual_seed(0)
    base.resize_token_embeddings(VOCAB + 3)
    return base


def test_another_adapter_of_a_resized_base_leaves_the_base_as_it_is(tmp_path):
    """Its file holds the base's embeddings: the same ones are no reason to write them, others are refused."""
    build(LLAMA).save_pretrained(tmp_path / "base")
    models = []
    for number in range(2):
        model = get_peft_model(resized(tmp_path / "base"), config(LLAMA)).eval()
        randomize(model, seed=number)
        model.save_pretrained(tmp_path / str(number))
        models.append(model)
    host = PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "0").eval()
    table = host.base_model.layer.base_layer.weight
    before = table.clone()
    host.load_adapter(tmp_path / "1", adapter_name="other")
    assert host.base_model.layer.base_layer.weight is table
    for name, model in zip(("default", "other"), models, strict=True):
        host.set_adapter(name)
        assert torch.equal(output(host, LLAMA), output(model, LLAMA))
    file = tmp_path / "1" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("embed_tokens.base_layer.weight"))
    tensors[key] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds `model.embed_tokens.base_layer.weight`, and this base model has"):
        host.load_adapter(tmp_path / "1", adapter_name="third")
    assert torch.equal(table, before)
    assert host.base_model.layer.adapter_names == ["default", "other"]
    assert list(host.peft_config) == ["default", "other"]


# ---- what the prompt starts from ----------------------------------------------------------------------------------

WORDS = ("find", "the", "first", "song", "by", "release", "date")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: 10 + i for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(path)
    return str(path)


def text_config(tokenizer_path: str, **changes) -> InputTuningConfig:
    text = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "find the first song",
        "tokenizer_name_or_path": tokenizer_path,
    }
    return config(**{**text, **changes})


@torch.no_grad()
def vocabulary_embeddings(base: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What an untouched model's embedding module gives, scale included."""
    return encoder_of(base).get_input_embeddings()(tokens)


@pytest.mark.parametrize(
    ("length", "want"),
    [(4, [10, 11, 12, 13]), (2, [10, 11]), (10, [10, 11, 12, 13, 10, 11, 12, 13, 10, 11])],
    ids=["exact", "cut", "repeated"],
)
@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("llama", "gemma3", "bart", "bert")], ids=str)
def test_text_gives_the_embeddings_of_its_tokens(tokenizer_path, family, length, want):
    made = text_config(tokenizer_path, num_virtual_tokens=length, task_type=family.task_type)
    model = get_peft_model(build(family), made)
    rows = vocabulary_embeddings(build(family), torch.tensor(want, device=DEVICE))
    assert torch.equal(adapter_weights(model)["prompt.weight"], rows)


def test_a_text_without_tokens_is_refused(tokenizer_path):
    base = build(LLAMA)
    with pytest.raises(ValueError, match=r"`prompt_tuning_init_text` ' ' has no tokens\. Pass a longer text"):
        get_peft_model(base, text_config(tokenizer_path, prompt_tuning_init_text=" "))


@each_family
def test_sampled_prompt_is_made_of_vocabulary_embeddings(family):
    """As the embedding module gives them: Gemma and BART scale what stands in the table."""
    model = get_peft_model(build(family), config(family, num_virtual_tokens=12))
    rows = vocabulary_embeddings(build(family), torch.arange(VOCAB, device=DEVICE))
    prompt = adapter_weights(model)["prompt.weight"]
    found = (prompt[:, None] == rows[None]).all(-1).any(-1)
    assert found.all()
    assert len(prompt.unique(dim=0)) > 4  # not one row again and again


def test_random_prompt_is_standard_normal():
    model = get_peft_model(build(LLAMA), config(LLAMA, num_virtual_tokens=100, prompt_tuning_init="RANDOM"))
    prompt = adapter_weights(model)["prompt.weight"]
    # 3200 draws: the mean's standard error is 0.018, the deviation's 0.0125
    assert abs(prompt.mean()) < 0.1
    assert abs(prompt.std() - 1) < 0.07


@pytest.mark.parametrize("zero", [True, False], ids=["init_weights", "random"])
def test_second_matrix_starts_at_zero_or_at_random(zero):
    weights = adapter_weights(get_peft_model(build(LLAMA), config(LLAMA, init_weights=zero, adapter_bias=True)))
    assert (not weights["fc2.weight"].any()) == zero
    assert (not weights["fc2.bias"].any()) == zero
    assert weights["fc1.weight"].any()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.feature("saving")
def test_no_tokenizer_is_read_when_an_adapter_is_loaded(tmp_path, tokenizer_path, monkeypatch, way):
    """A downloaded configuration must not make us fetch, and run, whatever tokenizer it names; even for training."""
    model = get_peft_model(build(LLAMA), text_config(tokenizer_path, task_type="CAUSAL_LM")).eval()
    randomize(model)
    model.save_pretrained(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer was read")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path, **way)
    loaded.load_adapter(tmp_path, "second", is_trainable=True)
    assert torch.equal(output(loaded, LLAMA), output(model, LLAMA))
    injected = build(LLAMA)
    injected.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(output(injected, LLAMA), output(model, LLAMA))


# ---- model card ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card_directory(tmp_path_factory) -> Path:
    """A card that was saved twice, with a base on a hub and a task."""
    path = tmp_path_factory.mktemp("card")
    base = build(LLAMA)
    base.name_or_path = "some-org/some-base"
    model = get_peft_model(base, config(LLAMA))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base is not on this machine
        model.save_pretrained(path)
        model.save_pretrained(path)
    return path


def test_card_says_to_import_the_package_first(card_directory):
    text = (card_directory / "README.md").read_text()
    assert text.count("import peft_input_tuning") == 1
    assert text.count("## How to load this adapter") == 1
    assert "package peft-input-tuning" in text
    assert text.index("import peft_input_tuning") < text.index("AutoPeftModelForCausalLM.from_pretrained(")
    assert "4 virtual tokens" in text
    assert "of inner size 24" in text


def test_card_has_the_facts_of_the_last_adapter_that_was_saved_there(tmp_path):
    first = get_peft_model(build(LLAMA), config(LLAMA, num_virtual_tokens=4))
    sizes = {"num_virtual_tokens": 7, "adapter_hidden_dim": None}
    second = get_peft_model(build(LLAMA, "seq_cls"), config(task_type="SEQ_CLS", **sizes))
    for model in (first, second):
        model.save_pretrained(tmp_path)
        card = tmp_path / "README.md"
        card.write_text(card.read_text() + "\nWords of mine.\n")
    text = card.read_text()
    assert "7 virtual tokens and an input-adapter\nof inner size 2 x the embedding size. PEFT loads it" in text
    assert "4 virtual tokens" not in text
    assert re.findall(r"AutoPeftModel\w*", text) == ["AutoPeftModelForSequenceClassification"] * 2
    assert text.count("Words of mine.") == 2
    assert text.count("## How to load this adapter") == 1


def test_card_names_the_base(card_directory):
    text = (card_directory / "README.md").read_text()
    assert "`some-org/some-base`" in text
    assert ModelCard(text).data.base_model == "some-org/some-base"


def test_card_metadata_is_valid(card_directory):
    text = (card_directory / "README.md").read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert data["library_name"] == "peft"
    assert {"input-tuning", "peft"} <= set(data["tags"])
    assert len(data["tags"]) == len(set(data["tags"]))
    assert data["pipeline_tag"] == "text-generation"
    assert "base_model:adapter:some-org/some-base" in data["tags"]


def test_card_of_a_base_without_a_name_has_no_empty_fields(tmp_path):
    """An empty `base_model` is refused by the hub."""
    saved(tmp_path, LLAMA)
    data = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert "base_model" not in data
    assert data["tags"] == ["input-tuning", "peft", "transformers"]


def test_code_in_the_card_runs_as_it_stands(tmp_path):
    build(LLAMA).save_pretrained(tmp_path / "base")
    model = get_peft_model(LLAMA.heads["lm"].from_pretrained(tmp_path / "base").to(DEVICE), config(LLAMA))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    code = (tmp_path / "adapter" / "README.md").read_text().rpartition("```python")[2].partition("```")[0]
    scope: dict = {}
    exec(code.replace("path or id of this adapter", str(tmp_path / "adapter")), scope)
    assert torch.equal(output(scope["model"].to(DEVICE), LLAMA), output(model, LLAMA))


def test_a_card_that_a_user_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# My adapter\n\nIt sings.\n")
    saved(tmp_path, LLAMA)
    card = ModelCard.load(tmp_path / "README.md")
    assert "It sings." in card.text
    assert card.data.license == "mit"
    assert "input-tuning" in card.data.tags
    assert card.text.count("import peft_input_tuning") == 1


def test_a_configuration_alone_makes_a_card_too(tmp_path):
    InputTuningConfig(task_type="SEQ_2_SEQ_LM", base_model_name_or_path="some-org/some-base").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "AutoPeftModelForSeq2SeqLM" in card.text
    assert "2 x the embedding size" in card.text
    assert card.data.base_model == "some-org/some-base"


# ---- what PEFT reports --------------------------------------------------------------------------------------------


@each_family
def test_trainable_parameters_are_counted_by_hand(family, capsys):
    """Prompt P·e and two matrices of h·e; the paper's h = 2e makes that 4e² + P·e."""
    base = build(family)
    size = vocabulary_embeddings(base, torch.tensor([5], device=DEVICE)).shape[-1]
    whole = sum(parameter.numel() for parameter in base.parameters())
    for hidden, wanted in ((None, 4 * size**2 + 20 * size), (7, 2 * 7 * size + 20 * size), (0, 20 * size)):
        model = get_peft_model(build(family), InputTuningConfig(adapter_hidden_dim=hidden))
        assert model.get_nb_trainable_parameters() == (wanted, whole + wanted)
    model.print_trainable_parameters()
    assert f"trainable params: {20 * size:,} || all params: {whole + 20 * size:,}" in capsys.readouterr().out


def test_biases_are_counted():
    model = get_peft_model(build(LLAMA), config(LLAMA, adapter_bias=True))
    prompt, hidden = SIZES["num_virtual_tokens"], SIZES["adapter_hidden_dim"]
    assert model.get_nb_trainable_parameters()[0] == prompt * 32 + 2 * hidden * 32 + hidden + 32


@pytest.mark.parametrize("changes", [{}, {"adapter_hidden_dim": 0}, {"num_virtual_tokens": 0}], ids=str)
def test_status(changes):
    model, _, _ = adapted(LLAMA, **changes)
    add(model, "second", seed=5, **changes)
    status = get_model_status(model)
    assert status.adapter_model_type == "InputTuningModel"
    assert status.peft_types == {"default": "INPUT_TUNING", "second": "INPUT_TUNING"}
    assert (status.num_adapter_layers, status.enabled) == (1, True)
    assert status.active_adapters == ["default"]
    assert sorted(status.available_adapters) == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.merged_adapters == []
    assert status.devices == {"default": [DEVICE.type], "second": [DEVICE.type]}
    (layer,) = get_layer_status(model)
    assert layer.name == "model.model.embed_tokens"
    assert layer.module_type == "input_tuning.InputTuningLayer"
    assert sorted(layer.available_adapters) == ["default", "second"]
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
