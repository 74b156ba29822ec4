"""Text models inside of other models: the decoder of a speech or image model, CLIP's text model, pairs of models.

The oracle is the same pair around a base with a word more for each virtual token (`oracles.grown`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close

from adapters import add, config, randomize
from device import DEVICE
from families import FAMILIES, PAD, VOCAB, build, ids, padded
from oracles import adapter_weights, embed, grown, likeliest

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
START, NEW = 2, 5
SMALL = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": 1, "bos_token_id": START}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT = {**SMALL, **WIDE, "max_position_embeddings": 64, "initializer_range": 0.3}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
LAYERS = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "init_std": 0.3}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def gpt2():
    return FAMILIES["gpt2"].config()


def trocr_settings():
    return t.TrOCRConfig(
        **SMALL, **LAYERS, max_position_embeddings=64, cross_attention_hidden_size=16, dropout=0.0, is_decoder=True
    )


def pair(kind: str, encoder: t.PretrainedConfig, decoder: t.PretrainedConfig) -> nn.Module:
    settings = getattr(t, f"{kind}Config").from_encoder_decoder_configs(encoder, decoder)
    settings.decoder_start_token_id, settings.pad_token_id = START, PAD
    return getattr(t, f"{kind}Model")(settings)


def whisper():
    encoder = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8}
    limits = {"max_source_positions": 10, "max_target_positions": 40, "decoder_start_token_id": START}
    settings = t.WhisperConfig(
        **SMALL, **LAYERS, **encoder, **limits, begin_suppress_tokens=None, suppress_tokens=None
    )
    return t.WhisperForConditionalGeneration(settings), {"input_features": noise(2, 8, 20)}


def trocr():
    model = pair("VisionEncoderDecoder", t.ViTConfig(**VISION), trocr_settings())
    return model, {"pixel_values": noise(2, 3, 28, 28)}


def image_to_gpt2():
    return pair("VisionEncoderDecoder", t.ViTConfig(**VISION), gpt2()), {"pixel_values": noise(2, 3, 28, 28)}


def speech_to_bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"conv_dim": [16], "conv_stride": [4], "conv_kernel": [4], "num_feat_extract_layers": 1}
    sound = t.Wav2Vec2Config(**sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return pair("SpeechEncoderDecoder", sound, t.BertConfig(**BERT)), {"input_values": noise(2, 200)}


def bert_to_bert():
    return pair("EncoderDecoder", t.BertConfig(**BERT), t.BertConfig(**BERT)), {"input_ids": ids(2, 7, seed=4)}


def roberta_to_gpt2():
    return pair("EncoderDecoder", t.RobertaConfig(**BERT), gpt2()), {"input_ids": ids(2, 7, seed=4)}


def bart():
    return build("bart"), {"input_ids": ids(2, 7, seed=4)}


DECODERS = {one.__name__: one for one in (trocr, image_to_gpt2, speech_to_bert, bert_to_bert, roberta_to_gpt2)}
PATHS = {**dict.fromkeys(DECODERS, "decoder"), "whisper": "model.decoder", "bart": "model.decoder"}
DECODERS |= {"whisper": whisper, "bart": bart}
WAYS = ["in a PeftModel", "injected"]


def put(model: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)


def built(make: Callable) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    base, inputs = make()
    return base.requires_grad_(False).eval().to(DEVICE), inputs


def with_adapter(base: nn.Module, path: str, way: str = WAYS[0]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a model with an adapter on a part of it, and the adapter's weights."""
    model = copy.deepcopy(base)
    part = model.get_submodule(path)
    if way == "injected":
        settings = config()
        inject_adapter_in_model(settings, part)
        part.peft_config = {"default": settings}
    else:
        part = get_peft_model(part, config())
        put(model, path, part)
    randomize(part.eval())
    return model, adapter_weights(part)


