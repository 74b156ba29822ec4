"""The losses of a run as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from input_tuning_examples.checkpoints import write_whole


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(log["step"], log[key]) for log in history if key in log]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss per target token")
    if axes.lines:  # a short run has logged nothing
        axes.legend()
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())
    plt.close(figure)
