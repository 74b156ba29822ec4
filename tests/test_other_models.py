"""Models outside of the families: those that cannot hold virtual tokens say so, others give the oracles' values."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as t
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from adapters import add, config, randomize
from device import DEVICE
from families import EOS, PAD, VOCAB, ids, padded
from oracles import adapter_weights, embed, grown, likeliest, row_output, transform
from peft_input_tuning import reuse_prompts
from peft_input_tuning.virtual_tokens.backbone import forward_parameters
from peft_input_tuning.virtual_tokens.cache_mark import cache_name

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
SMALL = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SMALL, **WIDE, "num_key_value_heads": 2, "initializer_range": 0.3}
BERT = {**SMALL, **WIDE, "max_position_embeddings": 64, "initializer_range": 0.3}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}


def built(kind: type, settings: t.PretrainedConfig):
    torch.manual_seed(0)
    return kind(settings).requires_grad_(False).eval().to(DEVICE)


def adapted_to(base: torch.nn.Module, **changes):
    """A copy of the base with a random adapter, and the adapter's weights."""
    model = get_peft_model(copy.deepcopy(base), config(**changes)).eval()
    randomize(model)
    return model, adapter_weights(model)


# ---- a past that is a list of tensors -------------------------------------------------------------------------------


def xlnet():
    settings = t.XLNetConfig(**SMALL, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.3)
    return built(t.XLNetLMHeadModel, settings)


def reformer():
    settings = {"attn_layers": ["local"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]}
    return built(t.ReformerModelWithLMHead, t.ReformerConfig(**SMALL, **settings, hidden_size=32, is_decoder=True))


def rwkv():
    return built(t.RwkvForCausalLM, t.RwkvConfig(**SMALL, hidden_size=32, num_hidden_layers=2))


LISTS = {"rwkv": (rwkv, "state"), "xlnet": (xlnet, "mems"), "reformer": (reformer, "past_buckets_states")}


def steps_on_a_list(model, row, name, **settings):
    """Logits of three calls, each on the list that came back."""
    found, past = [], {}
    for part in (row[:, :4], row[:, 4:5], row[:, 5:6]):
        out = model(input_ids=part, use_cache=True, **past, **settings)
        found.append(out.logits)
        past = {name: out[name]}
    return torch.cat(found, 1), past


@pytest.mark.parametrize("name", LISTS)
@torch.no_grad()
def test_a_list_of_tensors_says_whether_a_prompt_is_in_it(name):
    build, past_name = LISTS[name]
    base = build()
    settings = {"use_mems": True} if name == "xlnet" else {}
    model, weights = adapted_to(base, num_virtual_tokens=4)
    oracle, prompt = grown(base, weights)
    row = ids(1, 6)
    expected = []
    past = {}
    for part in (torch.cat([prompt[None], row[:, :4]], 1), row[:, 4:5], row[:, 5:6]):
        out = oracle(input_ids=part, use_cache=True, **past, **settings)
        expected.append(out.logits)
        past = {past_name: out[past_name]}
    found, past = steps_on_a_list(model, row, past_name, **settings)
    assert_close(found, torch.cat(expected, 1)[:, 4:], **TOLERANCE)
    copied = copy.deepcopy(past)
    again = model(input_ids=row[:, :1], use_cache=True, **copied, **settings).logits
    assert_close(again, model(input_ids=row[:, :1], use_cache=True, **past, **settings).logits)


@pytest.mark.parametrize("name", ["rwkv", "xlnet"])
def test_a_list_made_anew_does_not_say_what_it_holds(name):
    build, past_name = LISTS[name]
    settings = {"use_mems": True} if name == "xlnet" else {}
    model, _ = adapted_to(build(), num_virtual_tokens=4)
    out = model(input_ids=ids(1, 4), use_cache=True, **settings)
    with pytest.raises(ValueError, match="Nothing tells whether this list is empty"):
        model(input_ids=ids(1, 1), use_cache=True, **{past_name: list(out[past_name])}, **settings)


