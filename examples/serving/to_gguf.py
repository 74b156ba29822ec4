"""An exported checkpoint, or an adapter as a LoRA, as a GGUF file, for llama.cpp and what is built on it.

    peft-input-tuning export my-adapter my-checkpoint
    python examples/serving/to_gguf.py my-checkpoint my-model.gguf --converter llama.cpp/convert_hf_to_gguf.py

    peft-input-tuning grow-base my-base my-grown-base --virtual-tokens 20 --untie
    peft-input-tuning to-lora my-adapter my-lora --base my-grown-base
    python examples/serving/to_gguf.py my-grown-base base.gguf --converter llama.cpp/convert_hf_to_gguf.py
    python examples/serving/to_gguf.py my-lora my-lora.gguf --base base.gguf

A LoRA is written here. llama.cpp takes one tensor for the embedding and for an output that is tied to it, and would
apply the LoRA twice: the base must be untied.

Of a checkpoint, llama.cpp's own converter does the work. Two things are in its way, and are taken out of it here:

- It knows a tokenizer by the ids of one test text, which the virtual tokens in front of it change. It gets the folder
  with a tokenizer that puts none there.
- llama.cpp puts a start token before everything, where the checkpoint has it after the virtual tokens. The file says
  that none is to be added; it is part of the text that this script prints.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from input_tuning_examples.extras import needs

VIRTUAL_TOKEN = "<|virtual_0|>"
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        needs("demo", "gguf")
        if (arguments.checkpoint / "adapter_config.json").is_file():
            convert_lora(arguments.checkpoint, arguments.output, arguments.base, arguments.outtype)
        else:
            convert(arguments.checkpoint, arguments.output, arguments.converter, arguments.outtype)
    except (OSError, ValueError) as error:
        print(f"to_gguf.py: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"to_gguf.py: the converter failed with status {error.returncode}; see above.", file=sys.stderr)
        return 1
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    suppressed = GenerationConfig.from_pretrained(arguments.checkpoint).suppress_tokens or []
    print(f"Wrote {arguments.output}")
    print("Put this in front of plain text (chat templates have it):")
    print(f"  {tokenizer.decode(tokenizer('').input_ids)}")
    print("Never to be generated, as logit_bias:")
    print(f"  {json.dumps({str(token): -100 for token in suppressed})}")
    return 0


def convert_lora(lora: Path, output: Path, base: Path | None, outtype: str = "auto") -> None:
    """Writes the GGUF file of a LoRA on the word embedding.

    Args:
        lora: folder that `peft_input_tuning.save_as_lora` wrote.
        output: the file to write; must not exist.
        base: the GGUF file of its base model, whose embedding and output are two tensors.
        outtype: "f32", else 16 bits (float16; "bf16" for bfloat16).

    Raises:
        ValueError: another kind of LoRA, or a base that does not fit.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, Keys
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    if base is None or not base.is_file():
        raise ValueError(f"--base: there is no file {str(base)!r}. Pass the GGUF file of the LoRA's base model.")
    _check_output(output)
    tensors = load_file(lora / "adapter_model.safetensors")
    a, b = (next((t for name, t in tensors.items() if name.endswith(f".lora_embedding_{end}")), None) for end in "AB")
    if a is None or b is None or len(tensors) != 2:
        raise ValueError(f"checkpoint: {str(lora)!r} is no LoRA on the word embedding alone, as to-lora writes it.")
    reader = GGUFReader(base)
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    if "output.weight" not in shapes:
        raise ValueError(
            f"--base: {str(base)!r} has one tensor for embedding and output, and llama.cpp would apply the LoRA to "
            "both. Convert the folder of `peft-input-tuning grow-base --untie`."
        )
    if shapes["token_embd.weight"] != (b.shape[0], a.shape[1]):
        raise ValueError(
            f"--base: {str(base)!r} has a table of {shapes['token_embd.weight'][::-1]}, and the LoRA is for "
            f"{(a.shape[1], b.shape[0])}. Make the LoRA on the base that was converted: to-lora --base."
        )
    kinds = {"f32": GGMLQuantizationType.F32, "bf16": GGMLQuantizationType.BF16}
    kind = kinds.get(outtype, GGMLQuantizationType.F16)
    unfinished = output.with_name(f".{output.name}.unfinished")
    writer = GGUFWriter(unfinished, reader.get_field(Keys.General.ARCHITECTURE).contents())
    try:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(b.shape[1]))  # over the rank: no scaling
        for end, tensor in (("a", a.T), ("b", b)):  # llama.cpp looks rows up in the first
            values = quantize(tensor.astype("float32").copy(), kind)
            writer.add_tensor(f"token_embd.weight.lora_{end}", values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


def convert(checkpoint: Path, output: Path, converter: Path | None, outtype: str = "auto") -> None:
    """Writes the GGUF file; `output` is there when it is complete, and not before.

    Args:
        checkpoint: folder that `peft_input_tuning.export_model` or `grow_base` wrote, with a tokenizer.
        output: the file to write; must not exist.
        converter: `convert_hf_to_gguf.py` of llama.cpp; its source distributions have it.
        outtype: type of the weights in the file, as the converter names it.

    Raises:
        ValueError: no such checkpoint or converter, or `output` exists.
        subprocess.CalledProcessError: the converter failed.
    """
    if converter is None or not converter.is_file():
        raise ValueError(f"--converter: there is no file {str(converter)!r}. Pass llama.cpp's convert_hf_to_gguf.py.")
    _check_output(output)
    if not (checkpoint / "config.json").is_file() or not (checkpoint / "tokenizer.json").is_file():
        raise ValueError(
            f"checkpoint: {str(checkpoint)!r} has no config.json and tokenizer.json. Pass a folder that "
            "`peft-input-tuning export` or `grow-base` wrote with its tokenizer."
        )
    tokenizer = without_prompt(json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8")))
    unfinished = output.with_name(f".{output.name}.unfinished")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / checkpoint.resolve().name  # the converter takes the model's name from it
        folder.mkdir()
        for file in checkpoint.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        command = [sys.executable, str(converter), str(folder), "--outfile", str(unfinished), "--outtype", outtype]
        print(shlex.join(command), file=sys.stderr)
        try:
            subprocess.run(command, check=True)
            _add_no_start_token(unfinished)
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)


def _check_output(output: Path) -> None:
    if output.exists():
        raise ValueError(f"output: {str(output)!r} exists. Choose a new name.")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"output: the folder of {str(output)!r} does not exist. Make it first.")


def without_prompt(tokenizer: dict) -> dict:
    """The content of a `tokenizer.json`, as it was before the export put virtual tokens in front."""
    processor = tokenizer["post_processor"]
    own = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    if own[-1] and VIRTUAL_TOKEN in own[-1].get("special_tokens", {}):
        own = own[:-1]
    if len(own) > 1:
        return {**tokenizer, "post_processor": {"type": "Sequence", "processors": own}}
    return {**tokenizer, "post_processor": own[0] if own else None}


def _add_no_start_token(file: Path) -> None:
    from gguf import GGUFReader, Keys

    field = GGUFReader(file, "r+").get_field(Keys.Tokenizer.ADD_BOS)
    if field is not None:
        field.parts[field.data[0]][0] = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of `peft-input-tuning export`, `grow-base` or `to-lora`")
    parser.add_argument("output", type=Path, help="the GGUF file to write")
    parser.add_argument("--converter", type=Path, help="of a checkpoint: llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--base", type=Path, help="of a LoRA: the GGUF file of its base model")
    parser.add_argument("--outtype", choices=OUTTYPES, default="auto", help="type of the weights (default: 16 bits)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
