"""What goes wrong while training: kills, a full disk, NaN, a rank that dies. With train.py as it is."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

import train
from input_tuning_examples import logic_to_text
from input_tuning_examples.checkpoints import (
    CheckpointFolders,
    checkpoints_in,
    is_complete,
    last_complete_checkpoint,
    write_whole,
)
from input_tuning_examples.faults import StopAtNonFinite, TrainingError, is_out_of_room

TRAINING = Path(__file__).parents[1] / "examples" / "training"

faults = pytest.mark.trains_with
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.not_emulated("its scripts run on the CPU, in processes of their own")


@pytest.fixture(scope="module")
def options(tiny_model, tmp_path_factory) -> list[str]:
    """A run of six steps that saves the third and the last."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = logic_to_text.make_splits(48, 10, 7)["train"]
    file.write_text("".join(json.dumps({"source": r.source, "references": [r.reference]}) + "\n" for r in rows))
    settings = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none"}
    settings |= {"per_device_train_batch_size": 4, "disable_tqdm": "true", "use_cpu": "true"}
    named = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["--model", str(tiny_model), "--train_data", str(file), *named]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """The run without any fault."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*options, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """A run that got as far as its third step."""
    shutil.copytree(whole / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    return tmp_path / "half"


def results(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "results.json").read_text())["results"]
    return {name: value for name, value in found.items() if name != "train_seconds"}


def curve(folder: Path) -> dict[int, float]:
    logs = json.loads((folder / "results.json").read_text())["curve"]
    return {log["step"]: log["loss"] for log in logs if "loss" in log}


def assert_same_run(got: Path, want: Path) -> None:
    """Bit for bit."""
    assert curve(got) == curve(want)
    assert results(got) == results(want)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (got, want))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def resume(options: list[str], folder: Path) -> int:
    return train.main([*options, "--output_dir", str(folder), "--resume_from_checkpoint", "last"])


# ---- which checkpoint is complete -----------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@faults("Faults", "a checkpoint with a file missing or cut off is passed over")
@pytest.mark.parametrize("harm", [Path.unlink, cut], ids=["missing", "cut off"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(whole, tmp_path, name, harm):
    run = tmp_path / "run"
    for number in (3, 6):
        shutil.copytree(whole / f"checkpoint-{number}", run / f"checkpoint-{number}")
    assert last_complete_checkpoint(run) == (run / "checkpoint-6", [])
    harm(run / "checkpoint-6" / name)
    assert last_complete_checkpoint(run) == (run / "checkpoint-3", [run / "checkpoint-6"])


def test_a_checkpoint_is_complete_when_all_processes_have_written_it(whole, tmp_path):
    """While it is saved it is marked, with all of the main process's files there."""
    shutil.copytree(whole / "checkpoint-6", tmp_path / "aside")
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    state, saving = SimpleNamespace(global_step=6, best_global_step=None), SimpleNamespace(should_save=True)
    CheckpointFolders().on_step_end(args, state, saving)
    shutil.copytree(tmp_path / "aside", tmp_path / "checkpoint-6", dirs_exist_ok=True)
    assert not is_complete(tmp_path / "checkpoint-6")
    CheckpointFolders().on_save(args, state, saving)
    assert is_complete(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6").rename(tmp_path / "checkpoint-5")
    assert not is_complete(tmp_path / "checkpoint-5"), "its state is of another step"


@faults("Faults", "save_total_limit deletes no complete checkpoint in favour of an incomplete one")
@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [9, 7]), (2, None, [9, 7, 5]), (2, 3, [9, 7, 3]), (1, 3, [9, 7, 3]), (9, None, [9, 7, 5, 3])],
)
def test_incomplete_checkpoints_do_not_count(whole, tmp_path, keep, best, left):
    """The ninth and the sixth are incomplete, the seventh has just been saved."""
    for step in (3, 5, 6, 7, 9):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(whole / "checkpoint-3", folder)
        state = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    for step in (6, 9):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    CheckpointFolders(keep).on_save(args, SimpleNamespace(global_step=7, best_global_step=best), None)
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_there_may_be_no_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") == (None, [])


