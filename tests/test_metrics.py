"""`metrics/paper_metrics.py` against published values, values by hand and loops written from the papers."""

from __future__ import annotations

import math
import random
import sys
from itertools import pairwise
from pathlib import Path

import evaluate
import pytest
from nltk.translate.nist_score import corpus_nist

METRICS = Path(__file__).parent.parent / "examples" / "input_tuning_examples" / "metrics"
KEYS = {"bleu", "chrf", "ter", "nist", "meteor", "rouge_l", "cider", "exact_match", "length_ratio"}
# Words that no tokenizer parts, no stemmer shortens and WordNet does not know.
VOCABULARY = [f"q{letter}q" for letter in "bcdfghjkmn"]
SEEDS = range(6)

Row = tuple[list[str], list[list[str]]]  # the words of a prediction and of its references


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(METRICS / "paper_metrics.py"))


@pytest.fixture(scope="module")
def script(metric):
    return sys.modules[type(metric).__module__]


def score(metric, rows: list[Row]) -> dict[str, float]:
    return metric.compute(
        predictions=[" ".join(words) for words, _ in rows],
        references=[[" ".join(text) for text in texts] for _, texts in rows],
    )


def of_one(metric, prediction: str, *references: str) -> dict[str, float]:
    return metric.compute(predictions=[prediction], references=[list(references)])


def random_rows(seed: int, fewest_words: int = 0, most_references: int = 4) -> list[Row]:
    """Predictions that are changed references; some are short, and some empty where that is allowed."""
    rng = random.Random(seed)
    rows = []
    for row in range(8):
        texts = [rng.choices(VOCABULARY[:6], k=rng.randint(5, 10)) for _ in range(rng.randint(1, most_references))]
        words = [word if rng.random() < 0.8 else rng.choice(VOCABULARY) for word in rng.choice(texts)]
        words = words[: rng.randint(4, 10)] + rng.choices(VOCABULARY, k=rng.randint(0, 2))
        if row < 3:
            words = words[: max(fewest_words, row)]
        rows.append((words, texts))
    rng.shuffle(rows)
    return rows


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


# ---- the loops of the papers ----------------------------------------------------------------------------------------


def naive_bleu(rows: list[Row]) -> float:
    """Papineni et al. 2002, for texts that have matches of every length."""
    log = 0.0
    for n in (1, 2, 3, 4):
        matches = total = 0
        for words, texts in rows:
            own = ngrams(words, n)
            total += len(own)
            matches += sum(min(own.count(g), max(ngrams(text, n).count(g) for text in texts)) for g in set(own))
        log += math.log(matches / total) / 4
    length = sum(len(words) for words, _ in rows)
    closest = sum(min((abs(len(t) - len(words)), len(t)) for t in texts)[1] for words, texts in rows)
    return 100 * math.exp(log) * min(1.0, math.exp(1 - closest / length))


def naive_nist(rows: list[Row]) -> float:
    """Doddington 2002, equation 3 and what follows it."""
    everything = [text for _, texts in rows for text in texts]

    def information(g: tuple[str, ...]) -> float:
        whole = sum(ngrams(text, len(g)).count(g) for text in everything)
        start = sum(ngrams(text, len(g) - 1).count(g[:-1]) for text in everything) if len(g) > 1 else 0
        return math.log2((start or sum(map(len, everything))) / whole)

    gained = 0.0
    for n in (1, 2, 3, 4, 5):
        numerator = denominator = 0.0
        for words, texts in rows:
            own = ngrams(words, n)
            denominator += len(own)
            for g in set(own):
                matches = min(own.count(g), max(ngrams(text, n).count(g) for text in texts))
                numerator += matches * information(g) if matches else 0
        gained += numerator / denominator if denominator else 0
    length = sum(len(words) for words, _ in rows)
    expected = sum(sum(map(len, texts)) / len(texts) for _, texts in rows)
    # beta is such that a text of two thirds of the length loses a half.
    beta = math.log(0.5) / math.log(1.5) ** 2
    return gained * math.exp(beta * math.log(min(length / expected, 1)) ** 2)


