"""Models outside of the families: those that cannot hold virtual tokens say so, others give the oracles' values."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from peft import get_peft_model
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from adapters import add, config, randomize
from families import EOS, PAD, VOCAB, ids, padded
from oracles import adapter_weights, embed, row_output, transform

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
SMALL = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SMALL, **WIDE, "num_key_value_heads": 2, "initializer_range": 0.3}
BERT = {**SMALL, **WIDE, "max_position_embeddings": 64, "initializer_range": 0.3}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}


def built(kind: type, settings: t.PretrainedConfig):
    torch.manual_seed(0)
    return kind(settings).requires_grad_(False).eval()


def adapted_to(base: torch.nn.Module, **changes):
    """A copy of the base with a random adapter, and the adapter's weights."""
    model = get_peft_model(copy.deepcopy(base), config(**changes)).eval()
    randomize(model)
    return model, adapter_weights(model)


# ---- no place for virtual tokens ------------------------------------------------------------------------------------

STATEFUL = {
    "mamba": lambda: built(t.MambaForCausalLM, t.MambaConfig(**SMALL, hidden_size=32, state_size=4)),
    "mamba2": lambda: built(
        t.Mamba2ForCausalLM,
        t.Mamba2Config(
            **SMALL, hidden_size=32, num_heads=8, head_dim=8, state_size=4, n_groups=1, num_hidden_layers=2
        ),
    ),
    "rwkv": lambda: built(t.RwkvForCausalLM, t.RwkvConfig(**SMALL, hidden_size=32, num_hidden_layers=2)),
    "xlnet": lambda: built(
        t.XLNetLMHeadModel, t.XLNetConfig(**SMALL, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.3)
    ),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_that_is_no_cache_is_refused(name):
    """Each generated token would get a prompt of its own."""
    base = STATEFUL[name]()
    with pytest.raises(ValueError, match=r"`num_virtual_tokens` is 4, but .* keeps its state in `\w+`.*=0"):
        get_peft_model(base, config(num_virtual_tokens=4))
    assert not any("input_tuning" in key for key in base.state_dict())


@pytest.mark.parametrize("name", STATEFUL)
def test_such_a_model_takes_the_adapter_alone(name):
    base = STATEFUL[name]()
    model, weights = adapted_to(base, num_virtual_tokens=0)
    row = ids(7)
    assert_close(model(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)


def test_ids_that_every_layer_looks_up_are_refused():
    settings = t.Gemma3nTextConfig(
        **GROUPED, head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, laurel_rank=4,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Gemma3nTextModel looks up the ids of all tokens in each layer.*=0"):
        get_peft_model(built(t.Gemma3nForCausalLM, settings), config(num_virtual_tokens=4))


# ---- outputs that not all models have -------------------------------------------------------------------------------

MIXTURES = {
    "mixtral": lambda: built(t.MixtralForCausalLM, t.MixtralConfig(**EXPERTS, num_local_experts=4)),
    "qwen3_moe": lambda: built(
        t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=16, head_dim=8)
    ),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_balanced_over_the_callers_tokens(name, masked):
    """Router logits of [prompt ; T(e)] on the bare base, the prompt's cut off by hand; padding does not count."""
    base = MIXTURES[name]()
    model, weights = adapted_to(base)
    rows = [ids(7), ids(4, seed=1)] if masked else [ids(6), ids(6, seed=1)]
    batch, mask = padded(rows, "right")
    out = model(
        input_ids=batch,
        attention_mask=mask if masked else None,
        labels=batch,
        output_router_logits=True,
        use_cache=False,
    )
    assert all(len(router) == batch.numel() for router in out.router_logits)
    by_hand = []
    for row in rows:
        routers = base.model(inputs_embeds=embed(base, weights, row), output_router_logits=True).router_logits
        by_hand.append([router[len(router) - len(row) :] for router in routers])
    layers = [torch.cat(of_layer) for of_layer in zip(*by_hand, strict=True)]
    for ours, theirs in zip(out.router_logits, layers, strict=True):
        assert_close(ours[mask.flatten().bool()], theirs, **TOLERANCE)
    assert_close(out.aux_loss, load_balancing_loss_func(tuple(layers), 4, 2), **TOLERANCE)


POOLERS = {
    "albert": lambda: built(
        t.AlbertForSequenceClassification, t.AlbertConfig(**BERT, embedding_size=16, num_labels=3)
    ),
    "big_bird": lambda: built(
        t.BigBirdForPreTraining, t.BigBirdConfig(**BERT, attention_type="original_full", use_cache=False)
    ),
}


@pytest.mark.parametrize("name", POOLERS)
def test_a_pooler_that_is_a_bare_linear_module(name):
    """These models take the first place, and the activation, outside of it."""
    base = POOLERS[name]()
    model, weights = adapted_to(base)
    backbone = base.base_model
    row = ids(7)
    hidden = backbone(inputs_embeds=embed(base, weights, row)).last_hidden_state[:, 4:]
    want = torch.tanh(backbone.pooler(hidden[:, 0]))
    assert_close(model.get_base_model().base_model(input_ids=row[None]).pooler_output, want, **TOLERANCE)
    head = base.classifier if name == "albert" else base.cls.seq_relationship
    out = model(input_ids=row[None])
    assert_close(out.logits if name == "albert" else out.seq_relationship_logits, head(want), **TOLERANCE)


# ---- token types and positions --------------------------------------------------------------------------------------

UNTYPED = {  # the models look types up elsewhere than in the word embedding, or not at all
    "deberta_v2": lambda: built(t.DebertaV2Model, t.DebertaV2Config(**BERT, type_vocab_size=0)),
    "funnel": lambda: built(
        t.FunnelBaseModel,
        t.FunnelConfig(
            vocab_size=VOCAB, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1], num_decoder_layers=1
        ),
    ),
    "xlnet": STATEFUL["xlnet"],
}


@pytest.mark.parametrize("name", UNTYPED)
def test_token_types_are_left_to_models_that_do_not_look_them_up_among_the_words(name):
    base = UNTYPED[name]()
    model, weights = adapted_to(base, num_virtual_tokens=0)
    row, types = ids(8), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    x = transform(weights, base.get_input_embeddings()(row))[None]
    want = base(inputs_embeds=x, token_type_ids=types[None])[0]
    assert_close(model(input_ids=row[None], token_type_ids=types[None])[0], want, **TOLERANCE)


def test_token_types_beside_virtual_tokens_where_the_model_has_none():
    base = UNTYPED["deberta_v2"]()
    model, weights = adapted_to(base)
    row = ids(8)
    out = model(input_ids=row[None], token_type_ids=torch.ones(1, 8, dtype=torch.long))
    assert_close(out[0][0], row_output(base, weights, row), **TOLERANCE)


@torch.no_grad()
def test_a_mixed_batch_of_roberta_as_a_decoder_goes_on_at_its_own_positions():
    """Its first position is behind the padding's: a cache and the whole row at once must agree."""
    base = built(t.RobertaForCausalLM, t.RobertaConfig(**BERT, is_decoder=True))
    model, weights = adapted_to(base, task_type="CAUSAL_LM", num_virtual_tokens=2)
    other = add(model, "other", seed=3, num_virtual_tokens=5)
    rows = torch.stack([ids(6), ids(6, seed=1)])
    names = ["default", "other"]
    first = model(input_ids=rows[:, :3], adapter_names=names, use_cache=True)
    found = [first.logits]
    cache = first.past_key_values
    for place in range(3, 6):
        found.append(model(input_ids=rows[:, place : place + 1], past_key_values=cache, adapter_names=names).logits)
    for row, mine, logits in zip(rows, (weights, other), torch.cat(found, 1), strict=True):
        assert_close(logits, row_output(base, mine, row), **TOLERANCE)
