"""How large a tiny model is: rules by the names of configurations' fields, and what single models want otherwise."""

from __future__ import annotations

import re
from typing import Any

import torch

VOCAB = 97
PAD, EOS, BOS = 0, 1, 2
WORDS = range(5, 60)  # ids of text; special tokens have other ones
IMAGE = 90

# The first pattern that a field's whole name matches gives its value, whatever its default; a field that is None stays
# None. "keep" leaves the default as it is.
RULES: list[tuple[str, Any]] = [
    ("pad_token_id", PAD),
    ("eos_token_id", EOS),
    ("bos_token_id", BOS),
    ("decoder_start_token_id", BOS),
    ("(sep|cls)_token_id", EOS),
    ("(mask|unk|blank)_token_id", 61),
    ("forced_(eos|bos)_token_id", None),
    (r"image_token_(id|index)|img_token_id|image_pad_token_id", IMAGE),
    (r"video_token_(id|index)", 91),
    (r"audio_token_(id|index)", 92),
    (r"(vision|image|eoi|eoa|video|audio).*_end.*_(id|index)|eo[iav]_token_(id|index)|.*_eos_(id|index)", 94),
    (r"(vision|image|video|audio|boi|eoi|boa|eoa|vision_bos|vision_eos|image_bos|image_eos).*_(id|index)", 93),
    ("(unpadded_|text_|.*)vocab_size(_per_layer_input)?", VOCAB),
    ("type_vocab_size", "keep"),
    (r".*(dropout|drop|pdrop|layerdrop|jitter|jitter_noise|path_rate)(_rate|_prob)?", 0.0),
    ("summary_(first|last)_dropout", 0.0),
    (r"moe_intermediate_size|shared_expert_intermediate_size|moe_.*intermediate.*", 24),
    (r".*intermediate_size|.*ffn_dim|d_ff|ffn_hidden_size|n_inner|mlp_dim|d_inner|ffn_size|.*_mlp_dim", 48),
    (r"hidden_size_per_layer_input", 8),
    ("hidden_size_global", 32),
    ("linear_(key|value)_head_dim|linear_head_dim", 8),
    ("mamba_n_heads", 8),
    ("rotary_dim", 4),
    (r".*rope_head_dim|v_head_dim|.*head_dim|dim_head|d_kv|d_head|mamba_d_head|mamba_headdim|index_head_dim", 8),
    (r"kv_lora_rank|.*lora_rank|.*latent_dim|.*_rank", 16),
    (r".*hidden_size|d_model|n_embd|.*embed_dim|hidden_dim|emb_dim|dim|width|word_embed_proj_dim|embedding_dim", 32),
    (r".*embedding_size|projection_dim|.*proj_dim|.*_hidden_dim|output_dim|d_embed", 32),
    (r"(num_)?(hidden|encoder|decoder|.*encoder|.*decoder|transformer|local|global|perceiver)_?layers", 2),
    (r"num_layers|n_layers?|depth|num_blocks|encoder_depth|.*_depth|.*num_hidden_layers|layers", 2),
    ("num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k_experts|moe_top_k|experts_per_token", 2),
    ("num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts", 4),
    ("n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    ("n_group|topk_group", 1),
    ("first_k_dense_replace|num_dense_layers", 1),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads|.*kv_heads|num_query_groups)", 2),
    (r".*(attention_heads|num_heads|n_heads?|_n_heads|attn_heads|_num_heads|attention_head)|num_(key|value)_heads", 4),
    (r"linear_num_(key|value)_heads|linear_num_heads", 4),
    (r"state_size|mamba_d_state|ssm_state_size", 8),
    ("(mamba_)?chunk_size", 8),
    ("base_channels", 32),
    ("channel_multiplier", [1]),
    ("num_res_blocks", 1),
    ("(vision_soft_tokens_per_image|mm_tokens_per_image)", 4),
    ("image_grid_pinpoints", [[28, 28]]),
    (r"sliding_window(_size)?|attention_window|local_attention|window_length", 8),
    (r"attention_chunk_size", 16),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_source_positions|max_target_positions|block_size)", 128),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"initializer_range|init_std|initializer_factor", "keep"),
]
_COMPILED = [(re.compile(pattern), value) for pattern, value in RULES]


def by_rule(name: str, value: Any) -> Any:
    """The value for a field: `value` is its default."""
    for pattern, small in _COMPILED:
        if pattern.fullmatch(name):
            if isinstance(small, list) and isinstance(value, (list, tuple)):
                return small
            if isinstance(small, str) or (value is None and name not in ("pad_token_id", "head_dim")):
                return value
            if isinstance(value, (bool, list, tuple, dict, str)):
                return value
            if isinstance(small, int) and isinstance(value, int) and value < small and "token" not in name:
                return value
            return small
    return value


