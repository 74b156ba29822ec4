"""An adapter as a LoRA = the adapter: in stock PEFT, in float64, over all families that can generate.

The oracle is the formula on an untouched base, and PEFT's own LoRA does the rest.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from adapters import adapted, add, config, randomize
from device import DEVICE
from families import EOS, FAMILIES, GENERATORS, PAD, VOCAB, Family, build, ids, padded
from oracles import adapter_weights, greedy, row_output, transform
from peft_input_tuning import from_lora, grow_base, prompt_embeds, save_as_lora
from peft_input_tuning.layer import named_layer
from peft_input_tuning.lora_form.places import find_places
from peft_input_tuning.lora_form.tensors import lora_tensors, word_errors
from tokenizers_of_families import tokenizer_of

SPARE, TOKENS = 6, 4
LLAMA = FAMILIES["llama"]
each_generator = pytest.mark.parametrize("family", GENERATORS, ids=str)
EXACT = {"atol": 1e-12, "rtol": 1e-12}


@cache
def _roomy(name: str) -> torch.nn.Module:
    """A model whose table has rows behind the last of its tokenizer's words, in float64."""
    torch.manual_seed(0)
    settings = FAMILIES[name].config()
    settings.vocab_size = VOCAB + SPARE
    model = FAMILIES[name].heads["lm"](settings).eval().double()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def roomy(family: Family) -> torch.nn.Module:
    return copy.deepcopy(_roomy(family.name)).to(DEVICE).requires_grad_(False)


@contextmanager
def float64_stays() -> Iterator[None]:
    """Models compute norms and weights of attention in float32, where a last bit of float64 may round either way."""

    def keeping(method):
        def kept(tensor, *args, **kwargs):
            if tensor.dtype != torch.float64:
                return method(tensor, *args, **kwargs)
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in kwargs.items()}
            return method(tensor, *args, **kwargs)

        return kept

    float32 = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda one: one if one.dtype == torch.float64 else float32(one))
        patch.setattr(torch.Tensor, "to", keeping(torch.Tensor.to))
        patch.setattr(torch.nn.functional, "softmax", keeping(torch.nn.functional.softmax))
        yield


def in_full(call: Callable, *args, **kwargs):
    """What a call gives with all of its arithmetic in float64, if its model is."""
    with float64_stays(), torch.no_grad():
        return call(*args, **kwargs)


def in_float64(family: Family, folder: Path) -> torch.nn.Module:
    """A model that was loaded in float64: Gemma's embedding scale is rounded otherwise in one that was cast."""
    build(family).save_pretrained(folder / "source")
    return type(build(family)).from_pretrained(folder / "source", dtype=torch.float64).eval().double().to(DEVICE)


def tuned(base: torch.nn.Module, family: Family, seed: int = 1, **changes) -> tuple[PeftModel, dict]:
    model = get_peft_model(base, config(family, **changes)).eval().double()
    randomize(model, seed=seed)
    return model, adapter_weights(model)


def more_of(family: Family) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": ids(1, 5, seed=9)} if family.kind == "seq2seq" else {}


def logits(model: torch.nn.Module, virtual: list[int], row: torch.Tensor, family: Family, **kwargs) -> torch.Tensor:
    """Of one row with the virtual tokens in front, `(length, words)`, without theirs."""
    front = torch.tensor(virtual, dtype=torch.long, device=DEVICE)
    out = in_full(model, input_ids=torch.cat([front, row])[None], **more_of(family), **kwargs).logits[0]
    return out if family.kind == "seq2seq" else out[len(virtual) :]


ADAPTERS = {
    "plain": {},
    "bias": {"adapter_bias": True, "adapter_activation": "gelu"},
    "wide": {"adapter_hidden_dim": 64},  # more than the embedding's size: the differences themselves
    "no prompt": {"num_virtual_tokens": 0},
    "prompt only": {"adapter_hidden_dim": 0},
}


