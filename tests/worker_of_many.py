"""One process of a distributed run of `ManyAdapters`, started by `tests/test_distributed.py`.

    torchrun --nproc-per-node 2 tests/worker_of_many.py FOLDER

Writes FOLDER/adapters.pt: the adapters after each case, and their validation losses.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from oracles import adapter_weights
from test_adapters_that_stop import StopAfter
from test_trainer_of_many import SOME, data, optimizer_of, trainer_of
from test_training_many import many

# The adapters of twelve rows: three steps of four, the first two of each step in the first process. In "stopped", "a"
# stops after the first step, and the second process has nothing left to do in the second.
CASES = {"uneven": "abbb" + "bbaa" + "bbbb", "accumulated": "abbbabaabbbb", "checkpointed": "aabb" * 3}
CASES["stopped"] = "abbb" + "bbaa" + "abab"
SETTINGS = {
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
}


def run(case: str, folder: Path) -> dict:
    model, _ = many(adapters=SOME)
    trainer = trainer_of(
        model,
        data(CASES[case]),
        folder,
        callbacks=[StopAfter(1, "a")] if case == "stopped" else [],
        optimizer=optimizer_of(model),
        eval_dataset={name: data(name * 4, seed=60) for name in SOME},
        **{"per_device_train_batch_size": 2, **SETTINGS.get(case, {})},
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    metrics = trainer.evaluate()
    losses = {name: metrics[f"eval_{name}_loss"] for name in SOME}
    return {**{name: adapter_weights(model, name) for name in SOME}, "losses": losses}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {case: run(case, folder) for case in CASES}
    if dist.get_rank() == 0:
        torch.save(found, folder / "adapters.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