@pytest.mark.parametrize("name", ["rwkv", "reformer"])
def test_generation_on_a_list_equals_whole_forward_passes(name):
    model, _ = adapted_to(LISTS[name][0](), num_virtual_tokens=4)
    row = ids(1, 5)
    found = model.generate(input_ids=row, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    whole = row
    for _ in range(4):
        logits = model(input_ids=whole, use_cache=False).logits[:, -1].clone()
        logits[:, EOS] = -torch.inf
        whole = torch.cat([whole, logits.argmax(-1, keepdim=True)], 1)
    assert found.tolist() == whole.tolist()


@pytest.mark.parametrize("virtual_tokens", [0, 4])
def test_rows_of_a_model_that_looks_them_up_by_length_keep_their_adapters(virtual_tokens):
    """XLNet, with as many rows as tokens."""
    base = xlnet()
    model, _ = adapted_to(base, num_virtual_tokens=virtual_tokens)
    add(model, "b", seed=2, num_virtual_tokens=virtual_tokens)
    model.eval()
    batch, names = ids(3, 3), ["b", "default", "__base__"]
    found = model(input_ids=batch, adapter_names=names).logits
    for row, name, logits in zip(batch, names, found, strict=True):
        if name == "__base__":
            expected = base(input_ids=row[None]).logits[0]
        else:
            expected = row_output(base, adapter_weights(model, name), row)
        assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["rwkv", "xlnet"])
def test_such_a_model_takes_the_adapter_alone(name):
    base = LISTS[name][0]()
    model, weights = adapted_to(base, num_virtual_tokens=0)
    row = ids(7)
    assert_close(model(input_ids=row[None]).logits[0], row_output(base, weights, row), **TOLERANCE)


def test_a_model_that_does_not_return_its_cache_is_refused_one():
    """XLM cuts whole rows by the length of a cache, which it keeps to itself."""
    settings = t.XLMConfig(vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4, pad_index=PAD, mask_token_id=9)
    model, _ = adapted_to(built(t.XLMWithLMHeadModel, settings), num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"was passed to XLMModel, which does not return it.*use_cache=False"):
        model.generate(input_ids=ids(1, 5), max_new_tokens=2, do_sample=False)


def test_virtual_tokens_have_the_language_of_their_row():
    settings = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": PAD, "n_langs": 3, "use_lang_emb": True}
    base = built(t.XLMModel, t.XLMConfig(vocab_size=VOCAB, **settings, embed_init_std=0.3))
    model, weights = adapted_to(base, num_virtual_tokens=4, task_type=None)
    oracle, prompt = grown(base, weights)
    rows, mask = padded([ids(6), ids(4, seed=1)], "left")
    langs = torch.tensor([[1] * 6, [0, 0, 2, 2, 2, 2]], device=DEVICE)
    found = model(input_ids=rows, attention_mask=mask, langs=langs).last_hidden_state
    for at, pads in ((0, 0), (1, 2)):
        row = torch.cat([rows[at, :pads], prompt, rows[at, pads:]])[None]
        spread = torch.cat([langs[at, :pads], langs[at, -1:].expand(4), langs[at, pads:]])[None]
        wide = torch.cat([mask[at, :pads], mask.new_ones(4), mask[at, pads:]])[None]
        expected = oracle(input_ids=row, attention_mask=wide, langs=spread).last_hidden_state
        assert_close(found[at, pads:], expected[0, pads + 4 :], **TOLERANCE)


# ---- models that do more with ids than look them up -----------------------------------------------------------------


def seq2seq(kind: str, model: str | None = None, **changes):
    settings = getattr(t, f"{kind}Config")(**{**SEQ2SEQ, "max_position_embeddings": 64, "init_std": 0.3, **changes})
    return built(getattr(t, model or f"{kind}ForConditionalGeneration"), settings)


