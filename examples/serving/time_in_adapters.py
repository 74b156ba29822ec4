"""What share of vLLM's processor time goes into adapters: input-tuning beside LoRA, 1, 8 and 32 of them in a batch.

    OMP_NUM_THREADS=1 python examples/serving/time_in_adapters.py --base BASE

`measure_vllm.py` compares engines, which asks for a machine that does nothing else. This measures inside of one: the
engine runs in this process, and the processor time of the functions that only adapters need is taken in the thread
that computes, and divided by that of the whole. What else the machine does slows both alike.

Adapters have random weights, which cost what trained ones do. Not counted: what vLLM does for adapters in its
scheduler and its caches, and the virtual tokens, which are as many tokens more in each prompt.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from measure_vllm import COUNTS, WAYS, write_adapters


class Clock:
    """Processor seconds of this thread that are spent in some functions, the outermost of them at a time."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def watch(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self.depth = time.thread_time(), self.depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.thread_time() - start

        setattr(owner, name, timed)


def functions_of_adapters() -> Iterator[tuple[Any, str]]:
    """What runs in a step because adapters are there, of vLLM 0.32 and of this package."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from peft_input_tuning.engines.vllm_embedding import EmbeddingByWord

    yield EmbeddingByWord, "forward"  # with the base's own lookup in it, which a base pays too
    yield LoRAModelRunnerMixin, "set_active_loras"
    for name in ("add_lora_linear", "add_lora_embedding", "add_lora_logits", "add_shrink", "add_expand"):
        yield PunicaWrapperCPU, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or hub id of the base model")
    parser.add_argument("--adapters", type=Path, default=Path("outputs/vllm-adapters"), help="folder for adapters")
    parser.add_argument("--hidden", type=int, help="adapter_hidden_dim; left out: 2e")
    parser.add_argument("--way", choices=list(WAYS), default="input-tuning")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=16, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    write_adapters(arguments.base, arguments.adapters, arguments.hidden)

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    clock = Clock()
    for owner, name in functions_of_adapters():
        clock.watch(owner, name)
    sizes = {"max_model_len": 256, "max_num_seqs": 32, "max_lora_rank": 8, "kv_cache_memory_bytes": 320 << 20}
    loras = {"enable_lora": True, "lora_target_modules": WAYS[arguments.way][0], "max_loras": max(COUNTS)}
    llm = LLM(arguments.base, dtype="float32", enforce_eager=True, **sizes, **loras)
    settings = SamplingParams(temperature=0, max_tokens=arguments.new, ignore_eos=True, detokenize=False)
    draw, folder = random.Random(0), str(arguments.adapters / arguments.way)
    shares: dict[int, list[float]] = {count: [] for count in COUNTS}
    for turn in range(arguments.rounds + 1):
        for count in draw.sample(COUNTS, len(COUNTS)):
            prompts = [[draw.randrange(100, 40_000) for _ in range(arguments.prompt)] for _ in range(32)]
            requests = [LoRARequest(f"a{i % count}", i % count + 1, folder) for i in range(32)]
            clock.seconds, start = 0.0, time.thread_time()
            llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], settings, lora_request=requests, use_tqdm=False
            )
            if turn:  # the first round loads adapters
                shares[count].append(clock.seconds / (time.thread_time() - start))
    for count, values in shares.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        print(f"{arguments.way}, {count}: {middle:.2%} of the processor's time ({low:.2%} to {high:.2%})")


if __name__ == "__main__":
    main()
