"""The way to a GGUF file, without llama.cpp: the tokenizer that its converter gets, and what is left behind.

`tests/engines` runs the real converter and the real engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from peft import get_peft_model
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import to_gguf
from adapters import adapted, config, randomize
from families import FAMILIES, GENERATORS, build
from peft_input_tuning import export_model, grow_base, save_as_lora
from peft_input_tuning.export.tokenizer import tokenizer_with_prompt
from tokenizers_of_families import tokenizer_of

LLAMA = FAMILIES["llama"]
# Stands in for llama.cpp's converter: writes a GGUF file of one key, and the tokenizer that it was given beside it.
CONVERTER = """
import shutil, sys
from pathlib import Path
from gguf import GGUFWriter
folder, outfile = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
shutil.copy(folder / "tokenizer.json", outfile.parent / "seen.json")
writer = GGUFWriter(outfile, "llama")
writer.add_add_bos_token(True)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.close()
"""


@pytest.mark.parametrize("family", GENERATORS, ids=str)
@pytest.mark.parametrize("count", [0, 3])
def test_the_converter_gets_the_base_models_ids(family, count):
    tokenizer = tokenizer_of(family)
    exported, _ = tokenizer_with_prompt(tokenizer, count)
    plain = to_gguf.without_prompt(json.loads(exported.backend_tokenizer.to_str()))
    for text in ("", "abc", "a b  c"):
        assert Tokenizer.from_str(json.dumps(plain)).encode(text).ids == tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "checkpoint"
    export_model(adapted(LLAMA)[0], folder, tokenizer=tokenizer_of(LLAMA))
    return folder


def converter(tmp_path: Path, source: str = CONVERTER) -> Path:
    path = tmp_path / "convert_hf_to_gguf.py"
    path.write_text(source)
    return path


def test_no_start_token_is_put_before_the_virtual_tokens(tmp_path, checkpoint, capsys):
    output = tmp_path / "model.gguf"
    before = sorted(path.name for path in checkpoint.iterdir())
    assert to_gguf.main([str(checkpoint), str(output), "--converter", str(converter(tmp_path))]) == 0
    assert not GGUFReader(output).get_field("tokenizer.ggml.add_bos_token").contents()
    seen = Tokenizer.from_file(str(tmp_path / "seen.json"))
    assert seen.encode("abc").ids == tokenizer_of(LLAMA)("abc")["input_ids"]
    assert sorted(path.name for path in checkpoint.iterdir()) == before
    said = capsys.readouterr().out
    assert "<|virtual_0|><|virtual_1|><|virtual_2|><|virtual_3|><s>" in said
    assert '{"97": -100, "98": -100, "99": -100, "100": -100}' in said


def test_a_failed_conversion_leaves_nothing(tmp_path, checkpoint, capsys):
    failing = converter(tmp_path, f"{CONVERTER}\nsys.exit(3)")
    assert to_gguf.main([str(checkpoint), str(tmp_path / "model.gguf"), "--converter", str(failing)]) == 1
    assert "status 3" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert_hf_to_gguf.py", "seen.json"]


def test_a_file_without_the_key_is_taken_as_it_is(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_name("x")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    to_gguf._add_no_start_token(tmp_path / "model.gguf")
    assert GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.add_bos_token") is None


@pytest.mark.parametrize("wrong", ["converter", "output", "folder", "checkpoint"])
def test_what_is_not_there_is_named(tmp_path, checkpoint, capsys, wrong):
    arguments = {"checkpoint": checkpoint, "output": tmp_path / "m.gguf", "converter": converter(tmp_path)}
    if wrong == "output":
        arguments["output"].write_text("mine")
    elif wrong == "folder":
        wrong, arguments["output"] = "output", tmp_path / "nowhere" / "m.gguf"
    else:
        arguments[wrong] = tmp_path / "nowhere"
    call = [str(arguments["checkpoint"]), str(arguments["output"]), "--converter", str(arguments["converter"])]
    assert to_gguf.main(call) == 2
    error = capsys.readouterr().err
    assert f"{wrong}:" in error
    assert str(arguments[wrong]) in error


# ---- the adapter as a LoRA ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA folder, and a GGUF file with tensors of the shapes that its base has."""
    folder = tmp_path_factory.mktemp("lora")
    grow_base(build(LLAMA), folder / "base", 4, tokenizer_of(LLAMA), untie=True)
    base = type(build(LLAMA)).from_pretrained(folder / "base")
    model = get_peft_model(base, config(LLAMA))
    randomize(model)
    save_as_lora(model, folder / "lora", tokenizer=AutoTokenizer.from_pretrained(folder / "base"))
    write_base(folder / "base.gguf", {"token_embd.weight": (101, 32), "output.weight": (101, 32)})
    return folder


def write_base(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    writer = GGUFWriter(path, "llama")
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_a_lora_as_llama_cpp_reads_it(tmp_path, lora, capsys, outtype):
    """`ggml_get_rows` of the first by ids, times the second, times alpha / rank."""
    call = [str(lora / "lora"), str(tmp_path / "lora.gguf"), "--base", str(lora / "base.gguf"), "--outtype", outtype]
    assert to_gguf.main(call) == 0
    reader = GGUFReader(tmp_path / "lora.gguf")
    fields = {
        key: reader.get_field(key).contents() for key in ("general.type", "general.architecture", "adapter.type")
    }
    assert fields == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert reader.get_field("adapter.lora.alpha").contents() == 28
    found = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    want = load_file(lora / "lora" / "adapter_model.safetensors")
    (a, b) = (want[f"base_model.model.model.embed_tokens.lora_embedding_{end}"] for end in "AB")
    rough = {"f32": 0, "f16": 1e-3, "bf16": 1e-2}[outtype]
    ids = [5, 97, 100]
    got = found["token_embd.weight.lora_a"][ids] @ found["token_embd.weight.lora_b"].T
    np.testing.assert_allclose(got, a[:, ids].T @ b.T, atol=1e-6 + 10 * rough, rtol=0)
    assert found["token_embd.weight.lora_a"].shape == (101, 28)
    said = capsys.readouterr().out
    assert "<|virtual_0|><|virtual_1|><|virtual_2|><|virtual_3|><s>" in said
    assert '{"97": -100, "98": -100, "99": -100, "100": -100}' in said


def test_bases_that_a_lora_does_not_fit(tmp_path, lora, capsys):
    write_base(tmp_path / "tied.gguf", {"token_embd.weight": (101, 32)})
    write_base(tmp_path / "small.gguf", {"token_embd.weight": (97, 32), "output.weight": (97, 32)})
    for name, message in (
        ("tied", "grow-base --untie"),
        ("small", "a table of (97, 32)"),
        ("none", "there is no file"),
    ):
        call = [str(lora / "lora"), str(tmp_path / "lora.gguf"), "--base", str(tmp_path / f"{name}.gguf")]
        assert to_gguf.main(call) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    save_file({"q_proj.lora_A.weight": np.zeros((2, 2))}, tmp_path / "other" / "adapter_model.safetensors")
    call = [str(tmp_path / "other"), str(tmp_path / "lora.gguf"), "--base", str(lora / "base.gguf")]
    assert to_gguf.main(call) == 2
    assert "is no LoRA on the word embedding alone" in capsys.readouterr().err
    assert not (tmp_path / "lora.gguf").exists()