@pytest.mark.feature("lora")
@pytest.mark.parametrize("changes", ADAPTERS.values(), ids=ADAPTERS)
@each_generator
def test_logits_in_stock_peft(family, changes, tmp_path):
    model, weights = tuned(roomy(family), family, **changes)
    report = save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(family))
    assert report.virtual_token_ids == tuple(range(VOCAB, VOCAB + changes.get("num_virtual_tokens", TOKENS)))
    hidden, width = changes.get("adapter_hidden_dim", 24), model.get_input_embeddings().embedding_dim
    parts = hidden + ("adapter_bias" in changes) + len(report.virtual_token_ids)
    assert report.rank == report.exact_rank == min(parts, width)
    assert report.errors.largest < 1e-13
    lora = PeftModel.from_pretrained(roomy(family), tmp_path / "lora").eval().double()
    assert type(lora.peft_config["default"]) is LoraConfig
    row = ids(7)
    want = in_full(
        row_output, roomy(family), weights, row, changes.get("adapter_activation", "relu"), **more_of(family)
    )
    got = logits(lora, list(report.virtual_token_ids), row, family)
    assert_close(got, want, **EXACT)
    assert_close(got, in_full(model, input_ids=row[None], **more_of(family)).logits[0], **EXACT)


@pytest.mark.feature("lora")
@each_generator
def test_mixed_batches_of_stock_peft(family, tmp_path):
    """Several LoRAs and the base in one padded batch; prompts of different lengths begin on the same ids."""
    model, first = tuned(roomy(family), family)
    second = add(model, "b", seed=2, num_virtual_tokens=2, adapter_bias=True)
    model.double()
    reports = {
        name: save_as_lora(model, tmp_path / name, adapter_name=name, tokenizer=tokenizer_of(family))
        for name in ("default", "b")
    }
    lora = PeftModel.from_pretrained(roomy(family), tmp_path / "default")
    lora.load_adapter(tmp_path / "b", adapter_name="b")
    lora.eval().double()
    names, rows = ["b", "default", "__base__", "b"], [ids(n, seed=n) for n in (5, 7, 6, 8)]
    virtual = {name: torch.tensor(report.virtual_token_ids, device=DEVICE) for name, report in reports.items()}
    virtual["__base__"] = rows[0][:0]
    batch, mask = padded([torch.cat([virtual[name], row]) for name, row in zip(names, rows, strict=True)], "right")
    more = {key: value.expand(len(rows), -1) for key, value in more_of(family).items()}
    out = in_full(lora, input_ids=batch, attention_mask=mask, adapter_names=names, **more).logits
    weights = {"default": first, "b": second, "__base__": {}}
    for got, name, row in zip(out, names, rows, strict=True):
        want = in_full(row_output, roomy(family), weights[name], row, **more_of(family))
        first = len(virtual[name])
        assert_close(got if family.kind == "seq2seq" else got[first : first + len(row)], want, **EXACT)


@pytest.mark.feature("lora")
@each_generator
def test_merged_by_stock_peft(family, tmp_path):
    """Into a base whose embedding has a table of its own, as `grow_base` writes it."""
    source, own = in_float64(family, tmp_path), type(build(family))
    grown = grow_base(source, tmp_path / "base", TOKENS, tokenizer_of(family), untie=True)
    base = own.from_pretrained(tmp_path / "base", dtype=torch.float64).eval().double().to(DEVICE)
    model, weights = tuned(copy.deepcopy(base), family, adapter_bias=True)
    report = save_as_lora(
        model, tmp_path / "lora", tokenizer=tokenizer_of(family), virtual_token_ids=[*grown.virtual_token_ids]
    )
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").double().merge_and_unload()
    row = ids(7)
    want = in_full(row_output, source, weights, row, **more_of(family))
    assert_close(logits(merged, list(report.virtual_token_ids), row, family)[:, :VOCAB], want, **EXACT)
    merged.save_pretrained(tmp_path / "merged")
    again = own.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval().double().to(DEVICE)
    assert_close(logits(again, list(report.virtual_token_ids), row, family)[:, :VOCAB], want, **EXACT)