def naive_cider(rows: list[Row]) -> float:
    """CIDEr-D, Vedantam et al. 2015, section 6; sigma 6 and the factor 10 are theirs."""
    scores = []
    for words, texts in rows:
        of_row = 0.0
        for n in (1, 2, 3, 4):

            def weights(text: list[str], n: int = n) -> dict[tuple[str, ...], float]:
                weight = {}
                for g in ngrams(text, n):
                    rows_with_it = sum(any(g in ngrams(other, n) for other in others) for _, others in rows)
                    weight[g] = ngrams(text, n).count(g) * math.log(len(rows) / max(1, rows_with_it))
                return weight

            own = weights(words)
            for text in texts:
                other = weights(text)
                lengths = math.hypot(*own.values()) * math.hypot(*other.values())
                dot = sum(min(own[g], other[g]) * other[g] for g in own if g in other)
                penalty = math.exp(-((len(words) - len(text)) ** 2) / (2 * 6**2))
                of_row += 10 * penalty * dot / lengths / len(texts) / 4 if lengths else 0
        scores.append(of_row)
    return sum(scores) / len(scores)


def naive_meteor(rows: list[Row]) -> float:
    """Lavie and Agarwal 2007 with the parameters of the first METEOR, for texts in which no word is there twice."""
    scores = []
    for words, texts in rows:
        best = 0.0
        for text in texts:
            places = [(i, text.index(word)) for i, word in enumerate(words) if word in text]
            if not places:
                continue
            runs = [b for a, b in pairwise(places) if b != (a[0] + 1, a[1] + 1)]
            precision, recall = len(places) / len(words), len(places) / len(text)
            mean = precision * recall / (0.9 * precision + 0.1 * recall)
            best = max(best, mean * (1 - 0.5 * ((1 + len(runs)) / len(places)) ** 3))
        scores.append(best)
    return 100 * sum(scores) / len(scores)


def naive_rouge_l(rows: list[Row]) -> float:
    """Lin 2004, with as much weight on precision as on recall."""
    scores = []
    for words, texts in rows:
        best = 0.0
        for text in texts:
            longest = [[0] * (len(text) + 1) for _ in range(len(words) + 1)]
            for i, word in enumerate(words):
                for j, other in enumerate(text):
                    same = longest[i][j] + 1 if word == other else 0
                    longest[i + 1][j + 1] = max(same, longest[i][j + 1], longest[i + 1][j])
            common = longest[-1][-1]
            best = max(best, 2 * common / (len(words) + len(text)))
        scores.append(best)
    return 100 * sum(scores) / len(scores)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_texts_get_what_the_papers_say(metric, seed):
    rows = random_rows(seed)
    got = score(metric, rows)
    assert got["bleu"] == pytest.approx(naive_bleu(rows))
    assert got["nist"] == pytest.approx(naive_nist(rows))
    assert got["cider"] == pytest.approx(naive_cider(rows))
    assert got["rouge_l"] == pytest.approx(naive_rouge_l(rows))


@pytest.mark.parametrize("seed", SEEDS)
def test_meteor_of_exact_matches(metric, seed):
    rng = random.Random(seed)

    def text(fewest: int) -> list[str]:
        return rng.sample(VOCABULARY, rng.randint(fewest, 9))

    rows = [(text(0), [text(1) for _ in range(rng.randint(1, 3))]) for _ in range(20)]
    assert score(metric, rows)["meteor"] == pytest.approx(naive_meteor(rows))


@pytest.mark.parametrize("seed", SEEDS)
def test_nist_with_one_reference_is_nltks(metric, seed):
    """With several nltk takes the best one by n-gram precision, which neither Doddington nor mteval-13a does."""
    rows = random_rows(seed, fewest_words=5, most_references=1)
    assert score(metric, rows)["nist"] == pytest.approx(
        corpus_nist([texts for _, texts in rows], [words for words, _ in rows])
    )


# ---- published values -----------------------------------------------------------------------------------------------

PARTY = "It is a guide to action which ensures that the military always obeys the commands of the party"
PARTIES = (
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
)


def test_meteor_is_nltks_example(metric):
    """The documentation of `nltk.translate.meteor_score`, which uses nltk's own WordNet."""
    assert of_one(metric, PARTY, *PARTIES)["meteor"] == pytest.approx(69.44, abs=0.005)
    assert of_one(metric, PARTY, PARTIES[0])["meteor"] == pytest.approx(69.44, abs=0.005)
    assert of_one(metric, "non matching hypothesis", "this is a cat")["meteor"] == 0


def test_ter_is_the_example_of_its_paper(metric):
    """Snover et al. 2006: one shift, two substitutions and one insertion for 13 words."""
    reference = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
    prediction = "THIS WEEK THE SAUDIS denied information published in the new york times"
    assert of_one(metric, prediction, reference)["ter"] == pytest.approx(100 * 4 / 13)


