"""Checkpoints of transformers' Trainer: which can be gone on from, and how they are kept from harm.

A checkpoint is a folder that Trainer writes file by file, `trainer_state.json` last; of several processes, each adds
its random state when it comes to it. A process that is killed meanwhile, or a disk that is full, leaves a folder that
looks like the newest checkpoint and is none. `CheckpointFolders` marks a folder until all have written; where another
script has trained, the files themselves tell.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainingArguments

from peft_input_tuning.output.files import unfinished

from .task_data import InputError

RESUME = "go on from the last complete checkpoint with --resume_from_checkpoint last"
_STATE = "trainer_state.json"
_MARK = "unfinished"
_OF_MODELS = ("adapter_config.json", "config.json")  # in the folder of an adapter, of a model
# What a checkpoint must have, by the names of Trainer, or of FSDP and DeepSpeed, which write theirs in folders.
_NEEDED = (
    ("*.safetensors", "pytorch_model_fsdp*", "global_step*"),
    ("optimizer*", "global_step*"),
    ("scheduler.pt", "global_step*"),
    ("rng_state*.pth",),
)


# ---- which checkpoint is complete -----------------------------------------------------------------------------------


def last_complete_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that can be gone on from.

    Args:
        output_dir: the folder that has `checkpoint-N` folders; it need not exist.

    Returns:
        The folder, or None; and the newer folders that are incomplete, newest first.
    """
    incomplete = []
    for path in checkpoints_in(output_dir):
        if is_complete(path):
            return path, incomplete
        incomplete.append(path)
    return None, incomplete


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Complete or not, newest first."""
    numbered = ((_step_of(path), path) for path in Path(output_dir).glob("checkpoint-*"))
    return [path for _, path in sorted((pair for pair in numbered if pair[0] is not None), reverse=True)]


def is_complete(checkpoint: Path) -> bool:
    """Whether everything that Trainer writes is there and whole: its state, which it writes last, random states, and
    weights and optimizers whose files are not cut off."""
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if (checkpoint / _MARK).exists() or _step_of(checkpoint) not in (None, state.get("global_step")):
        return False
    if not all(any(any(checkpoint.glob(name)) for name in names) for names in _NEEDED):
        return False
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    pickles = [path for path in files if path.suffix in (".bin", ".pt", ".pth")]
    return all(map(_is_whole, weights)) and all(map(zipfile.is_zipfile, pickles))


def _step_of(checkpoint: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def _is_whole(path: Path) -> bool:
    """Whether a file of safetensors is as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def find_checkpoint(arguments: TrainingArguments) -> str | None:
    """What to go on from; None is the beginning.

    Raises:
        InputError: the checkpoint is incomplete, or the run would write over another one, or over a model.
    """
    folder, wanted = arguments.output_dir, arguments.resume_from_checkpoint
    last, incomplete = last_complete_checkpoint(folder)
    holds_run = bool((Path(folder) / "results.json").exists() or checkpoints_in(folder))
    model = next((name for name in _OF_MODELS if (Path(folder) / name).exists()), None)
    if holds_run and not wanted:
        raise InputError(f"--output_dir: {folder!r} holds a run already. Choose another folder, or {RESUME}.")
    if model and not holds_run:
        raise InputError(
            f"--output_dir: {folder!r} holds {model}, and no run of this script: a model or an adapter would be "
            "written over. Choose another folder."
        )
    if not wanted:
        return None
    if wanted == "last":
        if arguments.process_index == 0:
            for path in incomplete:
                print(f"{path} is incomplete: passed over")
            print(f"Going on from {last}" if last else "No complete checkpoint: starting from the beginning")
        return str(last) if last else None
    if not is_complete(Path(wanted)):
        raise InputError(f"--resume_from_checkpoint: {wanted!r} is no complete checkpoint. Pass last, or another one.")
    if last and last.resolve() != Path(wanted).resolve():
        raise InputError(
            f"--resume_from_checkpoint: {str(last)!r} would be written over by a run that goes on from {wanted!r}. "
            "Pass last, or choose another --output_dir."
        )
    return wanted


class CheckpointFolders(TrainerCallback):
    """Marks a checkpoint until all processes have written it, and keeps older ones until then.

    Trainer itself writes into a folder that an earlier life of the run left there. And it deletes older checkpoints
    (`save_total_limit`, which must be None here) while other processes may still be writing the newest one.

    Args:
        keep: how many checkpoints to keep, the best one included; None keeps all.
    """

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not control.should_save:
            return
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _MARK).touch()
        _wait_for_all()

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs) -> None:
        _wait_for_all()
        if not args.should_save:
            return
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _MARK).unlink(missing_ok=True)
        if self.keep:
            self._remove_older(checkpoints_in(args.output_dir), state.best_global_step)

    def _remove_older(self, newest_first: list[Path], best: int | None) -> None:
        complete = [path for path in newest_first if is_complete(path)]
        kept = [*complete[:1], *(path for path in complete[1:] if _step_of(path) == best)]
        kept += [path for path in complete if path not in kept][: max(0, self.keep - len(kept))]
        for path in newest_first[newest_first.index(complete[0]) :] if complete else []:
            if path not in kept:
                _remove(path)


def _remove(folder: Path) -> None:
    (folder / _STATE).unlink(missing_ok=True)  # first, lest what is left is taken for a checkpoint
    shutil.rmtree(folder, ignore_errors=True)


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is there whole or not at all."""
    with unfinished(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
