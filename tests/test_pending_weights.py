"""An adapter that waits for its file takes no memory, whatever its configuration asks for."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapters import adapted, add
from families import FAMILIES, build, ids

BLOOM = FAMILIES["bloom"]  # takes prompts of any length
X = ids(1, 6)
ASKED_FOR = {"num_virtual_tokens": 65536, "adapter_hidden_dim": 2048}


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation made."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.count = max(self.count, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def base(dtype: torch.dtype = torch.float32):
    return build(BLOOM).to(dtype)


def write(folder: Path, **changes) -> PeftModel:
    """Saves an adapter of four virtual tokens, and puts other numbers into its configuration."""
    model, _, _ = adapted(BLOOM)
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return model


@torch.no_grad()
def answer(model) -> Tensor:
    return model(input_ids=X).logits


@pytest.fixture(scope="module")
def of_the_base() -> int:
    return max(parameter.numel() for parameter in base().parameters())


def test_the_count_sees_what_is_made():
    with Largest() as largest:
        torch.zeros(100, 7).fill_(1)
    assert largest.count == 700


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("name", "wanted"), ASKED_FOR.items(), ids=ASKED_FOR)
def test_from_pretrained_takes_no_memory_for_what_the_file_does_not_hold(
    tmp_path, of_the_base, name, wanted, low_cpu_mem_usage, dtype
):
    write(tmp_path, **{name: wanted})
    model = base(dtype)
    with Largest() as largest, pytest.raises(ValueError, match=rf"in the file, but this model needs \({wanted}, 32\)"):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert largest.count <= of_the_base


def test_load_adapter_takes_no_memory_for_what_the_file_does_not_hold(tmp_path, of_the_base):
    write(tmp_path, **ASKED_FOR)
    model, _, _ = adapted(BLOOM)
    with Largest() as largest, pytest.raises(ValueError, match="in the file, but this model needs"):
        model.load_adapter(tmp_path, "second")
    assert largest.count <= of_the_base


def test_transformers_takes_no_memory_for_what_the_file_does_not_hold(tmp_path, of_the_base):
    write(tmp_path, **ASKED_FOR)
    model = base()
    with Largest() as largest:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            model.load_adapter(str(tmp_path))
        with pytest.raises(ValueError, match="has no usable weights"):
            answer(model)
    assert largest.count <= of_the_base


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_values_get_room_in_the_dtype_of_an_adapter_that_waited_for_none(tmp_path, dtype, autocast):
    saved = write(tmp_path)
    fresh = get_peft_model(base(dtype), saved.peft_config["default"], autocast_adapter_dtype=autocast)
    model = PeftModel.from_pretrained(base(dtype), tmp_path, autocast_adapter_dtype=autocast, is_trainable=True)
    want = {name: p.dtype for name, p in fresh.named_parameters() if "input_tuning" in name}
    got = {name: p for name, p in model.named_parameters() if "input_tuning" in name}
    assert {name: p.dtype for name, p in got.items()} == want
    assert all(p.is_contiguous() and p.requires_grad for p in got.values())
    values = {name: p for name, p in saved.named_parameters() if name in got}
    assert all(torch.equal(p, values[name].to(p.dtype)) for name, p in got.items())
    torch.optim.SGD(got.values()).zero_grad()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_torch_brings_the_values_too(tmp_path, assign):
    saved = write(tmp_path)
    model = get_peft_model(base(), PeftConfig.from_pretrained(tmp_path)).eval()
    with pytest.raises(ValueError, match="has no usable weights"):
        answer(model)
    model.load_state_dict(saved.state_dict(), assign=assign)
    assert torch.equal(answer(model), answer(saved))


def test_what_a_state_dict_does_not_bring_is_still_missing(tmp_path):
    saved = write(tmp_path)
    model = get_peft_model(base(), PeftConfig.from_pretrained(tmp_path)).eval()
    state = {name: value for name, value in saved.state_dict().items() if "fc2" not in name}
    model.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match=r"`input_tuning_fc2.weight` was not in the file"):
        answer(model)


def test_a_model_that_waits_can_be_moved_and_copied(tmp_path):
    saved = write(tmp_path)
    model = copy.deepcopy(get_peft_model(base(), PeftConfig.from_pretrained(tmp_path))).double().float().eval()
    with pytest.raises(ValueError, match="has no usable weights"):
        answer(model)
    model.load_state_dict(saved.state_dict())
    assert torch.equal(answer(model), answer(saved))


def test_another_adapter_is_used_while_one_waits(tmp_path):
    model, _, _ = adapted(BLOOM)
    want = answer(model)
    add(model, "second", seed=3, inference_mode=False)
    write(tmp_path)
    model.add_adapter("third", PeftConfig.from_pretrained(tmp_path))
    assert torch.equal(answer(model), want)
