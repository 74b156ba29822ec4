"""The method is a full member of PEFT's enum and tables, once, however often the package is imported."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_config, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import peft_input_tuning
from adapters import adapted, config
from families import FAMILIES, build, ids
from peft_input_tuning.registration import add_peft_type

LLAMA = FAMILIES["llama"]


@pytest.fixture
def reloaded():
    """The package and its modules, loaded a second time; what was there before comes back afterwards."""
    names = [name for name in sys.modules if name.partition(".")[0] == "peft_input_tuning"]
    before = {name: sys.modules.pop(name) for name in names}
    again = importlib.import_module("peft_input_tuning")
    yield again
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_input_tuning"]:
        del sys.modules[name]
    sys.modules.update(before)
    importlib.reload(peft_input_tuning)


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)


# ---- the enum -----------------------------------------------------------------------------------------------------


def test_the_member_is_found_by_value_name_and_attribute():
    member = PeftType("INPUT_TUNING")
    assert member is PeftType["INPUT_TUNING"]
    assert member is PeftType.INPUT_TUNING
    assert isinstance(member, PeftType)


def test_the_member_is_a_string_like_the_others():
    member = PeftType.INPUT_TUNING
    assert member == "INPUT_TUNING"
    assert (member.name, member.value) == ("INPUT_TUNING", "INPUT_TUNING")
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "INPUT_TUNING")
    assert str(member) == str(PeftType.LORA).replace("LORA", "INPUT_TUNING")
    assert hash(member) == hash(PeftType("INPUT_TUNING"))
    assert {member: 1}[PeftType("INPUT_TUNING")] == 1


def test_the_enum_holds_the_member_once():
    assert PeftType.INPUT_TUNING in PeftType
    assert [member for member in PeftType if member == "INPUT_TUNING"] == [PeftType.INPUT_TUNING]
    assert list(PeftType.__members__).count("INPUT_TUNING") == 1
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert next(reversed(PeftType)) is list(PeftType)[-1]


def test_the_value_is_in_the_enum_as_far_as_python_answers_that():
    """Python >= 3.12 answers `value in Enum`, Python 3.11 raises: the same as for a member of PEFT's own."""

    def answer(value):
        try:
            return value in PeftType
        except TypeError:
            return TypeError

    assert answer("INPUT_TUNING") == answer("LORA")


def test_other_values_are_still_refused():
    with pytest.raises(ValueError, match="OUTPUT_TUNING"):
        PeftType("OUTPUT_TUNING")


def test_other_members_are_what_they_were():
    assert PeftType("LORA") is PeftType.LORA
    assert len({member.value for member in PeftType}) == len(PeftType)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_gives_the_same_member(protocol):
    assert pickle.loads(pickle.dumps(PeftType.INPUT_TUNING, protocol)) is PeftType.INPUT_TUNING


def test_copies_are_the_same_member():
    assert copy.deepcopy(PeftType.INPUT_TUNING) is PeftType.INPUT_TUNING
    assert copy.copy(PeftType.INPUT_TUNING) is PeftType.INPUT_TUNING


def test_json_writes_the_value():
    assert json.loads(json.dumps({"peft_type": PeftType.INPUT_TUNING})) == {"peft_type": "INPUT_TUNING"}


def test_adding_the_member_again_changes_nothing():
    before = list(PeftType)
    assert add_peft_type("INPUT_TUNING") is PeftType.INPUT_TUNING
    assert list(PeftType) == before


# ---- PEFT's tables ------------------------------------------------------------------------------------------------


def test_peft_knows_the_classes():
    member = PeftType.INPUT_TUNING
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is peft_input_tuning.InputTuningConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is peft_input_tuning.InputTuningModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "input_tuning_"


def test_mixed_models_of_peft_do_not_take_the_method():
    """PEFT's `PeftMixedModel` has a fixed list of types; being in its table would promise what it refuses."""
    assert PeftType.INPUT_TUNING not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_get_peft_config():
    made = get_peft_config({"peft_type": "INPUT_TUNING", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"})
    assert type(made) is peft_input_tuning.InputTuningConfig
    assert (made.num_virtual_tokens, made.task_type) == (3, "CAUSAL_LM")


def test_everything_in_all_is_there():
    assert {name for name in peft_input_tuning.__all__ if not hasattr(peft_input_tuning, name)} == set()


# ---- again and again ----------------------------------------------------------------------------------------------


def test_reload_keeps_the_member_and_the_model_goes_on():
    model, _, _ = adapted(LLAMA)
    x = ids(1, 5)
    want, before, member = model(input_ids=x).logits, list(PeftType), PeftType.INPUT_TUNING
    importlib.reload(peft_input_tuning)
    assert list(PeftType) == before
    assert PeftType("INPUT_TUNING") is member
    assert torch.equal(model(input_ids=x).logits, want)
    assert len(get_peft_model(build(LLAMA), config(LLAMA)).peft_config) == 1


def test_a_second_copy_of_the_package_takes_over(tmp_path, reloaded):
    """As in a notebook with autoreload: new classes, the same member, and files go on loading."""
    assert reloaded is not peft_input_tuning
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.INPUT_TUNING] is reloaded.InputTuningConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.INPUT_TUNING] is reloaded.InputTuningModel
    assert list(PeftType.__members__).count("INPUT_TUNING") == 1
    model = get_peft_model(build(LLAMA), reloaded.InputTuningConfig(num_virtual_tokens=3, adapter_hidden_dim=4)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids(1, 5)).logits, model(input_ids=ids(1, 5)).logits)


# ---- with the import and without ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_config(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("adapter"))
    peft_input_tuning.InputTuningConfig(num_virtual_tokens=3).save_pretrained(directory)
    return directory


def test_without_the_import_peft_raises_a_key_error(saved_config):
    """README and model card promise this error for this mistake."""
    done = run(f"from peft import PeftConfig; PeftConfig.from_pretrained({saved_config!r})")
    assert done.returncode != 0
    assert "KeyError: 'INPUT_TUNING'" in done.stderr


def test_with_the_import_peft_reads_the_configuration(saved_config):
    """Also where PEFT and transformers were imported first."""
    code = f"""
import transformers
from peft import PeftConfig, PeftType
import peft_input_tuning
print(PeftConfig.from_pretrained({saved_config!r}).num_virtual_tokens, PeftType("INPUT_TUNING").name)
"""
    done = run(code)
    assert done.stdout.split() == ["3", "INPUT_TUNING"], done.stderr


def test_a_configuration_in_memory_is_pickled_to_a_new_process():
    """Trainers send configurations to workers: the package is imported there by unpickling its class."""
    data = pickle.dumps(peft_input_tuning.InputTuningConfig(num_virtual_tokens=3))
    done = run(f"import pickle; print(pickle.loads({data!r}).num_virtual_tokens)")
    assert done.stdout.split() == ["3"], done.stderr
