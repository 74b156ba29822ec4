"""Tiny randomly initialised models of every family that the package supports, built from configurations.

Weights are large (an initializer_range of 0.2 to 0.5), so that wrong positions, masks and prompts show in the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
import transformers as t
from packaging.version import Version

from device import DEVICE

VOCAB, PAD, EOS = 97, 0, 1
_SMALL = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
_WIDE = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        kind: "decoder", "seq2seq" or "encoder".
        config: makes its tiny configuration.
        heads: classes for the heads it has: "lm", "base", "seq_cls", "token_cls", "qa".
        learned_positions: whether an input can be too long for a table of positions.
    """

    name: str
    kind: str
    config: Callable[[], t.PretrainedConfig]
    heads: dict[str, type] = field(hash=False)
    learned_positions: bool = False

    @property
    def task_type(self) -> str:
        return {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}[self.kind]

    def __str__(self) -> str:
        return self.name


def _heads(prefix: str, lm: str, *names: str, base: str | None = None) -> dict[str, type]:
    classes = {"lm": getattr(t, lm), "base": getattr(t, base or f"{prefix}Model")}
    suffixes = {"seq_cls": "SequenceClassification", "token_cls": "TokenClassification", "qa": "QuestionAnswering"}
    return {**classes, **{name: getattr(t, f"{prefix}For{suffixes[name]}") for name in names}}


_ALL = ("seq_cls", "token_cls", "qa")
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 1.0,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "dropout_rate": 0.0,
}
_BART = {
    **_SMALL,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "scale_embedding": True,
    "dropout": 0.0,
}
_GPT2 = {**_SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT = {**_WIDE, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "decoder", lambda: t.LlamaConfig(**_GROUPED), _heads("Llama", "LlamaForCausalLM", *_ALL)),
        Family(
            "mistral",
            "decoder",
            lambda: t.MistralConfig(**_GROUPED, sliding_window=8),
            _heads("Mistral", "MistralForCausalLM", *_ALL),
        ),
        Family("qwen2", "decoder", lambda: t.Qwen2Config(**_GROUPED), _heads("Qwen2", "Qwen2ForCausalLM", *_ALL)),
        Family(
            "gemma2",
            "decoder",
            lambda: t.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
            _heads("Gemma2", "Gemma2ForCausalLM", "seq_cls", "token_cls"),
        ),
        Family(
            "gemma3",
            "decoder",
            lambda: t.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8),
            {
                "lm": t.Gemma3ForCausalLM,
                "base": t.Gemma3TextModel,
                "seq_cls": t.Gemma3TextForSequenceClassification,
            },
        ),
        Family(
            "gpt2",
            "decoder",
            lambda: t.GPT2Config(**_GPT2, **_NO_DROPOUT),
            _heads("GPT2", "GPT2LMHeadModel", *_ALL),
            learned_positions=True,
        ),
        Family(
            "opt",
            "decoder",
            lambda: t.OPTConfig(
                **_SMALL,
                hidden_size=32,
                word_embed_proj_dim=16,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                init_std=0.3,
                dropout=0.0,
            ),
            _heads("OPT", "OPTForCausalLM", "seq_cls", "qa"),
            learned_positions=True,
        ),
        Family(
            "bloom",
            "decoder",
            lambda: t.BloomConfig(**_SMALL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
            _heads("Bloom", "BloomForCausalLM", *_ALL),
        ),
        Family(
            "gpt_neox", "decoder", lambda: t.GPTNeoXConfig(**_WIDE), _heads("GPTNeoX", "GPTNeoXForCausalLM", *_ALL)
        ),
        Family(
            "phi3",
            "decoder",
            lambda: t.Phi3Config(**_GROUPED),
            _heads("Phi3", "Phi3ForCausalLM", "seq_cls", "token_cls"),
        ),
        Family("t5", "seq2seq", lambda: t.T5Config(**_T5), _heads("T5", "T5ForConditionalGeneration", *_ALL)),
        Family(
            "bart",
            "seq2seq",
            lambda: t.BartConfig(**_BART),
            _heads("Bart", "BartForConditionalGeneration", "seq_cls", "qa"),
            learned_positions=True,
        ),
        Family(
            "bert",
            "encoder",
            lambda: t.BertConfig(**_BERT),
            _heads("Bert", "BertForMaskedLM", *_ALL),
            learned_positions=True,
        ),
        Family(
            "roberta",
            "encoder",
            lambda: t.RobertaConfig(**_BERT),
            _heads("Roberta", "RobertaForMaskedLM", *_ALL),
            learned_positions=True,
        ),
    )
}
DECODERS = [f for f in FAMILIES.values() if f.kind == "decoder"]
SEQ2SEQ = [f for f in FAMILIES.values() if f.kind == "seq2seq"]
ENCODERS = [f for f in FAMILIES.values() if f.kind == "encoder"]
GENERATORS = DECODERS + SEQ2SEQ
# Bloom itself fails on a static cache without padding before transformers 5.21.
UNPADDED_STATIC_CACHE = [f for f in DECODERS if f.name != "bloom" or Version(t.__version__) >= Version("5.21")]
ALL = list(FAMILIES.values())


@cache
def _built(name: str, head: str) -> torch.nn.Module:
    torch.manual_seed(0)
    family = FAMILIES[name]
    config = family.config()
    if head in ("seq_cls", "token_cls"):
        config.num_labels = 3
    model = family.heads[head](config).eval()
    if hasattr(model, "generation_config"):
        model.generation_config.forced_eos_token_id = None
        # An end that comes by chance makes rows of a batch end early, and comparisons vacuous.
        model.generation_config.eos_token_id = None
    return model


def build(family: Family | str, head: str = "lm") -> torch.nn.Module:
    """A fresh tiny model in eval mode; the same weights each time."""
    return copy.deepcopy(_built(str(family), head)).to(DEVICE)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without special ones; the same on every device."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads 1-D rows to one batch: ids and mask, `(batch, length)`."""
    length = max(len(row) for row in rows)
    batch = torch.full((len(rows), length), PAD, device=DEVICE)
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=DEVICE)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        batch[i, place], mask[i, place] = row, 1
    return batch, mask