@pytest.mark.feature("lora")
@pytest.mark.parametrize("untie", [False, True], ids=["tied as before", "untied"])
@each_generator
def test_a_grown_base_is_the_base_and_holds_any_adapter(family, untie, tmp_path):
    source, tokenizer = in_float64(family, tmp_path), tokenizer_of(family)
    before = {key: value.clone() for key, value in source.state_dict().items()}
    grown = grow_base(source, tmp_path / "base", virtual_tokens=TOKENS, tokenizer=tokenizer, untie=untie)
    assert grown.virtual_token_ids == tuple(range(VOCAB, VOCAB + TOKENS))
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    base = type(source).from_pretrained(tmp_path / "base", dtype=torch.float64).eval().double().to(DEVICE)
    row = ids(7)
    assert_close(logits(base, [], row, family)[:, :VOCAB], logits(source, [], row, family), **EXACT)
    assert base.generation_config.suppress_tokens == list(grown.virtual_token_ids)
    reader = base.get_encoder() if family.kind == "seq2seq" else base
    if untie:
        assert reader.get_input_embeddings().weight is not base.get_output_embeddings().weight
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    assert loaded("a b c")["input_ids"] == tokenizer("a b c")["input_ids"]  # nothing is put in front by itself
    model, weights = tuned(copy.deepcopy(base), family, num_virtual_tokens=3)
    report = save_as_lora(model, tmp_path / "lora", tokenizer=loaded)
    assert report.virtual_token_ids == grown.virtual_token_ids[:3]
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval().double()
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "lora")
    assert own("a b c")["input_ids"] == [*report.virtual_token_ids, *tokenizer("a b c")["input_ids"]]
    want = in_full(row_output, source, weights, row, **more_of(family))
    assert_close(logits(lora, list(report.virtual_token_ids), row, family)[:, :VOCAB], want, **EXACT)
    longer = tuned(copy.deepcopy(base), family, num_virtual_tokens=5)[0]
    with pytest.raises(ValueError, match="has words for 4 virtual tokens, and this adapter has 5"):
        save_as_lora(longer, tmp_path / "x", tokenizer=loaded)


@pytest.mark.parametrize(
    "family",
    [LLAMA, *(pytest.param(FAMILIES[name], marks=pytest.mark.slow) for name in ("gemma3", "t5"))],
    ids=str,
)
def test_generates_without_the_package(family, tmp_path):
    """Stock PEFT in a process of its own, the folder's own tokenizer, the base's greedy text."""
    base = roomy(family).float()
    tokenizer = tokenizer_of(family)
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    model, weights = tuned(base, family)
    save_as_lora(model.float(), tmp_path / "lora", tokenizer=tokenizer)
    code = (
        "import sys; sys.modules['peft_input_tuning'] = None\n"
        "from transformers import AutoTokenizer, GenerationConfig\n"
        "from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM\n"
        f"folder, kind = {str(tmp_path / 'lora')!r}, {family.kind!r}\n"
        "auto = AutoPeftModelForSeq2SeqLM if kind == 'seq2seq' else AutoPeftModelForCausalLM\n"
        "model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)\n"
        "inputs = tokenizer('a b c', return_tensors='pt', return_token_type_ids=False)\n"
        "banned = GenerationConfig.from_pretrained(folder)\n"
        "banned.max_new_tokens = banned.min_new_tokens = 5\n"
        "print(model.generate(**inputs, generation_config=banned, do_sample=False)[0, -5:].tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    row = torch.tensor(tokenizer("a b c")["input_ids"], device=DEVICE)
    assert result.stdout.strip().endswith(str(greedy(roomy(family).float(), weights, row, 5).tolist()))


# ---- words for virtual tokens ---------------------------------------------------------------------------------------


def places(count, rows, tokenizer, named=None, **fields):
    return find_places(count, rows, [transformers.LlamaConfig(**fields)], tokenizer, named)


def test_ids_that_the_configuration_names_are_taken():
    tokenizer = tokenizer_of(LLAMA)
    assert places(3, VOCAB + 3, tokenizer).ids == (VOCAB, VOCAB + 1, VOCAB + 2)
    with pytest.raises(ValueError, match="no words to spare for 3 virtual tokens"):
        places(3, VOCAB + 3, tokenizer, image_token_index=VOCAB + 1)
    with pytest.raises(ValueError, match="no words to spare for 3 virtual tokens"):
        places(3, VOCAB + 3, tokenizer, vision_config={"eos_token_id": [5, VOCAB + 2]})


@pytest.mark.parametrize("form", ["<|reserved_special_token_{}|>", "<unused{}>", "[unused{}]"])
def test_words_that_the_tokenizer_calls_unused(form):
    tokenizer = tokenizer_of(LLAMA)
    tokenizer.add_tokens([form.format(i) for i in range(5)], special_tokens=True)
    tokenizer.chat_template = "{{ '" + form.format(3) + "' }}{{ messages[0]['content'] }}"
    found = places(2, len(tokenizer), tokenizer)
    assert found.ids == (VOCAB + 4, VOCAB + 2)  # the last first, without the one that the template uses
    assert found.tokenizer("a b")["input_ids"] == [*found.ids, *tokenizer("a b")["input_ids"]]
    chat = [{"role": "user", "content": "a"}]
    assert found.tokenizer.apply_chat_template(chat, tokenize=False).startswith(found.front)
    assert places(1, len(tokenizer), tokenizer).ids == found.ids[:1]
    with pytest.raises(ValueError, match="4 are words that the tokenizer calls reserved or unused"):
        places(5, len(tokenizer), tokenizer)


def test_words_that_the_tokenizer_uses_itself_are_taken():
    """A reserved word is a usual choice for padding, of which no configuration of the model needs to know."""
    tokenizer = tokenizer_of(LLAMA)
    tokenizer.add_tokens([f"<|reserved_special_token_{i}|>" for i in range(5)], special_tokens=True)
    tokenizer.pad_token = "<|reserved_special_token_4|>"
    assert tokenizer.pad_token_id == VOCAB + 4
    found = places(2, len(tokenizer), tokenizer)
    assert found.ids == (VOCAB + 3, VOCAB + 2)
    assert found.tokenizer.pad_token_id == VOCAB + 4
    with pytest.raises(ValueError, match=rf"names {VOCAB + 4}, which is .* or the tokenizer uses"):
        places(1, len(tokenizer), tokenizer, [VOCAB + 4])


def test_a_table_that_was_resized_since_it_was_loaded(tmp_path):
    """PEFT keeps its new rows in the adapter's file, and a LoRA has no place for them."""
    build(LLAMA).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCAB + TOKENS + 2)
    model, _ = tuned(base, LLAMA)
    with pytest.raises(ValueError, match=f"resized to {VOCAB + TOKENS + 2} words after it was loaded"):
        save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA))
    assert not (tmp_path / "lora").exists()
    base = model.unload()
    base.save_pretrained(tmp_path / "resized")
    model, _ = tuned(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "resized"), LLAMA)
    assert save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA)).is_exact


