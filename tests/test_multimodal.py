"""Models that take images: the prompt stands in front, images get their places and masks with it there.

The oracle is a base with a word more for each virtual token (`oracles.grown`), given the same images.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as t
from peft import get_peft_model
from torch.testing import assert_close

from adapters import add, config, randomize
from device import DEVICE
from families import PAD, VOCAB, ids
from oracles import adapter_weights, grown, likeliest, transform
from peft_input_tuning import export_model, grow_base, reuse_prompts

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
IMAGE = 90
SMALL = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": 1, "bos_token_id": 2}
TEXT = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def gemma3():
    text = {**TEXT, "head_dim": 8, "sliding_window": 8}
    settings = t.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_id=IMAGE)
    return t.Gemma3ForConditionalGeneration(settings), 4, {"pixel_values": PIXELS}


def paligemma():
    text = {**TEXT, "head_dim": 8, "model_type": "gemma"}
    vision = {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False}
    settings = t.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, projection_dim=32)
    return t.PaliGemmaForConditionalGeneration(settings), 4, {"pixel_values": PIXELS}


def llava():
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    settings = t.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return t.LlavaForConditionalGeneration(settings), 4, {"pixel_values": PIXELS}


def qwen(name: str, kind: type, settings: type, **vision: Any):
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    if "3" in name:
        text["head_dim"] = 8
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, **vision}
    built = settings(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=True,
    )
    patches = torch.randn(16, 3 * 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return kind(built), 4, {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]], device=DEVICE)}


def qwen2_vl():
    sizes = {"embed_dim": 16, "hidden_size": 32}
    return qwen("qwen2_vl", t.Qwen2VLForConditionalGeneration, t.Qwen2VLConfig, **sizes)


def qwen2_5_vl():
    sizes = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16, "window_size": 16}
    return qwen("qwen2_5_vl", t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig, **sizes)


def qwen3_vl():
    sizes = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16, "num_position_embeddings": 16}
    sizes["deepstack_visual_indexes"] = [0]
    return qwen("qwen3_vl", t.Qwen3VLForConditionalGeneration, t.Qwen3VLConfig, **sizes)


MAKERS = {one.__name__: one for one in (gemma3, paligemma, llava, qwen2_vl, qwen2_5_vl, qwen3_vl)}
WITH_TYPES = {"gemma3": "token_type_ids", "paligemma": "token_type_ids"}
WITH_TYPES |= dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "mm_token_type_ids")
each_model = pytest.mark.parametrize("name", MAKERS)
each_input = pytest.mark.parametrize("image", [True, False], ids=["with an image", "text alone"])


def built(name: str):
    torch.manual_seed(0)
    base, count, pixels = MAKERS[name]()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    base.generation_config.eos_token_id = None
    return base.requires_grad_(False).eval().to(DEVICE), count, pixels


def inputs(name: str, count: int, pixels: dict, image: bool, virtual: torch.Tensor | None = None) -> dict[str, Any]:
    row = torch.cat([torch.full((count,), IMAGE, device=DEVICE), ids(7)]) if image else ids(11)
    types_of_image = name != "paligemma"  # there 0 is the prefix, in which all see all, and 1 what follows it
    if "qwen" in name and image:
        row = torch.cat([row.new_tensor([92]), row[:count], row.new_tensor([93]), row[count:]])
    types = ((row == IMAGE) & types_of_image).long()
    if virtual is not None:
        row, types = torch.cat([virtual, row]), torch.cat([torch.zeros_like(virtual), types])
    found = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None], **(pixels if image else {})}
    if name in WITH_TYPES:
        found[WITH_TYPES[name]] = types[None]
    return found


def adapted_to(base, **changes):
    model = get_peft_model(copy.deepcopy(base), config(task_type="CAUSAL_LM", **changes)).eval()
    randomize(model)
    return model, adapter_weights(model)


@torch.no_grad()
@each_input
@each_model
def test_forward(name, image):
    base, count, pixels = built(name)
    model, weights = adapted_to(base)
    oracle, virtual = grown(base, weights)
    want = oracle(**inputs(name, count, pixels, image, virtual)).logits[:, len(virtual) :]
    assert_close(model(**inputs(name, count, pixels, image)).logits, want, **TOLERANCE)
    assert_close(model.get_base_model().forward(**inputs(name, count, pixels, image)).logits, want, **TOLERANCE)


@torch.no_grad()
@each_input
@each_model
def test_generation_on_a_cache(name, image):
    base, count, pixels = built(name)
    model, weights = adapted_to(base)
    oracle, virtual = grown(base, weights)
    given = inputs(name, count, pixels, image)
    out = model.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    new: list[int] = []
    for _ in range(5):
        whole = inputs(name, count, pixels, image, virtual)
        for key, value in whole.items():
            if key in ("input_ids", "attention_mask", WITH_TYPES.get(name)):
                ones = key == "attention_mask" or name == "paligemma"
                fill = new if key == "input_ids" else [int(ones)] * len(new)
                whole[key] = torch.cat([value, value.new_tensor([fill])], dim=1)
        new.append(likeliest(oracle(**whole).logits[0, -1]))
    assert out[0, given["input_ids"].shape[1] :].tolist() == new


@torch.no_grad()
@each_model
def test_the_text_model_called_by_itself(name):
    """The prompt is put in front in the model around it, so with ids it would be missing. Without a prompt, and where
    the adapter is disabled, nothing is."""
    base, *_ = built(name)
    model, weights = adapted_to(base)
    decoder = model.get_base_model().get_decoder()
    with pytest.raises(ValueError, match=r"was called by itself.*the whole model; or give the adapter to this part"):
        decoder(input_ids=ids(1, 6))
    with pytest.raises(ValueError, match="was called by itself"):
        decoder(ids(1, 6))
    with model.disable_adapter():
        assert_close(decoder(ids(1, 6))[0], base.get_decoder()(ids(1, 6))[0], **TOLERANCE)
    alone, weights = adapted_to(base, num_virtual_tokens=0)
    adapted_words = transform(weights, base.get_input_embeddings()(ids(1, 6)))
    want = base.get_decoder()(inputs_embeds=adapted_words)[0]
    assert_close(alone.get_base_model().get_decoder()(ids(1, 6))[0], want, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("bounds", [False, True], ids=["by positions", "by bounds"])
@pytest.mark.parametrize("name", [name for name in MAKERS if "qwen" in name])
def test_packed_rows_with_axes(name, bounds):
    """Four axes, of which the first is the text's; the others are as an image gives them. Alone is the oracle."""
    base, *_ = built(name)
    model, _ = adapted_to(base)
    sequences = [ids(5, seed=1), ids(7, seed=2)]
    text = [torch.arange(5), torch.arange(7)]
    of_image = [
        torch.tensor([[0, 1, 1, 1, 3], [0, 1, 1, 2, 3], [0, 1, 2, 2, 3]]),
        torch.tensor([[0, 1, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 4, 5], [0, 1, 2, 3, 2, 4, 5]]),
    ]
    axes = [torch.cat([own[None], image])[:, None].to(DEVICE) for own, image in zip(text, of_image, strict=True)]
    more = {}
    if bounds:
        of_row = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
        more = {"cu_seq_lens_q": of_row, "cu_seq_lens_k": of_row, "max_length_q": 7, "max_length_k": 7}
    row = torch.cat(sequences)[None]
    out = model(input_ids=row, position_ids=torch.cat(axes, dim=-1), use_cache=False, **more).logits[0]
    for part, sequence, positions in zip(out.split([5, 7]), sequences, axes, strict=True):
        alone = model(input_ids=sequence[None], position_ids=positions, use_cache=False).logits[0]
        assert_close(part, alone, **TOLERANCE)


