"""What is measured. Each function makes the models it needs and gives back one `Measure`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from peft import PeftConfig
from torch import nn

from input_tuning_examples.rounds import Measure
from memory import offloaded_activations, peak_of, resident
from models import Bench, input_tuning, lora, prompt_tuning
from peft_input_tuning import export_model, reuse_prompts

INPUT_TUNING, PROMPT_TUNING, LORA, BASE = "input-tuning", "prompt-tuning", "LoRA", "base model"
LORA_EVERYWHERE = "LoRA, all linear layers"
VIRTUAL_TOKENS = 20
BATCH, LENGTH = 8, 64
NEW_TOKENS = 32
TASKS = 8


def training_step(bench: Bench) -> Measure:
    """One step: forward, backward, AdamW. 8 rows of 64 tokens, 20 virtual tokens."""
    steps = {name: _step(bench, config)[0] for name, config in _methods().items()}
    return Measure("training step", "ms", steps, [(INPUT_TUNING, PROMPT_TUNING, 1.03), (INPUT_TUNING, LORA, None)])


def training_memory(
    bench: Bench, checkpointing: bool = False, bf16: bool = False, offloading: bool = False
) -> Measure:
    """Weights, optimizer state and the highest point of one step.

    Args:
        bench: where and on what.
        checkpointing: activations are computed again in the backward pass (gradient checkpointing).
        bf16: the frozen base in bfloat16, what is trained in float32.
        offloading: activations are put elsewhere until the backward pass (`memory.py`).
    """
    choices = {"gradient checkpointing": checkpointing, "bfloat16 base": bf16, "activation offloading": offloading}
    settings = [name for name, on in choices.items() if on]
    bench = replace(bench, dtype=torch.bfloat16) if bf16 else bench

    def measured(config) -> float:
        step, model, optimizer = _step(bench, config, checkpointing)
        step()  # the optimizer's state is made in the first step
        optimizer.zero_grad()
        with offloaded_activations(model, bench.device) if offloading else nullcontext():
            return float(resident(model, optimizer) + peak_of(step, bench.device))

    variants = {name: partial(measured, config) for name, config in _methods().items()}
    compared: list = [(INPUT_TUNING, PROMPT_TUNING, 1.02), (INPUT_TUNING, LORA, None)]
    name = ", ".join(["training memory", *settings])
    return Measure(name, "MB", variants, compared, rounds_matter=False)


def _methods() -> dict:
    return {
        INPUT_TUNING: input_tuning(VIRTUAL_TOKENS),
        PROMPT_TUNING: prompt_tuning(VIRTUAL_TOKENS),
        LORA: lora(),
    }


def _step(
    bench: Bench, config, checkpointing: bool = False
) -> tuple[Callable[[], None], nn.Module, torch.optim.Optimizer]:
    model = bench.adapted(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ids = bench.ids(BATCH, LENGTH)
    mask = torch.ones_like(ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()

    return step, model, optimizer


def _generate(model: nn.Module, ids: torch.Tensor, new_tokens: int, **more) -> torch.Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        **more,
    )


class _Times(transformers.StoppingCriteria):
    """Notes when each new token came; never stops."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _token_time(bench: Bench, model: nn.Module, ids: torch.Tensor) -> float:
    """Seconds for each token after the first, which pays for the input."""
    times = _Times(bench.synchronize)
    _generate(model, ids, NEW_TOKENS, stopping_criteria=[times])
    return (times.times[-1] - times.times[0]) / (len(times.times) - 1)


def decode(bench: Bench) -> Measure:
    """Time for each token after the first, 8 rows. The base has as many tokens before it as the others."""
    ids, longer = bench.ids(BATCH, 32), bench.ids(BATCH, 32 + VIRTUAL_TOKENS)
    variants = {
        INPUT_TUNING: partial(_token_time, bench, bench.adapted(input_tuning(VIRTUAL_TOKENS)), ids),
        PROMPT_TUNING: partial(_token_time, bench, bench.adapted(prompt_tuning(VIRTUAL_TOKENS)), ids),
        BASE: partial(_token_time, bench, bench.base(), longer),
    }
    return Measure(
        "decoding, a token", "ms", variants, [(INPUT_TUNING, BASE, 1.03), (INPUT_TUNING, PROMPT_TUNING, None)]
    )


