"""BLEU, chrF, ROUGE-L and exact match against one or more references, as a metric script for `evaluate`.

A local script, so that `evaluate.load(<path of this file>)` works without a network.
"""

import datasets
import evaluate
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

DESCRIPTION = """\
BLEU and chrF of the whole corpus (sacrebleu's defaults), ROUGE-L (rouge-score, with stemming; the best reference of a
row counts, rows are averaged) and the share of predictions that equal one of their references, blanks and case apart.
All in per cent. Rows may have different numbers of references."""

CITATION = """\
@inproceedings{post-2018-call,
    title = "A Call for Clarity in Reporting {BLEU} Scores",
    author = "Post, Matt",
    booktitle = "Proceedings of the Third Conference on Machine Translation",
    year = "2018",
    url = "https://aclanthology.org/W18-6319",
    pages = "186--191",
}
@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
    url = "https://aclanthology.org/W04-1013",
    pages = "74--81",
}"""

INPUTS = """\
predictions: list of str.
references: list of lists of str, at least one for each prediction."""


FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def by_position(references: list[list[str]]) -> list[list[str | None]]:
    """What sacrebleu wants: the n-th reference of all rows together, None where a row has fewer."""
    most = max(map(len, references))
    return [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]


def generation_scores(
    predictions: list[str], references: list[list[str]], lowercase_bleu: bool = False
) -> dict[str, float]:
    empty = next((row for row, texts in enumerate(references) if not texts), None)
    if empty is not None:
        raise ValueError(f"`references[{empty}]` is empty. Give each prediction at least one reference.")
    streams = by_position(references)
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    rows = list(zip(predictions, references, strict=True))
    rouge_l = [rouge.score_multi(texts, prediction)["rougeL"].fmeasure for prediction, texts in rows]
    matches = [_plain(prediction) in {_plain(text) for text in texts} for prediction, texts in rows]
    return {
        "bleu": sacrebleu.corpus_bleu(predictions, streams, lowercase=lowercase_bleu).score,
        "chrf": sacrebleu.corpus_chrf(predictions, streams).score,
        "rouge_l": 100 * sum(rouge_l) / len(rouge_l),
        "exact_match": 100 * sum(matches) / len(matches),
    }


class GenerationMetrics(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=FEATURES,
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return generation_scores(predictions, references)