def test_errors_in_a_text_on_a_grown_base(tmp_path):
    """Its new rows are zeros, of which a share of an error is no number."""
    source, tokenizer = in_float64(FAMILIES["gpt2"], tmp_path), tokenizer_of(FAMILIES["gpt2"])
    grow_base(source, tmp_path / "base", TOKENS, tokenizer)
    base = type(source).from_pretrained(tmp_path / "base", dtype=torch.float64)
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    model, _ = tuned(base, FAMILIES["gpt2"])
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    errors = save_as_lora(model, tmp_path / "lora", tokenizer=own, rank=12, text=["a b a", "c"]).errors
    assert 0 < errors.mean_in_text <= errors.largest_in_text <= errors.largest


def test_a_base_that_is_untied_only(tmp_path):
    family = FAMILIES["gpt2"]
    source, tokenizer = in_float64(family, tmp_path), tokenizer_of(family)
    grow_base(source, tmp_path / "grown", TOKENS, tokenizer)
    grown = type(source).from_pretrained(tmp_path / "grown", dtype=torch.float64).eval().double().to(DEVICE)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "grown")
    own.chat_template = (own.chat_template or "") + "{{ messages[0]['content'] }}"
    again = grow_base(grown, tmp_path / "untied", 0, own, untie=True)
    assert (again.virtual_token_ids, again.rows) == ((), VOCAB + TOKENS)
    untied = type(source).from_pretrained(tmp_path / "untied", dtype=torch.float64).eval().double().to(DEVICE)
    assert untied.get_input_embeddings().weight is not untied.get_output_embeddings().weight
    assert_close(logits(untied, [], ids(7), family), logits(grown, [], ids(7), family), **EXACT)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "untied")
    chat = [{"role": "user", "content": "a"}]
    for count in (0, TOKENS):
        want = own.apply_chat_template(chat, tokenize=False, virtual_tokens=count)
        assert loaded.apply_chat_template(chat, tokenize=False, virtual_tokens=count) == want
    with pytest.raises(ValueError, match="`untie` needs `virtual_tokens` >= 1 on an encoder-decoder model"):
        grow_base(build(FAMILIES["t5"]), tmp_path / "t5", 0, untie=True)