@torch.no_grad()
@each_model
def test_left_padding_and_two_prompts_in_a_batch(name):
    base, *_ = built(name)
    model, weights = adapted_to(base)
    other = add(model, "other", seed=3, num_virtual_tokens=2)
    model.eval()
    row = ids(9)
    batch = torch.stack([row, torch.cat([torch.full((3,), PAD, device=DEVICE), row[:6]])])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    types = {WITH_TYPES[name]: torch.zeros_like(batch)} if name in WITH_TYPES else {}
    out = model(input_ids=batch, attention_mask=mask, **types, adapter_names=["other", "default"]).logits
    for found, mine, own in ((out[0], other, row), (out[1, 3:], weights, row[:6])):
        oracle, virtual = grown(base, mine)
        whole = torch.cat([virtual, own])[None]
        types = {WITH_TYPES[name]: torch.zeros_like(whole)} if name in WITH_TYPES else {}
        want = oracle(input_ids=whole, attention_mask=torch.ones_like(whole), **types).logits[0, len(virtual) :]
        assert_close(found, want, **TOLERANCE)


def test_prompts_of_two_lengths_want_the_token_types_of_paligemma():
    """Without them it looks ahead if nothing is masked, and does not if something is."""
    base, *_ = built("paligemma")
    model, _ = adapted_to(base)
    add(model, "other", seed=3, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="without `token_type_ids` PaliGemmaModel attends in another way"):
        model(input_ids=torch.stack([ids(9), ids(9)]), adapter_names=["other", "default"])