def falcon_h1():
    settings = {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_head": 8}
    return built(t.FalconH1ForCausalLM, t.FalconH1Config(**GROUPED, **settings, embedding_multiplier=5.0))


def esm():
    settings = {**BERT, "pad_token_id": 1, "mask_token_id": 90, "token_dropout": True}
    return built(t.EsmForMaskedLM, t.EsmConfig(**settings, position_embedding_type="rotary"))


SCALED = {
    "marian": lambda: seq2seq("Marian", "MarianMTModel", scale_embedding=True),
    "pegasus": lambda: seq2seq("Pegasus", scale_embedding=True),
    "blenderbot_small": lambda: seq2seq("BlenderbotSmall", scale_embedding=True),
    "mvp": lambda: seq2seq("Mvp", scale_embedding=True),
}


def gemma3n():
    settings = t.Gemma3nTextConfig(
        **GROUPED,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    base = built(t.Gemma3nForCausalLM, settings)
    for layer in base.model.layers:
        layer.altup.correct_output_scale.fill_(0.5)  # starts at 0, where what each layer looks up does not count
    return base


def gemma4():
    settings = t.Gemma4TextConfig(
        **GROUPED, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB
    )
    return built(t.Gemma4ForCausalLM, settings)


IDS_ONLY = {**SCALED, "falcon_h1": falcon_h1, "esm": esm, "gemma3n": gemma3n, "gemma4": gemma4}


@torch.no_grad()
def grown_output(base, weights, row, **more):
    """Logits for one row of ids, by a base with a word more for each virtual token."""
    model, virtual = grown(base, weights)
    other = getattr(base.base_model, "embed_tokens_per_layer", None)
    if other is not None:  # padding, for virtual tokens
        rows = torch.cat([other.weight, other.weight[PAD].expand(len(virtual), -1)])
        model.base_model.embed_tokens_per_layer.weight = torch.nn.Parameter(rows, requires_grad=False)
    logits = model(input_ids=torch.cat([virtual, row])[None], **more).logits[0]
    return logits if base.config.is_encoder_decoder else logits[len(virtual) :]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*IDS_ONLY, "m2m_100"])
def test_models_that_do_more_with_ids_than_look_them_up(name, side):
    """They scale what they look up, count positions along ids, look ids up in further tables."""
    base = {**IDS_ONLY, "m2m_100": lambda: seq2seq("M2M100")}[name]()
    if name in SCALED and side == "left":
        return  # the bases count pads as positions
    seq2seq_model = base.config.is_encoder_decoder
    task = "SEQ_2_SEQ_LM" if seq2seq_model else "CAUSAL_LM" if hasattr(base, "generate") else "FEATURE_EXTRACTION"
    model, weights = adapted_to(base, task_type=task)
    rows = [ids(7), ids(4, seed=1)]
    batch, mask = padded(rows, side)
    batch = batch.masked_fill(mask == 0, base.config.pad_token_id)
    more = {"decoder_input_ids": ids(1, 5, seed=9)} if seq2seq_model else {}
    many = {key: value.expand(2, -1) for key, value in more.items()}
    out = model(input_ids=batch, attention_mask=mask, **many).logits
    for i, row in enumerate(rows):
        found = out[i] if seq2seq_model else out[i][mask[i] == 1]
        assert_close(found, grown_output(base, weights, row, **more), **TOLERANCE)


def plain_attributes(model: torch.nn.Module) -> dict[str, object]:
    kinds = bool | int | float | str | None
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, kinds)
    }


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["rwkv", "nllb_moe", "switch", "gemma3n"])
def test_adding_and_unloading_leaves_no_trace(name, training):
    """The runs at injection: RWKV divides its weights in eval mode, the experts of NLLB take another capacity."""
    base = {"rwkv": rwkv, "gemma3n": gemma3n, **OTHER_MIXTURES}[name]().train(training)
    values, attributes = copy.deepcopy(base.state_dict()), plain_attributes(base)
    classes = {path: type(one) for path, one in base.named_modules()}
    model = get_peft_model(base, config(num_virtual_tokens=0, init_weights=True, adapter_hidden_dim=1))
    plain = model.unload()
    assert {path: type(one) for path, one in plain.named_modules()} == classes
    assert plain_attributes(plain) == attributes
    assert plain.state_dict().keys() == values.keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, values[key]), key


