"""The real command, in a process of its own."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import quantized_bases
from adapters import adapted, config, randomize
from device import DEVICE
from families import FAMILIES, VOCAB, build
from oracles import row_output
from peft_input_tuning import __version__
from peft_input_tuning.command_line.gguf import gguf_arguments
from peft_input_tuning.command_line.load import load_adapter
from peft_input_tuning.command_line.main import _parser, main
from tokenizers_of_families import tokenizer_of


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "peft_input_tuning", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, base, weights = adapted(FAMILIES["llama"])
    base.save_pretrained(folder / "base")
    tokenizer_of(FAMILIES["llama"]).save_pretrained(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder, base, weights


def test_export(saved, tmp_path):
    folder, base, weights = saved
    result = run("export", folder / "adapter", tmp_path / "plain")
    assert result.returncode == 0, result.stderr
    assert f"Wrote {tmp_path / 'plain'} with 4 virtual tokens (97 to 100)." in result.stdout
    assert "Loaded it again: outputs differ from the adapter's by at most" in result.stdout
    assert "Folding the table: 100%" in result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").to(DEVICE)
    row = torch.tensor(tokenizer_of(FAMILIES["llama"])("a b c")["input_ids"], device=DEVICE)
    with torch.no_grad():
        logits = plain(**tokenizer("a b c", return_tensors="pt").to(DEVICE)).logits[0, 4:, :VOCAB]
    assert_close(logits, row_output(base, weights, row), atol=2e-4, rtol=1e-3)


def test_export_with_options(saved, tmp_path):
    folder, _, _ = saved
    options = ("--base", folder / "base", "--dtype", "bfloat16", "--no-tokenizer")
    assert run("export", folder / "adapter", tmp_path / "plain", *options).returncode == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dtype == torch.bfloat16
    assert not (tmp_path / "plain" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["model.gguf"], {"gguf_file": "model.gguf"}),
        (["model.gguf", "config.json"], {}),
        (["model.gguf", "other.gguf"], {}),
        ([], {}),
    ],
    ids=["one", "a plain checkpoint too", "two", "none"],
)
def test_the_only_gguf_file_of_a_folder_is_found(files, found, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    assert gguf_arguments(str(tmp_path)) == found
    assert gguf_arguments(str(tmp_path), "named.gguf") == {"gguf_file": "named.gguf"}
    assert gguf_arguments("an-id/on-a-hub") == {}


def test_an_adapter_whose_base_is_a_gguf_file(tmp_path):
    """As the demo's is. The adapter's file names the folder, not the file in it."""
    pytest.importorskip("gguf")
    quantized_bases.write_plain(tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        if file.suffix != ".gguf":
            file.unlink()
    model = get_peft_model(quantized_bases.gguf_file(tmp_path / "base"), config(FAMILIES["llama"])).eval()
    randomize(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", gguf_file="model.gguf")
    result = run("export", tmp_path / "adapter", tmp_path / "plain", "--no-tokenizer")
    assert result.returncode == 0, result.stderr
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    row = torch.tensor([[5, 7, 11]])
    prompt = torch.arange(VOCAB, VOCAB + 4)[None]
    with torch.no_grad():
        expected = model(row).logits
        assert_close(loaded(row).logits, expected)
        assert_close(plain(torch.cat([prompt, row], 1)).logits[:, 4:, :VOCAB], expected, atol=1e-4, rtol=1e-3)


def test_a_classifier_of_five_labels(tmp_path):
    """What its base was loaded with is not in the adapter's folder."""
    base = build(FAMILIES["llama"], "base")
    base.config.num_labels = 5
    model = get_peft_model(AutoModelForSequenceClassification.from_config(base.config), config(task_type="SEQ_CLS"))
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "base" / "config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if "label" not in k}))
    without = run("inspect", tmp_path / "adapter", "--no-tokenizer")
    assert without.returncode == 2
    assert "and its --num-labels set as they were then" in without.stderr
    result = run("inspect", tmp_path / "adapter", "--no-tokenizer", "--num-labels", 5)
    assert result.returncode == 0, result.stderr


