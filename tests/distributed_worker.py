"""One process of a distributed run, started by `tests/test_distributed.py`: some training steps on fixed rows.

    torchrun --nproc-per-node 2 tests/distributed_worker.py fsdp2 FOLDER --steps 4

Writes FOLDER/losses.json, and the adapter with `save_pretrained` to FOLDER/adapter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adapters import adapted, add
from families import FAMILIES, ids
from peft_input_tuning import create_input_tuning_optimizer

ROWS, LENGTH = 8, 6
LR = 1e-2
ZERO = {
    "train_micro_batch_size_per_gpu": ROWS // 2,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
}


def rows_of_step(step: int, rank: int, world: int) -> Tensor:
    return ids(ROWS, LENGTH, seed=100 + step)[rank::world]


def make_model(second: bool) -> nn.Module:
    model, *_ = adapted(FAMILIES["llama"])
    if second:
        add(model, "unused", seed=7)
        model.set_adapter("default")
    return model.train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return create_input_tuning_optimizer(model, torch.optim.AdamW, lr=LR, prompt_lr=LR)


def train(model, optimizer, steps: range, rank: int, world: int, zero: bool = False) -> list[float]:
    losses = []
    for step in steps:
        rows = rows_of_step(step, rank, world)
        loss = model(input_ids=rows, labels=rows).loss
        if zero:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def run_plain(options, rank: int, world: int) -> tuple[list[float], nn.Module, dict | None]:
    model = make_model(options.second)
    return train(model, optimizer_of(model), range(options.steps), rank, world), model, None


def run_ddp(options, rank: int, world: int) -> tuple[list[float], nn.Module, dict | None]:
    model = make_model(options.second)
    optimizer = optimizer_of(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=options.find_unused)
    return train(wrapped, optimizer, range(options.steps), rank, world), model, None


def run_fsdp2(options, rank: int, world: int) -> tuple[list[float], nn.Module, dict | None]:
    model = make_model(options.second)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    if options.embedding:
        fully_shard(model.get_input_embeddings())
    fully_shard(model)
    optimizer = optimizer_of(model)
    start = 0
    trained = StateDictOptions(ignore_frozen_params=True, strict=False)
    checkpoint = Path(options.folder) / "checkpoint"
    if options.resume and options.full:
        state = torch.load(checkpoint, weights_only=True) if rank == 0 else {"model": {}, "optimizer": {}, "step": 0}
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, state["model"], options=whole)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=whole)
        start = options.steps // 2
    elif options.resume:
        state = {
            "model": get_model_state_dict(model, options=trained),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=trained),
            "step": 0,
        }
        dcp.load(state, checkpoint_id=checkpoint)
        set_model_state_dict(model, state["model"], options=trained)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=trained)
        start = state["step"]
    losses = train(model, optimizer, range(start, options.steps), rank, world)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if options.checkpoint and options.full:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        moments = get_optimizer_state_dict(model, optimizer, options=whole)
        if rank == 0:
            torch.save({"model": full, "optimizer": moments}, checkpoint)
    elif options.checkpoint:
        state = {
            "model": get_model_state_dict(model, options=trained),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=trained),
            "step": options.steps,
        }
        assert all("input_tuning_" in name for name in state["model"]), "the base model is in the checkpoint"
        dcp.save(state, checkpoint_id=checkpoint)
    return losses, model, full


def run_accelerate(options, rank: int, world: int) -> tuple[list[float], nn.Module, dict | None]:
    parts = 2 if options.accumulate else 1
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=parts,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=options.dispatch),
    )
    model = make_model(options.second)
    rows = [row for step in range(options.steps) for row in rows_of_step(step, 0, 1)]
    # Without shuffling each process gets every second batch, or, where batches are dispatched, half of each.
    wrapped, optimizer, batches = accelerator.prepare(
        model, optimizer_of(model), DataLoader(rows, ROWS // world // parts)
    )
    losses, micro = [], []
    for batch in batches:
        with accelerator.accumulate(wrapped):
            loss = wrapped(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        micro.append(float(accelerator.reduce(loss.detach(), reduction="mean")))
        if accelerator.sync_gradients:
            losses.append(sum(micro) / len(micro))
            micro = []
    return losses, model, None


def run_zero(options, rank: int, world: int) -> tuple[list[float], nn.Module, dict | None]:
    import deepspeed

    model = make_model(options.second)
    settings = {**ZERO, "train_micro_batch_size_per_gpu": ROWS // world}
    settings["zero_optimization"] = {"stage": int(options.mode[-1])}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings)
    losses = train(engine, None, range(options.steps), rank, world, zero=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(trained, enabled=options.mode == "zero3"):
        # Everything that `save_pretrained` writes; the frozen base stays where it is.
        full = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    return losses, model, full


RUN = {
    "plain": run_plain,
    "ddp": run_ddp,
    "accelerate": run_accelerate,
    "fsdp2": run_fsdp2,
    "zero2": run_zero,
    "zero3": run_zero,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=RUN)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--second", action="store_true", help="an adapter that is not active")
    parser.add_argument("--find-unused", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--embedding", action="store_true", help="sharded as a unit of its own")
    parser.add_argument("--full", action="store_true", help="checkpoints hold the whole model, in one file")
    parser.add_argument("--accumulate", action="store_true", help="gradients of two halves of a batch")
    parser.add_argument("--dispatch", action="store_true", help="the first process reads for all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    losses, model, full = RUN[options.mode](options, rank, world)
    if rank == 0:
        (Path(options.folder) / "losses.json").write_text(json.dumps(losses))
        model.save_pretrained(Path(options.folder) / "adapter", state_dict=full, selected_adapters=["default"])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