@pytest.mark.parametrize("name", [*SCALED, "falcon_h1"])
def test_embeddings_of_the_caller_are_refused_if_they_do_not_do_what_ids_do(name):
    base = IDS_ONLY[name]()
    model, _ = adapted_to(base)
    inner = model.get_base_model()
    backbone = inner.get_encoder() if base.config.is_encoder_decoder else inner.model
    x = model.get_input_embeddings()(ids(1, 7))
    with pytest.raises(ValueError, match=r"does more with ids than look up.*Pass `input_ids`"):
        backbone(inputs_embeds=x)


def test_such_a_model_does_not_tell_input_from_output():
    base = falcon_h1().train()
    with pytest.raises(ValueError, match=r'`adapter_scope` is "input", but .*adapter_scope="all"'):
        get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=0, adapter_scope="input"))
    assert all(module.training for module in base.modules())


# ---- models that keep a state instead of, or beside, keys and values ------------------------------------------------


def mamba():
    return built(t.MambaForCausalLM, t.MambaConfig(**SMALL, hidden_size=32, state_size=4, num_hidden_layers=2))


def mamba2():
    settings = {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1, "num_hidden_layers": 2}
    return built(t.Mamba2ForCausalLM, t.Mamba2Config(**SMALL, hidden_size=32, **settings))


def recurrent_gemma():
    settings = {**GROUPED, "head_dim": 8, "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3}
    return built(t.RecurrentGemmaForCausalLM, t.RecurrentGemmaConfig(**settings))


def minimax():
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "block_size": 4}
    return built(t.MiniMaxForCausalLM, t.MiniMaxConfig(**GROUPED, **settings))


def xlstm():
    settings = {"num_heads": 4, "num_blocks": 2, "num_hidden_layers": 2, "qk_dim_factor": 1.0}
    return built(t.xLSTMForCausalLM, t.xLSTMConfig(**SMALL, hidden_size=64, **settings, mode="inference"))


STATEFUL = {one.__name__: one for one in (mamba, mamba2, recurrent_gemma, minimax, xlstm)}


@torch.no_grad()
@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_holds_the_prompt_once(name):
    """Greedy generation on the state equals whole forwards of a base with a word more for each virtual token."""
    base = STATEFUL[name]()
    base.generation_config.eos_token_id = None
    model, weights = adapted_to(base, task_type="CAUSAL_LM")
    row = ids(7)
    got = model.generate(input_ids=row[None], max_new_tokens=6, do_sample=False, pad_token_id=PAD)[0, 7:]
    new: list[int] = []
    for _ in range(6):
        whole = torch.cat([row, row.new_tensor(new)])
        new.append(likeliest(grown_output(base, weights, whole)[-1]))
    assert got.tolist() == new
    rows = [ids(7), ids(4, seed=1)]
    batch, mask = padded(rows, "left")
    if base.config.model_type in ("mamba", "mamba2"):  # the others do not honour it, or take none
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
        out = model.generate(input_ids=batch, attention_mask=mask, **options)
        for i, own in enumerate(rows):
            alone = model.generate(input_ids=own[None], **options)[0, len(own) :]
            assert torch.equal(out[i, 7:], alone)
    if any(hasattr(part, "recurrent_states") for part in base.modules()):
        return  # RecurrentGemma before 5.23: states inside of the modules, which a new sequence by hand goes on from
    name = cache_name(forward_parameters(base))
    given = {name: t.DynamicCache(config=base.config)} if base.config.model_type == "recurrent_gemma" else {}
    first = model(input_ids=row[None, :5], use_cache=True, **given)
    rest = model(input_ids=row[None, 5:6], use_cache=True, **{name: given.get(name) or first[name]})
    assert_close(rest.logits[0, -1], grown_output(base, weights, row[:6])[-1], **TOLERANCE)


