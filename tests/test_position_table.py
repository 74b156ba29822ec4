"""Prompts of different lengths in one batch of decoders that count places: each row is what it is alone.

The oracle is the base with a word more for each virtual token, run on `[pads ; prompt ; words]` of one row.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import transformers as t
from peft import get_peft_model
from torch.testing import assert_close

from adapters import add, config, randomize
from device import DEVICE
from families import EOS, PAD, VOCAB, ids, padded
from oracles import adapter_gradients, adapter_weights, embed, grown, likeliest
from peft_input_tuning import reuse_prompts
from peft_input_tuning.virtual_tokens.backbone import forward_parameters
from peft_input_tuning.virtual_tokens.cache_mark import cache_name
from peft_input_tuning.virtual_tokens.position_table import PositionTable
from peft_input_tuning.virtual_tokens.subclass import Extension, class_of

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
SMALL = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
SIZES = {**SMALL, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
SIZES |= {"max_position_embeddings": 64, "init_std": 0.3, "forced_eos_token_id": None}
ROFORMER = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROFORMER |= {"max_position_embeddings": 64, "initializer_range": 0.3}
KINDS = (
    "Bart",
    "BigBirdPegasus",
    "Blenderbot",
    "BlenderbotSmall",
    "MBart",
    "Marian",
    "Mvp",
    "PLBart",
    "Pegasus",
    "TrOCR",
)
NAMES = ["longer", "__base__", "default", "longer"]
LENGTHS = [4, 7, 5, 7]
NEW = 5
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}

each_kind = pytest.mark.parametrize("kind", KINDS)
# A learned table with an offset, one of sines, and one that its decoder gives no positions.
each_way = pytest.mark.parametrize("kind", ["Bart", "Pegasus", "TrOCR"])
not_emulated = pytest.mark.not_emulated("RoFormer cannot be tried out there")
each_batch = pytest.mark.parametrize("side", [None, "left", "right"], ids=["no mask", "left", "right"])


def built(kind: type, settings: t.PretrainedConfig):
    torch.manual_seed(0)
    base = kind(settings).requires_grad_(False).eval().to(DEVICE)
    if base.can_generate():
        base.generation_config.eos_token_id = None
    return base


def decoder(kind: str):
    return built(getattr(t, f"{kind}ForCausalLM"), getattr(t, f"{kind}Config")(**SIZES))


def roformer(kind: type, is_decoder: bool):
    return built(kind, t.RoFormerConfig(**ROFORMER, is_decoder=is_decoder))


def mixed(base, task_type: str = "CAUSAL_LM"):
    """A model with adapters of 4 and 7 virtual tokens, and each one's weights for the oracle."""
    model = get_peft_model(copy.deepcopy(base), config(task_type=task_type)).eval()
    randomize(model)
    longer = add(model, "longer", seed=2, num_virtual_tokens=7)
    model.eval()
    return model, {"default": adapter_weights(model), "longer": longer, "__base__": {}}


def batch_of(side: str | None) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], list[int]]:
    """Rows, the batch that they make, and the pads before each."""
    rows = [ids(7 if side is None else n, seed=i) for i, n in enumerate(LENGTHS)]
    if side is None:
        return rows, {"input_ids": torch.stack(rows)}, [0] * len(rows)
    batch, mask = padded(rows, side)
    return rows, {"input_ids": batch, "attention_mask": mask}, [7 - n if side == "left" else 0 for n in LENGTHS]


@torch.no_grad()
def alone(base, weights: dict, row: torch.Tensor, pads: int = 0) -> torch.Tensor:
    """Logits `(length, vocabulary)` of one row behind so many pads, which these models count as positions."""
    model, virtual = grown(base, weights)
    whole = torch.cat([row.new_full((pads,), PAD), virtual, row])[None]
    mask = (torch.arange(whole.shape[1], device=DEVICE) >= pads).long()[None]
    return model(input_ids=whole, attention_mask=mask).logits[0, pads + len(virtual) :]


def greedily(base, weights: dict, row: torch.Tensor, pads: int) -> torch.Tensor:
    new: list[int] = []
    for _ in range(NEW):
        new.append(likeliest(alone(base, weights, torch.cat([row, row.new_tensor(new)]), pads)[-1]))
    return torch.tensor(new, device=DEVICE)


