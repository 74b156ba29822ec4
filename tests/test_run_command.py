"""`python -m peft_input_tuning run PROGRAM ...`: a program as Python itself runs it, and adapters are known in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters import adapted
from families import FAMILIES
from peft_input_tuning.command_line.main import main

PACKAGE = str(Path(__file__).parents[1])
TWO_PROCESSES = Path(PACKAGE) / "examples" / "training" / "accelerate_configs" / "ddp_cpu.yaml"
# What a program can see of how it was started; at the end, when Python has left it, pickling looks `__main__` up.
PROBE = """
import atexit, pickle, sys

def function(): pass

names = ("__name__", "__file__", "__package__", "__cached__", "__doc__")
print([globals().get(name) for name in names], getattr(__spec__, "name", None), type(__loader__).__name__)
print(sys.argv, sys.path[0], vars(sys.modules["__main__"]) is globals())
atexit.register(lambda: print(len(pickle.dumps(function))))
if sys.argv[-1].startswith("exit"):
    sys.exit(eval(sys.argv[-1].removeprefix("exit ")))
if sys.argv[-1] == "raise":
    raise RuntimeError("the program's own")
"""
LOADS = """
import sys
from peft import PeftConfig

print(PeftConfig.from_pretrained(sys.argv[1]).peft_type.value)
"""
SPAWNS = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor

def load(folder):
    from peft import PeftConfig
    return PeftConfig.from_pretrained(folder).peft_type.value

def child_of_a_child(folder):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [load(folder), *pool.map(load, [folder])]

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            print(method, *pool.submit(child_of_a_child, sys.argv[1]).result())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Programs, as files and as modules, and an adapter."""
    folder = tmp_path_factory.mktemp("programs")
    for name, text in {"probe": PROBE, "loads": LOADS, "spawns": SPAWNS}.items():
        (folder / f"{name}.py").write_text(text)
    for package in ("package", "plain"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    for name in ("__main__", "inner"):
        (folder / "package" / f"{name}.py").write_text(PROBE)
    (folder / "tool").write_text(PROBE)
    adapted(FAMILIES["llama"])[0].save_pretrained(folder / "adapter")
    return folder


def python(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Status, output and errors; the current folder is not in PYTHONPATH, which has the package."""
    before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": PACKAGE if before is None else f"{PACKAGE}{os.pathsep}{before}"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    return done.returncode, done.stdout.splitlines(), done.stderr


def run(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    return python(folder, "-m", "peft_input_tuning", "run", *arguments)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("{folder}/tool", ["--", "-h", "--x=1", "", "exit 'a reason'"]),
        ("package", ["--help", "exit 3"]),
        ("package.inner", ["-m", "package", "raise"]),
    ],
    ids=["a file", "a package", "a module"],
)
def test_a_program_is_run_as_python_runs_it(folder, program, arguments):
    is_file = "/" in program
    program = program.format(folder=folder)
    want = python(folder, *([] if is_file else ["-m"]), program, *arguments)
    found = run(folder, program, *arguments)
    assert found[:2] == want[:2]
    if want[2]:  # why it ended
        assert found[2].splitlines()[-1] == want[2].splitlines()[-1]


def test_a_program_that_does_not_import_the_package_loads_adapters(folder):
    status, _, errors = python(folder, "loads.py", "adapter")
    assert (status, errors.splitlines()[-1]) == (1, "KeyError: 'INPUT_TUNING'")
    assert run(folder, "loads.py", "adapter")[:2] == (0, ["INPUT_TUNING"])


@pytest.mark.slow
def test_processes_that_the_program_starts_with_multiprocessing_load_them_too(folder):
    known = "INPUT_TUNING INPUT_TUNING"
    assert run(folder, "spawns.py", "adapter")[:2] == (0, [f"spawn {known}", f"forkserver {known}"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_launchers_run_the_command(folder, launcher):
    launch = {
        "accelerate": ["accelerate.commands.launch", f"--config_file={TWO_PROCESSES}"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--master_port=0"],
    }[launcher]
    command = ["-m", "peft_input_tuning", "run", "loads.py", "adapter"]
    status, output, errors = python(folder, "-m", *launch, *command)
    assert status == 0, errors[-2000:]
    assert " ".join(output).count("INPUT_TUNING") == 2


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("nothing.py", "`PROGRAM` is 'nothing.py', and there is no such file"),
        ("./package", "`PROGRAM` is './package', and there is no such file"),
        ("nothing", "`PROGRAM` is 'nothing', and there is no such module"),
        ("package.nothing", "`PROGRAM` is 'package.nothing', and there is no such module"),
        ("plain", "`PROGRAM` is 'plain', and there is no such module, or it is a package without a `__main__`"),
        ("tool", "a file, with a slash in its name or `.py` at its end"),
    ],
)
def test_a_program_that_is_not_there(folder, program, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert main(["run", program, "--its-own"]) == 2
    assert message in capsys.readouterr().err


def test_a_package_that_wants_something_else_says_what(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    (folder / "wants").mkdir()
    (folder / "wants" / "__init__.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        main(["run", "wants.inner"])


@pytest.mark.parametrize("arguments", [["run"], ["run", "-m", "package"], ["run", "--help"]])
def test_what_stands_before_the_program_is_the_command_s(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == (0 if "--help" in arguments else 2)
    said = capsys.readouterr()
    assert "PROGRAM" in said.out + said.err