# ---- positions ------------------------------------------------------------------------------------------------------


def mpnet():
    return built(t.MPNetForMaskedLM, t.MPNetConfig(**{**BERT, "pad_token_id": 1}))


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_along_ids_are_found_where_no_method_tells_them(side):
    """MPNet counts along ids in a function of its module, where RoBERTa has a method."""
    base = mpnet()
    model, weights = adapted_to(base, task_type="FEATURE_EXTRACTION")
    rows = [ids(7), ids(4, seed=1)]
    pads = torch.ones(3, dtype=torch.long, device=DEVICE)
    short = torch.cat([pads, rows[1]] if side == "left" else [rows[1], pads])
    batch = torch.stack([rows[0], short])
    out = model(input_ids=batch, attention_mask=(batch != 1).long()).logits
    at = slice(3, None) if side == "left" else slice(0, 4)
    assert_close(out[0], row_output(base, weights, rows[0]), **TOLERANCE)
    assert_close(out[1, at], row_output(base, weights, rows[1]), **TOLERANCE)


def test_a_mixed_batch_where_positions_are_counted_along_ids():
    base = mpnet()
    model, weights = adapted_to(base, task_type="FEATURE_EXTRACTION")
    batch = ids(2, 7)
    out = model(input_ids=batch, adapter_names=["default", "__base__"]).logits
    assert_close(out[0], row_output(base, weights, batch[0]), **TOLERANCE)
    assert_close(out[1], base(input_ids=batch[1:]).logits[0], **TOLERANCE)


def test_positions_that_a_model_counts_along_ids_are_in_its_limit():
    model, _ = adapted_to(mpnet(), task_type="FEATURE_EXTRACTION")
    with pytest.raises(ValueError, match=r"has only 62 positions\. Shorten the input to 58 tokens"):
        model(input_ids=ids(1, 59))


def test_a_mixed_batch_where_the_table_could_count_along_the_mask():
    """BioGPT's table can, as OPT's, but its model gives it positions by place."""
    settings = {**SMALL, **WIDE, "max_position_embeddings": 64, "initializer_range": 0.3}
    base = built(t.BioGptForCausalLM, t.BioGptConfig(**settings))
    model, weights = adapted_to(base, task_type="CAUSAL_LM")
    other = add(model, "other", seed=3, num_virtual_tokens=2)
    batch = ids(2, 7)
    for mask in (None, torch.ones_like(batch)):
        out = model(input_ids=batch, attention_mask=mask, adapter_names=["default", "other"], use_cache=False).logits
        for row, mine, found in zip(batch, (weights, other), out, strict=True):
            assert_close(found, row_output(base, mine, row), **TOLERANCE)


WITHOUT_CACHE = {
    "distilbert": lambda: built(
        t.DistilBertForMaskedLM,
        t.DistilBertConfig(**SMALL, dim=32, n_layers=2, n_heads=4, hidden_dim=48, initializer_range=0.3),
    ),
    "albert": lambda: built(t.AlbertForMaskedLM, t.AlbertConfig(**BERT, embedding_size=16)),
}


@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_positions_of_the_caller_where_a_configuration_knows_no_cache(name):
    base = WITHOUT_CACHE[name]()
    model, weights = adapted_to(base, task_type="FEATURE_EXTRACTION")
    row = ids(7)
    out = model(input_ids=row[None], position_ids=torch.arange(7, device=DEVICE)[None]).logits
    assert_close(out[0], row_output(base, weights, row), **TOLERANCE)


