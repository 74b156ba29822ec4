"""Two real processes over gloo against one: the same losses, the same adapter, nothing of the base in any file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from adapters import adapted
from families import FAMILIES, build
from test_trainer_of_many import SOME, Alone, data
from test_training_many import many
from worker_of_many import CASES as CASES_OF_MANY

TESTS = Path(__file__).parent
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
pytestmark = pytest.mark.not_emulated("its scripts run on the CPU, in processes of their own")


def launch(processes: int, *arguments: str, worker: str = "distributed_worker.py") -> None:
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))  # the package beside these tests, installed or not
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(TESTS / worker)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]


def result_of(folder: Path) -> tuple[list[float], dict]:
    losses = json.loads((folder / "losses.json").read_text())
    return losses, load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    launch(1, "plain", str(folder))
    return result_of(folder)


def assert_same(got: tuple, want: tuple) -> None:
    assert got[0] == pytest.approx(want[0], abs=1e-4)
    assert set(got[1]) == set(want[1])
    for name, value in want[1].items():
        assert "input_tuning_" in name
        assert_close(got[1][name], value, **CLOSE)


def test_one_process_learns(alone):
    """The yardstick itself: the adapter moved away from where it started."""
    start = {key: value for key, value in adapted(FAMILIES["llama"])[0].state_dict().items() if "input_tuning_" in key}
    assert len(alone[0]) == 4
    for name, value in alone[1].items():
        head, _, tail = name.rpartition(".")
        assert (value - start[f"{head}.default.{tail}"]).abs().max() > 1e-3, name


CASES = {  # what the table calls it, and the worker's arguments
    "ddp": ("DDP", ["ddp"]),
    "ddp-unused": ("DDP, an unused second adapter", ["ddp", "--second"]),
    "ddp-unused-find": (
        "DDP, an unused second adapter, find_unused_parameters",
        ["ddp", "--second", "--find-unused"],
    ),
    "ddp-find": ("DDP, find_unused_parameters", ["ddp", "--find-unused"]),
    "accelerate": ("accelerate's loop", ["accelerate"]),
    "accelerate-accumulate": ("accelerate's loop, gradient accumulation", ["accelerate", "--accumulate"]),
    "accelerate-dispatch": ("accelerate's loop, dispatch_batches", ["accelerate", "--dispatch"]),
    "fsdp2": ("FSDP2 (torch's fully_shard)", ["fsdp2"]),
    "fsdp2-embedding": ("FSDP2, the embedding a unit of its own, as accelerate has it", ["fsdp2", "--embedding"]),
    "fsdp2-unused": ("FSDP2, an unused second adapter", ["fsdp2", "--second"]),
    "zero2": ("DeepSpeed ZeRO-2", ["zero2"]),
    "zero3": ("DeepSpeed ZeRO-3", ["zero3"]),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=[
                pytest.mark.trains_with("accelerate and processes", f"two processes: {words}"),
                *([pytest.mark.slow] if "zero" in case else []),
            ],
        )
        for case, (words, _) in CASES.items()
    ],
)
def test_two_processes_train_like_one(alone, tmp_path, case):
    mode, *more = CASES[case][1]
    launch(2, mode, str(tmp_path), *more)
    assert_same(result_of(tmp_path), alone)


@pytest.mark.trains_with(
    "accelerate and processes", "FSDP2: the adapter's state alone, resumed with another number of processes"
)
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_fsdp2_resumes_with_another_number_of_processes(alone, tmp_path, first, then):
    resumes(alone, tmp_path, first, then)


@pytest.mark.trains_with("accelerate and processes", "FSDP2: the full state dict in one file, saved and loaded")
def test_fsdp2_resumes_from_a_full_state_dict(alone, tmp_path):
    resumes(alone, tmp_path, 2, 2, "--full")
    state = torch.load(tmp_path / "checkpoint", weights_only=True)["model"]
    base = build(FAMILIES["llama"]).state_dict()
    held = {key.removeprefix("base_model.model.").replace(".base_layer", ""): value for key, value in state.items()}
    assert base.keys() <= held.keys()
    assert all(torch.equal(held[key], value) for key, value in base.items())


def resumes(alone: tuple, folder: Path, first: int, then: int, *more: str) -> None:
    launch(first, "fsdp2", str(folder), "--steps", "2", "--checkpoint", *more)
    before, _ = result_of(folder)
    launch(then, "fsdp2", str(folder), "--steps", "4", "--resume", *more)
    after, weights = result_of(folder)
    assert_same((before + after, weights), alone)


@pytest.mark.trains_with("accelerate and processes", "two processes: many adapters at once with Trainer")
def test_many_adapters_in_two_processes(tmp_path):
    """Each is what a loop by hand makes of it alone, though one process may have no rows of it."""
    launch(2, str(tmp_path), worker="worker_of_many.py")
    found = torch.load(tmp_path / "adapters.pt", weights_only=True)
    assert set(found) == set(CASES_OF_MANY)
    for case, names in CASES_OF_MANY.items():
        model, base = many(adapters=SOME)
        for name in SOME:
            alone = Alone(FAMILIES["llama"], base, model, name)
            rows = data(names)
            steps = 1 if case == "stopped" and name == "a" else 3
            for step in range(steps):
                alone.step([row for row in rows[4 * step : 4 * step + 4] if row["adapter_name"] == name])
            for key, value in found[case][name].items():
                assert_close(value, alone.leaves[key].detach(), atol=1e-8, rtol=1e-6, msg=f"{case}, {name}, {key}")
            loss = float(alone.loss(data(name * 4, seed=60)))
            assert found[case]["losses"][name] == pytest.approx(loss, rel=1e-6)
