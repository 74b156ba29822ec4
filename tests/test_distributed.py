"""Two real processes over gloo against one: the same losses, the same adapter, nothing of the base in any file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from adapters import adapted
from families import FAMILIES

TESTS = Path(__file__).parent
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-all installs it"
)


def launch(processes: int, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(TESTS / "distributed_worker.py")]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
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


CASES = {
    "ddp": ["ddp"],
    "ddp, an unused adapter": ["ddp", "--second"],
    "ddp, an unused adapter, find_unused_parameters": ["ddp", "--second", "--find-unused"],
    "ddp, find_unused_parameters": ["ddp", "--find-unused"],
    "fsdp2": ["fsdp2"],
    "fsdp2, an unused adapter": ["fsdp2", "--second"],
    "zero2": ["zero2"],
    "zero3": ["zero3"],
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow, needs_deepspeed] if "zero" in c else []) for c in CASES]
)
def test_two_processes_train_like_one(alone, tmp_path, case):
    mode, *more = CASES[case]
    launch(2, mode, str(tmp_path), *more)
    assert_same(result_of(tmp_path), alone)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_fsdp2_resumes_with_another_number_of_processes(alone, tmp_path, first, then):
    launch(first, "fsdp2", str(tmp_path), "--steps", "2", "--checkpoint")
    before, _ = result_of(tmp_path)
    launch(then, "fsdp2", str(tmp_path), "--steps", "4", "--resume")
    after, weights = result_of(tmp_path)
    assert_same((before + after, weights), alone)
