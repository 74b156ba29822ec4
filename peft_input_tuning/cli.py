"""The command line: `peft-input-tuning export ADAPTER OUTPUT`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 unusable arguments."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"peft-input-tuning {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-input-tuning", description="Tools around input-tuning adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export",
        help="write an adapter and its base model as one plain checkpoint",
        description="Writes an adapter and its base model as one plain checkpoint, which loads with transformers "
        "alone and costs nothing extra at inference.",
    )
    export.add_argument("adapter", help="folder or hub id of the adapter")
    export.add_argument("output", help="folder to write; must not exist, or be empty")
    export.add_argument("--base", help="folder or hub id of the base model (default: the one the adapter names)")
    export.add_argument("--gguf-file", help="the base model's file, where it is a GGUF file in its folder")
    export.add_argument("--dtype", choices=DTYPES, help="of the checkpoint (default: the base model's)")
    export.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    export.set_defaults(run=_export)
    return parser


def _export(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm.auto import tqdm

    from .export import export_model

    model, tokenizer = _load(arguments)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    with tqdm(desc="Folding the table", unit=" rows") as bar:

        def progress(done: int, rows: int) -> None:
            bar.total = rows
            bar.update(done - bar.n)

        report = export_model(model, arguments.output, tokenizer=tokenizer, dtype=dtype, progress=progress)
    ids = report.virtual_token_ids
    print(f"Wrote {report.output_dir} with {len(ids)} virtual tokens" + (f" ({ids[0]} to {ids[-1]})." if ids else "."))
    print(
        f"Loaded it again: outputs differ from the adapter's by at most {report.largest_difference:.2g} "
        f"(largest output {report.largest_output:.3g})."
    )
    return 0


def _load(arguments: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    import transformers
    from peft import PeftConfig, PeftModel

    from .config import InputTuningConfig

    config = PeftConfig.from_pretrained(arguments.adapter)
    if not isinstance(config, InputTuningConfig):
        raise ValueError(
            f"{arguments.adapter} is an adapter of another method ({config.peft_type}), not INPUT_TUNING."
        )
    base_name = arguments.base or config.base_model_name_or_path
    if not base_name:
        raise ValueError(f"{arguments.adapter} does not name its base model. Pass it with --base.")
    task = getattr(config.task_type, "value", config.task_type)
    auto_mapping: dict[str, Any] = config.auto_mapping or {}
    name = _AUTO_CLASSES.get(task or "") or auto_mapping.get("base_model_class") or "AutoModel"
    more = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    base = getattr(transformers, name).from_pretrained(base_name, dtype="auto", **more)
    model = PeftModel.from_pretrained(base, arguments.adapter)
    if arguments.no_tokenizer:
        return model, None
    has_own = (Path(arguments.adapter) / "tokenizer_config.json").is_file()
    source, more = (arguments.adapter, {}) if has_own else (base_name, more)
    return model, transformers.AutoTokenizer.from_pretrained(source, **more)


if __name__ == "__main__":
    sys.exit(main())