def test_ids_of_the_callers_choice():
    tokenizer = tokenizer_of(LLAMA)
    found = places(3, VOCAB + 2, tokenizer, [96, VOCAB, 90])
    assert found.ids == (96, VOCAB, 90)
    assert found.tokenizer("a")["input_ids"][:3] == [96, VOCAB, 90]
    assert places(2, VOCAB, None, [96, 90]).ids == (96, 90)
    for named, message in (
        ([96], "has 1 different ids, and the adapter has 2 virtual tokens"),
        ([96, 96], "has 1 different ids"),
        ([96, VOCAB + 2], rf"names {VOCAB + 2}, which is no row of the table \(0 to {VOCAB + 1}\)"),
        ([EOS, 96], rf"names {EOS}, which is"),
        ([96, VOCAB + 1], "gives new words the ids"),
    ):
        with pytest.raises(ValueError, match=message):
            places(2, VOCAB + 2, tokenizer, named, eos_token_id=EOS)


def test_a_table_without_room_names_the_way_out(tmp_path):
    model = adapted(LLAMA)[0]
    with pytest.raises(ValueError, match=r"no words to spare for 4.*grow_base\(base, output_dir, virtual_tokens=4\)"):
        save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA))
    with pytest.raises(ValueError, match="`tokenizer` is None, so nothing tells which ids are free"):
        save_as_lora(model, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_chats(tmp_path):
    """The adapter's own folder puts its tokens in front; a shared base does as it is told."""
    tokenizer = tokenizer_of(LLAMA)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    chat = [{"role": "user", "content": "a b"}]
    plain = tokenizer.apply_chat_template(chat, return_dict=False)
    grow_base(build(LLAMA), tmp_path / "base", 4, tokenizer)
    shared = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    for count in (0, 1, 4):
        got = shared.apply_chat_template(chat, return_dict=False, **({"virtual_tokens": count} if count else {}))
        assert got == [*range(VOCAB, VOCAB + count), *plain]
    with pytest.raises(Exception, match="virtual_tokens is more than the 4 that this base model has"):
        shared.apply_chat_template(chat, virtual_tokens=5)
    base = type(build(LLAMA)).from_pretrained(tmp_path / "base").to(DEVICE)
    save_as_lora(tuned(base, LLAMA, num_virtual_tokens=2)[0], tmp_path / "lora", tokenizer=shared)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "lora")
    assert own.apply_chat_template(chat, return_dict=False) == [VOCAB, VOCAB + 1, *plain]
    assert own.apply_chat_template(chat, return_dict=False, virtual_tokens=3) == [VOCAB, VOCAB + 1, *plain]


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_a_rank_above_what_an_engine_takes(tmp_path):
    model, _ = tuned(roomy(LLAMA), LLAMA, adapter_bias=True)
    with pytest.raises(ValueError, match=r"`max_rank` is 28.* needs rank 29 .* adapter_hidden_dim of at most 23"):
        save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA), max_rank=28)
    with pytest.raises(ValueError, match="What would fit: a shorter prompt"):
        save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA), max_rank=5)
    with pytest.raises(ValueError, match="`max_rank` is 8, but adapter 'default' needs rank 16"):
        save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA), max_rank=8, rank=16)
    with pytest.raises(ValueError, match="`rank` is 4, and the 4 virtual tokens of adapter 'default' need one each"):
        save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA), rank=4)
    assert not list(tmp_path.iterdir())
    report = save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA), max_rank=29, rank=40)
    assert (report.rank, report.is_exact, report.vllm_rank) == (29, True, 32)