def of_tokens(logits: torch.Tensor, inputs: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    return logits[row] if "attention_mask" not in inputs else logits[row][inputs["attention_mask"][row] == 1]


@torch.no_grad()
@each_batch
@each_kind
def test_each_row_is_what_it_is_alone(kind, side):
    base = decoder(kind)
    model, weights = mixed(base)
    rows, inputs, pads = batch_of(side)
    out = model(**inputs, adapter_names=NAMES).logits
    for i, (name, row) in enumerate(zip(NAMES, rows, strict=True)):
        assert_close(of_tokens(out, inputs, i), alone(base, weights[name], row, pads[i]), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["growing", "static", "static, padded", "padded"])
@each_kind
def test_step_by_step_on_a_cache(kind, cache):
    base = decoder(kind)
    model, weights = mixed(base)
    rows, inputs, pads = batch_of("left" if "padded" in cache else None)
    name = cache_name(forward_parameters(base))
    given = {name: t.StaticCache(config=base.config, max_cache_len=20)} if "static" in cache else {}
    found = []
    for start, end in ((0, 5), (5, 6), (6, 7)):
        more = {} if "attention_mask" not in inputs else {"attention_mask": inputs["attention_mask"][:, :end]}
        call = {"input_ids": inputs["input_ids"][:, start:end], **more, **given}
        out = model(**call, adapter_names=NAMES, use_cache=True)
        found.append(out.logits)
        given = {name: out[name]}
    out = torch.cat(found, dim=1)
    for i, (one, row) in enumerate(zip(NAMES, rows, strict=True)):
        assert_close(of_tokens(out, inputs, i), alone(base, weights[one], row, pads[i]), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@each_way
def test_generate(kind, options):
    base = decoder(kind)
    model, weights = mixed(base)
    rows, inputs, pads = batch_of("left")
    out = model.generate(**inputs, adapter_names=NAMES, **OPTIONS, **options, disable_compile=True)
    for i, (name, row) in enumerate(zip(NAMES, rows, strict=True)):
        assert torch.equal(out[i, 7:], greedily(base, weights[name], row, pads[i])), name


@torch.no_grad()
@each_way
def test_beams(kind):
    """Each row's are those of the row in a batch by itself, whose prompts have one length."""
    model, _ = mixed(decoder(kind))
    _, inputs, _ = batch_of("left")
    beams = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2}
    out = model.generate(**inputs, adapter_names=NAMES, **beams)
    for i, name in enumerate(NAMES):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        assert torch.equal(out[2 * i : 2 * i + 2], model.generate(**one, adapter_names=[name], **beams)), name


def test_gradients():
    base = decoder("Bart")
    model, weights = mixed(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("input_tuning_" in name)
    rows, inputs, _ = batch_of(None)
    factors = torch.randn(4, 7, VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    (model(**inputs, adapter_names=NAMES).logits * factors).sum().backward()
    for one in weights.values():
        for tensor in one.values():
            tensor.requires_grad_()
    for name, row, factor in zip(NAMES, rows, factors, strict=True):
        if weights[name]:
            (base(inputs_embeds=embed(base, weights[name], row)).logits[0, -7:] * factor).sum().backward()
    for name in ("default", "longer"):
        found = adapter_gradients(model, name)
        assert found.keys() == weights[name].keys()
        for key, tensor in weights[name].items():
            assert_close(found[key], tensor.grad, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_from_known_states():
    base = decoder("Bart")
    model, weights = mixed(base)
    rows, inputs, _ = batch_of(None)
    name = cache_name(forward_parameters(base))
    with reuse_prompts(model):
        cache = t.DynamicCache(config=base.config)
        first = model(input_ids=inputs["input_ids"][:, :5], adapter_names=NAMES, use_cache=True, **{name: cache})
        assert model.base_model.layer.prompt_states
        rest = model(input_ids=inputs["input_ids"][:, 5:], adapter_names=NAMES, use_cache=True, **{name: cache})
    out = torch.cat([first.logits, rest.logits], dim=1)
    for i, (one, row) in enumerate(zip(NAMES, rows, strict=True)):
        assert_close(out[i], alone(base, weights[one], row), **TOLERANCE)


# ---- the table itself -----------------------------------------------------------------------------------------------


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_whole])
@pytest.mark.parametrize("kind", ["Bart", "MBart"])  # MBart's table gets ids
def test_copies_do_the_same(kind, copied):
    model, _ = mixed(decoder(kind))
    _, inputs, _ = batch_of("left")
    expected = model(**inputs, adapter_names=NAMES).logits
    assert torch.equal(copied(model)(**inputs, adapter_names=NAMES).logits, expected)


@pytest.mark.parametrize("kind", ["Bart", "MBart"])
def test_unloading_gives_the_table_its_class_back(kind):
    base = decoder(kind)
    model, _ = mixed(base)
    table = model.get_base_model().model.decoder.embed_positions
    own = type(base.model.decoder.embed_positions)
    assert isinstance(table, PositionTable)
    assert (class_of(table), type(table).__name__) == (own, own.__name__)
    model.unload()
    assert type(table) is own


@torch.no_grad()
@pytest.mark.not_emulated("torch.compile does not know the device")
def test_compiled():
    """In one graph without rows; with rows of their own, without a graph."""
    base = decoder("Bart")
    model, weights = mixed(base)
    rows, inputs, _ = batch_of(None)
    expected = model(**inputs, adapter_names=NAMES).logits
    model.get_base_model().model.compile(backend="aot_eager", fullgraph=True)
    out = model(**inputs, use_cache=False).logits
    for i, row in enumerate(rows):
        assert_close(out[i], alone(base, weights["default"], row), **TOLERANCE)
    assert_close(model(**inputs, adapter_names=NAMES).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_a_call_that_fails_leaves_no_positions():
    base = decoder("Bart")
    model, weights = mixed(base)
    rows, inputs, _ = batch_of(None)
    layer = model.get_base_model().model.decoder.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, adapter_names=NAMES)
    hook.remove()
    assert_close(model(**inputs).logits[0], alone(base, weights["default"], rows[0]), **TOLERANCE)


# ---- what stays refused ---------------------------------------------------------------------------------------------


def rotary():
    return roformer(t.RoFormerForCausalLM, is_decoder=True)


def not_as_told():
    """A table with a forward of its own, which takes no notice of what it is told."""
    base = decoder("Blenderbot")
    table = base.model.decoder.embed_positions
    table.forward = lambda given, past=0, position_ids=None: type(table).forward(table, given, past)
    return base


def elsewhere():
    """Its first layer's weights are not here when the adapter is added."""
    base = decoder("Bart")
    layer = base.model.decoder.layers[0].fc1
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    return base


@torch.no_grad()
@pytest.mark.parametrize("make", [pytest.param(rotary, marks=not_emulated), not_as_told, elsewhere])
def test_prompts_of_different_lengths_where_rows_have_the_same_positions(make):
    model, _ = mixed(make())
    _, inputs, _ = batch_of("left")
    message = (
        "numbers positions by place in the row, the same for all rows.*Use adapters of one length.*use_cache=False"
    )
    with pytest.raises(ValueError, match=message):
        model(**inputs, adapter_names=NAMES)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, adapter_names=NAMES, **OPTIONS)
    assert not any(isinstance(one, PositionTable) for one in model.modules())
    assert not isinstance(make().base_model, Extension)


@not_emulated
@torch.no_grad()
@each_batch
@pytest.mark.parametrize("is_decoder", [True, False], ids=["decoder", "encoder"])
def test_such_rows_where_nothing_follows(is_decoder, side):
    """Slack stands on the right then. RoFormer turns queries and keys by one table for all rows."""
    base = roformer(t.RoFormerForCausalLM if is_decoder else t.RoFormerForMaskedLM, is_decoder)
    model, weights = mixed(base, "CAUSAL_LM" if is_decoder else "FEATURE_EXTRACTION")
    rows, inputs, pads = batch_of(side)
    more = {"use_cache": False} if is_decoder else {}
    out = model(**inputs, **more, adapter_names=NAMES).logits
    for i, (name, row) in enumerate(zip(NAMES, rows, strict=True)):
        assert_close(of_tokens(out, inputs, i), alone(base, weights[name], row, pads[i]), **TOLERANCE)


@not_emulated
@torch.no_grad()
def test_a_cache_that_comes_back_unasked():
    """Slack stood on the right of what it holds, so nothing can go on from it."""
    base = rotary()
    name = cache_name(forward_parameters(base))
    unasked = {"use_cache": True, name: t.DynamicCache(config=base.config)}
    model, _ = mixed(base)
    encoder = model.get_base_model().roformer.encoder
    encoder.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, **unasked}), with_kwargs=True)
    _, inputs, _ = batch_of(None)
    cache = model(**inputs, adapter_names=NAMES, use_cache=False)[name]
    with pytest.raises(ValueError, match="cannot share a batch that later tokens follow"):
        model(input_ids=ids(4, 1), adapter_names=NAMES, use_cache=False, **{name: cache})


@not_emulated
@torch.no_grad()
def test_generation_of_such_rows_without_a_cache():
    base = rotary()
    model, weights = mixed(base)
    rows, inputs, pads = batch_of("left")
    out = model.generate(**inputs, adapter_names=NAMES, **OPTIONS, use_cache=False)
    for i, (name, row) in enumerate(zip(NAMES, rows, strict=True)):
        assert torch.equal(out[i, 7:], greedily(base, weights[name], row, pads[i])), name
