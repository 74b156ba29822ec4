"""The metrics of the tables on data-to-text generation (E2E, WebNLG, DART), as a metric script for `evaluate`.

A local script, so that `evaluate.load(<path of this file>)` works without a network, data of nltk or Java.
`evaluate` copies `generation_metrics.py` beside it.
"""

import math
import re
import zipfile
from collections import Counter
from functools import cache, reduce
from operator import or_
from pathlib import Path

import evaluate
import sacrebleu
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.tokenize import TreebankWordTokenizer
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import nist_length_penalty
from nltk.util import everygrams
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from .generation_metrics import FEATURES, INPUTS, by_position, generation_scores

DESCRIPTION = """\
bleu, chrf, ter, meteor, rouge_l and exact_match in per cent, nist and cider on their own scales; less ter is better.
Rows may have different numbers of references. Beside the scripts of the E2E challenge (mteval-13a and the COCO caption
evaluation, both in lower case):

bleu: sacrebleu, 13a tokens in lower case, as mteval-13a has them.
nist: as mteval-13a counts it, on the same tokens: up to 5-grams, matches in any reference of the row, the mean length
    of its references. nltk's `corpus_nist` takes one best reference: the same with one, mostly less with several.
cider: CIDEr-D of pycocoevalcap, as the challenge. Document frequencies come from the references at hand: values of
    different sets do not compare, and a single row scores 0.
meteor: nltk's (Lavie and Agarwal 2007; alpha 0.9, beta 3, gamma 0.5) with synonyms of WordNet 3.0; the best reference
    of a row, rows averaged. The challenge's METEOR 1.5 (Java) weighs words and knows paraphrases: its values are far
    lower and do not compare with these.
rouge_l: rouge-score, with stemming, F1, letters a-z and digits only; the best reference of a row, rows averaged. The
    challenge's has no stemming and favours recall (beta 1.2).
chrf, ter: sacrebleu's defaults; case counts in chrf only, and words in ter are what stands between blanks.
exact_match: the share of predictions that equal one of their references, blanks and case apart.
length_ratio: bleu's tokens of the predictions over those of its references, of each row the one next in length. Below
    1 bleu has a penalty for brevity.

Tokens of cider and meteor are those of nltk's Treebank tokenizer, sentence by sentence, in lower case and without
punctuation. They stand in for the Stanford tokenizer (Java), from which they differ in abbreviations ("St. Louis"
loses its stop) and times of day ("10am" stays one word)."""

CITATION = """\
@article{dusek-2020-evaluating,
    title = "Evaluating the State-of-the-Art of End-to-End Natural Language Generation: The {E2E} {NLG} Challenge",
    author = "Du{\\v{s}}ek, Ond{\\v{r}}ej and Novikova, Jekaterina and Rieser, Verena",
    journal = "Computer Speech and Language",
    volume = "59",
    year = "2020",
    pages = "123--156",
}
@inproceedings{doddington-2002-automatic,
    title = "Automatic Evaluation of Machine Translation Quality Using N-gram Co-Occurrence Statistics",
    author = "Doddington, George",
    booktitle = "Proceedings of the Second International Conference on Human Language Technology Research",
    year = "2002",
    pages = "138--145",
}
@inproceedings{lavie-agarwal-2007-meteor,
    title = "{METEOR}: An Automatic Metric for {MT} Evaluation with High Levels of Correlation with Human Judgments",
    author = "Lavie, Alon and Agarwal, Abhaya",
    booktitle = "Proceedings of the Second Workshop on Statistical Machine Translation",
    year = "2007",
    url = "https://aclanthology.org/W07-0734",
    pages = "228--231",
}
@inproceedings{vedantam-2015-cider,
    title = "{CIDEr}: Consensus-based Image Description Evaluation",
    author = "Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi",
    booktitle = "Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition",
    year = "2015",
    pages = "4566--4575",
}"""

Words = list[str]

_mteval = Tokenizer13a()
_treebank = TreebankWordTokenizer()
# What the Stanford tokenizer parts or replaces, and the Treebank tokenizer does not.
_characters = str.maketrans(
    {"‘": " ` ", "’": "'", "“": '"', "”": '"', "–": " -- ", "—": " -- ", "£": " £ ", "€": " € "}
)


def _mteval_words(text: str) -> Words:
    return _mteval(text.lower()).split()


def _caption_words(text: str) -> Words:
    # The Treebank tokenizer sees a full stop at the end of its text only.
    sentences = re.split(r"(?<=[.!?])\s+", text.lower().translate(_characters))
    return [word for sentence in sentences for word in _treebank.tokenize(sentence) if word not in PUNCTUATIONS]