def test_a_lora_that_is_not_exact_says_its_error_before_it_writes(tmp_path):
    model, weights = tuned(roomy(LLAMA), LLAMA, adapter_bias=True)
    tokenizer, seen = tokenizer_of(LLAMA), []
    text = ["a b a", "c"]

    def look(report):
        seen.append(report)
        assert not list((tmp_path / ".lora.unfinished").iterdir())

    report = save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer, rank=12, text=text, before_writing=look)
    assert seen == [report]
    assert (report.rank, report.exact_rank, report.is_exact) == (12, 29, False)
    assert "**not exact**: 29 would be" in (tmp_path / "lora" / "README.md").read_text()
    # By hand: the best 8 directions of the table's differences, and the length of what they leave out.
    table = roomy(LLAMA).get_input_embeddings().weight
    words = [id for id in range(len(table)) if id not in report.virtual_token_ids]
    want = transform(weights, table)[words]
    left, values, right = torch.linalg.svd((want - table[words]), full_matrices=False)
    off = want - table[words] - (left[:, :8] * values[:8]) @ right[:8]
    errors = off.norm(dim=1) / want.norm(dim=1)
    assert report.errors.largest == pytest.approx(float(errors.max()), rel=1e-9)
    assert report.errors.mean == pytest.approx(float(errors.mean()), rel=1e-9)
    said = [id for line in text for id in tokenizer(line, add_special_tokens=False)["input_ids"]]
    at = torch.tensor([words.index(id) for id in said])
    assert report.errors.largest_in_text == pytest.approx(float(errors[at].max()), rel=1e-9)
    assert report.errors.mean_in_text == pytest.approx(float(errors[at].mean()), rel=1e-9)
    # The prompt stays exact.
    lora = PeftModel.from_pretrained(roomy(LLAMA), tmp_path / "lora").double()
    virtual = torch.tensor(report.virtual_token_ids, device=DEVICE)
    assert_close(lora.get_input_embeddings()(virtual), weights["prompt.weight"].double(), atol=1e-7, rtol=1e-7)

    _, layer = named_layer(model)
    a, b = lora_tensors(layer, "default", report.virtual_token_ids, 29)
    for spoilt in (1e3, float("nan")):
        a[0, 7] = spoilt
        assert not word_errors(layer, "default", a, b, report.virtual_token_ids, None).largest < 10

    def refuse(report):
        raise ValueError("too much")

    with pytest.raises(ValueError, match="too much"):
        save_as_lora(model, tmp_path / "other", tokenizer=tokenizer, rank=12, before_writing=refuse)
    with pytest.raises(ValueError, match="`text` has no words"):
        save_as_lora(model, tmp_path / "other", tokenizer=tokenizer, rank=12, text=[])
    with pytest.raises(ValueError, match="`text` is given without `tokenizer`"):
        save_as_lora(model, tmp_path / "other", virtual_token_ids=[96, 95, 94, 93], rank=12, text=text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None], ids=str)
def test_dtype_of_the_file(dtype, tmp_path):
    model, _ = tuned(roomy(LLAMA), LLAMA)
    report = save_as_lora(model.float(), tmp_path / "lora", tokenizer=tokenizer_of(LLAMA), dtype=dtype)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype or torch.float32}
    assert report.errors.largest < (2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert (report.errors.largest > 1e-4) == (dtype == torch.bfloat16)


# ---- the folder, and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("llama", "bart")], ids=str)
def test_back_to_the_adapter_to_the_bit(family, tmp_path):
    model, _ = tuned(roomy(family), family, adapter_bias=True)
    save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(family))
    again = from_lora(roomy(family), tmp_path / "lora").eval().double()
    for key, value in adapter_weights(model).items():
        assert torch.equal(adapter_weights(again)[key], value), key
    row = ids(2, 7)
    more = {key: value.expand(2, -1) for key, value in more_of(family).items()}
    assert torch.equal(again(input_ids=row, **more).logits, model(input_ids=row, **more).logits)
    assert "named" in from_lora(roomy(family), tmp_path / "lora", adapter_name="named").peft_config


