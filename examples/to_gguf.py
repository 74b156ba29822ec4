"""An exported checkpoint as a GGUF file, for llama.cpp and what is built on it.

    peft-input-tuning export my-adapter my-checkpoint
    python examples/to_gguf.py my-checkpoint my-model.gguf --converter llama.cpp/convert_hf_to_gguf.py

llama.cpp's own converter does the work. Two things are in its way, and are taken out of it here:

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

from extras import needs

VIRTUAL_TOKEN = "<|virtual_0|>"
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        needs("demo", "gguf")
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


def convert(checkpoint: Path, output: Path, converter: Path, outtype: str = "auto") -> None:
    """Writes the GGUF file; `output` is there when it is complete, and not before.

    Args:
        checkpoint: folder that `peft_input_tuning.export_model` wrote, with a tokenizer.
        output: the file to write; must not exist.
        converter: `convert_hf_to_gguf.py` of llama.cpp; its source distributions have it.
        outtype: type of the weights in the file, as the converter names it.

    Raises:
        ValueError: no such checkpoint or converter, or `output` exists.
        subprocess.CalledProcessError: the converter failed.
    """
    if not converter.is_file():
        raise ValueError(f"--converter: there is no file {str(converter)!r}. Pass llama.cpp's convert_hf_to_gguf.py.")
    if output.exists():
        raise ValueError(f"output: {str(output)!r} exists. Choose a new name.")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"output: the folder of {str(output)!r} does not exist. Make it first.")
    if not (checkpoint / "config.json").is_file() or not (checkpoint / "tokenizer.json").is_file():
        raise ValueError(
            f"checkpoint: {str(checkpoint)!r} has no config.json and tokenizer.json. Pass a folder that "
            "`peft-input-tuning export` wrote with its tokenizer."
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
    parser.add_argument("checkpoint", type=Path, help="folder that `peft-input-tuning export` wrote")
    parser.add_argument("output", type=Path, help="the GGUF file to write")
    parser.add_argument("--converter", type=Path, required=True, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--outtype", choices=OUTTYPES, default="auto", help="type of the weights (default: 16 bits)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
