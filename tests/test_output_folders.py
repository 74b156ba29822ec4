"""Folders that are written whole or not at all: behind links, in place, beside a killed or a running process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from peft_input_tuning.output import folders
from peft_input_tuning.output.folders import check_folder_to_write, unfinished_folder

WRITER = """
import runpy, sys, time
from pathlib import Path
unfinished_folder = runpy.run_path(sys.argv[3])["unfinished_folder"]  # without torch
with unfinished_folder("output", sys.argv[1], last="z") as folder:
    (folder / "a").write_text("killed")
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_text("killed")
    (folder / "z").write_text("killed")
    if sys.argv[2] == "moving":
        rename = Path.rename
        def stop_before_the_last(self, to):
            if self.name == "z":
                print("here", flush=True), time.sleep(60)
            return rename(self, to)
        Path.rename = stop_before_the_last
    else:
        print("here", flush=True), time.sleep(60)
"""


def write(path, text="whole"):
    with unfinished_folder("output", path, last="z") as folder:
        (folder / "z").write_text(text)
        (folder / "a").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text(text)


def files(path):
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


WHOLE = {"z": "whole", "a": "whole", "sub/b": "whole"}


KINDS = ("new", "deep", "empty", "link", "dangling", "here", "volume")


@pytest.fixture(params=KINDS)
def place(request, tmp_path, monkeypatch):
    """A target as a user names it, and the folder that is meant."""
    there, real = tmp_path / "target", tmp_path / "target"
    if request.param == "deep":
        there = real = tmp_path / "x" / "y" / "target"
    elif request.param in ("empty", "volume", "here"):
        real.mkdir()
    elif request.param in ("link", "dangling"):
        real = tmp_path / "real"
        if request.param == "link":
            real.mkdir()
        there.symlink_to(real)
    if request.param == "volume":
        (real / "lost+found").mkdir()
    if request.param == "here":
        monkeypatch.chdir(real)
        there = "."
    return there, real


def test_every_kind_of_place(place):
    there, real = place
    before = real.stat().st_ino if real.exists() else None
    write(there)
    assert files(real) == WHOLE
    assert before in (None, real.stat().st_ino)  # a mount point or the current folder is not replaced
    assert not [name for name in os.listdir(real.parent) if "unfinished" in name]


def test_what_fails_leaves_nothing(place, tmp_path):
    there, _ = place
    before = sorted(tmp_path.rglob("*"))

    def interrupted():
        with unfinished_folder("output", there, last="z") as folder:
            (folder / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    check_folder_to_write("output", there)
    assert sorted(tmp_path.rglob("*")) == before


# A new folder is moved to its place at once; one that is there gets its files one by one.
KILLED = [(kind, "writing") for kind in KINDS] + [(kind, "moving") for kind in ("empty", "link", "here", "volume")]


def started(path, stage):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), stage, folders.__file__], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize(("place", "stage"), KILLED, indirect=["place"])
def test_a_killed_process_is_cleared_away_and_a_running_one_is_named(place, stage):
    there, real = place
    process = started(real, stage)
    with pytest.raises(ValueError, match="is being written by another process"):
        check_folder_to_write("output", there)
    with pytest.raises(ValueError, match="is being written by another process"):
        write(there)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (real / "z").exists()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # the system takes a moment to give the lock of a killed process back
        try:
            check_folder_to_write("output", there)
            break
        except ValueError:
            time.sleep(0.05)
    write(there)
    assert files(real) == WHOLE


def test_two_in_one_new_parent(tmp_path):
    """The one that made the parent fails, while the other writes there."""

    def fail():
        with unfinished_folder("output", tmp_path / "new" / "a", last="z"):
            (tmp_path / "new" / "b").mkdir()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b"]


def test_folders_in_use_and_places_that_cannot_be_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for path in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(ValueError, match=r"output: '.*' exists and is not an empty folder"):
            write(path)
    with pytest.raises(ValueError, match=r"output: '.*' cannot be written \(Not a directory\)"):
        write(tmp_path / "full" / "mine" / "below")
    assert files(tmp_path) == {"full/mine": "mine"}
