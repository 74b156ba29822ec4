"""Tiny Llamas whose weights are quantized, each by the library that does it: on a CPU, from one folder of weights.

Sizes are multiples of the groups that weights are quantized in (64; 32 in a GGUF file).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GgufConfig, LlamaConfig, LlamaForCausalLM, QuantoConfig, TorchAoConfig

from families import EOS, PAD, VOCAB

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
GGUF_NAMES = {  # llama.cpp's name of each part of a layer
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_plain(folder: Path) -> None:
    """The weights that everything else here is made from, also as a GGUF file."""
    torch.manual_seed(0)
    special = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **special, initializer_range=0.3))
    model.save_pretrained(folder)
    write_gguf(model, folder / "model.gguf")


def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """Matrices in blocks of 8-bit numbers (Q8_0); queries and keys in the order of rows that llama.cpp rotates."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config, writer = model.config, GGUFWriter(file, "llama")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, weight in model.state_dict().items():
        name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.get(key[:-7])
        if name is None:
            layer, part = key[:-7].removeprefix("model.layers.").split(".", 1)
            name = f"blk.{layer}.{GGUF_NAMES[part]}"
        count = heads.get(name.split(".")[-1])
        if count:
            weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        if weight.ndim == 2:
            blocks = quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _plain(folder: Path, dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **more)
    model.generation_config.eos_token_id = None  # an end that comes by chance makes comparisons vacuous
    return model.requires_grad_(False).eval()


def _needs(package: str) -> None:
    """Imports it without its warnings; `make test-slow` installs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(package)


def bitsandbytes_4bit(folder: Path, dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    _needs("bitsandbytes")
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, **more}
    return _plain(folder, dtype, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings))


def bitsandbytes_8bit(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Without a threshold for outliers: those are columns of a batch, so that a row would depend on its neighbours."""
    _needs("bitsandbytes")
    return _plain(folder, dtype, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))


def torchao_int8(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    _needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return _plain(folder, dtype, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def torchao_int8_embedding(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    _needs("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    model = _plain(folder, dtype)
    settings = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, settings, filter_fn=lambda module, _: isinstance(module, nn.Embedding | nn.Linear))
    return model


def quanto_int8(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    _needs("optimum.quanto")
    return _plain(folder, dtype, quantization_config=QuantoConfig(weights="int8"))


def hqq_4bit(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """By HQQ itself: transformers 5.23 says of its HqqConfig that it is not available yet."""
    _needs("hqq")
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model, settings = _plain(folder, dtype), BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(model, quant_config=settings, compute_dtype=dtype, device="cpu")
    return model.eval()


def gguf_file(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Dequantized while it is read. transformers 5.23 keeps blocks of other architectures only, and not on a CPU."""
    return _plain(folder, dtype, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))


def gguf_embedding(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The table of words in blocks, of which transformers unpacks what it needs; everything else dequantized."""
    from gguf import GGMLQuantizationType, quants
    from transformers.integrations.gguf.utils import GgufEmbedding

    model = gguf_file(folder, dtype)
    table = model.get_input_embeddings().weight
    packed = GgufEmbedding(*table.shape, GGMLQuantizationType.Q8_0, dtype=dtype)
    blocks = quants.quantize(table.float().numpy(), GGMLQuantizationType.Q8_0)
    packed.weight.copy_(torch.from_numpy(blocks))
    model.set_input_embeddings(packed)
    return model


BASES: dict[str, Callable[..., nn.Module]] = {
    "bitsandbytes, 4-bit NF4": bitsandbytes_4bit,
    "bitsandbytes, 8-bit": bitsandbytes_8bit,
    "torchao, int8 weights": torchao_int8,
    "torchao, int8 weights and embedding": torchao_int8_embedding,
    "optimum-quanto, int8 weights": quanto_int8,
    "HQQ, 4-bit, by HQQ's own loader": hqq_4bit,
    "GGUF file, dequantized by transformers": gguf_file,
    "embedding in GGUF blocks": gguf_embedding,
}


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """All numbers that a model is made of, those of quantized weights too, as copies."""

    def inner(tensor: Tensor) -> list[Tensor]:
        if hasattr(tensor, "__tensor_flatten__"):
            return [one for name in tensor.__tensor_flatten__()[0] for one in inner(getattr(tensor, name))]
        return [tensor.detach().clone()]

    found = {}
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor) and "input_tuning_" not in key:
            found |= {f"{key.replace('base_layer.', '')} {i}": one for i, one in enumerate(inner(value))}
    return found
