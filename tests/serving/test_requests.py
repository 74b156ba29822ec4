"""A request gets its adapter's virtual tokens, or an error that says why it cannot."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.vllm
WORDS = 50


@pytest.fixture
def folder(tmp_path):
    def write(**settings) -> str:
        config = {"peft_type": "INPUT_TUNING", "num_virtual_tokens": 3, "adapter_hidden_dim": 4, **settings}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def asked(path, number=1, **changes):
    lora = SimpleNamespace(lora_name="task", lora_int_id=number, lora_path=path)
    params = SimpleNamespace(max_tokens=100, prompt_logprobs=None)
    settings = {"prompt_token_ids": [7, 8], "prompt_embeds": None, "mm_features": None, "sampling_params": params}
    return SimpleNamespace(**{"lora_request": lora, "cache_salt": None, "resumable": False, **settings, **changes})


def sent(request, target_modules=("embed_tokens",), most=256):
    from peft_input_tuning.engines.vllm_requests import virtual_tokens_of, with_virtual_tokens

    virtual_tokens_of.cache_clear()  # the tests use one number for many folders
    lengths = []
    model = SimpleNamespace(get_vocab_size=lambda: WORDS, max_model_len=20)
    config = SimpleNamespace(
        model_config=model,
        lora_config=SimpleNamespace(target_modules=target_modules),
        additional_config={"max_virtual_tokens": most},
    )
    processor = SimpleNamespace(
        vllm_config=config, _validate_prompt_len=lambda length, kind: lengths.append((length, kind))
    )
    request = with_virtual_tokens(processor, request)
    return request, lengths


def test_virtual_tokens_stand_in_front(folder):
    request, lengths = sent(asked(folder()))
    assert request.prompt_token_ids == [WORDS, WORDS + 1, WORDS + 2, 7, 8]
    assert lengths == [(5, "decoder")]
    assert request.sampling_params.max_tokens == 15


@pytest.mark.parametrize(("settings", "changes"), [({"peft_type": "LORA"}, {}), ({}, {"lora_request": None})])
def test_others_are_left_as_they_are(folder, settings, changes):
    request = asked(folder(**settings), **changes)
    before = dict(vars(request))
    assert vars(sent(request)[0]) == before


def test_an_adapter_without_virtual_tokens_only_gets_a_cache_of_its_own(folder):
    request, _ = sent(asked(folder(num_virtual_tokens=0), cache_salt="mine"))
    assert request.prompt_token_ids == [7, 8]
    assert request.cache_salt == "mine|input-tuning 1"


def test_an_adapter_that_is_loaded_again_has_another_cache(folder):
    first, again = (sent(asked(folder(), number=number))[0].cache_salt for number in (1, 2))
    assert first != again


@pytest.mark.parametrize(
    ("settings", "changes", "engine", "said"),
    [
        ({}, {}, {"target_modules": None}, "--lora-target-modules embed_tokens"),
        ({}, {}, {"most": 2}, "has 3 virtual tokens, and this engine has room for 2"),
        ({"adapter_scope": "input"}, {}, {}, "prompt_embeds"),
        ({"modules_to_save": ["lm_head"]}, {}, {}, "modules_to_save"),
        ({"adapter_activation": "none such"}, {}, {}, "adapter_activation"),
        ({}, {"sampling_params": None}, {}, "pooled"),
        ({}, {"prompt_embeds": "some"}, {}, "embeddings, images or sound"),
        ({}, {"mm_features": ["image"]}, {}, "embeddings, images or sound"),
        ({}, {"resumable": True}, {}, "as a whole"),
        ({}, {"sampling_params": SimpleNamespace(max_tokens=1, prompt_logprobs=0)}, {}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_is_an_error_of_the_request(folder, settings, changes, engine, said):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=said):
        sent(asked(folder(**settings), **changes), **engine)
