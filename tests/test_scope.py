"""adapter_scope="input": the adapter changes the tokens of the input, and nothing of the output."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from adapters import adapted, add, config
from device import DEVICE
from families import DECODERS, ENCODERS, FAMILIES, PAD, SEQ2SEQ, build, ids, padded
from oracles import adapter_gradients, embed, row_output, transform
from peft_input_tuning import InputTuningConfig, export_model
from peft_input_tuning.virtual_tokens.backbone import forward_parameters
from peft_input_tuning.virtual_tokens.cache_mark import cache_name

LLAMA = FAMILIES["llama"]
INPUT = {"adapter_scope": "input"}
CLOSE = {"atol": 2e-4, "rtol": 1e-3}
each_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)


def greedy_by_hand(base, weights, row: Tensor, new_tokens: int) -> list[int]:
    whole = row
    for _ in range(new_tokens):
        best = row_output(base, weights, whole, input_length=len(row))[-1].argmax()
        whole = torch.cat([whole, best[None]])
    return whole[len(row) :].tolist()


def labelled(rows: list[Tensor], inputs: list[int], side: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, mask = padded(rows, side)
    labels = torch.full_like(batch, -100)
    for i, (row, length) in enumerate(zip(rows, inputs, strict=True)):
        first = (batch.shape[1] - len(row) if side == "left" else 0) + length
        labels[i, first : first + len(row) - length] = row[length:]
    return batch, mask, labels


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@each_decoder
def test_tokens_with_a_label_are_left_as_they_are(family, side):
    model, base, weights = adapted(family, **INPUT)
    rows, inputs = [ids(n, seed=n) for n in (9, 6, 8)], [4, 2, 7]
    batch, mask, labels = labelled(rows, inputs, side)
    more = {}
    if side == "left" and family.name == "gpt2":
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=batch, attention_mask=mask, labels=labels, **more)
    for i, (row, length) in enumerate(zip(rows, inputs, strict=True)):
        assert_close(out.logits[i][mask[i] == 1], row_output(base, weights, row, input_length=length), **CLOSE)
    everywhere = row_output(base, weights, rows[0])
    assert (everywhere - row_output(base, weights, rows[0], input_length=4)).abs().max() > 1e-2, (
        "the case shows nothing"
    )


@each_decoder
def test_gradients_are_those_of_the_formula(family):
    model, base, weights = adapted(family, **INPUT)
    row, length = ids(9, seed=3), 5
    labels = row.clone()
    labels[:length] = -100
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    x = embed(base, weights, row, input_length=length)
    logits = base(inputs_embeds=x, use_cache=False).logits[0, -len(row) :]
    cross_entropy(logits[length - 1 : -1], row[length:]).backward()
    out = model.train()(input_ids=row[None], labels=labels[None])
    out.loss.backward()
    got = adapter_gradients(model)
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        assert_close(got[name], weight.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_rows_of_a_mixed_batch_have_scopes_of_their_own():
    model, base, weights = adapted(LLAMA, **INPUT)
    everywhere = add(model, "all", seed=5, num_virtual_tokens=2)
    model.eval()
    rows, inputs = [ids(7, seed=n) for n in range(3)], [3, 4, 5]
    batch, mask, labels = labelled(rows, inputs, "right")
    out = model(
        input_ids=batch, attention_mask=mask, labels=labels, adapter_names=["all", "default", "__base__"]
    ).logits
    assert_close(out[0], row_output(base, everywhere, rows[0]), **CLOSE)
    assert_close(out[1], row_output(base, weights, rows[1], input_length=4), **CLOSE)
    assert_close(out[2], row_output(base, {}, rows[2]), **CLOSE)


def test_packed_rows():
    model, base, weights = adapted(LLAMA, **INPUT)
    rows, inputs = [ids(6, seed=1), ids(5, seed=2)], [3, 2]
    labels = torch.cat([torch.cat([row.new_full((n,), -100), row[n:]]) for row, n in zip(rows, inputs, strict=True)])
    positions = torch.cat([torch.arange(len(row), device=DEVICE) for row in rows])
    out = model(input_ids=torch.cat(rows)[None], position_ids=positions[None], labels=labels[None], use_cache=False)
    want = torch.cat([row_output(base, weights, row, input_length=n) for row, n in zip(rows, inputs, strict=True)])
    assert_close(out.logits[0], want, **CLOSE)


@pytest.mark.not_emulated("torch.compile does not know the device")
def test_training_compiles_into_one_graph():
    model, *_ = adapted(LLAMA, **INPUT)
    row = ids(2, 8)
    labels = row.clone()
    labels[:, :4] = -100
    want = model(input_ids=row, labels=labels).loss
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(input_ids=row, labels=labels).loss, want)


# ---- generation -----------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("virtual_tokens", [0, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("llama", "mistral", "gemma2", "gpt2", "opt")], ids=str)
def test_generated_tokens_are_left_as_they_are(family, way, virtual_tokens):
    model, base, weights = adapted(family, **INPUT, num_virtual_tokens=virtual_tokens)
    row = ids(7, seed=1)
    out = model.generate(
        input_ids=row[None],
        attention_mask=torch.ones(1, 7, dtype=torch.long, device=DEVICE),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=PAD,
        **WAYS[way],
    )
    assert out[0, 7:].tolist() == greedy_by_hand(base, weights, row, 6)


def test_the_case_shows_that_generated_tokens_matter():
    """With the adapter over all tokens the same rows go on otherwise, so the test above can fail."""
    model, base, weights = adapted(LLAMA)
    rows = [ids(7, seed=n) for n in range(4)]
    out = model.generate(input_ids=torch.stack(rows), max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    assert out[:, 7:].tolist() != [greedy_by_hand(base, weights, row, 6) for row in rows]


@each_decoder
def test_beams_and_left_padding(family):
    model, base, weights = adapted(family, **INPUT)
    rows = [ids(n, seed=n) for n in (7, 4)]
    batch, mask = padded(rows, "left")
    greedy = model.generate(input_ids=batch, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    for row, got in zip(rows, greedy, strict=True):
        assert got[7:].tolist() == greedy_by_hand(base, weights, row, 5)
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    cached = model.generate(input_ids=batch, attention_mask=mask, **beams)
    assert torch.equal(cached, model.generate(input_ids=batch, attention_mask=mask, use_cache=False, **beams))


def test_a_conversation_goes_on_with_more_input():
    """The tokens that a later call of `generate` is given are input, those it had generated are not."""
    model, base, weights = adapted(LLAMA, **INPUT)
    first, more = ids(5, seed=1), ids(3, seed=2)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True}
    start = model.generate(input_ids=first[None], attention_mask=torch.ones_like(first[None]), **settings)
    cached = start.past_key_values.get_seq_length()  # the last token has not been through the model
    new = torch.cat([start.sequences[0, cached:], more])
    mask = torch.ones(1, cached + len(new), dtype=torch.long, device=DEVICE)
    out = model.generate(
        input_ids=new[None], attention_mask=mask, past_key_values=start.past_key_values, **settings
    ).sequences[0, len(new) :]
    e = base.get_input_embeddings()
    x = [weights["prompt.weight"], transform(weights, e(first)), e(start.sequences[0, 5:cached])]
    x = torch.cat([*x, transform(weights, e(new))])
    for token in out:
        with torch.no_grad():
            assert base(inputs_embeds=x[None]).logits[0, -1].argmax() == token
        x = torch.cat([x, e(token[None])])


def test_an_assistant_model_has_an_input_of_its_own():
    model, base, weights = adapted(LLAMA, **INPUT)
    assistant, *_ = adapted(LLAMA, seed=9, **INPUT, num_virtual_tokens=0)
    row = ids(7, seed=1)
    out = model.generate(
        input_ids=row[None], assistant_model=assistant, max_new_tokens=6, do_sample=False, pad_token_id=PAD
    )
    assert out[0, 7:].tolist() == greedy_by_hand(base, weights, row, 6)


# ---- models with input only, files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), [(f, "lm") for f in SEQ2SEQ + ENCODERS] + [(LLAMA, "seq_cls")], ids=str)
def test_both_scopes_are_one_where_a_model_reads_input_only(family, head):
    task = {} if head == "lm" else {"task_type": "SEQ_CLS"}
    model, base, weights = adapted(family, head, **INPUT, **task)
    row = ids(6, seed=4)
    more = {"decoder_input_ids": ids(1, 4, seed=5)} if family.kind == "seq2seq" else {}
    assert_close(model(input_ids=row[None], **more).logits[0], row_output(base, weights, row, **more), **CLOSE)


def test_saved_and_loaded(tmp_path):
    model, base, _ = adapted(LLAMA, **INPUT)
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    row, labels = ids(1, 8), ids(1, 8)
    labels[:, :5] = -100
    want = model(input_ids=row, labels=labels).logits
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "adapter").eval()
    assert_close(loaded(input_ids=row, labels=labels).logits, want)
    copied = copy.deepcopy(loaded)
    assert_close(copied(input_ids=row, labels=labels).logits, want)
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").to(DEVICE)
    native.load_adapter(str(tmp_path / "adapter"))
    assert_close(native.eval()(input_ids=row, labels=labels).logits, want)


def test_switched_off_and_unloaded():
    model, base, _ = adapted(LLAMA, **INPUT)
    row = ids(1, 8)
    want = base(input_ids=row).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=row).logits, want)
    plain = model.unload()
    assert not plain._forward_pre_hooks
    assert torch.equal(plain(input_ids=row).logits, want)


# ---- a conversation -------------------------------------------------------------------------------------------------


OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}


@pytest.mark.parametrize("static", [False, True])
@each_decoder
def test_a_conversation_on_its_cache_and_as_ids_with_labels(family, static):
    """What was generated stays output, whether its cache says so or the caller."""
    if static and family.name == "bloom" and Version(transformers.__version__) < Version("5.21"):
        return
    model, base, weights = adapted(family, **INPUT)
    cache = (transformers.StaticCache if static else transformers.DynamicCache)(
        config=base.config, **({"max_cache_len": 64} if static else {})
    )
    name = cache_name(forward_parameters(model.get_base_model()))
    first = model.generate(input_ids=ids(1, 6), **{name: cache}, **OPTIONS, disable_compile=True)
    turn = torch.cat([first, ids(1, 4, seed=5)], dim=1)
    on_cache = model.generate(input_ids=turn, **{name: cache}, **OPTIONS, disable_compile=True)
    again = model.generate(input_ids=turn, labels=labels_of_cached(turn), **OPTIONS)
    assert torch.equal(on_cache, again)
    assert again[0, 15:].tolist() == by_hand(base, weights, turn[0], output=range(6, 10))


def labels_of_cached(turn: Tensor) -> Tensor:
    """The last token of an answer is not in the cache: it is given with the next turn, as input."""
    labels = torch.full_like(turn, -100)
    labels[:, 6:10] = turn[:, 6:10]
    return labels


def by_hand(base, weights, row: Tensor, output: range, new_tokens: int = 5) -> list[int]:
    """Greedy decoding in which the tokens at `output` and the new ones are not adapted."""
    whole = row
    for _ in range(new_tokens):
        e = base.get_input_embeddings()(whole)
        adapted_rows = transform(weights, e)
        plain = torch.tensor([at in output or at >= len(row) for at in range(len(whole))], device=DEVICE)
        x = torch.cat([weights["prompt.weight"], torch.where(plain[:, None], e, adapted_rows)])
        with torch.no_grad():
            whole = torch.cat([whole, base(inputs_embeds=x[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return whole[len(row) :].tolist()


def test_labels_of_another_shape_in_generate():
    model, *_ = adapted(LLAMA, **INPUT)
    with pytest.raises(ValueError, match=r"`labels` have the shape \(1, 5\), and `input_ids` \(1, 6\)"):
        model.generate(input_ids=ids(1, 6), labels=ids(1, 5), **OPTIONS)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_told_apart_is_refused():
    model, *_ = adapted(LLAMA, **INPUT)
    row = ids(2, 8)
    for call in (
        lambda: model(input_ids=row),
        lambda: model.get_base_model().model(input_ids=row),
        lambda: model.get_input_embeddings()(row),
    ):
        with pytest.raises(ValueError, match=r'`adapter_scope` is "input".*adapter_scope="all"'):
            call()
    with pytest.raises(ValueError, match="a row of `labels` has a label at every token"):
        model(input_ids=row, labels=row)
    with pytest.raises(ValueError, match=r"`labels` have the shape \(2, 7\)"):
        model(input_ids=row, labels=row[:, 1:])


def test_merging_and_exporting_are_refused(tmp_path):
    model, *_ = adapted(LLAMA, **INPUT, num_virtual_tokens=0)
    with pytest.raises(ValueError, match="a table holds one for each"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="a table holds one for each"):
        export_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_wrong_scope_is_named():
    with pytest.raises(ValueError, match=r"`adapter_scope` must be one of \['all', 'input'\], got 'output'"):
        InputTuningConfig(adapter_scope="output")


def test_a_model_of_which_nothing_is_known():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build(LLAMA)

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

    with pytest.raises(ValueError, match="needs a model of transformers, got Wrapper"):
        get_peft_model(Wrapper(), config(**INPUT))
