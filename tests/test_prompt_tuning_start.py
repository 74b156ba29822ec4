"""Training starts from prompt-tuning, PEFT's own and its weights included; without a prompt it starts from the base.

The oracle is PEFT's own prompt-tuning. It is compared on unpadded rows, where its positions and masks are right.
"""

from __future__ import annotations

import pytest
import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from torch.testing import assert_close

from adapters import adapted, config
from device import DEVICE
from families import ALL, DECODERS, ENCODERS, FAMILIES, SEQ2SEQ, build, ids
from oracles import adapter_weights, encoder_of
from peft_input_tuning import InputTuningConfig, from_prompt_tuning

each_family = pytest.mark.parametrize("family", ALL, ids=str)
each_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)
LLAMA = FAMILIES["llama"]
LENGTH = 4
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}  # of the same sums in another order


def prompt_tuned(family, head: str = "lm", **changes) -> PeftModel:
    """PEFT's prompt-tuning with a prompt that matters."""
    base = build(family, head)
    fields = {
        "num_virtual_tokens": LENGTH,
        "task_type": family.task_type,
        "num_transformer_submodules": 1,
        "token_dim": encoder_of(base).get_input_embeddings().embedding_dim,  # PEFT takes OPT's hidden size otherwise
    }
    model = get_peft_model(base, PromptTuningConfig(**{**fields, **changes})).eval()
    generator = torch.Generator().manual_seed(3)
    for encoder in model.prompt_encoder.values():
        weight = encoder.embedding.weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def trained_prompt(model: PeftModel, name: str = "default") -> torch.Tensor:
    return model.prompt_encoder[name].embedding.weight.detach().clone()


@torch.no_grad()
def output(model: nn.Module, family, **kwargs) -> torch.Tensor:
    more = {"decoder_input_ids": ids(2, 4, seed=9)} if family.kind == "seq2seq" else {}
    return model(input_ids=ids(2, 6), **more, **kwargs).logits


def peft_output(model: PeftModel, family) -> torch.Tensor:
    """Without the virtual places that PEFT leaves in a decoder's logits."""
    logits = output(model, family)
    return logits[:, LENGTH:] if family.kind == "decoder" else logits


def put_prompt(model: PeftModel, prompt: torch.Tensor) -> None:
    """The same prompt into an input-tuning adapter."""
    for name, parameter in model.named_parameters():
        if "input_tuning_prompt" in name:
            parameter.data.copy_(prompt / model.peft_config["default"].prompt_scale)


# ---- a zero W2 is prompt-tuning -----------------------------------------------------------------------------------

STARTS = {
    "zero W2": {"init_weights": True},
    "zero W2 and bias": {"init_weights": True, "adapter_bias": True},
    "no adapter": {"adapter_hidden_dim": 0},
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@each_decoder
def test_the_start_is_prompt_tuning(family, start):
    theirs = prompt_tuned(family)
    ours = get_peft_model(build(family), config(family, num_virtual_tokens=LENGTH, **start)).eval()
    put_prompt(ours, trained_prompt(theirs))
    want = peft_output(theirs, family)
    assert_close(output(ours, family), want, **TOLERANCE)
    assert not torch.allclose(want, output(build(family), family), atol=1e-2)


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("family", SEQ2SEQ, ids=str)
def test_the_start_is_prompt_tuning_of_the_encoder(family, start):
    theirs = prompt_tuned(family)
    ours = get_peft_model(build(family), config(family, num_virtual_tokens=LENGTH, **start)).eval()
    put_prompt(ours, trained_prompt(theirs))
    want = peft_output(theirs, family)
    assert_close(output(ours, family), want, **TOLERANCE)
    assert not torch.allclose(want, output(build(family), family), atol=1e-2)


def test_a_zero_second_matrix_changes_no_bit_of_the_embeddings():
    model = get_peft_model(build(LLAMA), config(LLAMA, init_weights=True))
    with torch.no_grad():
        got = model.get_input_embeddings()(ids(2, 6))
        assert torch.equal(got, build(LLAMA).get_input_embeddings()(ids(2, 6)))


@each_family
def test_without_prompt_and_with_a_zero_second_matrix_the_base_speaks_bit_for_bit(family):
    base = build(family).requires_grad_(False)
    model = get_peft_model(build(family), config(family, num_virtual_tokens=0, init_weights=True)).eval()
    assert adapter_weights(model)["fc1.weight"].any()
    assert torch.equal(output(model, family), output(base, family))
    mask = torch.ones(2, 6, dtype=torch.long, device=DEVICE)
    mask[1, 4:] = 0
    got, want = output(model, family, attention_mask=mask), output(base, family, attention_mask=mask)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("llama", "gemma3", "t5", "bert")], ids=str)
def test_the_base_speaks_bit_for_bit_in_bfloat16_too(family):
    """The float32 adapter works beside the skip connection, which stays in the dtype of the embeddings."""
    base = build(family).bfloat16().requires_grad_(False)
    made = config(family, num_virtual_tokens=0, init_weights=True)
    model = get_peft_model(build(family).bfloat16(), made).eval()
    assert torch.equal(output(model, family), output(base, family))