def test_rouge_l_is_the_example_of_its_paper(metric):
    """Lin 2004, section 3: one half for the third sentence; the stemmer makes the second equal to the first."""
    assert of_one(metric, "the gunman kill police", "police killed the gunman")["rouge_l"] == pytest.approx(50)
    assert of_one(metric, "police kill the gunman", "police killed the gunman")["rouge_l"] == pytest.approx(100)


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_ter_takes_the_nearest_reference_and_the_mean_length(metric):
    """Two edits in the first row, and none of the second; the lengths are 4 and (3 + 5) / 2. Case does not count."""
    got = metric.compute(
        predictions=["a b x y", "C d e"],
        references=[["a b c d"], ["c d e f g", "c d e"]],
    )
    assert got["ter"] == pytest.approx(100 * 2 / (4 + 4))


def test_chrf(metric):
    """Two of three letters, one of two pairs and no triple: nothing longer is there. Case counts."""
    assert of_one(metric, "abc", "abd")["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert of_one(metric, "abc", "ABC")["chrf"] == 0
    assert of_one(metric, "abc", "xyz", "abc")["chrf"] == pytest.approx(100)


def test_lengths_are_beside_the_reference_that_is_next(metric):
    """4 tokens beside 5 of "a b c d e"; 3 beside 3, not 6; of two that are as near, the shorter: 4 beside 3, not 5."""
    rows = [
        ("A b c d", ["a b c d e", "a"]),
        ("x y.", ["x y z", "x x x x x x"]),
        ("k l m n", ["k l m n o", "k l m"]),
    ]
    assert score(metric, rows)["length_ratio"] == pytest.approx(11 / 11)
    assert score(metric, rows[:1])["length_ratio"] == pytest.approx(4 / 5)
    assert score(metric, rows[1:])["length_ratio"] == pytest.approx(7 / 6)


def test_exact_match_leaves_case_and_blanks_out(metric):
    got = metric.compute(
        predictions=[" A  cat", "a dog", "dogs", "a cat"],
        references=[["a cat"], ["a Dog", "x"], ["dog"], ["x", "A cat "]],
    )
    assert got["exact_match"] == 75


def test_meteor_knows_stems_and_synonyms(metric):
    """Two matches in one chunk. Nothing but WordNet relates `children` to `kid`, by way of `child`."""
    all_match = pytest.approx(100 * (1 - 0.5 * (1 / 2) ** 3))
    assert of_one(metric, "qbq walking", "qbq walked")["meteor"] == all_match
    assert of_one(metric, "qbq kid", "qbq child")["meteor"] == all_match
    assert of_one(metric, "qbq children", "qbq kid")["meteor"] == all_match
    # One match of two words: precision, recall and their mean are a half, and so is the penalty.
    assert of_one(metric, "qbq kid", "qbq house")["meteor"] == pytest.approx(25)


def test_the_wordnet_of_pycocoevalcap(script):
    wordnet = script._wordnet()
    assert len(wordnet.numbers) == 147_306  # as many as the index files of WordNet 3.0 name

    def names(word: str) -> set[str]:
        return {lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas()}

    assert {"pub", "saloon", "taphouse"} <= names("pubs")
    assert {"good", "well"} <= names("better")
    assert names("cities") >= {"city", "metropolis"}
    assert names("qbq") == set()


def test_perfect_predictions_of_many_rows(metric):
    """CIDEr's greatest value is 10; METEOR's penalty for one chunk of n words stays."""
    rows = [[f"z{row}{letter}" for letter in "bcdfgh"] for row in range(5)]
    got = score(metric, [(words, [words]) for words in rows])
    assert got["cider"] == pytest.approx(10)
    assert got["meteor"] == pytest.approx(100 * (1 - 0.5 / 6**3))
    assert {key: got[key] for key in ("bleu", "chrf", "ter", "rouge_l", "exact_match")} == {
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
        "ter": 0,
        "rouge_l": pytest.approx(100),
        "exact_match": 100,
    }


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "The Vaults pub near Café Adriatic has a 5 star rating. Prices start at £30.",
            "the vaults pub near café adriatic has a 5 star rating prices start at £ 30",
        ),
        (
            "Alimentum's food is \"average\", isn't it? Rated 1 out of 5; price range £20-25.",
            "alimentum 's food is average is n't it rated 1 out of 5 price range £ 20-25",
        ),
        ("The Plough doesn't allow kids... avoid it - really.", "the plough does n't allow kids avoid it really"),
        (
            "“Strada” — a mid-priced Italian restaurant – is rated 3/5.",
            "strada a mid-priced italian restaurant is rated 3/5",
        ),
        ("It’s £20–25; you can’t miss ‘it’.", "it 's £ 20 25 you ca n't miss it"),
        ("naïve Ünïcödé 日本語 text", "naïve ünïcödé 日本語 text"),
    ],
)
def test_caption_words(script, text, words):
    """What the Stanford tokenizer 3.4.1 of pycocoevalcap makes of them, with # for its £."""
    assert script._caption_words(text) == words.split()