# ---- killed ---------------------------------------------------------------------------------------------------------


def test_resuming_passes_an_incomplete_checkpoint_over(options, whole, half, capsys):
    shutil.copytree(whole / "checkpoint-6", half / "checkpoint-6")
    cut(half / "checkpoint-6" / "adapter_model.safetensors")
    (half / "checkpoint-6" / "left-over").touch()
    assert resume(options, half) == 0
    said = capsys.readouterr().out
    assert "checkpoint-6 is incomplete: passed over" in said
    assert f"Going on from {half / 'checkpoint-3'}" in said
    assert_same_run(half, whole)
    assert not (half / "checkpoint-6" / "left-over").exists(), "files of two lives in one checkpoint"


def test_resuming_without_any_checkpoint_starts_anew(options, whole, tmp_path, capsys):
    assert resume(options, tmp_path / "new") == 0
    assert "No complete checkpoint: starting from the beginning" in capsys.readouterr().out
    assert_same_run(tmp_path / "new", whole)


@faults("Faults", "SIGKILL at 20 random moments, in training and in saving: the same run in the end")
@pytest.mark.slow
def test_twenty_kills_at_random_moments(options, tmp_path):
    longer = [*options, "--max_steps", "400", "--save_steps", "1", "--save_total_limit", "3"]
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), "20", "0", *longer]
    done = subprocess.run(
        [*command, "--output_dir", str(killed)], env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lives = json.loads(done.stdout.splitlines()[-1])
    assert [life["ended"] for life in lives] == ["signal 9"] * 20 + ["exit 0"]
    assert any(life["incomplete"] for life in lives), "no kill hit a checkpoint that was being written"
    assert len({life["complete"] for life in lives}) > 5, "the run hardly went on between the kills"
    assert train.main([*longer, "--output_dir", str(alone)]) == 0
    assert len(curve(alone)) == 400
    assert_same_run(killed, alone)


@faults("Faults", "a rank that dies: the launcher ends, the next launch goes on to the same numbers")
@pytest.mark.slow
def test_a_rank_that_dies(options, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [str(TRAINING / "accelerate_configs" / "ddp_cpu.yaml"), str(TRAINING / "train.py"), *options]
    command += ["--per_device_train_batch_size", "2", "--max_steps", "40", "--save_steps", "5"]
    run, alone = tmp_path / "run", tmp_path / "alone"
    launcher = subprocess.Popen(
        [*command, "--output_dir", str(run)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    ranks = []
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoint-10").exists():
            assert launcher.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks = [
            p for p in psutil.Process(launcher.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())
        ]
        assert len(ranks) == 2
        second = next(p for p in ranks if p.environ()["RANK"] == "1")
        os.kill(second.pid, signal.SIGKILL)
        launcher.communicate(timeout=60)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode != 0
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not (run / "results.json").exists()
    for folder, more in ((run, ["--resume_from_checkpoint", "last"]), (alone, [])):
        done = subprocess.run(
            [*command, "--output_dir", str(folder), *more],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("Going on from" in done.stdout) == (folder == run)
    assert_same_run(run, alone)


@faults("Faults", "killed while the results are written: they are written anew")
def test_killed_behind_the_last_step(options, whole, tmp_path):
    """Both checkpoints are there, the adapter is cut off, and results.json would have come last."""
    shutil.copytree(whole, tmp_path / "run")
    cut(tmp_path / "run" / "adapter_model.safetensors")
    (tmp_path / "run" / "results.json").unlink()
    assert resume(options, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


@faults("Faults", "early stopping after a kill: at the same step as without")
def test_killed_while_early_stopping_waits(options, tmp_path, monkeypatch):
    """No evaluation is better than the first: it is the third one after it that ends the run, at the eighth step."""
    predict = train.Trainer.prediction_step

    def worse_and_worse(self, *args, **kwargs):
        loss, *rest = predict(self, *args, **kwargs)
        return (loss + self.state.global_step, *rest)

    monkeypatch.setattr(train.Trainer, "prediction_step", worse_and_worse)
    data = options[options.index("--train_data") + 1]
    more = ["--validation_data", data, "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
    more += ["--load_best_model_at_end", "true", "--early_stopping_patience", "3", "--max_steps", "20"]
    run, alone = tmp_path / "run", tmp_path / "alone"
    assert train.main([*options, *more, "--output_dir", str(alone)]) == 0
    assert results(alone)["steps"] == 8
    shutil.copytree(alone / "checkpoint-2", run / "checkpoint-2")
    shutil.copytree(alone / "checkpoint-4", run / "checkpoint-4")
    assert resume([*options, *more], run) == 0
    assert_same_run(run, alone)


def test_early_stopping_can_be_added_when_going_on(options, half):
    data = options[options.index("--train_data") + 1]
    more = ["--validation_data", data, "--eval_strategy", "steps", "--eval_steps", "3"]
    assert resume([*options, *more, "--load_best_model_at_end", "true", "--early_stopping_patience", "2"], half) == 0
    assert results(half)["steps"] == 6


def test_a_run_is_not_written_over(options, whole, half, capsys):
    before = {path: path.read_bytes() for folder in (whole, half) for path in folder.rglob("*") if path.is_file()}
    older = str(whole / "checkpoint-3")
    for folder, more, named in (
        (whole, [], "--output_dir"),
        (half, [], "--output_dir"),
        (whole, ["--resume_from_checkpoint", older], "checkpoint-6' would be written over"),
        (half, ["--resume_from_checkpoint", str(half)], "is no complete checkpoint"),
    ):
        assert train.main([*options, *more, "--output_dir", str(folder)]) == 2
        assert named in capsys.readouterr().err
    for path, content in before.items():
        assert path.read_bytes() == content, path


def test_another_folder_goes_on_from_a_checkpoint(options, whole, tmp_path):
    more = ["--resume_from_checkpoint", str(whole / "checkpoint-3")]
    assert train.main([*options, *more, "--output_dir", str(tmp_path / "other")]) == 0
    assert_same_run(tmp_path / "other", whole)


# ---- a full disk ----------------------------------------------------------------------------------------------------


@faults("Faults", "a full disk: a clear error, the older checkpoint intact")
def test_files_that_cannot_grow(options, whole, half, capsys):
    """The limit is on a file's size, and any user can set it: the optimizer's file is the one that does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (half / "checkpoint-3" / "optimizer.pt").stat().st_size - 1000
    assert all(f.stat().st_size < room for f in (half / "checkpoint-3").glob("*") if f.name != "optimizer.pt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        assert resume(options, half) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert f"--output_dir: no room left to write in {str(half)!r}" in said
    assert f"{half / 'checkpoint-6'}: incomplete, can be deleted" in said
    assert "--resume_from_checkpoint last" in said
    assert_goes_on(options, half, whole)


def assert_goes_on(options, run: Path, whole: Path) -> None:
    assert not (run / "results.json").exists()
    assert last_complete_checkpoint(run)[0] == run / "checkpoint-3"
    for path in (whole / "checkpoint-3").iterdir():
        assert (run / "checkpoint-3" / path.name).read_bytes() == path.read_bytes(), path.name
    assert resume(options, run) == 0
    assert_same_run(run, whole)


@faults("Faults", "a full file system")
def test_a_file_system_that_is_full(options, whole, half, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    needed = sum(path.stat().st_size for path in (half / "checkpoint-3").iterdir())
    size = needed + needed // 2
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        shutil.copytree(half, small / "run")
        assert resume(options, small / "run") == 1
        assert "--output_dir: no room left to write in" in capsys.readouterr().err
        shutil.copytree(small / "run", tmp_path / "moved")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert_goes_on(options, tmp_path / "moved", whole)


def test_other_errors_are_not_taken_for_a_full_disk():
    assert is_out_of_room(OSError(28, "No space left on device"))
    assert is_out_of_room(OSError(28, "in another language"))
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = OSError(122, "Disk quota exceeded")
    assert is_out_of_room(wrapped)
    for other in (OSError(13, "Permission denied"), RuntimeError("shapes do not fit"), KeyError("No space left")):
        assert not is_out_of_room(other)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "results.json", "old")

    def fails(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "results.json", "new")
    assert (tmp_path / "results.json").read_text() == "old"


# ---- NaN ------------------------------------------------------------------------------------------------------------


def all_finite(folder: Path) -> bool:
    return all(torch.isfinite(v).all() for f in folder.rglob("*.safetensors") for v in load_file(f).values())


@faults("Faults", "a loss that becomes NaN ends training at that step, and nothing of it is saved")
@pytest.mark.parametrize("accumulate", [1, 2], ids=["", "accumulated"])
def test_a_loss_that_becomes_nan(options, whole, tmp_path, monkeypatch, capsys, accumulate):
    compute = train.Trainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    out = tmp_path / "out"
    more = ["--save_steps", "2", "--logging_steps", "100", "--gradient_accumulation_steps", str(accumulate)]
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "compute_loss", poisoned)
        assert train.main([*options, *more, "--output_dir", str(out)]) == 1
    said = capsys.readouterr().err
    assert "At step 5 (learning rate 0.00333 and 0.0333) the loss is nan" in said
    assert "Lower --learning_rate" in said
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert all_finite(out)
    assert not (out / "results.json").exists()
    if accumulate == 1:
        assert resume([*options, "--save_steps", "2"], out) == 0
        assert all_finite(out)
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@faults("Faults", "a learning rate that is far too high is named, and no weight that is not finite is saved")
@pytest.mark.parametrize("method", ["input-tuning", "prompt-tuning", "lora", "full"])
def test_a_learning_rate_that_is_too_high(options, tmp_path, capsys, method):
    """In a real run, with nothing replaced."""
    more = ["--method", method, "--learning_rate", "1e30", "--weight_decay", "0.01", "--save_steps", "1"]
    more += ["--output_dir", str(tmp_path / "out")]
    assert train.main([*options, *more]) == 1
    assert "Lower --learning_rate" in capsys.readouterr().err
    assert all_finite(tmp_path)
    assert not (tmp_path / "out" / "results.json").exists()


@faults("Faults", "a validation loss of NaN is named, and not chosen as the best")
def test_a_validation_loss_of_nan(options, tmp_path, monkeypatch, capsys):
    predict = train.Trainer.prediction_step

    def poisoned(self, *args, **kwargs):
        loss, *rest = predict(self, *args, **kwargs)
        return (loss * float("nan") if self.state.global_step == 4 else loss, *rest)

    out, data = tmp_path / "out", options[options.index("--train_data") + 1]
    more = ["--validation_data", data, "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
    more += ["--load_best_model_at_end", "true"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "prediction_step", poisoned)
        assert train.main([*options, *more, "--output_dir", str(out)]) == 1
    assert "At step 4" in (said := capsys.readouterr().err)
    assert "eval_loss is nan" in said
    assert last_complete_checkpoint(out)[0] == out / "checkpoint-2"
    assert json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["best_global_step"] == 2
    assert resume([*options, *more], out) == 0
    assert all_finite(out)


def model_with(value: float) -> torch.nn.Module:
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = value
    return model


STATE = SimpleNamespace(global_step=7)
SAVING = SimpleNamespace(should_save=True, should_evaluate=False, should_training_stop=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(value):
    stop, model = StopAtNonFinite(), model_with(value)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    with pytest.raises(TrainingError, match=r"At step 7 \(learning rate 0.5\) eval_loss is"):
        stop.on_log(None, STATE, None, {"loss": 1.0, "eval_loss": value}, optimizer)
    with pytest.raises(TrainingError, match="At step 7 the weight `weight` is NaN or infinite"):
        stop.on_step_end(None, STATE, SAVING, model)


def test_what_is_finite_goes_on():
    stop, model = StopAtNonFinite(), model_with(3e38)  # the norm of which is not finite in float32
    stop.on_log(None, STATE, None, {"loss": 1.0, "grad_norm": float("inf"), "eval_loss": 2.0})
    stop.on_step_end(None, STATE, SAVING, model)
    frozen = model_with(float("nan")).requires_grad_(False)
    stop.on_step_end(None, STATE, SAVING, frozen)