# ---- NIST -----------------------------------------------------------------------------------------------------------


def _ngrams(words: Words) -> Counter:
    return Counter(everygrams(words, max_len=5))


def _nist(predictions: list[Words], references: list[list[Words]]) -> float:
    seen = Counter()
    for texts in references:
        for text in texts:
            seen.update(_ngrams(text))
            seen[()] += len(text)
    length = sum(sum(map(len, texts)) / len(texts) for texts in references)
    if not length:
        return 0.0
    information, total = Counter(), Counter()
    for words, texts in zip(predictions, references, strict=True):
        own, most = _ngrams(words), reduce(or_, map(_ngrams, texts))
        for ngram, count in own.items():
            total[len(ngram)] += count
        for ngram, count in (own & most).items():
            information[len(ngram)] += count * math.log2(seen[ngram[:-1]] / seen[ngram])
    # Where all predictions are shorter than n words, `total` has no n, and these n-grams add nothing.
    return sum(information[n] / total[n] for n in total) * nist_length_penalty(length, total[1])


# ---- METEOR ---------------------------------------------------------------------------------------------------------


class _Lemma(str):
    def name(self) -> str:
        return self


class _Synset(list):
    def lemmas(self) -> list[_Lemma]:
        return self


class _WordNet:
    """What nltk's METEOR asks of WordNet, from the WordNet 3.0 that comes with pycocoevalcap, inside METEOR's archive.

    nltk's own reader needs a download. It also knows parts of speech: this one allows any ending for any word.
    """

    endings = sorted({pair for pairs in WordNetCorpusReader.MORPHOLOGICAL_SUBSTITUTIONS.values() for pair in pairs})

    def __init__(self) -> None:
        with zipfile.ZipFile(Path(meteor_package.__file__).with_name(meteor_package.METEOR_JAR)) as archive:
            synsets, forms = (archive.read(f"synonym/english.{name}") for name in ("synsets", "exceptions"))
        self.numbers = _pairs_of_lines(synsets)  # of a word's synsets
        self.synset: dict[str, _Synset] = {}
        for word, numbers in self.numbers.items():
            for number in numbers:
                self.synset.setdefault(number, _Synset()).append(_Lemma(word))
        self.bases: dict[str, list[str]] = {}  # of irregular forms
        for word, irregular in _pairs_of_lines(forms).items():
            for form in irregular:
                self.bases.setdefault(form, []).append(word)

    def synsets(self, word: str) -> list[_Synset]:
        bases = self.bases.get(word) or [
            word.removesuffix(ending) + instead for ending, instead in self.endings if word.endswith(ending)
        ]
        return [self.synset[number] for base in {word, *bases} for number in self.numbers.get(base, ())]


def _pairs_of_lines(text: bytes) -> dict[str, list[str]]:
    lines = text.decode().splitlines()
    return {word: line.split() for word, line in zip(lines[::2], lines[1::2], strict=True)}


_wordnet = cache(_WordNet)  # half a second to read


def _meteor(predictions: list[Words], references: list[list[Words]]) -> float:
    rows = list(zip(predictions, references, strict=True))
    return 100 * sum(meteor_score(texts, words, wordnet=_wordnet()) for words, texts in rows) / len(rows)


# ---- CIDEr ----------------------------------------------------------------------------------------------------------


def _cider(predictions: list[Words], references: list[list[Words]]) -> float:
    if not any(map(any, references)):  # pycocoevalcap takes the most frequent of no n-grams
        return 0.0
    score, _ = Cider().compute_score(
        {row: [" ".join(text) for text in texts] for row, texts in enumerate(references)},
        {row: [" ".join(words)] for row, words in enumerate(predictions)},
    )
    return float(score)


class PaperMetrics(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=FEATURES,
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = generation_scores(predictions, references, lowercase_bleu=True)
        mteval, captions = (
            ([words(text) for text in predictions], [[words(text) for text in texts] for texts in references])
            for words in (_mteval_words, _caption_words)
        )
        lengths = sacrebleu.corpus_bleu(predictions, by_position(references), lowercase=True)
        return {
            **scores,
            "length_ratio": lengths.sys_len / max(1, lengths.ref_len),
            "ter": sacrebleu.corpus_ter(predictions, by_position(references)).score,
            "nist": _nist(*mteval),
            "meteor": _meteor(*captions),
            "cider": _cider(*captions),
        }
