"""What many adapters cost in vLLM: the base model, input-tuning adapters, LoRAs, with 1, 8 and 32 of them in a batch.

    OMP_NUM_THREADS=1 python examples/serving/measure_vllm.py --base BASE --rounds 6

Each way has an engine of its own. A round asks all of them the same, one after another, so that what else the machine
does meets all alike. Adapters have random weights, which cost what trained ones do. An adapter's 20 virtual tokens
make prompts longer; so the base is also asked with prompts that are as much longer, which says what the adapters
themselves cost. Printed: new tokens for each second of processor time (medians of the rounds, with quartiles), and
what that is of a base's in the same round. Wall time is in the file. Needs psutil beside vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COUNTS = (1, 8, 32)
BARE = "base, not compiled"
VIRTUAL = 20
LONGER = f"{{}}, prompts longer by {VIRTUAL}"
# name → layers that vLLM gives adapters to, and the adapter
WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "input-tuning": (["embed_tokens"], {}),
    "LoRA q, v": (["q_proj", "v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
    "LoRA all linear": (LINEAR, {"target_modules": LINEAR}),
}


def write_adapters(base: str, folder: Path, hidden: int | None) -> None:
    """A folder for each way; the base model as a folder, if it is the packaged one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_input_tuning import InputTuningConfig

    for name, (_, settings) in WAYS.items():
        if (folder / name).is_dir():
            continue
        config: Any = InputTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, adapter_hidden_dim=hidden, init_weights=False
        )
        if settings:
            config = LoraConfig(task_type="CAUSAL_LM", r=8, init_lora_weights=False, **settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        model.save_pretrained(folder / name)


class Engine:
    """An engine, and the processes that it runs in."""

    def __init__(self, base: str, targets: list[str] | None, **settings: Any) -> None:
        import psutil
        from vllm import LLM

        before = set(psutil.Process().children(recursive=True))
        if targets:
            settings |= {"enable_lora": True, "lora_target_modules": targets, "max_loras": max(COUNTS)}
        sizes = {"max_model_len": 256, "max_num_seqs": 32, "max_lora_rank": 8, "kv_cache_memory_bytes": 320 << 20}
        self.llm = LLM(base, dtype="float32", **sizes, **settings)
        self.processes = set(psutil.Process().children(recursive=True)) - before

    def processor_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)


def ask(engine: Engine, folder: Path | None, adapters: int, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """Asks all prompts at once; returns new tokens for a second of processor time, and for a second."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = None
    if folder is not None:
        requests = [LoRARequest(f"a{i % adapters}", i % adapters + 1, str(folder)) for i in range(len(prompts))]
    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    processor, wall = engine.processor_seconds(), time.perf_counter()
    engine.llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], settings, lora_request=requests, use_tqdm=False
    )
    processor, wall = engine.processor_seconds() - processor, time.perf_counter() - wall
    return len(prompts) * new / processor, len(prompts) * new / wall


def summary(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def report(measured: dict[str, list[tuple[float, float]]]) -> str:
    """A table: new tokens for a second of processor time, and over those of a base in the same round."""
    bases = [name for name in measured if name.startswith("base")]
    lines = [
        "| | new tokens | " + " | ".join(f"of {name}" for name in bases) + " |",
        "| :-- " + "| --: " * (1 + len(bases)) + "|",
    ]
    for name, values in measured.items():
        tokens = [processor for processor, _ in values]
        shares = [[one / of_base for one, (of_base, _) in zip(tokens, measured[base], strict=True)] for base in bases]
        lines.append(f"| {name} | " + " | ".join(summary(figures) for figures in [tokens, *shares]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or hub id of the base model")
    parser.add_argument("--adapters", type=Path, default=Path("outputs/vllm-adapters"), help="folder for adapters")
    parser.add_argument("--hidden", type=int, help="adapter_hidden_dim; left out: 2e")
    parser.add_argument("--ways", nargs="+", default=["base", BARE, *WAYS], help="what to measure, all by default")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("outputs/vllm.json"))
    arguments = parser.parse_args()
    write_adapters(arguments.base, arguments.adapters, arguments.hidden)
    # vLLM compiles the base model, on a CPU too; with `--enable-lora`, whatever for, it compiles nothing on a CPU.
    engines = {}
    for name in arguments.ways:
        targets = WAYS[name][0] if name in WAYS else None
        engines[name] = Engine(arguments.base, targets, **({"enforce_eager": True} if name == BARE else {}))
    keys = []
    for name in engines:
        keys += [f"{name}, {n}" for n in COUNTS] if name in WAYS else [name, LONGER.format(name)]
    draw = random.Random(0)
    measured: dict[str, list[tuple[float, float]]] = {}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for turn in range(arguments.rounds + 1):
        prompts = [[draw.randrange(100, 40_000) for _ in range(arguments.prompt)] for _ in range(arguments.requests)]
        plans: list[tuple[str, int, int]] = []  # which engine, how many adapters, how much longer prompts
        for name in engines:
            plans += [(name, n, 0) for n in COUNTS] if name in WAYS else [(name, 0, 0), (name, 0, VIRTUAL)]
        draw.shuffle(plans)
        for name, adapters, longer in plans:
            engines[name].llm.reset_prefix_cache()
            folder = arguments.adapters / name if adapters else None
            figures = ask(engines[name], folder, adapters, [[50] * longer + ids for ids in prompts], arguments.new)
            if turn:  # the first round loads adapters
                key = f"{name}, {adapters}" if adapters else LONGER.format(name) if longer else name
                measured.setdefault(key, []).append(figures)
        ordered = dict(sorted(measured.items(), key=lambda item: keys.index(item[0])))
        arguments.output.write_text(json.dumps(ordered), encoding="utf-8")
        if turn > 1:
            print(f"after {turn} rounds\n{report(ordered)}", flush=True)


if __name__ == "__main__":
    main()
