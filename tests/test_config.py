"""`InputTuningConfig`: the defaults, a clear refusal of every value that cannot work, and JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import fields

import pytest
import torch
from peft import PeftConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.tuners.prompt_tuning import PromptTuningInit

from device import DEVICE
from families import FAMILIES, build
from peft_input_tuning import InputTuningConfig

LLAMA = FAMILIES["llama"]

DEFAULTS = {
    "num_virtual_tokens": 20,
    "prompt_tuning_init": "SAMPLE_VOCAB",
    "prompt_tuning_init_text": None,
    "tokenizer_name_or_path": None,
    "tokenizer_kwargs": None,
    "prompt_scale": 8.0,
    "adapter_hidden_dim": None,
    "adapter_activation": "relu",
    "adapter_bias": False,
    "adapter_dropout": 0.0,
    "init_weights": True,
    "modules_to_save": None,
    "inference_mode": False,
    "task_type": None,
    "target_modules": None,
    "weights_in_checkpoint": False,
    "is_prompt_learning": False,
}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Translate:", "tokenizer_name_or_path": "a/tokenizer"}
EVERY_FIELD = {
    "num_virtual_tokens": 7,
    **TEXT,
    "tokenizer_kwargs": {"use_fast": True},
    "prompt_scale": 2.5,
    "adapter_hidden_dim": 12,
    "adapter_activation": "gelu",
    "adapter_bias": True,
    "adapter_dropout": 0.25,
    "init_weights": False,
    "modules_to_save": ["score"],
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "a/base",
    "revision": "main",
}


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items(), ids=DEFAULTS)
def test_default(name, value):
    assert getattr(InputTuningConfig(), name) == value


def test_every_field_says_what_it_is_for():
    undocumented = {field.name for field in fields(InputTuningConfig) if not field.metadata.get("help")}
    assert undocumented <= {field.name for field in fields(PeftConfig)}  # PEFT's own are PEFT's to document


# ---- what is refused ---------------------------------------------------------------------------------------------

REFUSED = {
    # fields, then what the message must hold: the field, the value, the remedy
    "negative prompt": ({"num_virtual_tokens": -3}, ["`num_virtual_tokens`", "-3", "Use 0 for an adapter without"]),
    "fractional prompt": ({"num_virtual_tokens": 2.5}, ["`num_virtual_tokens`", "2.5", "must be an integer"]),
    "boolean prompt": ({"num_virtual_tokens": True}, ["`num_virtual_tokens`", "True", "must be an integer"]),
    "no prompt length": ({"num_virtual_tokens": None}, ["`num_virtual_tokens`", "None", "Use 0"]),
    "absurd prompt": ({"num_virtual_tokens": 10**6}, ["`num_virtual_tokens`", "1000000", "5 to 200"]),
    "negative hidden": ({"adapter_hidden_dim": -1}, ["`adapter_hidden_dim`", "-1", "Use 0 for prompt-tuning"]),
    "fractional hidden": ({"adapter_hidden_dim": 1.5}, ["`adapter_hidden_dim`", "1.5", "must be an integer"]),
    "string hidden": ({"adapter_hidden_dim": "8"}, ["`adapter_hidden_dim`", "'8'", "must be an integer"]),
    "nothing to train": (
        {"num_virtual_tokens": 0, "adapter_hidden_dim": 0},
        ["`num_virtual_tokens`", "`adapter_hidden_dim`", "both 0", "Set at least one"],
    ),
    "scale of zero": ({"prompt_scale": 0}, ["`prompt_scale`", "got 0", "Leave it out for 8", "use 1.0"]),
    "negative scale": ({"prompt_scale": -8.0}, ["`prompt_scale`", "-8.0", "Leave it out for 8"]),
    "NaN scale": ({"prompt_scale": float("nan")}, ["`prompt_scale`", "nan", "positive finite"]),
    "infinite scale": ({"prompt_scale": float("inf")}, ["`prompt_scale`", "inf", "positive finite"]),
    "string scale": ({"prompt_scale": "8"}, ["`prompt_scale`", "'8'", "positive finite"]),
    "boolean scale": ({"prompt_scale": True}, ["`prompt_scale`", "True", "positive finite"]),
    "activation": ({"adapter_activation": "rellu"}, ["`adapter_activation`", "'rellu'", "Known:", "gelu"]),
    "activation is a list": ({"adapter_activation": ["relu"]}, ["`adapter_activation`", "['relu']", "Known:"]),
    "dropout of one": ({"adapter_dropout": 1.0}, ["`adapter_dropout`", "1.0", "[0, 1)", "Use 0.0"]),
    "negative dropout": ({"adapter_dropout": -0.1}, ["`adapter_dropout`", "-0.1", "Use 0.0"]),
    "string dropout": ({"adapter_dropout": "0.1"}, ["`adapter_dropout`", "'0.1'", "Use 0.0"]),
    "NaN dropout": ({"adapter_dropout": float("nan")}, ["`adapter_dropout`", "nan", "Use 0.0"]),
    "init": ({"prompt_tuning_init": "ZEROS"}, ["`prompt_tuning_init`", "'ZEROS'", "SAMPLE_VOCAB", "TEXT", "RANDOM"]),
    "no init": ({"prompt_tuning_init": None}, ["`prompt_tuning_init`", "None", "SAMPLE_VOCAB"]),
    "text without text": (
        {**TEXT, "prompt_tuning_init_text": None},
        ["`prompt_tuning_init_text`", "None", 'prompt_tuning_init="TEXT"'],
    ),
    "text that is empty": ({**TEXT, "prompt_tuning_init_text": ""}, ["`prompt_tuning_init_text`", "''", "needed"]),
    "text without tokenizer": (
        {**TEXT, "tokenizer_name_or_path": None},
        ["`tokenizer_name_or_path`", "None", "needed"],
    ),
    "tokenizer arguments without text": (
        {"tokenizer_kwargs": {"use_fast": True}},
        ["`tokenizer_kwargs`", "SAMPLE_VOCAB", "Remove it, or choose"],
    ),
    "remote code": (
        {**TEXT, "tokenizer_kwargs": {"trust_remote_code": True}},
        ["`tokenizer_kwargs`", "trust_remote_code", "refused", "Remove it"],
    ),
    "remote code that is off": (
        {**TEXT, "tokenizer_kwargs": {"trust_remote_code": False}},
        ["`tokenizer_kwargs`", "trust_remote_code", "Remove it"],
    ),
    "tokenizer arguments are a list": ({**TEXT, "tokenizer_kwargs": ["x"]}, ["`tokenizer_kwargs`", "['x']", "dict"]),
    "modules as a string": ({"modules_to_save": "score"}, ["`modules_to_save`", "'score'", "Write ['score']"]),
    "task": ({"task_type": "POETRY"}, ["task type", "POETRY", "CAUSAL_LM"]),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_field_the_value_and_the_remedy(changes, said):
    with pytest.raises(ValueError, match=r".") as error:
        InputTuningConfig(**changes)
    missing = [part for part in said if part not in str(error.value)]
    assert not missing, str(error.value)


TAKEN = {
    "adapter only": {"num_virtual_tokens": 0},
    "prompt only": {"adapter_hidden_dim": 0},
    "ADePT's shape": {"adapter_hidden_dim": 2},
    "whole number dropout": {"adapter_dropout": 0},
    "whole number scale": {"prompt_scale": 10},
    "init as the enum": {"prompt_tuning_init": PromptTuningInit.RANDOM},
    "task as the enum": {"task_type": TaskType.CAUSAL_LM},
    "every field": EVERY_FIELD,
}


@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN)
def test_what_is_taken(changes):
    made = InputTuningConfig(**changes)
    assert {name: getattr(made, name) for name in changes} == changes


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "gelu_new"])
def test_any_activation_of_transformers_is_taken(activation):
    assert InputTuningConfig(adapter_activation=activation).adapter_activation == activation


# ---- what only the model can judge -------------------------------------------------------------------------------

TOO_BIG = {
    "prompt": ({"num_virtual_tokens": 128}, ["`num_virtual_tokens`", "128 positions", "shorter"]),
    "hidden": ({"adapter_hidden_dim": 32 * 64 + 1}, ["`adapter_hidden_dim`", "2049", "embedding size 32", "None"]),
}


@pytest.mark.parametrize(("changes", "said"), TOO_BIG.values(), ids=TOO_BIG)
def test_a_size_that_does_not_fit_the_model_is_refused_and_the_model_stays_as_it_was(changes, said):
    model = build(LLAMA)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=said[0]) as error:
        get_peft_model(model, InputTuningConfig(task_type="CAUSAL_LM", **changes))
    assert not [part for part in said if part not in str(error.value)], str(error.value)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_none_is_twice_the_embedding_size():
    model = get_peft_model(build(LLAMA), InputTuningConfig())
    shapes = {name.rpartition("input_tuning_")[2]: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["fc1.default.weight"] == (64, 32)
    assert shapes["fc2.default.weight"] == (32, 64)
    assert shapes["prompt.default.weight"] == (20, 32)


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [PeftConfig, InputTuningConfig], ids=lambda cls: cls.__name__)
def test_json_roundtrip(tmp_path, cls):
    made = InputTuningConfig(**EVERY_FIELD)
    made.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert type(loaded) is InputTuningConfig
    want = {**made.to_dict(), "weights_in_checkpoint": True}
    assert loaded.to_dict() == want


def test_the_file_is_plain_json(tmp_path):
    InputTuningConfig(**EVERY_FIELD).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "INPUT_TUNING"
    assert written["prompt_tuning_init"] == "TEXT"
    assert {name: written[name] for name in EVERY_FIELD} == EVERY_FIELD


def test_only_a_saved_configuration_says_that_weights_are_in_the_file(tmp_path):
    """The configuration in memory goes on describing an adapter that is to be initialised."""
    made = InputTuningConfig()
    made.save_pretrained(tmp_path)
    assert made.weights_in_checkpoint is False
    assert PeftConfig.from_pretrained(tmp_path).weights_in_checkpoint is True


def test_a_save_that_fails_leaves_the_configuration_as_it_was(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    made = InputTuningConfig()
    with pytest.raises(AssertionError):
        made.save_pretrained(tmp_path / "file")
    assert made.weights_in_checkpoint is False


@pytest.mark.parametrize("change", [{"weights_in_checkpoint": True}, {"inference_mode": True}], ids=str)
def test_an_adapter_without_its_weights_is_refused_at_the_first_use(change):
    """A saved configuration alone makes no trained adapter, and what it makes must not pass for one."""
    made = get_peft_model(
        build(LLAMA), InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **change)
    ).eval()
    with pytest.raises(ValueError, match="has no usable weights") as error:
        made(input_ids=torch.tensor([[5, 6, 7]], device=DEVICE))
    assert "`weights_in_checkpoint` and `inference_mode` to False" in str(error.value)


def test_remote_code_is_refused_in_a_file_too(tmp_path):
    """The dangerous case: a configuration that somebody else wrote."""
    InputTuningConfig(**TEXT).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "tokenizer_kwargs": {"trust_remote_code": True}}))
    for cls in (PeftConfig, InputTuningConfig):
        with pytest.raises(ValueError, match="trust_remote_code"):
            cls.from_pretrained(tmp_path)


def test_a_file_with_a_wrong_value_is_refused(tmp_path):
    InputTuningConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "num_virtual_tokens": -1}))
    with pytest.raises(ValueError, match="`num_virtual_tokens` must be >= 0, got -1"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [PeftConfig, InputTuningConfig], ids=lambda cls: cls.__name__)
def test_a_file_from_before_there_was_a_scale_holds_the_prompt_itself(tmp_path, cls):
    InputTuningConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    assert written.pop("prompt_scale") == 8.0
    file.write_text(json.dumps(written))
    assert cls.from_pretrained(tmp_path).prompt_scale == 1.0


def test_a_file_of_a_later_version_is_read_without_its_unknown_fields(tmp_path):
    InputTuningConfig(num_virtual_tokens=5).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "a_field_to_come": 1}))
    with pytest.warns(UserWarning, match="a_field_to_come"):
        assert PeftConfig.from_pretrained(tmp_path).num_virtual_tokens == 5


def test_deepcopy_is_equal():
    made = InputTuningConfig(**EVERY_FIELD)
    assert copy.deepcopy(made) == made


def test_target_modules_stays_out_of_the_file(tmp_path):
    """PEFT writes the base embedding into the adapter where `target_modules` names it."""
    InputTuningConfig().save_pretrained(tmp_path)
    assert "target_modules" not in json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(TypeError, match="target_modules"):
        InputTuningConfig(target_modules=["embed_tokens"])


# ---- from PEFT's prompt-tuning ------------------------------------------------------------------------------------


def test_from_a_prompt_tuning_configuration():
    old = PromptTuningConfig(
        num_virtual_tokens=9,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Translate:",
        tokenizer_name_or_path="a/tokenizer",
        tokenizer_kwargs={"use_fast": True},
        task_type="CAUSAL_LM",
        base_model_name_or_path="a/base",
        revision="main",
    )
    new = InputTuningConfig.from_prompt_tuning(old)
    shared = [f.name for f in fields(PromptTuningConfig) if f.name in EVERY_FIELD]
    assert {name: getattr(new, name) for name in shared} == {name: getattr(old, name) for name in shared}
    assert new.adapter_hidden_dim is None
    assert new.init_weights is True
    assert new.peft_type == "INPUT_TUNING"


def test_from_a_prompt_tuning_configuration_with_changes():
    new = InputTuningConfig.from_prompt_tuning(PromptTuningConfig(num_virtual_tokens=9), adapter_hidden_dim=4)
    assert (new.num_virtual_tokens, new.adapter_hidden_dim) == (9, 4)


def test_from_another_configuration_is_refused():
    with pytest.raises(ValueError, match=r"`config` must be a PromptTuningConfig or a .* got InputTuningConfig"):
        InputTuningConfig.from_prompt_tuning(InputTuningConfig())
