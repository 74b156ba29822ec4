"""The command line before its work begins: what it answers without torch, transformers and PEFT, and in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_input_tuning import __version__, program
from peft_input_tuning.command_line import export
from peft_input_tuning.command_line.main import COMMANDS, main

HEAVY = {"torch", "transformers", "peft", "numpy", "huggingface_hub", "rich", "tqdm", "importlib.metadata"}
ENTRY = "import sys\nfrom peft_input_tuning.command_line.main import main\nsys.exit(main())\n"  # as pip writes it
IMPORT_TIME = re.compile(r"^import time:.*\|\s+([\w.]+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Runs `python -m peft_input_tuning`, or the script; returns status, output, errors and what was imported."""
    script = tmp_path_factory.mktemp("bin") / "peft-input-tuning"
    script.write_text(ENTRY)

    def start(way: str, *arguments: str, cwd: Path | None = None) -> tuple[int, str, str, set[str]]:
        how = ["-m", "peft_input_tuning"] if way == "module" else [str(script)]
        command = [sys.executable, "-X", "importtime", *how, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
        said = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time:"))
        return done.returncode, done.stdout, said, set(IMPORT_TIME.findall(done.stderr))

    return start


def test_the_script_is_the_one_of_the_metadata():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'{program.PROGRAM} = "peft_input_tuning.command_line.main:main"' in text


@pytest.mark.parametrize("way", ["module", "script"])
@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_and_version_import_nothing_heavy(started, way, arguments):
    code, out, err, imported = started(way, *arguments)
    assert (code, err) == (0, "")
    assert out.startswith(
        f"peft-input-tuning {__version__}" if "--version" in arguments else "usage: peft-input-tuning"
    )
    assert "peft_input_tuning.command_line.main" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m", "--help"], ["python", "-m", "peft_input_tuning", "--help"], True),
        (["-m"], ["python", "-W", "ignore", "-mpeft_input_tuning"], True),
        (["-m", "peft_input_tuning"], ["python", "-m", "lm_eval", "peft_input_tuning"], False),
        (["/bin/peft-input-tuning", "run"], ["python", "/bin/peft-input-tuning", "run"], True),
        (["tool.py", "peft-input-tuning"], ["python", "tool.py", "peft-input-tuning"], False),
        (["peft-input-tuning.py"], ["python", "peft-input-tuning.py"], False),
        ([""], ["python"], False),
    ],
)
def test_only_the_command_line_puts_the_import_off(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert program.is_command_line() is expected


def test_the_public_names_are_there_before_the_work_begins(tmp_path):
    """A library may ask the package for a name while the command line has not imported it yet."""
    script = tmp_path / "peft-input-tuning"
    script.write_text(
        "import sys, peft_input_tuning\n"
        "assert 'torch' not in sys.modules\n"
        "from peft_input_tuning import InputTuningConfig\n"
        "import peft\n"
        "print(peft_input_tuning.InputTuningConfig().peft_type is peft.PeftType('INPUT_TUNING'))\n"
        "peft_input_tuning.nothing\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr
    assert "has no attribute 'nothing'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "./nothing"], "ADAPTER: there is no folder './nothing', and it is no id of a model hub."),
        (["inspect", "a/b/c"], "ADAPTER: there is no folder 'a/b/c', and it is no id of a model hub."),
        (["export", "nothing", "out"], "ADAPTER: there is no folder 'nothing'. On a model hub, adapters are named OW"),
        (["to-lora", "here/nothing", "out"], "ADAPTER: there is no folder 'here/nothing'. 'here' is one, so no model"),
        (
            ["export", "here", "out"],
            "ADAPTER: 'here' has no adapter_config.json. Name a folder that holds an adapter.",
        ),
        (
            ["inspect", "half"],
            "ADAPTER: 'half' has no adapter_model.safetensors, only the configuration. Get the folder again, or save",
        ),
        (["export", "file", "out"], "ADAPTER: 'file' is a file. Name the folder that it is in."),
        (["export", "adapter", "out", "--base", "here/no"], "--base: there is no folder 'here/no'. 'here' is one"),
        (
            ["grow-base", "~/base", "out", "--virtual-tokens", "2"],
            "BASE: there is no folder '~/base', and it is no id",
        ),
        (["familiarity", "rows", "--model", "half"], "--model: 'half' holds an adapter. Name the folder of its base"),
        (["grow-base", "half", "out", "--virtual-tokens", "2"], "BASE: 'half' holds an adapter. Name the folder of"),
        (["familiarity", "rows", "--model", "here/x"], "--model: there is no folder 'here/x'. 'here' is one"),
        (["inspect", "x\x1b[2J"], r"ADAPTER: there is no folder 'x\x1b[2J'"),
        (["export", "adapter", "/proc/out"], "OUTPUT: '/proc/out' cannot be written"),
        (["to-lora", "adapter", "/proc/out"], "OUTPUT: '/proc/out' cannot be written"),
        (["to-lora", "adapter", "out", "--text", "nothing"], "--text: 'nothing' cannot be read (No such file"),
        (["to-lora", "adapter", "out", "--text", "latin"], "--text: 'latin' is not UTF-8"),
        (["grow-base", "here", "/proc/out", "--virtual-tokens", "2"], "OUTPUT: '/proc/out' cannot be written"),
        (["inspect", "adapter", "--html", "/proc/page"], "--html: '/proc/page' cannot be written"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_anything_is_imported(tmp_path, monkeypatch, capsys, arguments, message):
    """`check` is what runs before the import of torch, as the next test shows."""
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "adapter"):
        Path(folder).mkdir()
        Path(folder, "adapter_model.safetensors").touch()
    for folder in ("adapter", "half"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "adapter_config.json").write_text("{}")
    Path("file").touch()
    Path("latin").write_bytes(b"gr\xfcn\n")
    Path("rows").write_text('{"source": "a"}\n')
    monkeypatch.setattr(COMMANDS[arguments[0]][0], "run", lambda _: pytest.fail("the work began"))
    assert main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"peft-input-tuning {arguments[0]}: {message}")
    assert error.isprintable()
    assert not Path("out").exists()


@pytest.mark.parametrize("way", ["module", "script"])
def test_a_mistyped_folder_is_answered_without_torch(started, way, tmp_path):
    code, out, err, imported = started(way, "export", "./nothing", "out", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err == (
        "peft-input-tuning export: ADAPTER: there is no folder './nothing', and it is no id of a model hub.\n"
    )
    assert not imported & HEAVY


def test_what_may_be_an_id_is_looked_for_on_a_hub(capsys, monkeypatch):
    monkeypatch.setattr(export, "run", lambda _: 0)
    assert main(["export", "owner/adapter", "out", "--base", "gpt2"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "ADAPTER: there is no folder 'owner/adapter' here, so a model hub is asked.",
        "--base: there is no folder 'gpt2' here, so a model hub is asked.",
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["export"], "peft-input-tuning export: the following arguments are required: adapter, output."),
        (
            ["inspect", "x", "--nearest", "many"],
            "peft-input-tuning inspect: argument --nearest: must be an integer >= 1, got 'many'",
        ),
        (
            ["inspect", "x", "--nearest", "0"],
            "peft-input-tuning inspect: argument --nearest: must be an integer >= 1, got '0'.",
        ),
        (
            ["to-lora", "x", "y", "--rank", "0"],
            "peft-input-tuning to-lora: argument --rank: must be an integer >= 1, got '0'.",
        ),
        (
            ["grow-base", "x", "y", "--virtual-tokens", "-1"],
            "peft-input-tuning grow-base: argument --virtual-tokens: must be an integer >= 0, got '-1'.",
        ),
        *(
            (
                ["familiarity", "x", "--model", "y", option, str(lowest - 1)],
                f"peft-input-tuning familiarity: argument {option}: must be an integer >= {lowest}, got ",
            )
            for option, lowest in (("--limit", 1), ("--batch-size", 1), ("--least", 1), ("--window", 2))
        ),
        (["exprot"], "peft-input-tuning: argument command: invalid choice: 'exprot'"),
        (["export", "a", "b", "--\x1b[2J"], r"peft-input-tuning: unrecognized arguments: --\x1b[2J."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_arguments_are_one_line(capsys, arguments, error):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(error)
    assert said.endswith(" --help.")


def test_what_a_function_says_of_its_arguments_names_the_options(capsys, monkeypatch, tmp_path):
    def fail(_):
        raise ValueError("`max_rank` is 3; choose `rank`, or name `virtual_token_ids`; `other` is the function's own.")

    monkeypatch.setattr(COMMANDS["to-lora"][0], "run", fail)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    assert main(["to-lora", str(tmp_path), str(tmp_path / "out")]) == 2
    said = "--max-rank is 3; choose --rank, or name --virtual-token-ids; `other` is the function's own."
    assert capsys.readouterr().err == f"peft-input-tuning to-lora: {said}\n"


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (ValueError("a\nb"), 2, "a b"),
        (ImportError("no sentencepiece"), 1, "no sentencepiece"),
        (KeyError("w1"), 1, "KeyError: 'w1'"),
        (AssertionError(), 1, "AssertionError: "),
        (MemoryError(), 1, "MemoryError: "),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_is_raised_is_one_line(capsys, monkeypatch, tmp_path, raised, status, said):
    def fail(_):
        raise raised

    monkeypatch.setattr(export, "run", fail)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == status
    assert capsys.readouterr().err.rstrip("\n") == f"peft-input-tuning export: {said}".rstrip()


def test_development_mode_shows_where_an_error_comes_from(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[]")
    (tmp_path / "adapter_model.safetensors").touch()
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-m", "peft_input_tuning", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