def oracle_of(base: nn.Module, path: str, weights: dict[str, Tensor]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The model around a part with more words, and what puts the virtual tokens in front of ids `(batch, length)`."""
    model = copy.deepcopy(base)
    part, virtual = grown(model.get_submodule(path), weights, table=model.get_submodule(path).get_input_embeddings())
    put(model, path, part)
    return model, lambda row: torch.cat([virtual.expand(len(row), -1), row], dim=1)


# ---- a decoder ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_an_adapter_on_a_decoder(name, way):
    base, inputs = built(DECODERS[name])
    model, weights = with_adapter(base, PATHS[name], way)
    oracle, widened = oracle_of(base, PATHS[name], weights)
    row = ids(2, 6)
    out = model(**inputs, decoder_input_ids=row).logits
    want = oracle(**inputs, decoder_input_ids=widened(row)).logits[:, 4:, :VOCAB]
    assert_close(out, want, **TOLERANCE)
    assert (out - base(**inputs, decoder_input_ids=row).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_generation_of_such_a_decoder(name):
    """On a cache, greedily and with beams; the oracle goes through the whole row at each step."""
    base, inputs = built(DECODERS[name])
    model, weights = with_adapter(base, PATHS[name])
    oracle, widened = oracle_of(base, PATHS[name], weights)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    new = torch.full((2, 1), START, device=DEVICE)
    for _ in range(NEW):
        logits = oracle(**inputs, decoder_input_ids=widened(new)).logits[:, -1, :VOCAB]
        new = torch.cat([new, torch.tensor([[likeliest(row)] for row in logits], device=DEVICE)], dim=1)
    assert torch.equal(model.generate(**inputs, **options)[:, -NEW:], new[:, 1:])
    beams = [model.generate(**inputs, **options, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", DECODERS)
def test_training_of_such_a_decoder(name):
    """`labels` of the whole model: the loss of the oracle, by hand."""
    base, inputs = built(DECODERS[name])
    model, weights = with_adapter(base, PATHS[name])
    oracle, widened = oracle_of(base, PATHS[name], weights)
    labels = ids(2, 6, seed=5)
    start = model.config.decoder_start_token_id
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    loss = model(**inputs, labels=labels).loss
    with torch.no_grad():
        logits = oracle(**inputs, decoder_input_ids=widened(shifted)).logits[:, 4:, :VOCAB]
    assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), **TOLERANCE)
    loss.backward()
    gradients = [one.grad for key, one in model.named_parameters() if "input_tuning_" in key]
    assert len(gradients) == 3
    assert all(one is not None and one.abs().sum() > 0 for one in gradients)


@torch.no_grad()
def test_such_an_adapter_is_saved_and_loaded(tmp_path):
    base, inputs = built(whisper)
    model, _ = with_adapter(base, "model.decoder")
    model.model.decoder.save_pretrained(tmp_path)
    again = copy.deepcopy(base)
    again.model.decoder = PeftModel.from_pretrained(again.model.decoder, tmp_path).eval()
    row = ids(2, 6)
    want = model(**inputs, decoder_input_ids=row).logits
    assert torch.equal(again(**inputs, decoder_input_ids=row).logits, want)


@pytest.mark.parametrize(
    "name", [name for name in DECODERS if name not in ("bert_to_bert", "roberta_to_gpt2", "bart")]
)
def test_a_model_whose_input_is_no_text_names_its_decoder(name):
    base, inputs = built(DECODERS[name])
    path = PATHS[name].replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"is no text.*`model\.{path} = get_peft_model\(model\.{path}, config\)`"):
        get_peft_model(base, config())
    model = get_peft_model(copy.deepcopy(base), config(num_virtual_tokens=0))  # goes to the decoder by itself
    randomize(model.eval())
    oracle, _ = oracle_of(base, PATHS[name], adapter_weights(model))
    row = ids(2, 6)
    with torch.no_grad():
        want = oracle(**inputs, decoder_input_ids=row).logits
        assert_close(model(**inputs, decoder_input_ids=row).logits, want, **TOLERANCE)


# ---- the encoder of a pair ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert_to_bert", "roberta_to_gpt2"])
def test_a_pair_is_an_encoder_decoder_model(name):
    """Padding, a mixed batch and generation, with an adapter on the whole: it goes to the encoder."""
    base, _ = built(DECODERS[name])
    model = get_peft_model(copy.deepcopy(base), config(task_type="SEQ_2_SEQ_LM")).eval()
    randomize(model)
    weights = adapter_weights(model)
    rows, decoded = [ids(7), ids(4, seed=1)], ids(2, 5, seed=9)
    batch, mask = padded(rows, "right")
    other = add(model, "other", seed=3, num_virtual_tokens=2)
    model.eval()

    def wanted(one: dict[str, Tensor], row: Tensor, tokens: Tensor) -> Tensor:
        return base(inputs_embeds=embed(base, one, row), decoder_input_ids=tokens[None]).logits[0]

    for names, each in ((None, [weights, weights]), (["other", "default"], [other, weights])):
        more: dict[str, Any] = {} if names is None else {"adapter_names": names}
        out = model(input_ids=batch, attention_mask=mask, decoder_input_ids=decoded, **more)
        assert out.encoder_last_hidden_state.shape[1] == 7
        for found, one, row, tokens in zip(out.logits, each, rows, decoded, strict=True):
            assert_close(found, wanted(one, row, tokens), **TOLERANCE)
    model.get_base_model().generation_config.eos_token_id = None
    got = model.generate(input_ids=rows[0][None], max_new_tokens=NEW, do_sample=False)
    new = torch.tensor([START], device=DEVICE)
    for _ in range(NEW):
        new = torch.cat([new, new.new_tensor([likeliest(wanted(weights, rows[0], new)[-1])])])
    assert torch.equal(got[0], new)


# ---- CLIP -----------------------------------------------------------------------------------------------------------


def clip():
    text = {**SMALL, **WIDE, "max_position_embeddings": 40, "projection_dim": 16, "initializer_factor": 20.0}
    settings = t.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16)
    return t.CLIPModel(settings), {"pixel_values": noise(2, 3, 28, 28)}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_the_text_model_of_clip(way):
    base, inputs = built(clip)
    whole = get_peft_model(copy.deepcopy(base), config())  # goes into the same part by itself
    assert whole.base_model.place.backbone_path == "text_model"
    model, weights = with_adapter(base, "text_model", way)
    oracle, widened = oracle_of(base, "text_model", weights)
    end = torch.ones(1, dtype=torch.long, device=DEVICE)  # the place that is pooled
    batch, mask = padded([torch.cat([ids(n, seed=n), end]) for n in (7, 4)], "right")
    out = model(**inputs, input_ids=batch, attention_mask=mask)
    want = oracle(**inputs, input_ids=widened(batch), attention_mask=nn.functional.pad(mask, (4, 0), value=1))
    assert_close(out.logits_per_text, want.logits_per_text, **TOLERANCE)
    plain = base(**inputs, input_ids=batch, attention_mask=mask)
    assert (out.text_embeds - plain.text_embeds).abs().max() > 0.1
    assert torch.equal(out.image_embeds, plain.image_embeds)
