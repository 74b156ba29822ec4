"""What saves memory or time in training gives the numbers of plain training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from adapters import adapted, config, randomize
from device import DEVICE
from families import ENCODERS, FAMILIES, build, ids
from oracles import adapter_weights
from tokenizers_of_families import tokenizer_of

LLAMA = FAMILIES["llama"]
GENERATORS = [family for family in FAMILIES.values() if family not in ENCODERS]


class OnDisk(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what the backward pass needs in files. torch's `save_on_cpu` would do nothing on a CPU."""

    def __init__(self, folder) -> None:
        self.count = 0

        def pack(tensor: Tensor):
            if isinstance(tensor, nn.Parameter):
                return tensor
            self.count += 1
            torch.save(tensor, folder / f"{self.count}.pt")
            return folder / f"{self.count}.pt"

        super().__init__(pack, lambda kept: kept if isinstance(kept, Tensor) else torch.load(kept))


def gradients(model: nn.Module, around: Callable[[], AbstractContextManager]) -> dict[str, Tensor]:
    batch = ids(2, 7)
    model.train().zero_grad()
    with around():
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.trains_with("Memory", "activation offloading, to files")
@pytest.mark.parametrize("family", GENERATORS, ids=str)
def test_offloaded_activations_give_the_same_gradients(family, tmp_path):
    model, *_ = adapted(family)
    want = gradients(model, torch.enable_grad)
    on_disk = OnDisk(tmp_path)
    assert len(want) == 3
    got = gradients(model, lambda: on_disk)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert on_disk.count > 10


def trained(folder, **more) -> tuple[list[float], dict[str, Tensor]]:
    model, *_ = adapted(LLAMA)
    rows = [{"input_ids": row, "labels": row} for row in ids(16, 6).cpu()]
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"use_cpu": DEVICE.type == "cpu", "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(model=model, args=TrainingArguments(str(folder), **settings, **more), train_dataset=rows)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], adapter_weights(model)


@pytest.mark.trains_with("Memory", "torch.compile with inductor, in transformers' Trainer")
@pytest.mark.slow
def test_a_compiled_step_trains_the_same(tmp_path):
    want, weights = trained(tmp_path / "eager")
    got, compiled = trained(tmp_path / "compiled", torch_compile=True, torch_compile_backend="inductor")
    assert got == pytest.approx(want, rel=1e-4)
    for name, value in weights.items():
        assert_close(compiled[name], value, atol=1e-3, rtol=1e-3)


@pytest.mark.trains_with(
    "Memory", "torch.compile: forward, backward (compiled autograd) and optimizer of several steps"
)
@pytest.mark.slow
def test_a_step_compiled_as_a_whole_trains_the_same():
    torch.compiler.reset()
    batches = [{"input_ids": rows, "labels": rows} for rows in ids(8, 6).split(2)]

    def losses_and_weights(compiled: bool) -> tuple[list[float], dict[str, Tensor]]:
        model, *_ = adapted(LLAMA)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

        def step(batch) -> Tensor:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        return [float(run(batch)) for batch in batches], adapter_weights(model)

    want, weights = losses_and_weights(compiled=False)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(compiled_autograd=True):
        got, compiled = losses_and_weights(compiled=True)
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] > 0
    assert got == pytest.approx(want, rel=1e-4)
    for key, value in weights.items():
        assert_close(compiled[key], value, atol=1e-3, rtol=1e-3)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.trains_with("Memory", "TRL's activation_offloading")
def test_trl_offloads_activations(tmp_path):
    """It moves them to the CPU on a stream of its own, so that it needs a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    import trl
    from peft import get_peft_model

    losses = []
    for offloading in (False, True):
        model = get_peft_model(build(LLAMA), config(LLAMA))
        randomize(model)
        settings = {"report_to": "none", "save_strategy": "no", "max_steps": 4, "logging_steps": 1, "bf16": False}
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(str(tmp_path / str(offloading)), activation_offloading=offloading, **settings),
            train_dataset=Dataset.from_list([{"input_ids": row.tolist()} for row in ids(16, 7)]),
            processing_class=tokenizer_of(LLAMA),
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