def test_case_does_not_count_and_punctuation_is_a_word_to_mteval_only(metric):
    rows = [["A small Pub near the river, by the Inn."], ["Ten Chinese dishes are cheap at the Inn."]]
    plain = [["a small pub near the river , by the inn ."], ["ten chinese dishes are cheap at the inn ."]]
    got = metric.compute(predictions=[texts[0] for texts in rows], references=plain)
    best = metric.compute(predictions=[texts[0] for texts in plain], references=plain)
    for key in ("bleu", "nist", "cider", "meteor"):
        assert got[key] == pytest.approx(best[key]), key
    assert got["bleu"] == pytest.approx(100)
    # Without it the n-grams around it are lost.
    bare = metric.compute(predictions=[text[0].translate({44: "", 46: ""}) for text in plain], references=plain)
    assert bare["nist"] < best["nist"]
    assert bare["cider"] == pytest.approx(best["cider"])


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([""], [["a cat"]]),
        (["", ""], [["a cat"], ["a dog", "dogs"]]),
        (["", "the cat sat"], [["a cat"], ["the cat sat", "a cat", "cats"]]),
        (["a", "b c"], [["a"], ["b c"]]),
        (["   ", "..."], [["."], ["!", "?"]]),
        (["a cat"], [[""]]),
        ([""], [[""]]),
        (["日本語 のテキスト", "Ünïcödé 😀 ' \" |||"], [["日本語 の テキスト"], ["ünïcödé", "😀", "\n"]]),
    ],
)
def test_edges_have_finite_values(metric, predictions, references):
    got = metric.compute(predictions=predictions, references=references)
    assert set(got) == KEYS
    assert all(type(value) is float and math.isfinite(value) and value >= 0 for value in got.values()), got


def test_nothing_predicted_is_worth_nothing(metric):
    got = metric.compute(predictions=["", ""], references=[["a cat sat here"], ["two dogs ran"]])
    assert got.pop("ter") == 100
    assert set(got.values()) == {0}


def test_nist_of_short_predictions_is_that_of_the_ngrams_there_are(metric):
    """Each word says log2(4 / 1) bits; the pair's first word tells the second. No n-gram is longer."""
    got = metric.compute(predictions=["qbq qcq", "qdq"], references=[["qbq qcq"], ["qdq qfq"]])
    assert got["nist"] == pytest.approx(2 * math.exp(math.log(0.5) * (math.log(3 / 4) / math.log(1.5)) ** 2))


def test_a_further_reference_helps_its_own_row_only(metric):
    """The first row has fewer references than the second, for sacrebleu's lists of the n-th references."""
    predictions = ["one two three four", "five six seven eight"]
    one = metric.compute(predictions=predictions, references=[["nine ten"], ["no such words here"]])
    two = metric.compute(predictions=predictions, references=[["nine ten"], ["no such words here", predictions[1]]])
    assert one["rouge_l"] == one["meteor"] == one["exact_match"] == one["nist"] == 0
    assert two["rouge_l"] == two["exact_match"] == 50
    assert two["meteor"] == pytest.approx(50 * (1 - 0.5 / 4**3))
    assert one["ter"] == pytest.approx(100 * (4 + 4) / (2 + 4))
    assert two["ter"] == pytest.approx(100 * (4 + 0) / (2 + 4))
    assert two["nist"] > 0
    assert two["cider"] > 0


def test_a_row_without_references_is_refused(metric):
    with pytest.raises(ValueError, match=r"`references\[1\]` is empty\. Give each prediction"):
        metric.compute(predictions=["a", "b"], references=[["a"], []])


def test_the_shared_values_are_those_of_generation_metrics(metric):
    predictions, references = ["The cat sat on the mat", "a dog"], [["the cat sat on the mat", "cats"], ["A dog"]]
    ours = metric.compute(predictions=predictions, references=references)
    shared = evaluate.load(str(METRICS / "generation_metrics.py")).compute(
        predictions=predictions, references=references
    )
    assert set(shared) == {"bleu", "chrf", "rouge_l", "exact_match"}
    # Case counts in its BLEU alone.
    assert shared.pop("bleu") < 99
    assert ours["bleu"] == pytest.approx(100)
    assert {key: ours[key] for key in shared} == shared