@each_model
def test_gradients(name):
    base, count, pixels = built(name)
    model, _ = adapted_to(base)
    given = inputs(name, count, pixels, True)
    model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)).loss.backward()
    gradients = [one.grad for one in model.parameters() if one.requires_grad]
    assert len(gradients) == 3
    assert all(one is not None and one.abs().sum() > 0 for one in gradients)


# ---- an encoder-decoder model whose input is looked up around it ----------------------------------------------------


def florence2():
    text = {"model_type": "bart", **SMALL, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    text |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    text |= {"max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None, "dropout": 0.0}
    vision = {"embed_dim": [16], "num_heads": [2], "num_groups": [2], "depths": [1], "patch_size": [4]}
    vision |= {"patch_stride": [4], "patch_padding": [0], "patch_prenorm": [False], "window_size": 2}
    vision |= {"projection_dim": 32, "max_temporal_embeddings": 4, "max_position_embeddings": 4}
    settings = t.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return t.Florence2ForConditionalGeneration(settings), 5, {"pixel_values": pixels}


@torch.no_grad()
@each_input
def test_florence2(image, monkeypatch):
    monkeypatch.setitem(MAKERS, "florence2", florence2)
    base, count, pixels = built("florence2")
    model, weights = adapted_to(base)
    given = inputs("florence2", count, pixels, image)
    decoded = {"decoder_input_ids": ids(1, 4, seed=5)}
    oracle, virtual = grown(base, weights, table=base.get_input_embeddings())
    want = oracle(**inputs("florence2", count, pixels, image, virtual), **decoded)
    out = model(**given, **decoded)
    assert_close(out.logits, want.logits, **TOLERANCE)
    assert out.encoder_last_hidden_state.shape[1] == given["input_ids"].shape[1]
    assert (out.logits - base(**given, **decoded).logits).abs().max() > 0.1
    first = model.generate(**given, max_new_tokens=1, do_sample=False)
    assert int(first[0, -1]) == likeliest(
        oracle(
            **inputs("florence2", count, pixels, image, virtual),
            decoder_input_ids=torch.tensor([[2]], device=DEVICE),
        ).logits[0, -1]
    )
    with pytest.raises(ValueError, match="the input-adapter is in the model around it"):
        model.get_base_model().get_encoder()(input_ids=given["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("reused", [False, True])
def test_positions_that_a_model_counts_from_one(reused):
    """PaliGemma's `generate` does: the prompt stands right before the first token all the same."""
    base, *_ = built("paligemma")
    model, weights = adapted_to(base)
    oracle, virtual = grown(base, weights)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with reuse_prompts(model) if reused else nullcontext():
        out = model.generate(input_ids=ids(1, 7), **options)
    want = oracle.generate(input_ids=torch.cat([virtual, ids(7)])[None], **options)
    assert torch.equal(out.sequences[:, 7:], want.sequences[:, 11:])
    for ours, theirs in zip(out.logits, want.logits, strict=True):
        assert_close(ours[:, :VOCAB], theirs[:, :VOCAB], **TOLERANCE)


# ---- sound that goes with each token --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_voxtral_realtime(use_cache):
    """It adds a piece of sound to each token. The oracle's text model gets the prompt in front of these sums."""
    if not hasattr(t, "VoxtralRealtimeForConditionalGeneration"):
        pytest.skip("this transformers has no Voxtral realtime")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    sound = {**sizes, "num_key_value_heads": 4, "num_mel_bins": 8}
    settings = t.VoxtralRealtimeConfig(text_config={**SMALL, **sizes}, audio_config=sound)
    torch.manual_seed(0)
    base = t.VoxtralRealtimeForConditionalGeneration(settings).requires_grad_(False).eval().to(DEVICE)
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.2)
    base.generation_config.eos_token_id = None
    frames = torch.randn(1, 12 * settings.downsample_factor, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    model, weights = adapted_to(base)
    given = {"input_ids": ids(7)[None], "encoder_inputs_embeds": frames, "do_sample": False, "pad_token_id": PAD}
    out = model.generate(**given, max_new_tokens=5, use_cache=use_cache)

    table = transform(weights, base.get_input_embeddings().weight)
    heard = base.model.get_audio_features(encoder_inputs_embeds=frames, return_dict=True).pooler_output
    delay = base.model.time_embedding(torch.full((1,), settings.default_num_delay_tokens, device=DEVICE).float())[None]
    for end in range(7, 12):
        sums = torch.cat([weights["prompt.weight"][None], table[out[:, :end]] + heard[:, :end]], dim=1)
        hidden = base.model.language_model(inputs_embeds=sums, t_cond=delay, use_cache=False).last_hidden_state
        assert likeliest(base.lm_head(hidden)[0, -1]) == int(out[0, end])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_vl"])
def test_exported_and_grown(name, tmp_path):
    """Of a model of images and text, the number of words stands in the configuration of its text."""
    base, *_ = built(name)
    model, weights = adapted_to(base)
    report = export_model(model, tmp_path / "plain")
    plain = type(base).from_pretrained(tmp_path / "plain", dtype=torch.float32).eval().to(DEVICE)
    row = torch.cat([torch.tensor(report.virtual_token_ids, device=DEVICE), ids(7)])
    types = {WITH_TYPES[name]: torch.zeros_like(row)[None]} if name in WITH_TYPES else {}
    oracle, virtual = grown(base, weights)
    whole = torch.cat([virtual, ids(7)])
    mask = torch.ones_like(whole)[None]
    want = oracle(input_ids=whole[None], attention_mask=mask, **types).logits[0, len(virtual) :, :VOCAB]
    got = plain(input_ids=row[None], attention_mask=mask, **types).logits[0, len(virtual) :, :VOCAB]
    assert_close(got, want, **TOLERANCE)
    grow_base(base, tmp_path / "grown", 3)
    larger = type(base).from_pretrained(tmp_path / "grown", dtype=torch.float32).eval().to(DEVICE)
    assert larger.get_input_embeddings().num_embeddings == base.get_input_embeddings().num_embeddings + 3
    of_base = {WITH_TYPES[name]: torch.zeros_like(ids(1, 7))} if name in WITH_TYPES else {}
    want = base(input_ids=ids(1, 7), **of_base).logits
    assert_close(larger(input_ids=ids(1, 7), **of_base).logits[..., : want.shape[-1]], want, **TOLERANCE)
