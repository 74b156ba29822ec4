"""What training runs left in their output folders, of `train.py` or of any transformers Trainer.

results.json                      of train.py: figures, options, curve
trainer_state.json                of `Trainer.save_state`, else of the last checkpoint-N
adapter_config.json               the adapter's settings, beside either
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Points = tuple[tuple[float, float], ...]  # steps and values

_OF_THE_PLACE = {"output_dir", "logging_dir", "run_name", "local_rank", "base_model_name_or_path", "peft_version"}
_NO_FIGURES = {"epoch", "step", "grad_norm", "learning_rate", "loss", "total_flos"}
_HIGHER = ("bleu", "chrf", "rouge", "exact_match", "accuracy", "f1")


@dataclass(frozen=True)
class TrainingRun:
    """One run.

    Args:
        name: the end of its folder's path, as long as it takes to tell it from the others.
        figures: by name, in the run's order.
        settings: by name, as text.
        training, validation: losses by step.
        is_of_script: whether train.py wrote it, which records all settings; a Trainer's state has a few.
    """

    name: str
    figures: Mapping[str, float]
    settings: Mapping[str, str]
    training: Points
    validation: Points
    is_of_script: bool


def read_runs(folders: Sequence[Path]) -> list[TrainingRun]:
    """Reads the runs in the order given.

    Raises:
        ValueError: a folder is not there, is given twice, or holds no run.
    """
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if not folder.is_dir():
            raise ValueError(f"RUN: there is no folder {str(folder)!r}. Name the output folder of a training run.")
        if places.count(place) > 1:
            raise ValueError(f"RUN: {str(folder)!r} is given twice. Name each run once.")
    return [_run(folder, name) for folder, name in zip(folders, _names(places), strict=True)]


def _names(places: Sequence[Path]) -> list[str]:
    """The ends of paths, with as many parts as it takes to have all of them different."""
    count = 1
    while len({place.parts[-count:] for place in places}) < len(places):
        count += 1
    return ["/".join(place.parts[-count:]) for place in places]


def _run(folder: Path, name: str) -> TrainingRun:
    is_of_script = (folder / "results.json").is_file()
    if is_of_script:
        path = folder / "results.json"
        report = _json(path)
        history = _part(report, "curve", [], path)
        figures = _part(report, "results", {}, path)
        settings = _adapter(folder) | _part(report, "arguments", {}, path) | _part(report, "options", {}, path)
    else:
        path = _state(folder)
        state = _json(path)
        history = _part(state, "log_history", [], path)
        figures = _figures(history, state)
        rates = [log["learning_rate"] for log in history if "learning_rate" in log]
        known = {key: state.get(key) for key in ("max_steps", "num_train_epochs", "train_batch_size")}
        settings = _adapter(folder, path.parent) | known | ({"highest learning_rate": max(rates)} if rates else {})
    return TrainingRun(
        name,
        {key: value for key, value in figures.items() if _is_number(value)},
        {key: _shown(value) for key, value in settings.items() if key not in _OF_THE_PLACE and value is not None},
        _points(history, "loss"),
        _points(history, "eval_loss"),
        is_of_script,
    )


def _adapter(*folders: Path) -> dict[str, Any]:
    """The adapter's settings, from the first folder that has some."""
    files = (folder / "adapter_config.json" for folder in folders)
    return next((_json(file) for file in files if file.is_file()), {})


def _state(folder: Path) -> Path:
    """The file of a Trainer's state: the folder's own, or that of its last checkpoint."""
    checkpoints = [path for path in folder.glob("checkpoint-*/trainer_state.json") if _step(path).isdigit()]
    found = [folder / "trainer_state.json", *sorted(checkpoints, key=lambda path: int(_step(path)), reverse=True)]
    for path in found:
        if path.is_file():
            return path
    raise ValueError(
        f"RUN: {str(folder)!r} has no results.json (of train.py), and no trainer_state.json of a Trainer, nor a "
        "checkpoint-N with one. Name the output folder of a training run."
    )


def _step(path: Path) -> str:
    return path.parent.name.removeprefix("checkpoint-")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"RUN: {str(path)!r} cannot be read ({error}). Name the folder of a whole run.") from None
    if not isinstance(found, dict):
        raise ValueError(f"RUN: {str(path)!r} holds no object. Name the output folder of a training run.")
    return found


def _part(found: Mapping[str, Any], key: str, empty: Any, path: Path) -> Any:
    """What stands under a key: an object, or a list of objects, as `empty` is; that if there is none."""
    part = found.get(key, empty)
    if not isinstance(part, type(empty)) or (
        isinstance(part, list) and not all(isinstance(one, dict) for one in part)
    ):
        kind = "an object" if isinstance(empty, dict) else "a list of objects"
        raise ValueError(
            f"RUN: {str(path)!r} has {part!r:.40} under {key!r}, not {kind}. Name the folder of a whole run."
        )
    return part


def _figures(history: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> dict[str, Any]:
    """The last of each figure that was logged, and the lowest validation loss."""
    figures: dict[str, Any] = {"steps": state.get("global_step")}
    for log in history:
        figures |= {key: value for key, value in log.items() if key not in _NO_FIGURES}
    losses = [log["eval_loss"] for log in history if _is_number(log.get("eval_loss"))]
    return figures | ({"lowest eval_loss": min(losses)} if losses else {})


def _points(history: Sequence[Mapping[str, Any]], key: str) -> Points:
    logs = (log for log in history if _is_number(log.get(key)) and _is_number(log.get("step")))
    return tuple((log["step"], log[key]) for log in logs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


# ---- side by side ---------------------------------------------------------------------------------------------------


def names_of_figures(runs: Sequence[TrainingRun]) -> list[str]:
    """All figures, in the order in which the runs have them."""
    return list(dict.fromkeys(name for run in runs for name in run.figures))


def figure(run: TrainingRun, name: str) -> str:
    """A figure as text: whole numbers with all digits, others with four; a dash where the run has none."""
    value = run.figures.get(name)
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def best(name: str, runs: Sequence[TrainingRun]) -> set[int]:
    """Which runs have the best value of a figure; none where it is not known whether more is better, or all agree."""
    values = {number: run.figures[name] for number, run in enumerate(runs) if name in run.figures}
    low = name.endswith("loss") or name in ("forgetting", "ter")
    high = any(part in name for part in _HIGHER)
    if len(set(values.values())) < 2 or not (low or high):
        return set()
    wanted = min(values.values()) if low else max(values.values())
    return {number for number, value in values.items() if value == wanted}


def differing_settings(runs: Sequence[TrainingRun]) -> dict[str, list[str | None]]:
    """The settings that are not the same in all runs, each with every run's value; None where it has none. Of runs
    of train.py and of other Trainers those that both kinds record."""
    recorded = [{name for run in runs if run.is_of_script is kind for name in run.settings} for kind in (True, False)]
    kinds = [names for names in recorded if names]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    shared = [name for name in names if all(name in of_kind for of_kind in kinds)]
    values = {name: [run.settings.get(name) for run in runs] for name in shared}
    return {name: of for name, of in values.items() if len(set(of)) > 1}


def scale(runs: Sequence[TrainingRun]) -> tuple[float, float, float] | None:
    """The last step, the lowest and the highest loss over all runs: one scale for all; None without curves."""
    points = [point for run in runs for point in (*run.training, *run.validation)]
    if not points:
        return None
    losses = [loss for _, loss in points]
    return max(step for step, _ in points), min(losses), max(losses)
