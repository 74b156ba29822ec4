"""How familiar the inputs of each task are to the frozen model: bits and tokens per byte, beside plain prose.

python examples/benchmark/familiarity_of_tasks.py DATA     DATA: a folder with a folder for each task, test.jsonl in it

Writes examples/benchmark/results/familiarity.json. The corpus' measure, bigram scores, needs text like the model's
pretraining corpus: pass one with --corpus. Without it that figure is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from input_tuning_examples.packaged_model import PACKAGED, find_model
from input_tuning_examples.task_data import InputError, limit, read_json_lines
from peft_input_tuning.command_line.gguf import dense_weights
from peft_input_tuning.familiarity import BigramCounts, familiarity
from records import RESULTS

SEED = 0
FIGURES = ("texts", "tokens_per_byte", "bits_per_byte", "bits_per_token", "bigram_score", "unseen_bigrams")
QUARTILES = (0.25, 0.5, 0.75)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        files = sorted(arguments.data.glob("*/test.jsonl"))
        if not files:
            raise InputError(f"DATA: there is no */test.jsonl in {str(arguments.data)!r}. Name the tasks' folder.")
        tasks = {f.parent.name: limit(read_json_lines(str(f), "DATA"), arguments.limit, SEED) for f in files}
        name, gguf = find_model(arguments.model)
    except InputError as error:
        print(f"familiarity_of_tasks.py: {error}", file=sys.stderr)
        return 2
    more = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(name, **more)
    counts = None
    if arguments.corpus:
        with arguments.corpus.open(encoding="utf-8") as lines:
            counts = BigramCounts(tokenizer).add(tqdm(lines, desc="corpus", unit=" lines"))
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **dense_weights(gguf)).to(arguments.device)
    results: dict[str, object] = {"model": gguf or name, "limit": arguments.limit, "seed": SEED}
    for task, rows in tasks.items():
        with tqdm(desc=task, total=len(rows), unit=" inputs") as bar:

            def progress(stage: str, done: int, bar: tqdm = bar) -> None:
                bar.update(done - bar.n if stage == "inputs" else 0)

            found = familiarity((row.source for row in rows), model, tokenizer, counts, progress=progress)
        figures = {figure: getattr(found.inputs, figure) for figure in FIGURES}
        spread = found.inputs.bits_spread
        results[task] = {
            **{figure: value for figure, value in figures.items() if value is not None},
            "bits_per_byte_quartiles": [round(spread.quantile(q), 3) for q in QUARTILES] if spread else [],
            "prose_bits_per_byte": found.prose.bits_per_byte,
            "prose_tokens_per_byte": found.prose.tokens_per_byte,
            "least_familiar_tokens": [token.word.text for token in islice(found.least_familiar_tokens, 5)],
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(results), indent=2, ensure_ascii=False)
        arguments.output.write_text(text + "\n", encoding="utf-8")  # after each task: a later failure costs nothing
    print(f"Wrote {arguments.output}")
    return 0


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="How familiar the inputs of each task are to the frozen model.")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with a folder for each task")
    parser.add_argument(
        "--model", default=PACKAGED, help="folder or hub id (default: the packaged SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--limit", type=int, default=300, help="inputs of each task, drawn at random (default: 300)")
    parser.add_argument("--corpus", type=Path, help="text like the model's pretraining corpus, one text a line")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--output", type=Path, default=RESULTS / "familiarity.json", help="file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
