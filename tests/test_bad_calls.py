"""What a call cannot do is said by name, before anything runs; nothing is silently wrong."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model

from adapters import adapted, add, config
from device import DEVICE
from families import DECODERS, FAMILIES, build, ids, padded

llama, gpt2, opt, bart, t5, bert, roberta = (
    FAMILIES[name] for name in ("llama", "gpt2", "opt", "bart", "t5", "bert", "roberta")
)
LEARNED = [family for family in FAMILIES.values() if family.learned_positions]

each_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)


def still_works(model) -> bool:
    return bool(torch.isfinite(model(input_ids=ids(1, 5)).logits).all())


@pytest.mark.parametrize("family", LEARNED, ids=str)
def test_prompt_and_input_longer_than_the_positions(family):
    model, base, _ = adapted(family)
    longest = 64 - (1 if family is roberta else 0)
    more = {"decoder_input_ids": ids(1, 3)} if family is bart else {}
    base(input_ids=ids(1, longest), **more)
    assert torch.isfinite(model(input_ids=ids(1, longest - 4), **more).logits).all()
    with pytest.raises(
        ValueError, match=rf"{longest - 3} tokens and the prompt 4 virtual tokens.*{longest} positions"
    ):
        model(input_ids=ids(1, longest - 3), **more)


@pytest.mark.parametrize("family", [gpt2, opt], ids=str)
def test_pads_do_not_count_as_positions(family):
    """A left-padded row shares its first position with its pads; the base takes such a batch, so does the model."""
    model, _, _ = adapted(family)
    batch, mask = padded([ids(59), ids(63, seed=1)], "left")
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert model(input_ids=batch, attention_mask=mask, position_ids=positions).logits.shape[1] == 63


@pytest.mark.parametrize("family", [gpt2, opt], ids=str)
def test_generating_past_the_last_position(family):
    model, _, _ = adapted(family)
    with pytest.raises(ValueError, match="Shorten the input"):
        model.generate(input_ids=ids(1, 58), max_new_tokens=10, do_sample=False, pad_token_id=0)


@each_decoder
def test_expanded_masks(family):
    model, _, _ = adapted(family)
    mask = torch.ones(1, 1, 5, 5, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"`attention_mask` must have the shape \(batch, length\), got \(1, 1, 5, 5\)"
    ):
        model(input_ids=ids(1, 5), attention_mask=mask)
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \(batch, length\), got dict"):
        model(input_ids=ids(1, 5), attention_mask={"full_attention": mask})
    cache = model(input_ids=ids(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Pass the two-dimensional mask"):
        model(input_ids=ids(1, 1), attention_mask=torch.ones(1, 1, 1, 6, device=DEVICE), past_key_values=cache)
    assert still_works(model)


@each_decoder
def test_a_static_cache_without_room_for_the_prompt(family):
    model, base, _ = adapted(family)
    cache = transformers.StaticCache(config=base.config, max_cache_len=8)
    if all(cache.is_sliding):
        return  # it forgets what has no room
    with pytest.raises(ValueError, match="is a StaticCache of 8 places, and the tokens and virtual tokens take 9"):
        model(input_ids=ids(1, 5), past_key_values=cache)
    assert still_works(model)


def test_packed_rows_where_the_model_cannot_tell_sequences_apart():
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=DEVICE)
    for family in (bert, roberta):
        model, _, _ = adapted(family)
        with pytest.raises(ValueError, match=r"packed into a row, which \w+Model cannot tell apart"):
            model(input_ids=ids(1, 5), position_ids=positions)
        assert still_works(model)


def test_packed_rows_in_a_batch_with_flash_attention(monkeypatch):
    model, _, _ = adapted(llama)
    monkeypatch.setattr(model.get_base_model().model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match=r"in a batch of 2 rows\. With flash attention"):
        model(input_ids=ids(2, 5), position_ids=torch.tensor([[0, 1, 2, 0, 1]], device=DEVICE).expand(2, -1))


@pytest.mark.not_emulated("torch.compile does not know the device")
def test_packed_rows_in_a_compiled_model():
    model, _, _ = adapted(llama)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for positions in (torch.arange(5, device=DEVICE)[None], torch.tensor([[0, 1, 2, 0, 1]], device=DEVICE)):
        with pytest.raises(Exception, match=r"`position_ids` come without an `attention_mask` or a cache"):
            compiled(input_ids=ids(1, 5), position_ids=positions)
    mask = torch.ones(1, 5, dtype=torch.long, device=DEVICE)
    compiled(input_ids=ids(1, 5), position_ids=torch.arange(5, device=DEVICE)[None], attention_mask=mask)


def test_positions_of_a_wrong_shape():
    model, _, _ = adapted(llama)
    with pytest.raises(ValueError, match=r"`position_ids` must have the shape \(batch, length\) or .*, got \(5,\)"):
        model(input_ids=ids(1, 5), position_ids=torch.arange(5, device=DEVICE))


def test_ids_of_choices():
    model, _, _ = adapted(llama)
    with pytest.raises(ValueError, match=r"`input_ids` must have the shape \(batch, length\), got \(2, 3, 5\)"):
        model(input_ids=ids(6, 5).view(2, 3, 5), attention_mask=torch.ones(2, 3, 5, device=DEVICE))


@each_decoder
def test_neither_ids_nor_embeddings_is_the_model_s_own_error(family):
    model, _, _ = adapted(family)
    with pytest.raises(ValueError, match="input"):
        model.get_base_model()()


@pytest.mark.parametrize("family", [t5, bart], ids=str)
def test_a_mask_that_does_not_fit_the_encoder_output(family):
    model, _, _ = adapted(family)
    encoded = model.get_base_model().get_encoder()(ids(1, 7))
    start = ids(1, 3)
    with pytest.raises(ValueError, match="`attention_mask` has 5 places for 11 places of the encoder's output"):
        model.get_base_model()(
            encoder_outputs=encoded, attention_mask=torch.ones(1, 5, device=DEVICE), decoder_input_ids=start
        )


# ---- adapter_names --------------------------------------------------------------------------------------------------


def test_unknown_name_in_a_mixed_batch():
    model, _, _ = adapted(llama)
    for call in (model, lambda **kwargs: model.generate(max_new_tokens=2, **kwargs)):
        with pytest.raises(ValueError, match=r"unknown name 'nobody'. Known: \['__base__', 'default'\]"):
            call(input_ids=ids(2, 5), adapter_names=["default", "nobody"])


@pytest.mark.parametrize("names", [["default"] * 3, ["default"] * 4], ids=len)
def test_number_of_names_and_rows(names):
    model, _, _ = adapted(llama)
    with pytest.raises(ValueError, match=rf"`adapter_names` has {len(names)} names for a batch of 2 rows"):
        model(input_ids=ids(2, 5), adapter_names=names)
    with pytest.raises(ValueError, match="`adapter_names` is empty"):
        model(input_ids=ids(2, 5), adapter_names=[])


def test_fewer_names_than_rows_outside_of_generate():
    """In generate rows are repeated for beams; in a plain forward pass nothing repeats them."""
    model, _, _ = adapted(llama)
    with pytest.raises(ValueError, match="`adapter_names` has 2 names for a batch of 4 rows"):
        model(input_ids=ids(4, 5), adapter_names=["default", "__base__"])


def test_prompts_of_different_lengths_where_positions_go_by_place():
    """RoFormer as a decoder: one table turns the queries and keys of all rows."""
    settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = transformers.RoFormerForCausalLM(transformers.RoFormerConfig(**settings, is_decoder=True)).eval().to(DEVICE)
    model = get_peft_model(base, config(llama)).eval()
    add(model, "b", seed=2, num_virtual_tokens=6)
    model.eval()
    assert torch.isfinite(model(input_ids=ids(2, 5), adapter_names=["default", "default"]).logits).all()
    with pytest.raises(ValueError, match="numbers positions by place in the row"):
        model(input_ids=ids(2, 5), adapter_names=["default", "b"])


# ---- making an adapter ----------------------------------------------------------------------------------------------


def test_model_without_a_token_embedding():
    model = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="ViTModel has no token embedding"):
        get_peft_model(model, config())
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_module_that_is_no_model_of_transformers():
    with pytest.raises(ValueError, match="Sequential has no token embedding"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_virtual_tokens": 128}, "`num_virtual_tokens` is 128, but the model has 128 positions"),
        (
            {"adapter_hidden_dim": 32 * 64 + 1},
            "`adapter_hidden_dim` is 2049, more than 64 times the embedding size 32",
        ),
    ],
    ids=["prompt", "adapter"],
)
def test_sizes_that_cannot_be_meant(changes, message):
    model = build(llama)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(llama, **changes))
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("name", ["__base__", "", "a.b", "keys", "forward", "training"])
def test_names_that_an_adapter_cannot_have(name):
    model, _, _ = adapted(llama)
    with pytest.raises(ValueError, match=rf"`adapter_name` is {name!r}"):
        model.add_adapter(name, config(llama))
    assert model.base_model.layer.adapter_names == list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=rf"`adapter_name` is {name!r}"):
        get_peft_model(build(llama), config(llama), adapter_name=name)
    assert still_works(model)


def test_two_adapters_for_the_whole_batch():
    model, _, _ = adapted(llama)
    add(model, "b", seed=2)
    with pytest.raises(ValueError, match=r"Only one input-tuning adapter can be active.*\['default', 'b'\]"):
        model.base_model.set_adapter(["default", "b"])
    assert model.base_model.layer.active_adapters == ["default"]
    with pytest.raises(ValueError, match="Unknown adapter 'c'"):
        model.base_model.set_adapter("c")


def test_embeddings_beside_names_were_looked_up_without_them():
    model, *_ = adapted(FAMILIES["llama"])
    x, names = model.get_input_embeddings()(ids(2, 5)), ["default", "__base__"]
    for call in (model, model.get_base_model(), model.generate, model.get_base_model().generate):
        with pytest.raises(ValueError, match="`inputs_embeds` beside `adapter_names`"):
            call(inputs_embeds=x, adapter_names=names)
