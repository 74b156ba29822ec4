"""Corpus BLEU (sacrebleu) and exact match against one or more references, as a metric script for `evaluate`.

A local script, so that `evaluate.load(<path of this file>)` works without a network.
"""

import evaluate

from .generation_metrics import FEATURES, INPUTS, generation_scores

DESCRIPTION = """\
BLEU of the whole corpus (sacrebleu's defaults: 13a tokens, case counts) and the share of predictions that equal one of
their references, blanks and case apart. Both in per cent. Rows may have different numbers of references."""

CITATION = """\
@inproceedings{post-2018-call,
    title = "A Call for Clarity in Reporting {BLEU} Scores",
    author = "Post, Matt",
    booktitle = "Proceedings of the Third Conference on Machine Translation",
    year = "2018",
    url = "https://aclanthology.org/W18-6319",
    pages = "186--191",
}"""


class BleuAndExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=FEATURES,
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = generation_scores(predictions, references)
        return {name: scores[name] for name in ("bleu", "exact_match")}