def exported(bench: Bench) -> Measure:
    """The exported checkpoint against the base with as many tokens: input of 8 x 52 tokens, 32 new ones."""
    model = bench.adapted(input_tuning(VIRTUAL_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        report = export_model(model, Path(folder) / "exported")
        plain = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "exported", dtype=bench.dtype)
    plain = plain.to(bench.device).eval()
    plain.generation_config.eos_token_id = None
    front = torch.tensor(report.virtual_token_ids, device=bench.device).expand(BATCH, -1)
    ids = torch.cat([front, bench.ids(BATCH, 32)], dim=1)
    base = bench.base()
    variants = {
        "exported": lambda: _discard(_generate(plain, ids, NEW_TOKENS)),
        BASE: lambda: _discard(_generate(base, bench.ids(BATCH, ids.shape[1]), NEW_TOKENS)),
    }
    return Measure("exported, whole generation", "ms", variants, [("exported", BASE, 1.01)])


def first_token(bench: Bench, virtual_tokens: int, target: float) -> Measure:
    """Time to the first token, 8 rows of 32 tokens, inside of `reuse_prompts`."""
    ids = bench.ids(BATCH, 32)
    ours, theirs = bench.adapted(input_tuning(virtual_tokens)), bench.adapted(prompt_tuning(virtual_tokens))
    reusing = reuse_prompts(ours)
    reusing.__enter__()

    def first_of_ours(_: object = reusing) -> None:  # what is not held ends: the measure holds it
        _discard(_generate(ours, ids, 1))

    variants = {
        INPUT_TUNING: first_of_ours,
        PROMPT_TUNING: lambda: _discard(_generate(theirs, ids, 1)),
    }
    name = f"first token, {virtual_tokens} virtual tokens"
    return Measure(name, "ms", variants, [(INPUT_TUNING, PROMPT_TUNING, target)])


def _of_tasks(bench: Bench, config: PeftConfig, tasks: int, rows: int) -> tuple[nn.Module, list[str]]:
    """A model with an adapter for each task, and the adapter of each row, as many rows for each."""
    model = bench.adapted(config)
    names = ["default", *(f"task-{number}" for number in range(1, tasks))]
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval(), [name for name in names for _ in range(rows // tasks)]


def mixed_batch(bench: Bench, tasks: int, batch: int) -> Measure:
    """Adapters of some tasks in one batch, 8 tokens in and 32 out. The base has as many tokens before as
    input-tuning."""
    ids, longer = bench.ids(batch, 8), bench.ids(batch, 8 + VIRTUAL_TOKENS)
    base = bench.base()
    variants: dict = {BASE: lambda: _discard(_generate(base, longer, NEW_TOKENS))}
    methods = {INPUT_TUNING: input_tuning(VIRTUAL_TOKENS), LORA: lora(), LORA_EVERYWHERE: lora(all_linear=True)}
    for name, config in methods.items():
        model, rows = _of_tasks(bench, config, tasks, batch)
        variants[name] = partial(_generate_mixed, model, ids, rows)
    compared: list = [(INPUT_TUNING, BASE, 1.02), (LORA, BASE, None), (LORA_EVERYWHERE, BASE, None)]
    return Measure(f"{tasks} adapters x {batch // tasks} rows, one batch", "ms", variants, compared)


def _generate_mixed(model: nn.Module, ids: torch.Tensor, rows: list[str]) -> None:
    _generate(model, ids, NEW_TOKENS, adapter_names=rows)


def many_tasks(bench: Bench) -> Measure:
    """8 adapters x 2 rows in one batch, against 8 batches with `set_adapter` between them; 32 new tokens."""
    model, rows = _of_tasks(bench, input_tuning(VIRTUAL_TOKENS), TASKS, 2 * TASKS)
    ids = bench.ids(2 * TASKS, 8)

    def eight_batches() -> None:
        for start in range(0, 2 * TASKS, 2):
            model.set_adapter(rows[start])
            _generate(model, ids[start : start + 2], NEW_TOKENS)

    variants = {"one batch": partial(_generate_mixed, model, ids, rows), "eight batches": eight_batches}
    return Measure("8 adapters x 2 rows", "ms", variants, [("one batch", "eight batches", 1 / 3)])


def loading(bench: Bench) -> Measure:
    """Reading an adapter from its folder into a model that has one already."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark-")  # lives as long as the variants, which hold it
    variants = {}
    for name, config in {INPUT_TUNING: input_tuning(VIRTUAL_TOKENS), LORA: lora()}.items():
        model = bench.adapted(config)
        model.save_pretrained(Path(folder.name) / name)
        variants[name] = partial(_load_and_drop, model, folder, name)
    return Measure("loading an adapter", "ms", variants, [(INPUT_TUNING, LORA, None)])


def _load_and_drop(model, folder: tempfile.TemporaryDirectory, name: str) -> float:
    start = time.perf_counter()
    model.load_adapter(Path(folder.name) / name, adapter_name="another")
    taken = time.perf_counter() - start
    model.delete_adapter("another")
    return taken


def switching(bench: Bench) -> Measure:
    """`set_adapter` between two adapters."""
    variants = {}
    for name, config in {INPUT_TUNING: input_tuning(VIRTUAL_TOKENS), LORA: lora()}.items():
        model = bench.adapted(config)
        model.add_adapter("another", config)
        variants[name] = partial(_switch, model)
    return Measure("switching adapters", "ms", variants, [(INPUT_TUNING, LORA, None)])


def _switch(model) -> None:
    model.set_adapter("another")
    model.set_adapter("default")


def _discard(_: object) -> None:
    """Callables that return None are timed with the clock."""


MEASURES: dict[str, Callable[[Bench], Measure]] = {
    "training-step": training_step,
    "training-memory": training_memory,
    "training-memory-checkpointing": partial(training_memory, checkpointing=True),
    "training-memory-bf16": partial(training_memory, bf16=True),
    "training-memory-offloading": partial(training_memory, offloading=True),
    "decode": decode,
    "exported": exported,
    "first-token-100": partial(first_token, virtual_tokens=100, target=0.5),
    "first-token-20": partial(first_token, virtual_tokens=20, target=0.85),
    "mixed-batch": partial(mixed_batch, tasks=TASKS, batch=2 * TASKS),
    "mixed-batch-1": partial(mixed_batch, tasks=1, batch=32),
    "mixed-batch-8": partial(mixed_batch, tasks=8, batch=32),
    "mixed-batch-32": partial(mixed_batch, tasks=32, batch=32),
    "many-tasks": many_tasks,
    "loading": loading,
    "switching": switching,
}