def arguments_of(adapter: Path, *more: str) -> argparse.Namespace:
    return _parser().parse_args(["inspect", str(adapter), *more])


def test_the_base_is_that_of_the_adapters_revision(saved, tmp_path, monkeypatch):
    folder, _, _ = saved
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"revision": "v1"}))
    asked = []

    def watched(kind):
        load = kind.from_pretrained

        def from_pretrained(name, **more):
            asked.append((kind.__name__, str(name), more.get("revision")))
            return load(name, **more)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    watched(AutoModelForCausalLM)
    watched(AutoTokenizer)
    load_adapter(arguments_of(tmp_path / "adapter"))
    base = str(folder / "base")
    assert asked == [("AutoModelForCausalLM", base, "v1"), ("AutoTokenizer", base, "v1")]
    asked.clear()
    load_adapter(arguments_of(tmp_path / "adapter", "--base", base))
    assert {revision for _, _, revision in asked} == {None}


def test_the_tokenizer_beside_the_adapter_may_have_more_words_than_the_base(tmp_path):
    """As AutoPeftModel does: the base grows before it gets its adapter."""
    llama = FAMILIES["llama"]
    base, tokenizer = build(llama), tokenizer_of(llama)
    base.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens([f"word{number}" for number in range(VOCAB)])
    base.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(base, config(llama))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, found = load_adapter(arguments_of(tmp_path / "adapter"))
    assert len(found) == len(tokenizer) == loaded.get_input_embeddings().num_embeddings
    row = torch.tensor([[5, VOCAB + 3]])
    assert_close(loaded.eval()(row).logits, model.cpu().eval()(row).logits)


def test_errors_are_one_line_and_status_2(saved, tmp_path):
    folder, _, _ = saved
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    cases = {
        ("export", folder / "adapter", tmp_path / "full"): "exists and is not an empty folder",
        ("export", tmp_path / "nothing", tmp_path / "plain"): "there is no folder",
        ("export", folder / "adapter", tmp_path / "plain", "--base", tmp_path / "nothing"): "nothing",
    }
    for arguments, message in cases.items():
        result = run(*arguments)
        assert result.returncode == 2, arguments
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "plain").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def junk(path: Path) -> None:
    path.write_bytes(b"\x1b[2Jno such file format")


def fields(**changes: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BROKEN = {
    "cut weights": (WEIGHTS, cut, "its weights are cut off, or no safetensors file"),
    "junk weights": (WEIGHTS, junk, "its weights are cut off, or no safetensors file"),
    "cut configuration": (CONFIG, cut, "it holds no JSON"),
    "a list": (CONFIG, lambda path: path.write_text("[1, 2]"), "holds a list, not fields"),
    "unknown method": (CONFIG, fields(peft_type="\x1b[31mX"), r"a method that PEFT does not know ('\x1b[31mX')"),
    "method of a wrong type": (CONFIG, fields(peft_type=["LORA"]), "a method that PEFT does not know (['LORA'])"),
    "another method": (CONFIG, fields(peft_type="LORA"), "another method"),
    "field of a wrong type": (CONFIG, fields(num_virtual_tokens="many"), "`num_virtual_tokens` must be an integer"),
    "base of a wrong type": (CONFIG, fields(base_model_name_or_path=7), "names 7 as its base model"),
}


@pytest.mark.parametrize("command", ["inspect", "export", "to-lora"])
@pytest.mark.parametrize(("name", "spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_answered_in_one_line(saved, tmp_path, capsys, command, name, spoil, message):
    folder, _, _ = saved
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    spoil(tmp_path / "adapter" / name)
    output = [] if command == "inspect" else [str(tmp_path / "output")]
    assert main([command, str(tmp_path / "adapter"), *output]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"peft-input-tuning {command}: ")
    assert message in error
    assert error.isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    "command",
    ["inspect ADAPTER --base BASE", "grow-base BASE OUT --virtual-tokens 2", "familiarity ROWS --model BASE"],
    ids=lambda command: command.split()[0],
)
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", junk),
        ("config.json", junk),
        ("config.json", lambda path: path.write_text("[1]")),
        ("config.json", fields(hidden_size="wide")),
        ("tokenizer.json", junk),
    ],
    ids=["cut weights", "junk weights", "junk config", "config is a list", "field of a wrong type", "tokenizer"],
)
def test_a_broken_base_is_answered_in_one_line(saved, tmp_path, capsys, command, name, spoil):
    folder, _, _ = saved
    shutil.copytree(folder / "base", tmp_path / "base")
    spoil(tmp_path / "base" / name)
    (tmp_path / "rows").write_text('{"source": "a b c"}\n')
    names = {
        "ADAPTER": folder / "adapter",
        "BASE": tmp_path / "base",
        "OUT": tmp_path / "out",
        "ROWS": tmp_path / "rows",
    }
    arguments = [str(names.get(word, word)) for word in command.split()]
    capsys.readouterr()
    assert main(arguments) in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    error = said.splitlines()[-1]
    assert error.startswith(f"peft-input-tuning {arguments[0]}: ")
    assert str(tmp_path / "base") in error
    assert error.isprintable()
    assert not (tmp_path / "out").exists()


