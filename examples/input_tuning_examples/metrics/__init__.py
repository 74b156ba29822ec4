"""Metric scripts for `evaluate.load`, which takes the path of a file: no network is needed."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
BLEU_AND_EXACT_MATCH = str(_HERE / "bleu_and_exact_match.py")  # the demo's
GENERATION_METRICS = str(_HERE / "generation_metrics.py")  # train.py's
PAPER_METRICS = str(_HERE / "paper_metrics.py")  # the benchmark's