# By model type, or by the name of a class where types are shared: fields by dotted path, and further settings.
#   "inputs": what calls need beside ids, {name: what makes a tensor for a batch of ids}
#   "prefix": ids in front of each row
#   "vision": "siglip" for a vision model in place of one that needs another library
#   "lacks": why no text can be put into it
#   "mended": "Class.attribute" of transformers that the base reads and that is missing; it is None then
#   "hidden": modules and functions that see ids too, and are to take the prompt's for padding
#   "blind": images are left out; they go through the word table, of which the oracle has another
#   "attention": the attention's implementation
#   "fed": what its `generate` makes of the ids, if it puts other ones in their places
#   "table": the path of the word table, where what is looked up are not the ids as they are
SETTINGS = ("inputs", "prefix", "fed", "attention", "table", "vision", "lacks", "hidden", "blind", "mended")
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_HALF_MROPE = {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}  # with heads of 16
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIGLIP |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
_SIGLIP = {"model_type": "siglip_vision_model", **SIGLIP}
_HEADS_OF_16 = {"text_config.num_attention_heads": 2, "text_config.num_key_value_heads": 2, "text_config.head_dim": 16}
_GEMMA3N = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 0,
    "intermediate_size": 48,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0, 0.0],
}
_GEMMA4 = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
_PATCHES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}


def _pixels(channels: int = 3, size: int = 28) -> Any:
    """Images `(batch, channels, size, size)`, the same for each row."""

    def make(ids: torch.Tensor) -> torch.Tensor:
        image = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(9), dtype=torch.float32)
        return image.to(torch.get_default_dtype()).expand(len(ids), -1, -1, -1)

    return make


def _zeros(*shape: int) -> Any:
    """Zeros `(batch, length, *shape)`."""
    return lambda ids: torch.zeros(*ids.shape, *shape)


_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        for kind in ("sliding_attention", "full_attention")
    },
}
_NEMOTRON_H = {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 8, "n_groups": 2}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "eos_token_id": EOS,
}
_DOTS3 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16}
_DOTS3 |= {"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
_SOUND = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
_ASSISTANT = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
_ASSISTANT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 8, "sliding_window": 8}
_ASSISTANT |= {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}

_DRAFTS = "it drafts for another model, from that one's hidden states"


OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "blip": {
        "inputs": {"pixel_values": _pixels()},
        "fed": lambda ids: torch.cat([torch.full_like(ids[:, :1], BOS), ids[:, 1:-1]], 1),
        "text_config.sep_token_id": 62,
    },
    "blip-2": {
        "num_query_tokens": 4,
        "image_token_index": IMAGE,
        "prefix": [IMAGE] * 4,
        "inputs": {"pixel_values": _pixels()},
    },
    "blt": {
        "table": "model.local_encoder.embed_tokens",
        "hidden": ("byte_group_hash_function",),
        "inputs": {"use_cache": lambda ids: False},
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "chameleon": {"vocabulary_map": {"<image>": IMAGE, "IMGIMGA": 80, "IMGIMGB": 81}},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {f"text_config.{key}": value for key, value in _COMPASS.items()},
    "cpmant": {"table": "cpmant.input_embedding", "prompt_length": 8, "segment_types": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 24,
        "canvas_length": 8,
    },
    "emu3": {"vocabulary_map": {"<image>": IMAGE}},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 61},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "fast_vlm": {"vision_config": _SIGLIP},
    "gemma3n": {**{f"text_config.{key}": value for key, value in _GEMMA3N.items()}, "vision": "siglip"},
    "gemma3n_text": _GEMMA3N,
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", **_ASSISTANT},
        "backbone_hidden_size": 32,
        "lacks": _DRAFTS,
    },
    "gemma4_text": _GEMMA4,
    "gemma4": {
        **{f"text_config.{key}": value for key, value in _GEMMA4.items()},
        "vision_config": {
            **_PATCHES,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
    },
    "glm46v": {**_HEADS_OF_16, "text_config.rope_parameters": _HALF_MROPE},
    "glm4v": {**_HEADS_OF_16, "text_config.rope_parameters": _HALF_MROPE},
    "glm4v_moe": {**_HEADS_OF_16, "text_config.rope_parameters": _HALF_MROPE},
    "glm_ocr": {**_HEADS_OF_16, "text_config.rope_parameters": {**_MROPE, "mrope_section": [4, 2, 2]}},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"],
        "num_hidden_layers": 2,
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kosmos-2": {
        "latent_query_num": 4,
        "prefix": [IMAGE] * 4,
        "inputs": {"pixel_values": _pixels(), "image_embeds_position_mask": lambda ids: (ids == IMAGE).long()},
    },
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 2, "expert_ffn_hidden_size": 24},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "molmo2": {"adapter_config.vision_feature_layer": [0, 1]},
    "mpt": {"attn_config.attn_pdrop": 0},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": _NEMOTRON_H,
    "neomme": {"head_dim": 16, "embedding_rank": 16, "embedding_dim": 32},
    "paligemma": {"inputs": {"token_type_ids": torch.zeros_like}},  # as its processor gives them
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": 32,
        "qk_channels": 32,
        "v_channels": 32,
    },
    "qwen2_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_omni_thinker": {
        "text_config.rope_parameters": _MROPE,
        "vision_start_token_id": 93,
        "vision_end_token_id": 94,
        "audio_start_token_id": 95,
    },
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_hashes": 1,
    },
    "step3p7": {"text_config.sliding_window": 8},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "nemotron_h_omni": {f"text_config.{key}": value for key, value in _NEMOTRON_H.items()},
    "qwen4_exp_text": {**_QWEN4, "hidden": ("ple_embedding",)},
    "qwen4_exp": {**{f"text_config.{key}": value for key, value in _QWEN4.items()}, "hidden": ("ple_embedding",)},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.n_routed_experts": 4,
        "text_config.num_experts_per_tok": 2,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", **_ASSISTANT},
        "backbone_hidden_size": 32,
        "lacks": _DRAFTS,
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "vision_config.hidden_size": 64, "downsample_rate": "1/2"},
    "hunyuan_vl": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}
    },
    "perception_lm": {
        "vision": "siglip",
        "vision_config.model_args": {"embed_dim": 32},
        "vision_use_cls_token": False,
        "projector_pooling_ratio": 1,
    },
    "musicgen": {"decoder.num_codebooks": 1},
    "musicgen_melody": {"decoder.num_codebooks": 1},
    "musicgen_decoder": {"num_codebooks": 1, "audio_channels": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1, "audio_channels": 1},
    "udop": {"inputs": {"bbox": _zeros(4)}},
    "instructblip": {
        "num_query_tokens": 4,
        "image_token_index": IMAGE,
        "prefix": [IMAGE] * 4,
        "inputs": {"pixel_values": _pixels(), "qformer_input_ids": lambda ids: torch.full((len(ids), 3), 7)},
    },
    "instructblipvideo": {
        "num_query_tokens": 4,
        "video_token_index": IMAGE,
        "prefix": [IMAGE] * 4,
        "inputs": {
            "pixel_values": lambda ids: _pixels()(ids)[:, None],
            "qformer_input_ids": lambda ids: torch.full((len(ids), 3), 7),
        },
    },
    "idefics": {
        "inputs": {
            "pixel_values": lambda ids: _pixels()(ids)[:, None],
            "image_attention_mask": lambda ids: (ids < VOCAB).long()[..., None],  # a prompt is in front of it
        }
    },
    "vibevoice_asr": {
        f"{part}_tokenizer_encoder_config.{name}": value
        for part in ("acoustic", "semantic")
        for name, value in _SOUND.items()
    }
    | {"acoustic_tokenizer_chunk_size": 16},
    "nemo_speechlm": {f"text_config.{key}": value for key, value in _NEMOTRON_H.items()},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "llama4": {
        "mended": "MoeCausalLMOutputWithPast.image_outputs",  # which transformers 5.24.0 reads and never sets
        "vision_config.intermediate_size": 128,
        **{
            f"vision_config.{name}": 64
            for name in ("projector_input_dim", "projector_output_dim", "vision_output_dim")
        },
    },
    "pi0": {"lacks": "beside text it wants the state of a robot, and puts out what that is to do"},
    "pp_formulanet": {"lacks": "its input is an image, its text an output"},
    "pix2struct": {"lacks": "its input is an image, its text an output"},
    "vision-encoder-decoder": {"lacks": "its input is an image, its text an output"},
    "voxtral_realtime": {"lacks": "it wants sound for each token; tests/test_multimodal.py tries it with some"},
    "inkling_mm_model": {"vision_config.num_hidden_layers": 4, "vision_config.patch_size": 4},  # else it needs scipy
    "muse_glimmer_assistant": {"lacks": _DRAFTS},
    "dots3_note": {
        "vision_config.adapter_in_dim": 32,
        "vision_config.adapter_out_dim": 32,
        "audio_config.adapter_input_size": 32,
        "audio_config.adapter_out_dim": 32,
        **{f"text_config.{key}": value for key, value in _DOTS3.items()},
    },
    "dots3_note_text": _DOTS3,
    "gemma3": {"vision_config.image_size": 28},
    "mllama": {
        "vision_config.intermediate_layers_indices": [0],
        "vision_config.num_global_layers": 1,
        "text_config.num_hidden_layers": 3,
        "text_config.cross_attention_layers": [1],
        "vision_config.vision_output_dim": 64,
    },
    "apertus1p5": {
        "audio_config.codebook_dim": 32,
        "image_token_offset": 60,
        "audio_token_offset": 68,
        "vision_config.codebook_size": 8,
        "audio_config.codebook_size": 8,
    },
    "florence2": {
        "vision_config.depths": [1, 1],
        "vision_config.embed_dim": [16, 32],
        "vision_config.num_heads": [2, 2],
        "vision_config.num_groups": [2, 2],
        "vision_config.patch_size": [7, 3],
        "vision_config.patch_stride": [4, 2],
        "vision_config.patch_padding": [3, 1],
        "vision_config.patch_prenorm": [False, True],
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 93, "vision_end_token_id": 94, "audio_start_token_id": 95},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ovis2": {"blind": True},
    "muse_spark": {
        "audio_config.hidden_sizes": [8, 16],
        "audio_config.depths": [1, 1],
        "audio_config.patch_sizes": [16, 6],
    },
}