def test_inspect_shows_control_characters_of_files_as_escapes(saved, tmp_path, capsys):
    folder, _, _ = saved
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    fields(prompt_tuning_init_text="\x1b]0;title\x07 \u202ereversed")(tmp_path / "adapter" / CONFIG)
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(folder / "base")]) == 0
    said = capsys.readouterr().out
    assert r"\x1b]0;title\x07 \u202ereversed" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_to_lora_on_a_grown_base(saved, tmp_path, capsys):
    folder, base, weights = saved
    assert main(["to-lora", str(folder / "adapter"), str(tmp_path / "lora")]) == 2
    assert "grow_base(base, output_dir, virtual_tokens=4)" in capsys.readouterr().err
    assert main(["grow-base", str(folder / "base"), str(tmp_path / "base"), "--virtual-tokens", "4"]) == 0
    assert f"Wrote {tmp_path / 'base'} with 101 words; virtual tokens are 97 to 100." in capsys.readouterr().out
    (tmp_path / "text").write_text("a b c\nd\n")
    options = ("--base", tmp_path / "base", "--max-rank", 32, "--text", tmp_path / "text")
    result = run("to-lora", folder / "adapter", tmp_path / "lora", *options)
    assert result.returncode == 0, result.stderr
    assert "Exact but for rounding" in result.stdout
    assert "vLLM: --max-lora-rank 32" in result.stdout
    assert "<|virtual_0|><|virtual_1|><|virtual_2|><|virtual_3|>" in result.stdout
    lora = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval().to(DEVICE)
    assert lora.peft_config["default"].peft_type == "LORA"
    inputs = AutoTokenizer.from_pretrained(tmp_path / "lora")("a b c", return_tensors="pt").to(DEVICE)
    row = torch.tensor(tokenizer_of(FAMILIES["llama"])("a b c")["input_ids"], device=DEVICE)
    with torch.no_grad():
        assert_close(lora(**inputs).logits[0, 4:, :VOCAB], row_output(base, weights, row), atol=2e-4, rtol=1e-3)


def test_to_lora_of_a_lower_rank_says_its_errors(saved, tmp_path, capsys):
    folder, _, _ = saved
    (tmp_path / "text").write_text("a b c\n")
    options = ["--virtual-token-ids", "96,95,94,93", "--rank", "12", "--text", str(tmp_path / "text")]
    assert main(["to-lora", str(folder / "adapter"), str(tmp_path / "lora"), *options]) == 0
    said = capsys.readouterr().out
    assert "NOT exact: rank 12, and 28 would be." in said
    assert "over all words" in said
    assert "in the text" in said
    for more, message in (
        (["--max-rank", "20"], "--max-rank is 20"),
        (["--virtual-token-ids", "x"], "no list of ids"),
    ):
        assert main(["to-lora", str(folder / "adapter"), str(tmp_path / "other"), *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_help():
    result = run("export", "--help")
    assert result.returncode == 0
    assert "must not exist, or be empty" in result.stdout


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"peft-input-tuning {__version__}\n"