@torch.no_grad()
def test_generation_of_a_decoder_whose_positions_start_later():
    """RoBERTa's own first position is 2 with this padding, where a prompt that is computed ahead would be."""
    base = built(t.XLMRobertaForCausalLM, t.XLMRobertaConfig(**{**BERT, "pad_token_id": 1}, is_decoder=True))
    model, _ = adapted_to(base, task_type="CAUSAL_LM")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "output_logits": True}
    logits = []
    for ahead in (reuse_prompts(model), nullcontext()):
        with ahead:
            out = model.generate(input_ids=ids(2, 7), return_dict_in_generate=True, **options)
        logits.append(torch.stack(out.logits))
    assert_close(*logits, **TOLERANCE)


# ---- arguments that nothing is known of -----------------------------------------------------------------------------


def test_arguments_that_nothing_is_known_of_are_refused():
    settings = t.XLMConfig(n_words=VOCAB, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, pad_index=0)
    model, _ = adapted_to(built(t.XLMWithLMHeadModel, settings))
    with pytest.raises(ValueError, match=r"`lengths` has the shape \(1,\).*num_virtual_tokens=0"):
        model(input_ids=ids(1, 7), lengths=torch.tensor([7], device=DEVICE))


def test_a_model_that_shortens_its_input_is_refused_at_the_first_call():
    settings = t.FunnelConfig(vocab_size=VOCAB, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1])
    model, _ = adapted_to(built(t.FunnelBaseModel, settings))
    with pytest.raises(
        ValueError, match=r"FunnelBaseModel gives \d+ places for 24: it pools.*virtual tokens cannot be taken"
    ):
        model(input_ids=ids(1, 20))


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


@torch.no_grad()
@pytest.mark.parametrize("case", ["packed", "prompts of two lengths"])
def test_routers_of_packed_and_of_mixed_rows(case):
    base = MIXTURES["mixtral"]()
    model, weights = adapted_to(base, task_type="CAUSAL_LM", num_virtual_tokens=2)
    other = add(model, "other", seed=3, num_virtual_tokens=5)
    rows = [ids(6), ids(6, seed=1)]
    if case == "packed":
        more = {
            "input_ids": torch.cat(rows)[None],
            "position_ids": torch.arange(6, device=DEVICE).repeat(2)[None],
            "use_cache": False,
        }
        each = [weights, weights]
    else:
        more = {"input_ids": torch.stack(rows), "adapter_names": ["default", "other"]}
        each = [weights, other]
    out = model(**more, output_router_logits=True)
    for place in range(2):
        by_hand = []
        for row, mine in zip(rows, each, strict=True):
            routers = base.model(inputs_embeds=embed(base, mine, row), output_router_logits=True).router_logits
            by_hand.append(routers[place][-6:])
        assert_close(out.router_logits[place], torch.cat(by_hand), **TOLERANCE)