def test_the_first_step_from_a_zero_start_moves_everything_but_the_first_matrix():
    """With W2 = 0 no gradient reaches W1 at the first step; from the second on it does."""
    model = get_peft_model(build(LLAMA), config(LLAMA, init_weights=True)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    moved = []
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in adapter_weights(model).items()}
        model(input_ids=ids(2, 6), labels=ids(2, 6)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = adapter_weights(model)
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
    assert moved == [{"prompt.weight", "fc2.weight"}, {"prompt.weight", "fc1.weight", "fc2.weight"}]


# ---- from a trained prompt ----------------------------------------------------------------------------------------


@each_decoder
def test_from_prompt_tuning_says_the_same(family):
    theirs = prompt_tuned(family)
    want = peft_output(theirs, family)
    assert_close(output(from_prompt_tuning(theirs).eval(), family), want, **TOLERANCE)


@pytest.mark.parametrize("family", SEQ2SEQ, ids=str)
def test_from_prompt_tuning_of_an_encoder_decoder_says_the_same(family):
    theirs = prompt_tuned(family)
    want = peft_output(theirs, family)
    assert_close(output(from_prompt_tuning(theirs).eval(), family), want, **TOLERANCE)


@pytest.mark.parametrize("family", ENCODERS, ids=str)
def test_from_prompt_tuning_of_an_encoder_says_the_same(family):
    """PEFT gives the states of the virtual places too."""
    theirs = prompt_tuned(family, "base")
    with torch.no_grad():
        want = theirs(input_ids=ids(2, 6)).last_hidden_state[:, LENGTH:]
    ours = from_prompt_tuning(theirs).eval()
    with torch.no_grad():
        got = ours(input_ids=ids(2, 6)).last_hidden_state
    assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["gpt2"], FAMILIES["t5"]], ids=str)
def test_a_classifier_with_its_trained_head_says_the_same(family):
    """The head that was trained with the prompt is in the base's place under PEFT's wrapper."""
    theirs = prompt_tuned(family, "token_cls", task_type="TOKEN_CLS")
    for name, parameter in theirs.named_parameters():
        if "modules_to_save.default" in name:
            parameter.data.normal_()
    with torch.no_grad():
        want = theirs(input_ids=ids(2, 6)).logits[:, -6:]
    ours = from_prompt_tuning(theirs).eval()
    with torch.no_grad():
        got = ours(input_ids=ids(2, 6)).logits
    assert_close(got, want, **TOLERANCE)


def test_the_configuration_goes_over():
    theirs = prompt_tuned(LLAMA)
    ours = from_prompt_tuning(theirs, adapter_hidden_dim=8)
    made = ours.active_peft_config
    assert isinstance(made, InputTuningConfig)
    assert (made.num_virtual_tokens, made.adapter_hidden_dim, made.task_type) == (LENGTH, 8, "CAUSAL_LM")
    assert adapter_weights(ours)["fc1.weight"].shape == (8, 32)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_prompt_goes_over_to_the_bit(scale):
    theirs = prompt_tuned(LLAMA)
    prompt = trained_prompt(theirs)
    ours = from_prompt_tuning(theirs, prompt_scale=scale)
    assert torch.equal(adapter_weights(ours)["prompt.weight"], prompt)


def test_the_prompt_is_a_copy_and_it_trains():
    theirs = prompt_tuned(LLAMA)
    before = trained_prompt(theirs)
    ours = from_prompt_tuning(theirs).train()
    ours(input_ids=ids(2, 6), labels=ids(2, 6)).loss.backward()
    torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(adapter_weights(ours)["prompt.weight"], before)
    assert torch.equal(trained_prompt(theirs), before)


def test_a_text_prompt_needs_no_tokenizer_any_more(monkeypatch):
    """The text was read when PEFT's adapter was made; its tokenizer may be gone."""
    theirs = prompt_tuned(LLAMA)
    made = theirs.peft_config["default"]
    made.prompt_tuning_init, made.prompt_tuning_init_text = "TEXT", "Translate:"
    made.tokenizer_name_or_path, made.tokenizer_kwargs = "gone/away", {"use_fast": True}
    want = peft_output(theirs, LLAMA)
    assert_close(output(from_prompt_tuning(theirs).eval(), LLAMA), want, **TOLERANCE)