def test_a_lora_of_somebody_else_or_trained_since(tmp_path):
    other = get_peft_model(roomy(LLAMA), LoraConfig(target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="save_as_lora did not write it"):
        from_lora(roomy(LLAMA), tmp_path / "other")
    save_as_lora(tuned(roomy(LLAMA), LLAMA)[0], tmp_path / "lora", tokenizer=tokenizer_of(LLAMA))
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1e-9
    save_file(tensors, file)
    with pytest.raises(ValueError, match="changed or trained since"):
        from_lora(roomy(LLAMA), tmp_path / "lora")


def test_what_is_in_the_folder(tmp_path):
    model, _ = tuned(roomy(LLAMA), LLAMA, modules_to_save=["lm_head"])
    torch.nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "base_model.model.model.embed_tokens.lora_embedding_A": (28, VOCAB + SPARE),
        "base_model.model.model.embed_tokens.lora_embedding_B": (32, 28),
        "base_model.model.lm_head.weight": (VOCAB + SPARE, 32),
    }
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["target_modules"]) == ("LORA", ["model.embed_tokens"])
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (28, 28, "CAUSAL_LM")
    banned = transformers.GenerationConfig.from_pretrained(tmp_path / "lora").suppress_tokens
    assert banned == list(report.virtual_token_ids)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"on the ids {', '.join(map(str, banned))}" in card
    assert report.front in card
    lora = PeftModel.from_pretrained(roomy(LLAMA), tmp_path / "lora").eval().double()
    want = in_full(model, input_ids=ids(7)[None]).logits[0]
    assert_close(logits(lora, list(report.virtual_token_ids), ids(7), LLAMA), want, **EXACT)


def test_an_adapter_of_transformers(tmp_path):
    base = roomy(LLAMA)
    base.add_adapter(config(), "default")
    base.double()
    randomize(base)
    report = save_as_lora(base, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA))
    lora = PeftModel.from_pretrained(roomy(LLAMA), tmp_path / "lora").eval().double()
    want = in_full(base, input_ids=ids(7)[None]).logits[0]
    assert_close(logits(lora, list(report.virtual_token_ids), ids(7), LLAMA), want, **EXACT)
    again = from_lora(roomy(LLAMA), tmp_path / "lora").double()
    assert torch.equal(in_full(again, input_ids=ids(7)[None]).logits[0], want)


def test_what_a_lora_cannot_hold(tmp_path):
    model, _ = tuned(roomy(LLAMA), LLAMA, adapter_scope="input")
    with pytest.raises(ValueError, match=r"adapter_scope=\"input\".*prompt_embeds\(model, input_ids\)"):
        save_as_lora(model, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA))
    assert prompt_embeds(model, ids(1, 3)).shape == (1, 7, 32)  # what the error names
    with pytest.raises(ValueError, match=r"`adapter_name` is 'x'.*\['default'\]"):
        save_as_lora(model, tmp_path / "lora", adapter_name="x")
    both = roomy(LLAMA)
    both.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    both.add_adapter(config(), "default")
    with pytest.raises(ValueError, match="adapters of another method too"):
        save_as_lora(both, tmp_path / "lora", tokenizer=tokenizer_of(LLAMA))
    pooled = adapted(FAMILIES["bert"], "seq_cls", task_type="SEQ_CLS")[0]
    with pytest.raises(ValueError, match="reads the first place of a row"):
        save_as_lora(pooled, tmp_path / "lora", virtual_token_ids=[96, 95, 94, 93])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match=r"`output_dir`: .* exists and is not an empty folder"):
        save_as_lora(tuned(roomy(LLAMA), LLAMA)[0], tmp_path / "full", tokenizer=tokenizer_of(LLAMA))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_bases_that_cannot_be_grown(tmp_path):
    with pytest.raises(ValueError, match="`base` has adapters"):
        grow_base(adapted(LLAMA)[0], tmp_path / "base", 4)
    with pytest.raises(ValueError, match="`virtual_tokens` must be an integer >= 0, got -1"):
        grow_base(build(LLAMA), tmp_path / "base", -1)
    grow_base(build(LLAMA), tmp_path / "base", 4, tokenizer_of(LLAMA))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"has the token '<\|virtual_0\|>' already"):
        grow_base(build(LLAMA), tmp_path / "more", 4, again)


def test_a_table_with_room_does_not_grow(tmp_path):
    grown = grow_base(roomy(LLAMA), tmp_path / "base", SPARE, tokenizer_of(LLAMA))
    assert (grown.rows, grown.virtual_token_ids) == (VOCAB + SPARE, tuple(range(VOCAB, VOCAB + SPARE)))
    assert PAD not in grown.virtual_token_ids
