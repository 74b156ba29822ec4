"""The parts of the plugin, without an engine around them."""

from __future__ import annotations

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, linear, relu
from torch.testing import assert_close
from transformers import BartConfig, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from peft_input_tuning import InputTuningConfig

pytestmark = pytest.mark.vllm
WORDS, DIM, MOST = 50, 8, 6


@pytest.fixture
def base() -> torch.Tensor:
    return torch.randn(WORDS, DIM)


def adapter_folder(path, **settings):
    """An adapter with random weights, as PEFT saves it."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    settings = {"num_virtual_tokens": 3, "adapter_hidden_dim": 5, "init_weights": False, **settings}
    model = get_peft_model(LlamaForCausalLM(config), InputTuningConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "input_tuning_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return {key.partition("embed_tokens.input_tuning_")[2]: value for key, value in load_file(path / FILE).items()}


FILE = "adapter_model.safetensors"


def read(path, name="task"):
    from peft_input_tuning.engines.adapter_folder import read_adapter

    return read_adapter(path, name, DIM, torch.device("cpu"))


@pytest.fixture
def layer(base, monkeypatch):
    """vLLM's embedding in our layer with three slots, and the slots of a step's tokens to be set."""
    from peft_input_tuning.engines import vllm_embedding

    class Table(torch.nn.Embedding):
        org_vocab_size = WORDS

    monkeypatch.setattr(vllm_embedding, "check_engine", lambda embedding: MOST)
    monkeypatch.setattr(vllm_embedding, "embedding_scale", lambda config: 1.0)
    layer = vllm_embedding.EmbeddingByWord(Table.from_pretrained(base))
    layer.create_lora_weights(3, SimpleNamespace(lora_dtype=torch.float32))
    layer.punica_wrapper = SimpleNamespace(_token_lora_indices=torch.full((64,), -1))
    return layer


def naive(weights, e, act):
    hidden = act(linear(e, weights["fc1.weight"], weights.get("fc1.bias")))
    return e + linear(hidden, weights["fc2.weight"], weights.get("fc2.bias"))


def test_each_token_gets_its_slots_embedding(layer, base, tmp_path):
    """Adapters of two sizes and activations, a LoRA, and the base's rows in one step: a loop over the tokens says
    what each gets."""
    small = adapter_folder(tmp_path / "small")
    large = adapter_folder(
        tmp_path / "large", num_virtual_tokens=6, adapter_hidden_dim=17, adapter_activation="gelu", adapter_bias=True
    )
    a, b = torch.randn(2, WORDS), torch.randn(DIM, 2)
    for slot, adapter in enumerate([read(tmp_path / "small"), read(tmp_path / "large")]):
        layer.set_lora(slot, adapter, adapter)
    layer.set_lora(2, a, b)
    ids = torch.tensor([0, 49, 50, 52, 7, 49, 50, 55, 7, 49, 0, 7, 49])
    slots = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1])
    layer.punica_wrapper._token_lora_indices[: len(ids)] = slots
    want = []
    for i, slot in zip(ids.tolist(), slots.tolist(), strict=True):
        weights, act = [(small, relu), (large, gelu), (None, None), (None, None)][slot]
        if i >= WORDS:
            want.append(weights["prompt.weight"][i - WORDS] * 8.0)  # `prompt_scale`
        elif slot < 0:
            want.append(base[i])
        elif slot == 2:
            want.append(base[i] + b @ a[:, i])
        else:
            want.append(naive(weights, base[i], act))
    assert_close(layer(ids), torch.stack(want), atol=1e-6, rtol=1e-6)
    assert torch.equal(layer(ids)[-2:], base[ids[-2:]])
    graph = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(graph(ids), layer(ids))


def test_a_slot_forgets_its_adapter(layer, base, tmp_path):
    adapter_folder(tmp_path / "a", num_virtual_tokens=6)
    adapter_folder(tmp_path / "b", num_virtual_tokens=1)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    layer.punica_wrapper._token_lora_indices[:2] = 0
    ids = torch.tensor([3, WORDS + 5])
    layer.set_lora(0, a, a)
    assert not torch.equal(layer(ids)[0], base[3])
    layer.set_lora(0, b, b)
    assert torch.equal(layer(ids)[1], torch.zeros(DIM))
    layer.reset_lora(0)
    assert torch.equal(layer(ids)[0], base[3])
    layer.set_lora(0, torch.randn(2, WORDS), torch.zeros(DIM, 2))
    assert torch.equal(layer(ids)[0], base[3])


def test_the_embeddings_scale_is_inside_of_the_adapter(layer, base, tmp_path):
    """The model multiplies what the lookup gives; T has to see the product, as in transformers."""
    weights = adapter_folder(tmp_path / "a")
    adapter = read(tmp_path / "a")
    layer.scale = 3.0
    layer.set_lora(0, adapter, adapter)
    layer.punica_wrapper._token_lora_indices[:3] = 0
    got = layer(torch.tensor([4, 5, WORDS])) * 3.0
    assert_close(got[:2], naive(weights, base[4:6] * 3.0, relu), atol=1e-5, rtol=1e-5)
    assert_close(got[2], weights["prompt.weight"][0] * 8.0)


def test_an_adapter_that_is_dropped_is_freed_at_once(tmp_path):
    """Engines look for circles of references seldom, and adapters come and go."""
    adapter_folder(tmp_path / "a")
    gc.disable()
    try:
        adapter = read(tmp_path / "a")
        weights = weakref.ref(adapter.adapt.keywords["fc1"])
        del adapter
        assert weights() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (LlamaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 1.0),
        (Gemma3TextConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, head_dim=8), 4.0),
        (BartConfig(vocab_size=9, d_model=16, scale_embedding=True, encoder_layers=1, decoder_layers=1), 4.0),
    ],
    ids=["Llama", "Gemma 3", "BART"],
)
def test_the_scale_is_read_off_transformers_model(config, scale):
    from peft_input_tuning.engines.vllm_engine import embedding_scale

    assert embedding_scale(config) == scale


def test_only_embeddings_that_are_named_are_wrapped():
    from vllm.lora import utils

    from peft_input_tuning.engines.vllm import register
    from peft_input_tuning.engines.vllm_embedding import EmbeddingByWord

    register()
    register()
    assert utils._all_lora_classes.count(EmbeddingByWord) == 1
    assert utils._all_lora_classes[0] is EmbeddingByWord
    unnamed = SimpleNamespace(target_modules=None)
    assert not EmbeddingByWord.can_replace_layer(torch.nn.Embedding(2, 2), unnamed, [])


def engine_config(**changes):
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    model = {"enable_prompt_embeds": False, "is_multimodal_model": False, "architectures": ["X"]}
    rest = {"speculative_config": None, "use_v2_model_runner": False, "additional_config": {}}
    for settings in (parallel, model, rest):
        settings.update({name: changes[name] for name in settings if name in changes})
    model["get_vocab_size"] = lambda: changes.get("words", WORDS)
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), model_config=SimpleNamespace(**model), **rest)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size` is 2"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size` is 2"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"is_multimodal_model": True}, "images or sound"),
        ({"speculative_config": "draft"}, "--speculative-config"),
        ({"words": 60}, "50 words, and the model has 60"),
        ({"additional_config": {"max_virtual_tokens": -1}}, "must be an integer >= 0, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_engines_in_which_adapters_were_not_tried(monkeypatch, changes, said):
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from peft_input_tuning.engines import vllm_engine

    embedding = VocabParallelEmbedding.__new__(VocabParallelEmbedding)
    torch.nn.Module.__init__(embedding)
    embedding.org_vocab_size = WORDS
    monkeypatch.setattr(vllm_engine, "get_current_vllm_config", lambda: engine_config())
    assert vllm_engine.check_engine(embedding) == vllm_engine.DEFAULT_MOST
    monkeypatch.setattr(vllm_engine, "get_current_vllm_config", lambda: engine_config(**changes))
    with pytest.raises(ValueError, match=said):
        vllm_engine.check_engine(embedding)


def broken(folder, how) -> None:
    tensors = load_file(folder / FILE)
    key = next(key for key in tensors if "fc1" in key)
    if how == "missing":
        del tensors[key]
    elif how == "shape":
        tensors[key] = torch.zeros(5, DIM + 1)
    elif how == "NaN":
        tensors[key][0, 0] = float("nan")
    elif how == "beside":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    elif how == "none":
        tensors = {"base_model.model.lm_head.weight": torch.zeros(2, 2)}
    save_file(tensors, folder / FILE)
    if how == "junk":
        (folder / FILE).write_bytes(b"junk")
    if how == "gone":
        (folder / FILE).unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "has no `input_tuning_fc1.weight`"),
        ("shape", "has the shape"),
        ("NaN", "NaN or infinite"),
        ("beside", "lm_head.weight"),
        ("none", "0 embeddings"),
        ("junk", "cannot be read"),
        ("gone", "has no file"),
    ],
)
def test_files_that_do_not_fit(tmp_path, how, said):
    adapter_folder(tmp_path / "a")
    broken(tmp_path / "a", how)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "a")


def test_modules_to_save_are_refused(tmp_path):
    adapter_folder(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match="modules_to_save"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    "second", [torch.device("cpu"), SimpleNamespace(device=torch.device("cpu"))], ids=["V1", "V2"]
)
def test_suppressed_tokens_are_banned(second):
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2

    from peft_input_tuning.engines.vllm_logits import SuppressTokens

    def processor(settings):
        model = SimpleNamespace(try_get_generation_config=lambda: settings)
        return SuppressTokens(SimpleNamespace(model_config=model), second)

    assert issubclass(SuppressTokens, LogitsProcessor)
    assert issubclass(SuppressTokens, V2)
    assert processor({"suppress_tokens": [1, 3]}).apply(torch.ones(2, 4)).isinf().sum(0).tolist() == [0, 2, 0, 2]
    assert torch.equal(processor({}).apply(torch.ones(2, 4)), torch.ones(2, 4))


def test_another_version_is_left_alone_and_says_so(monkeypatch):
    import vllm
    from vllm.lora.peft_helper import PEFTHelper

    from peft_input_tuning.engines.vllm import register

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setattr(PEFTHelper, "from_dict", vars(PEFTHelper)["from_dict"])
    register()
    with pytest.raises(RuntimeError, match="plugin was tested with vLLM"):
        PEFTHelper.from_dict({"peft_type": "INPUT_TUNING"})
    assert PEFTHelper.from_dict({"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}).r == 4


@pytest.mark.parametrize("name", ["../outside", "nothing", "other"])
def test_the_resolver_gives_folders_of_its_own_folder_only(tmp_path, name):
    import asyncio

    from peft_input_tuning.engines.vllm_folders import FolderResolver

    adapter_folder(tmp_path / "outside")
    adapter_folder(tmp_path / "all" / "mine")
    (tmp_path / "all" / "other").mkdir()
    for folder in (tmp_path / "outside", tmp_path / "all" / "mine"):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    resolver = FolderResolver(str(tmp_path / "all"))
    assert asyncio.run(resolver.resolve_lora("base", "mine")).lora_path == str(tmp_path / "all" / "mine")
    assert asyncio.run(resolver.resolve_lora("another", "mine")) is None
    config = json.loads((tmp_path / "all" / "mine" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "all" / ".." / "outside")
    (tmp_path / "all" / "mine" / "adapter_config.json").write_text(json.dumps(config))
    assert asyncio.run(resolver.resolve_lora(str(tmp_path / "outside"), "mine")) is not None
    assert asyncio.run(resolver.resolve_lora(str(tmp_path / "all"), "mine")) is None
    config["base_model_name_or_path"] = "base"
    (tmp_path / "all" / "mine" / "adapter_config.json").write_text(json.dumps(config))
    assert asyncio.run(resolver.resolve_lora("base", name)) is None
    del config["base_model_name_or_path"]
    (tmp_path / "all" / "mine" / "adapter_config.json").write_text(json.dumps(config))
    assert asyncio.run(resolver.resolve_lora("base", "mine")) is None


def test_an_adapter_in_use_is_not_loaded_in_place(tmp_path):
    """It would keep its number, under which its virtual tokens and its prefixes are known."""
    from types import SimpleNamespace

    from peft_input_tuning.engines.vllm_inside import _load_adapter

    adapter_folder(tmp_path / "mine")
    request = SimpleNamespace(lora_path=str(tmp_path / "mine"), lora_name="mine", lora_int_id=3, load_inplace=True)
    manager = SimpleNamespace(list_adapters=lambda: {3})
    with pytest.raises(ValueError, match="'mine' is loaded, and `load_inplace` would keep its number"):
        _load_adapter(None, manager, request)