def test_an_adapter_is_taken_by_name_and_keeps_it():
    theirs = prompt_tuned(LLAMA)
    theirs.add_adapter("second", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    prompt = trained_prompt(theirs, "second")
    ours = from_prompt_tuning(theirs, "second")
    assert list(ours.peft_config) == ["second"]
    assert torch.equal(adapter_weights(ours, "second")["prompt.weight"], prompt)


def test_a_loaded_adapter_is_taken(tmp_path):
    """The usual way: somebody's adapter from a folder."""
    saved = prompt_tuned(LLAMA)
    want = peft_output(saved, LLAMA)
    saved.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(build(LLAMA), tmp_path)
    ours = from_prompt_tuning(theirs)
    assert_close(output(ours.eval(), LLAMA), want, **TOLERANCE)
    assert {name.rpartition("input_tuning_")[2] for name, p in ours.named_parameters() if p.requires_grad} == {
        "prompt.default.weight",
        "fc1.default.weight",
        "fc2.default.weight",
    }
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(build(LLAMA), tmp_path / "ours")
    assert torch.equal(output(again.eval(), LLAMA), output(ours.eval(), LLAMA))


# ---- from P-tuning, whose prompt an encoder makes -----------------------------------------------------------------

ENCODINGS = {
    "MLP": {"encoder_reparameterization_type": "MLP"},
    "LSTM": {"encoder_reparameterization_type": "LSTM"},
    "LSTM with dropout": {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5},
}
each_encoding = pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)


def p_tuned(family, **changes) -> PeftModel:
    """PEFT's P-tuning with a prompt that matters."""
    base = build(family)
    fields = {
        "num_virtual_tokens": LENGTH,
        "task_type": family.task_type,
        "num_transformer_submodules": 1,
        "token_dim": encoder_of(base).get_input_embeddings().embedding_dim,
        "encoder_hidden_size": 24,
    }
    model = get_peft_model(base, PromptEncoderConfig(**{**fields, **changes})).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@each_encoding
@pytest.mark.parametrize("family", DECODERS + SEQ2SEQ, ids=str)
def test_from_p_tuning_says_the_same(family, encoding):
    theirs = p_tuned(family, **encoding)
    want = peft_output(theirs, family)
    assert_close(output(from_prompt_tuning(theirs).eval(), family), want, **TOLERANCE)
    assert not torch.allclose(want, output(build(family), family), atol=1e-2)


@each_encoding
def test_the_encoder_is_asked_without_dropout_and_left_in_its_mode(encoding):
    theirs = p_tuned(LLAMA, **encoding)
    want = peft_output(theirs, LLAMA)
    encoder = theirs.train().prompt_encoder["default"]
    ours = from_prompt_tuning(theirs)
    assert encoder.training
    assert_close(output(ours.eval(), LLAMA), want, **TOLERANCE)


@each_encoding
def test_p_tuning_of_a_folder_is_taken(tmp_path, encoding):
    """PEFT saves what the encoder makes, without the encoder."""
    saved = p_tuned(LLAMA, **encoding)
    want = peft_output(saved, LLAMA)
    saved.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(build(LLAMA), tmp_path)
    assert_close(output(from_prompt_tuning(theirs).eval(), LLAMA), want, **TOLERANCE)


def test_the_configuration_of_p_tuning_goes_over():
    made = InputTuningConfig.from_prompt_tuning(p_tuned(LLAMA).peft_config["default"], adapter_hidden_dim=8)
    assert (made.num_virtual_tokens, made.adapter_hidden_dim, made.task_type) == (LENGTH, 8, "CAUSAL_LM")
    assert made.prompt_tuning_init == InputTuningConfig().prompt_tuning_init


# ---- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "LoRA": (
        lambda: get_peft_model(build(LLAMA), LoraConfig(target_modules=["q_proj"])),
        {},
        ["must be a PROMPT_TUNING or P_TUNING adapter", "LoraConfig", "['default']"],
    ),
    "prefix-tuning": (
        lambda: get_peft_model(build(LLAMA), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        {},
        ["must be a PROMPT_TUNING or P_TUNING adapter", "PrefixTuningConfig"],
    ),
    "multitask prompt-tuning, whose tasks have matrices of their own": (
        lambda: get_peft_model(
            build(LLAMA), MultitaskPromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", num_tasks=2)
        ),
        {},
        ["must be a PROMPT_TUNING or P_TUNING adapter", "MultitaskPromptTuningConfig"],
    ),
    "input-tuning": (
        lambda: adapted(LLAMA)[0],
        {},
        ["must be a PROMPT_TUNING or P_TUNING adapter", "InputTuningConfig"],
    ),
    "unknown name": (
        lambda: prompt_tuned(LLAMA),
        {"adapter_name": "nobody"},
        ["'nobody'", "['default']"],
    ),
    "a prompt for the decoder too": (
        lambda: prompt_tuned(FAMILIES["t5"], num_transformer_submodules=2),
        {},
        ["8 virtual tokens for encoder and decoder", "num_transformer_submodules=1"],
    ),
    "another length": (
        lambda: prompt_tuned(LLAMA),
        {"num_virtual_tokens": 9},
        ["`num_virtual_tokens` must stay 4", "9"],
    ),
    "another value that is wrong": (
        lambda: prompt_tuned(LLAMA),
        {"adapter_activation": "rellu"},
        ["`adapter_activation`", "'rellu'"],
    ),
}


@pytest.mark.parametrize(("make", "arguments", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_reason_and_nothing_changed(make, arguments, said):
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r".") as error:
        from_prompt_tuning(model, **arguments)
    missing = [part for part in said if part not in str(error.value)]
    assert not missing, str(error.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="`prompt_tuned` must be a PeftModel, got LlamaForCausalLM"):
        from_prompt_tuning(build(LLAMA))
