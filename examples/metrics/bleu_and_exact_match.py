"""Corpus BLEU (sacrebleu) and exact match against one or more references, as a metric script for `evaluate`.

A local script, so that `evaluate.load("examples/metrics/bleu_and_exact_match.py")` works without a network.
"""

import datasets
import evaluate
import sacrebleu

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

INPUTS = """\
predictions: list of str.
references: list of lists of str, at least one for each prediction."""


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


class BleuAndExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        empty = next((row for row, texts in enumerate(references) if not texts), None)
        if empty is not None:
            raise ValueError(f"`references[{empty}]` is empty. Give each prediction at least one reference.")
        # sacrebleu wants the n-th reference of all rows together, None where a row has fewer.
        most = max(map(len, references))
        streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
        matches = [
            _plain(text) in {_plain(reference) for reference in texts}
            for text, texts in zip(predictions, references, strict=True)
        ]
        return {
            "bleu": sacrebleu.corpus_bleu(predictions, streams).score,
            "exact_match": 100 * sum(matches) / len(matches),
        }
