"""Counts of bigrams against a `Counter`."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from families import FAMILIES
from peft_input_tuning.familiarity import BigramCounts, bigrams, tokens
from tokenizers_of_families import tokenizer_of

TEXTS = ["sort the records", "", "sort the names, sort the dates", "a", "größer als 3 🙂🙂", "sort\nthe\trecords"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def counted(texts, tokenizer) -> Counter:
    pairs: Counter = Counter()
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for i in range(len(ids) - 1):
            pairs[ids[i], ids[i + 1]] += 1
    return pairs


def random_texts(seed: int, number: int) -> list[str]:
    """Letters of very different frequency."""
    draw = random.Random(seed)
    letters, weights = "abcdefghijklmnopqrstuvwxyz", [1 / (i + 1) ** 2 for i in range(26)]
    return ["".join(draw.choices(letters, weights, k=draw.randint(0, 40))) for _ in range(number)]


def of(counts: BigramCounts, pair: tuple[int, int]) -> int:
    (count,) = counts.of(torch.tensor(pair)).tolist()
    return count


@pytest.fixture(params=[(256, 1 << 18, 1 << 20), (2, 9, 5)], ids=["large groups", "small groups"])
def groups(request, monkeypatch):
    texts, characters, pairs = request.param
    monkeypatch.setattr(tokens, "TEXTS_AT_ONCE", texts)
    monkeypatch.setattr(tokens, "CHARACTERS_AT_ONCE", characters)
    monkeypatch.setattr(bigrams, "PAIRS_AT_ONCE", pairs)


@pytest.mark.usefixtures("groups")
def test_counts_are_those_of_a_loop(tokenizer):
    counts = BigramCounts(tokenizer).add(iter(TEXTS))
    expected = counted(TEXTS, tokenizer)
    assert (len(counts), counts.total, counts.undercount) == (len(expected), expected.total(), 0)
    assert max(expected.values()) > 1
    for pair, count in expected.items():
        assert of(counts, pair) == count
    unseen = next((a, b) for a in range(400) for b in range(400) if (a, b) not in expected)
    assert of(counts, unseen) == 0


def test_a_text_is_looked_up_bigram_by_bigram(tokenizer):
    counts = BigramCounts(tokenizer).add(TEXTS)
    expected = counted(TEXTS, tokenizer)
    ids = tokenizer.encode("the dates sort the zebra", add_special_tokens=False)
    pairs = list(pairwise(ids))
    assert counts.of(torch.tensor(ids)).tolist() == [expected[pair] for pair in pairs]
    million = [1e6 * expected[pair] / expected.total() for pair in pairs]
    assert counts.per_million(torch.tensor(ids)).tolist() == pytest.approx(million)
    scores = [math.log10(1 + frequency) for frequency in million]
    assert bigrams.score(counts.per_million(torch.tensor(ids))).tolist() == pytest.approx(scores)


def test_nothing_counted_and_nothing_to_look_up(tokenizer):
    counts = BigramCounts(tokenizer)
    assert counts.of(torch.tensor([5, 6, 7])).tolist() == [0, 0]
    assert counts.per_million(torch.tensor([5, 6])).tolist() == [0.0]
    counts.add(TEXTS)
    assert [counts.of(torch.tensor(ids)).tolist() for ids in ([], [5])] == [[], []]


@pytest.mark.parametrize("seed", range(4))
def test_dropping_the_rarest_keeps_the_bound(tokenizer, monkeypatch, seed):
    monkeypatch.setattr(tokens, "TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(bigrams, "PAIRS_AT_ONCE", 100)
    texts = random_texts(seed, 300)
    expected = counted(texts, tokenizer)
    limit = len(expected) // 4
    counts = BigramCounts(tokenizer, limit)
    for text in range(0, len(texts), 30):
        counts.add(texts[text : text + 30])
        assert len(counts) <= limit
    assert counts.total == expected.total()
    assert 0 < counts.undercount < max(expected.values()) / 2
    found = {pair: of(counts, pair) for pair in expected}
    assert all(count - counts.undercount <= found[pair] <= count for pair, count in expected.items())
    assert any(found[pair] < count for pair, count in expected.items() if found[pair])
    top = [pair for pair, _ in expected.most_common(5)]
    assert [pair for pair, _ in Counter(found).most_common(5)] == top


def test_saved_is_loaded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bigrams, "PAIRS_AT_ONCE", 50)
    monkeypatch.setattr(tokens, "TEXTS_AT_ONCE", 2)
    texts = random_texts(0, 60)
    counts = BigramCounts(tokenizer, 60).add(texts[:40])
    assert counts.undercount
    counts.save(tmp_path / "counts.safetensors")
    loaded = BigramCounts.load(tmp_path / "counts.safetensors", tokenizer)
    for both in (counts, loaded):
        both.add(texts[40:])  # the limit is kept too
    assert (len(loaded), loaded.total, loaded.undercount) == (len(counts), counts.total, counts.undercount)
    ids = torch.tensor(tokenizer.encode(" ".join(texts)))
    assert torch.equal(loaded.of(ids), counts.of(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["counts.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "counts.safetensors"
    BigramCounts(tokenizer).add(TEXTS).save(file)
    before = file.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(bigrams, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        BigramCounts(tokenizer).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_progress(tokenizer):
    done: list[int] = []
    BigramCounts(tokenizer).add(["a b"] * 600, done.append)
    assert done == [256, 512, 600]


def damaged(path, **change):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in change.items():
        if key in tensors:
            tensors[key] = value
        else:
            metadata[key] = value
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"total": "many"}, "holds no bigram counts"),
        ({"total": "1"}, "damaged"),
        ({"keys": torch.tensor([5, 5])}, "damaged"),
        ({"counts": torch.tensor([1])}, "damaged"),
        ({"vocabulary": "x"}, "tokenizer of another vocabulary"),
    ],
    ids=["format", "no number", "total", "keys", "lengths", "vocabulary"],
)
def test_damaged_files_are_refused(tokenizer, tmp_path, change, message):
    file = tmp_path / "counts.safetensors"
    BigramCounts(tokenizer).add(TEXTS).save(file)
    damaged(file, **change)
    with pytest.raises(ValueError, match=message):
        BigramCounts.load(file, tokenizer)


def test_what_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`max_bigrams` must be >= 1, got 0"):
        BigramCounts(tokenizer, 0)
    with pytest.raises(FileNotFoundError, match="no file"):
        BigramCounts.load(tmp_path / "nothing", tokenizer)
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="holds no bigram counts"):
        BigramCounts.load(tmp_path / "text", tokenizer)
    with pytest.raises(ValueError, match="another vocabulary"):
        BigramCounts(tokenizer).check_tokenizer(tokenizer_of(FAMILIES["llama"]))
    counts = BigramCounts(tokenizer)
    with pytest.raises(ValueError, match="`texts` is one string"):
        counts.add("one string")
    with pytest.raises(ValueError, match="`texts`: text 2 is None, not a string"):
        counts.add(["a", None])
    with pytest.raises(ValueError, match="`texts`: text 1 is no valid Unicode"):
        counts.add(["\ud800"])
