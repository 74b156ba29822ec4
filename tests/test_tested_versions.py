"""Beside versions of transformers and PEFT that were never tested: a warning, and a trial of each adapter's cache."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel
from transformers.utils import ModelOutput

from adapters import adapted, config
from device import DEVICE
from families import ALL, DECODERS, FAMILIES, build, ids
from peft_input_tuning.tested_versions import newer_than_tested, warn_of_untested_versions
from peft_input_tuning.virtual_tokens.backbone import forward_parameters, path_of
from peft_input_tuning.virtual_tokens.cache_check import check_cached_equals_uncached
from peft_input_tuning.virtual_tokens.cache_mark import cache_name

llama = FAMILIES["llama"]
NEWER = "99.1.0"


@pytest.fixture
def newer(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", NEWER)


@pytest.mark.parametrize("package", [transformers, peft], ids=lambda package: package.__name__)
def test_a_newer_version_is_warned_of_once(package, monkeypatch):
    assert not newer_than_tested()
    monkeypatch.setattr(package, "__version__", NEWER)
    with pytest.warns(UserWarning, match=rf"not tested with {package.__name__} {NEWER} \(tested: up to ") as warned:
        warn_of_untested_versions()
    assert len(warned) == 1


def test_a_patch_of_a_tested_version_is_not_newer(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.21.99")
    assert not newer_than_tested()


def test_importing_the_package_warns():
    # PEFT imports transformers anew.
    code = "import peft, transformers; transformers.__version__ = '99.1.0'; import peft_input_tuning as a"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("not tested with transformers 99.1.0") == 1
    quiet = subprocess.run(
        [sys.executable, "-c", "import peft_input_tuning"], capture_output=True, text=True, check=True
    )
    assert "not tested" not in quiet.stderr


@pytest.mark.parametrize("family", ALL, ids=str)
def test_models_that_are_right_are_taken(family, newer):
    model, *_ = adapted(family)
    assert model(input_ids=ids(1, 5), **({"decoder_input_ids": ids(1, 3)} if family.kind == "seq2seq" else {}))


@dataclass
class RenamedOutput(ModelOutput):
    last_hidden_state: torch.Tensor | None = None
    memory: DynamicCache | None = None


class RenamedModel(LlamaModel):
    """A Llama whose cache has yet another name."""

    def forward(self, input_ids=None, memory=None, inputs_embeds=None, attention_mask=None, use_cache=None, **kwargs):
        name = cache_name(forward_parameters(build(llama).model))
        out = LlamaModel.forward(
            self,
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{name: memory},
            **kwargs,
        )
        return RenamedOutput(out.last_hidden_state, getattr(out, name))


class RenamedLM(LlamaForCausalLM):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.model = RenamedModel(config)
        self.post_init()


def state_of(model: nn.Module) -> dict:
    return {
        "modules": {name: (type(module), module.training) for name, module in model.named_modules()},
        "hooks": [(*one._forward_pre_hooks.values(), *one._forward_hooks.values()) for one in model.modules()],
        "attributes": [{k: v for k, v in one.__dict__.items() if not k.startswith("_")} for one in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
    }


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize("training", [False, True])
def test_a_cache_of_yet_another_name_is_refused(newer, training):
    model = RenamedLM(llama.config()).to(DEVICE).train(training)
    state, values = state_of(model), values_of(model)
    with pytest.raises(ValueError, match=rf"RenamedModel gives other outputs with its cache.*transformers {NEWER}"):
        get_peft_model(model, config(prompt_tuning_init="RANDOM"))
    after = state_of(model)
    assert not hasattr(model, "peft_config") or not model.peft_config
    after["attributes"][0].pop("peft_config", None)
    assert after == state
    for name, value in values_of(model).items():
        assert torch.equal(value, values[name]), name
    get_peft_model(model, config(num_virtual_tokens=0))


def test_the_trial_of_an_adapter_that_is_read_from_a_file(tmp_path, newer):
    """Its weights are not there yet when it is tried out."""
    model, *_ = adapted(llama)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(llama), tmp_path, torch_device=str(DEVICE))
    row = ids(1, 5)
    assert_close(loaded(input_ids=row).logits, model(input_ids=row).logits)
    with pytest.raises(ValueError, match="RenamedModel gives other outputs"):
        PeftModel.from_pretrained(RenamedLM(llama.config()).to(DEVICE), tmp_path)


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_the_trial_leaves_nothing_behind(family):
    model, *_ = adapted(family)
    model.train()
    state, values, random = state_of(model), values_of(model), torch.get_rng_state()
    layer = model.base_model.layer
    check_cached_equals_uncached(model.get_submodule(_path_of_backbone(model)), layer)
    assert state_of(model) == state
    assert values_of(model).keys() == values.keys()
    for name, value in values_of(model).items():
        assert torch.equal(value, values[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert layer.adapter_names == ["default"]


class DemandingModel(LlamaModel):
    """A Llama whose forward wants one thing more."""

    def forward(self, input_ids=None, *, flavour, use_cache=None, **kwargs):
        return LlamaModel.forward(self, input_ids, use_cache=use_cache, **kwargs)


def test_a_model_that_cannot_be_tried_out_is_warned_of(newer):
    model = LlamaForCausalLM(llama.config())
    model.model = DemandingModel(llama.config())
    with pytest.warns(UserWarning, match="could not be tried out.*flavour"):
        adapter = get_peft_model(model.to(DEVICE), config(), adapter_name="trial")
    assert adapter.base_model.layer.prompt_length("trial") == 4


def _path_of_backbone(model: nn.Module) -> str:
    return "base_model.model." + path_of(model.get_base_model(), model.base_model.backbone)