SEQ2SEQ = {**SMALL, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": PAD}
SEQ2SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SWITCH = {**SMALL, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
SWITCH |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64}
NLLB = {**SEQ2SEQ, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "max_position_embeddings": 64}
OTHER_MIXTURES = {
    "switch": lambda: built(
        t.SwitchTransformersForConditionalGeneration,
        t.SwitchTransformersConfig(**SWITCH, num_experts=4, decoder_start_token_id=PAD),
    ),
    "nllb_moe": lambda: built(t.NllbMoeForConditionalGeneration, t.NllbMoeConfig(**NLLB, num_experts=4)),
    "doge": lambda: built(
        t.DogeForCausalLM, t.DogeConfig(**EXPERTS, is_moe=True, num_experts=16, max_position_embeddings=64)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHER_MIXTURES)
def test_routers_of_other_shapes_do_no_harm(name):
    """Switch has (batch, places, experts), NLLB a row a token, Doge something that is not of single places."""
    base = OTHER_MIXTURES[name]()
    model, weights = adapted_to(base)
    row = ids(7)
    more = {"decoder_input_ids": ids(1, 5, seed=9)} if base.config.is_encoder_decoder else {}
    out = model(input_ids=row[None], **more, output_router_logits=True)
    assert_close(out.logits[0], row_output(base, weights, row, **more), **TOLERANCE)
    if name != "doge":
        found = [router for router in out.encoder_router_logits if getattr(router, "ndim", 0) > 1]
        assert found
        assert {router.numel() // router.shape[-1] for router in found} == {len(row)}


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


def test_such_a_pooler_that_is_trained_too():
    """PEFT wraps it then, so that it is no bare module any more."""
    base = POOLERS["albert"]()
    model = get_peft_model(copy.deepcopy(base), config(task_type="SEQ_CLS", modules_to_save=["pooler", "classifier"]))
    randomize(model.eval())
    row = ids(7)
    hidden = base.base_model(inputs_embeds=embed(base, adapter_weights(model), row)).last_hidden_state[:, 4:]
    want = base.classifier(torch.tanh(base.base_model.pooler(hidden[:, 0])))
    assert_close(model(input_ids=row[None]).logits, want, **TOLERANCE)


# ---- token types and positions --------------------------------------------------------------------------------------

UNTYPED = {  # the models look types up elsewhere than in the word embedding, or not at all
    "deberta_v2": lambda: built(t.DebertaV2Model, t.DebertaV2Config(**BERT, type_vocab_size=0)),
    "funnel": lambda: built(
        t.FunnelBaseModel,
        t.FunnelConfig(
            vocab_size=VOCAB, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1], num_decoder_layers=1
        ),
    ),
    "xlnet": xlnet,
}


@pytest.mark.parametrize("name", UNTYPED)
def test_token_types_are_left_to_models_that_do_not_look_them_up_among_the_words(name):
    base = UNTYPED[name]()
    model, weights = adapted_to(base, num_virtual_tokens=0)
    row, types = ids(8), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1], device=DEVICE)
    x = transform(weights, base.get_input_embeddings()(row))[None]
    want = base(inputs_embeds=x, token_type_ids=types[None])[0]
    assert_close(model(input_ids=row[None], token_type_ids=types[None])[0], want, **TOLERANCE)


def test_token_types_beside_virtual_tokens_where_the_model_has_none():
    base = UNTYPED["deberta_v2"]()
    model, weights = adapted_to(base)
    row = ids(8)
    out = model(input_ids=row[None], token_type_ids=torch.ones(1, 8, dtype=torch.long, device=DEVICE))
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


# ---- adapters alone need an embedding and nothing else --------------------------------------------------------------


