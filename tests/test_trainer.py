"""transformers' Trainer, with numbers from the formula or from another way to the same end."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, log_softmax
from torch.testing import assert_close
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from adapters import adapted, config, randomize
from device import DEVICE
from families import DECODERS, FAMILIES, SEQ2SEQ, build, ids
from oracles import adapter_weights, greedy, row_output
from peft_input_tuning import create_input_tuning_optimizer, input_tuning_parameter_groups

LLAMA, T5 = FAMILIES["llama"], FAMILIES["t5"]
LENGTH = 6
BF16 = pytest.mark.not_emulated("Trainer asks CUDA whether a GPU has bfloat16")


def rows(count: int, seed: int = 0) -> list[dict]:
    return [{"input_ids": row, "labels": row} for row in ids(count, LENGTH, seed=seed).cpu()]


def arguments(folder: Path, kind: type = TrainingArguments, **more):
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none"}
    settings |= {
        "use_cpu": DEVICE.type == "cpu",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 4,
        "lr_scheduler_type": "linear",
    }
    return kind(output_dir=str(folder), **{**settings, **more})


def trainer_of(model, folder: Path, **more) -> Trainer:
    parts = {"train_dataset": rows(16), "eval_dataset": rows(6, seed=50)}
    for name in [name for name in more if name in {"callbacks", "compute_metrics", "optimizers", "train_dataset"}]:
        parts[name] = more.pop(name)
    if "optimizer_cls_and_kwargs" in more:
        parts["optimizer_cls_and_kwargs"] = more.pop("optimizer_cls_and_kwargs")
    return Trainer(model=model, args=arguments(folder, **more), **parts)


def losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def same_weights(a, b) -> None:
    got, want = adapter_weights(a), adapter_weights(b)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], msg=name)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.trains_with(
    "transformers Trainer", "resume from a checkpoint = uninterrupted run; safetensors, nothing of the base"
)
@pytest.mark.parametrize("two_rates", [False, True])
def test_resuming_equals_an_uninterrupted_run(tmp_path, two_rates):
    def trainer(folder: str, steps: int) -> Trainer:
        model, *_ = adapted(LLAMA)
        more = {}
        if two_rates:
            more["optimizers"] = (create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-2), None)
        # The schedule is that of the whole run, also where the run ends early.
        settings = {"max_steps": steps, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
        return trainer_of(model, tmp_path / folder, **settings, **more)

    whole, first = trainer("whole", 6), trainer("parts", 3)
    whole.train()
    first.train()
    second = trainer("parts", 6)
    second.train(resume_from_checkpoint=True)
    assert losses(second)[-3:] == pytest.approx(losses(whole)[3:], rel=1e-5)
    same_weights(second.model, whole.model)
    files = {path.name for path in (tmp_path / "parts" / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "trainer_state.json"} <= files
    assert "pytorch_model.bin" not in files
    assert "model.safetensors" not in files


@pytest.mark.trains_with("transformers Trainer", "load_best_model_at_end")
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, lowest_loss_at):
    model, *_ = adapted(LLAMA)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    lowest_loss_at(Trainer, 3)
    trainer = trainer_of(model, tmp_path, load_best_model_at_end=True, **settings)
    trainer.train()
    evaluations = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert [*evaluations] == [1, 2, 3, 4, 5, 6]
    assert min(evaluations, key=evaluations.get) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[3], rel=1e-5)
    best, last = (PeftModel.from_pretrained(build(LLAMA), tmp_path / f"checkpoint-{step}") for step in (3, 6))
    same_weights(trainer.model, best)
    weights, others = adapter_weights(trainer.model), adapter_weights(last)
    assert not any(torch.equal(weights[name], others[name]) for name in weights), "the case shows nothing"


@pytest.mark.trains_with("transformers Trainer", "early stopping")
def test_early_stopping(tmp_path, lowest_loss_at):
    model, *_ = adapted(LLAMA)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    callbacks = [EarlyStoppingCallback(2)]
    lowest_loss_at(Trainer, 3)
    trainer = trainer_of(model, tmp_path, load_best_model_at_end=True, callbacks=callbacks, **settings)
    trainer.train()
    assert trainer.state.global_step == 5  # after two that are no better
    same_weights(trainer.model, PeftModel.from_pretrained(build(LLAMA), tmp_path / "checkpoint-3"))


@pytest.mark.trains_with("transformers Trainer", "the model card is ready to push")
def test_the_card_is_ready_to_push(tmp_path):
    model, *_ = adapted(LLAMA)
    model.config._name_or_path = model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    for said in ("library_name: peft", "base_model: someone/some-model", "import peft_input_tuning", "input-tuning"):
        assert said in card, said


# ---- losses and metrics ---------------------------------------------------------------------------------------------


@pytest.mark.trains_with(
    "transformers Trainer", "compute_metrics on logits that are aligned with the labels, all decoder families"
)
@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_metrics_see_logits_that_are_aligned_with_the_labels(family, tmp_path):
    model, base, weights = adapted(family)
    seen = {}

    def accuracy(prediction) -> dict:
        seen["shape"] = prediction.predictions.shape
        best = prediction.predictions[:, :-1].argmax(-1)
        return {"accuracy": float((best == prediction.label_ids[:, 1:]).mean())}

    data = rows(5, seed=3)
    trainer = trainer_of(model, tmp_path, compute_metrics=accuracy, per_device_eval_batch_size=2)
    got = trainer.evaluate(data)
    logits = torch.stack([row_output(base, weights, row["input_ids"]) for row in data])
    labels = torch.stack([row["labels"] for row in data]).to(DEVICE)
    assert seen["shape"] == logits.shape
    want = (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()
    assert got["eval_accuracy"] == pytest.approx(float(want))
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    # GPT-2 divides by the number of all labels, with or without an adapter: it shifts them later than the others.
    counted = labels.numel() if family.name == "gpt2" else labels[:, 1:].numel()
    assert got["eval_loss"] == pytest.approx(float(loss) / counted, rel=1e-4)


@pytest.mark.trains_with("transformers Trainer", "label smoothing")
def test_label_smoothing(tmp_path):
    model, base, weights = adapted(LLAMA)
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.2)
    data = rows(2)
    batch = {name: torch.stack([row[name] for row in data]).to(DEVICE) for name in data[0]}
    logps = torch.stack([log_softmax(row_output(base, weights, row["input_ids"]), -1) for row in data])[:, :-1]
    right = logps.gather(-1, batch["labels"][:, 1:, None])
    want = -(0.8 * right.mean() + 0.2 * logps.mean())
    assert float(trainer.compute_loss(model, dict(batch))) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.trains_with("transformers Trainer", "gradient accumulation and clipping")
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    ran = []
    for folder, size, parts in (("whole", 4, 1), ("parts", 1, 4)):
        model, *_ = adapted(LLAMA)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_grad_norm": 0.5}
        trainer = trainer_of(model, tmp_path / folder, **settings)
        trainer.train()
        ran.append(trainer)
    assert losses(ran[0]) == pytest.approx(losses(ran[1]), rel=1e-4)
    norms = [[log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log] for trainer in ran]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert max(norms[0]) > 0.5, "nothing was clipped"
    got, want = (adapter_weights(trainer.model) for trainer in ran)
    for name in want:
        assert_close(got[name], want[name], atol=1e-4, rtol=1e-3)


@pytest.mark.trains_with("transformers Trainer", "two learning rates: optimizers=, optimizer_cls_and_kwargs=")
def test_two_learning_rates_through_the_optimizers_class(tmp_path):
    ran = []
    for way in ("class", "object"):
        model, *_ = adapted(LLAMA)
        if way == "class":
            groups = input_tuning_parameter_groups(model, lr=1e-3, prompt_lr=5e-2)
            more = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "lr": 1e-3})}
        else:
            optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3, prompt_lr=5e-2)
            more = {"optimizers": (optimizer, None)}
        trainer = trainer_of(model, tmp_path / way, **more)
        trainer.train()
        rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
        assert rates == [1e-3, 5e-2 / model.peft_config["default"].prompt_scale]
        ran.append(trainer)
    assert losses(ran[0]) == pytest.approx(losses(ran[1]), rel=1e-5)
    same_weights(ran[0].model, ran[1].model)


@pytest.mark.trains_with("transformers Trainer", "NEFTune")
def test_neftune_adds_its_noise_and_leaves(tmp_path):
    model, *_ = adapted(LLAMA)
    embedding, seen = model.get_input_embeddings(), []

    def without_noise() -> torch.Tensor:
        model.eval()
        clean = embedding(ids(1, LENGTH)).detach()
        model.train()
        return clean

    class Look(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            seen.append(embedding(ids(1, LENGTH)).detach() - without_noise())

    trainer = trainer_of(model, tmp_path, neftune_noise_alpha=5.0, callbacks=[Look()])
    trainer.train()
    bound = 5.0 / math.sqrt(LENGTH * seen[0].shape[-1])
    for noise in seen:
        assert 0.5 * bound < noise.abs().max() <= bound + 1e-6
    model.train()
    assert torch.equal(embedding(ids(1, LENGTH)), without_noise())  # it is gone after training


@pytest.mark.trains_with("transformers Trainer", "auto_find_batch_size")
def test_the_batch_size_is_found(tmp_path):
    """`auto_find_batch_size` starts again with a smaller batch after an out-of-memory error."""
    model, *_ = adapted(LLAMA)
    forward = model.forward

    def forward_of_a_small_device(input_ids, **more):
        if len(input_ids) > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(input_ids=input_ids, **more)

    model.forward = forward_of_a_small_device
    trainer = trainer_of(model, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer.train()
    assert trainer.state.train_batch_size <= 2
    assert trainer.state.global_step == 4


@pytest.mark.trains_with("transformers Trainer", "TensorBoard")
def test_tensorboard_gets_the_losses(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    model, *_ = adapted(LLAMA)
    trainer = trainer_of(model, tmp_path, report_to="tensorboard")
    trainer.train()
    (file,) = (tmp_path / "logs").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(trainer), rel=1e-4)
    text = events.Tensors("peft_config/text_summary") if "peft_config/text_summary" in events.Tags()["tensors"] else []
    assert all("INPUT_TUNING" in str(event) for event in text)


@pytest.mark.trains_with(
    "transformers Trainer", "bf16, gradient_checkpointing, torch_compile (its graph, run eagerly)"
)
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"bf16": True}, marks=BF16, id="{'bf16': True}"),
        {"gradient_checkpointing": True},
        {"torch_compile": True},
    ],
    ids=str,
)
def test_what_saves_memory_or_time_trains_the_same(tmp_path, setting):
    ran = []
    for more in ({}, setting):
        model, *_ = adapted(LLAMA)
        trainer = trainer_of(
            model,
            tmp_path / str(len(ran)),
            **more,
            **({"torch_compile_backend": "eager"} if "torch_compile" in more else {}),
        )
        trainer.train()
        ran.append(losses(trainer))
    assert ran[1] == pytest.approx(ran[0], rel=2e-2 if "bf16" in setting else 1e-4)


# ---- encoder-decoder ------------------------------------------------------------------------------------------------


@pytest.mark.trains_with("transformers Trainer", "Seq2SeqTrainer, predict_with_generate")
@pytest.mark.parametrize("family", SEQ2SEQ, ids=str)
def test_seq2seq_trainer_predicts_with_generate(family, tmp_path):
    model, base, weights = adapted(family)
    data = [{"input_ids": row, "labels": row[:3]} for row in ids(3, LENGTH).cpu()]
    settings = {"predict_with_generate": True, "generation_max_length": 6, "max_steps": 2}
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(tmp_path, Seq2SeqTrainingArguments, **settings),
        train_dataset=data,
        eval_dataset=data,
    )
    predicted = trainer.predict(data).predictions
    for row, got in zip(data, predicted, strict=True):
        assert got[1:6].tolist() == greedy(base, weights, row["input_ids"], 5).tolist()
    trainer.train()
    assert losses(trainer)[-1] > 0


@pytest.mark.trains_with("transformers Trainer", "the base model is left as it was")
def test_a_run_leaves_the_base_model_as_it_was(tmp_path):
    base = build(LLAMA)
    model = get_peft_model(copy.deepcopy(base), config(LLAMA))
    randomize(model)
    trainer_of(model, tmp_path).train()
    trainer_state = {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()}
    for name, value in base.state_dict().items():
        assert torch.equal(trainer_state[name], value), name
