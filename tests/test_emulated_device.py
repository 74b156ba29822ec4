"""The package on a device that is not the CPU, on machines without one; and what makes the emulated one an oracle."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from device import DEVICE, on_device

TESTS = Path(__file__).parent
CHOSEN = (
    "test_emulated_device.py",
    "test_forward.py::test_a_row_does_not_depend_on_padding_or_neighbours[llama-left]",
    "test_forward.py::test_a_row_does_not_depend_on_padding_or_neighbours[t5-right]",
    "test_forward.py::test_loss_is_over_the_caller_labels[llama]",
    "test_generation.py::test_greedy_padded_batch[llama-cache]",
    "test_generation.py::test_without_a_mask_and_from_embeddings[llama]",
    "test_generation.py::test_mixed_batch_in_generate[llama-beams]",
    "test_generation.py::test_mixed_batch_with_a_static_cache[llama]",
    "test_packing.py::test_rows_with_adapters_of_their_own[llama]",
    "test_export.py::test_generated_tokens[llama-static cache]",
    "test_trainer_of_many.py::test_an_adapter_without_rows_in_a_step_that_clips",
    "test_trainer.py::test_accumulated_gradients_are_those_of_the_whole_batch",
)
on_the_emulated_device = pytest.mark.skipif(DEVICE.type != "emulated", reason="runs with DEVICE=emulated")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the suite runs on a device as it is")
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch makes no devices"
)
def test_the_package_runs_on_a_device():
    """`make test DEVICE=emulated` runs all tests so; these are of every part that makes tensors."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / name) for name in CHOSEN)]
    environment = {**os.environ, "DEVICE": "emulated"}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " failed" not in done.stdout.splitlines()[-1]


# ---- the device itself ----------------------------------------------------------------------------------------------


@on_the_emulated_device
def test_tensors_of_two_devices_do_not_meet():
    here, there = torch.ones(2, 3), torch.ones(2, 3, device=DEVICE)
    table = torch.ones(5, 3, device=DEVICE)
    meetings = (
        lambda: there + here,
        lambda: there @ here.T,
        lambda: torch.cat([there, here]),
        lambda: torch.nn.functional.embedding(torch.tensor([1, 2]), table),
        lambda: torch.where(here > 0, there, there),
        lambda: torch.rand(2, device=DEVICE, generator=torch.Generator()),
        lambda: there.numpy(),
        lambda: there.pin_memory(),
    )
    for meet in meetings:
        with pytest.raises((RuntimeError, TypeError), match=r"same device|device type|cannot pin"):
            meet()
    assert (there * torch.tensor(2.0)).device.type == DEVICE.type  # a number
    assert table[torch.tensor([0, 1])].shape == (2, 3)  # indices
    assert torch.equal(there.cpu(), here)


@on_the_emulated_device
def test_views_and_copies_are_those_of_tensors(tmp_path):
    x = torch.arange(6, device=DEVICE)
    x.view(2, 3).t()[1] += 10
    assert x.tolist() == [0, 11, 2, 3, 14, 5]
    copied = copy.deepcopy(x)
    x.zero_()
    torch.save(copied, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt")
    assert loaded.device.type == DEVICE.type
    assert loaded.tolist() == [0, 11, 2, 3, 14, 5]


@on_the_emulated_device
def test_shared_weights_stay_shared():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight = first.weight
    torch.nn.ModuleList([first, second]).to(DEVICE)
    second(first(on_device({"x": torch.ones(1, 2)})["x"])).sum().backward()
    assert first.weight is second.weight
    assert first.weight.grad.device.type == DEVICE.type