class BagOfWords(torch.nn.Module):
    """A module that is not transformers': ids `(batch, length)` → scores `(batch, 3)`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(VOCAB, 16)
        self.head = torch.nn.Linear(16, 3)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.words

    def of_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.head(embeddings.tanh().mean(dim=1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.of_embeddings(self.words(input_ids))


def bag_of_words() -> BagOfWords:
    torch.manual_seed(0)
    return BagOfWords().requires_grad_(False).eval().to(DEVICE)


def clip():
    settings = t.CLIPTextConfig(
        **SMALL, **WIDE, max_position_embeddings=40, projection_dim=32, attention_dropout=0.0, initializer_factor=20.0
    )
    return built(t.CLIPTextModel, settings)


@torch.no_grad()
def hidden(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    return model(input_ids=ids(2, 6), **kwargs).last_hidden_state


def test_an_adapter_alone_on_a_text_model_without_a_place_for_a_prompt():
    """The formula, as a table of the plain model."""
    base = clip()
    model, weights = adapted_to(base, num_virtual_tokens=0)
    table = base.get_input_embeddings()
    table.weight = torch.nn.Parameter(transform(weights, table.weight.detach()))
    assert_close(hidden(model), hidden(base), **TOLERANCE)
    assert not torch.allclose(hidden(model), hidden(clip()), atol=0.1)


def test_such_an_adapter_is_saved_loaded_disabled_merged_and_unloaded(tmp_path):
    model, _ = adapted_to(clip(), num_virtual_tokens=0)
    want = hidden(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(hidden(PeftModel.from_pretrained(clip(), tmp_path).eval()), want)
    with model.disable_adapter():
        assert torch.equal(hidden(model), hidden(clip()))
    model.merge_adapter()
    assert_close(hidden(model), want, **TOLERANCE)
    model.unmerge_adapter()
    assert torch.equal(hidden(model.unload()), hidden(clip()))


def test_rows_with_such_adapters():
    model, _ = adapted_to(clip(), num_virtual_tokens=0)
    add(model, "b", seed=2, num_virtual_tokens=0)
    model.eval()
    found = hidden(model, adapter_names=["b", "__base__"])
    model.set_adapter("b")
    assert_close(found[0], hidden(model)[0], **TOLERANCE)
    assert_close(found[1], hidden(clip())[1], **TOLERANCE)


def test_an_adapter_alone_on_a_module_of_ones_own(tmp_path):
    base, batch = bag_of_words(), ids(2, 6)
    model, weights = adapted_to(base, num_virtual_tokens=0)
    assert_close(model(batch), base.of_embeddings(transform(weights, base.words(batch))), **TOLERANCE)
    model(batch).sum().backward()
    assert all(one.grad is not None for name, one in model.named_parameters() if "input_tuning_" in name)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(bag_of_words(), tmp_path)(batch), model(batch))
    want = model(batch)
    assert_close(model.merge_and_unload()(batch), want, **TOLERANCE)


@torch.no_grad()
def test_virtual_tokens_in_clip():
    """It takes no embeddings, and pools the place of the row's end: with ids kept, that is found where it is."""
    base = clip()
    model, weights = adapted_to(base)
    rows = [torch.cat([ids(n, seed=n), torch.tensor([EOS], device=DEVICE)]) for n in (7, 4)]
    batch, mask = padded(rows, "right")
    out = model(input_ids=batch, attention_mask=mask)
    for i, row in enumerate(rows):
        oracle, virtual = grown(base, weights)
        want = oracle(input_ids=torch.cat([virtual, row])[None])
        assert_close(out.last_hidden_state[i, : len(row)], want.last_hidden_state[0, 4:], **TOLERANCE)
        assert_close(out.pooler_output[i], want.pooler_output[0], **TOLERANCE)


def test_virtual_tokens_need_a_place():
    with pytest.raises(
        ValueError, match=r"goes from `input_ids` to hidden states, so there is no.*num_virtual_tokens=0"
    ):
        adapted_to(bag_of_words())
    model, _ = adapted_to(bag_of_words(), num_virtual_tokens=0)
    with pytest.raises(ValueError, match="so there is no place"):
        model.add_adapter("b", config())
    assert model.peft_config.keys() == {"default"}


def test_a_module_that_does_not_say_which_its_embedding_is():
    with pytest.raises(ValueError, match=r"Sequential has no token embedding.*`get_input_embeddings\(\)`"):
        get_peft_model(torch.nn.Sequential(torch.nn.Embedding(VOCAB, 8)), config(num_virtual_tokens=0))


def test_a_model_whose_layers_are_of_three_kinds_takes_an_adapter_alone():
    """LXMERT has a number of layers for each of its inputs."""
    small = {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 8}
    settings = t.LxmertConfig(vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, intermediate_size=48, **small)
    base = t.LxmertModel(settings).eval()
    model = get_peft_model(copy.deepcopy(base), config(num_virtual_tokens=0)).eval()
    randomize(model)
    row, seen = ids(1, 5).cpu(), {"visual_feats": torch.randn(1, 3, 8), "visual_pos": torch.rand(1, 3, 4)}
    with torch.no_grad():
        found = model(input_ids=row, **seen).language_output
        x = transform(adapter_weights(model), base.get_input_embeddings()(row))
        assert_close(found, base(inputs_embeds=x, **seen).language_output, **TOLERANCE)
