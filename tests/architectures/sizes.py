"""How large a tiny model is: rules by the names of a configuration's fields, and a table of what models want otherwise."""

from __future__ import annotations

import re
from typing import Any

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
    ("(mask|unk)_token_id", 61),
    ("forced_(eos|bos)_token_id", None),
    (r"image_token_(id|index)|img_token_id|image_pad_token_id", IMAGE),
    (r"video_token_(id|index)", 91),
    (r"audio_token_(id|index)", 92),
    (r"(vision|image|video|audio|boi|eoi|boa|eoa|vision_bos|vision_eos|image_bos|image_eos).*_(id|index)", 93),
    ("(unpadded_|text_|.*)vocab_size(_per_layer_input)?", VOCAB),
    ("type_vocab_size", "keep"),
    (r".*(dropout|drop|pdrop|layerdrop|jitter|jitter_noise|path_rate)(_rate|_prob)?", 0.0),
    ("summary_(first|last)_dropout", 0.0),
    (r"moe_intermediate_size|shared_expert_intermediate_size|moe_.*intermediate.*", 24),
    (r".*intermediate_size|.*ffn_dim|d_ff|ffn_hidden_size|n_inner|mlp_dim|d_inner|ffn_size|.*_mlp_dim", 48),
    (r"hidden_size_per_layer_input", 8),
    ("linear_(key|value)_head_dim|linear_head_dim", 8),
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
    (r".*(mamba_chunk_size|chunk_size|chunk_length)", 8),
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
            if isinstance(small, str) or (value is None and name != "pad_token_id"):
                return value
            if isinstance(value, bool) or isinstance(value, (list, tuple, dict, str)):
                return value
            if isinstance(small, int) and isinstance(value, int) and value < small and "token" not in name:
                return value
            return small
    return value


# By model type, or by the name of a class where types are shared: fields by dotted path, and further settings.
#   "inputs": what calls need beside ids, {name: values for one row}
#   "attention": the attention's implementation
SETTINGS = ("inputs", "attention")
OVERRIDES: dict[str, dict[str, Any]] = {}
