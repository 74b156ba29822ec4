"""Two learning rates: one for the prompt, one for the rest, in any optimizer, schedule and trainer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters import adapted, add, config, randomize
from device import DEVICE
from families import FAMILIES, build, ids
from oracles import adapter_weights
from peft_input_tuning import InputTuningConfig, create_input_tuning_optimizer, input_tuning_parameter_groups

LLAMA = FAMILIES["llama"]
SCALE = InputTuningConfig().prompt_scale


def names_of(model, group) -> set[str]:
    wanted = {id(parameter) for parameter in group["params"]}
    return {name.rpartition("input_tuning_")[2] for name, p in model.named_parameters() if id(p) in wanted}


def by_name(groups) -> dict:
    return {group["name"]: group for group in groups}


# ---- groups -------------------------------------------------------------------------------------------------------


def test_prompt_and_adapter_are_apart():
    model, _, _ = adapted(LLAMA, adapter_bias=True)
    groups = by_name(create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3, prompt_lr=3e-2).param_groups)
    assert set(groups) == {"adapter", "prompt"}
    assert names_of(model, groups["prompt"]) == {"prompt.default.weight"}
    assert names_of(model, groups["adapter"]) == {
        f"{name}.default.{leaf}" for name in ("fc1", "fc2") for leaf in ("weight", "bias")
    }
    assert (groups["adapter"]["lr"], groups["prompt"]["lr"] * SCALE) == (1e-3, 3e-2)


def test_the_prompt_learns_ten_times_as_fast_unless_told_otherwise():
    groups = by_name(input_tuning_parameter_groups(adapted(LLAMA)[0], lr=2e-3))
    assert groups["prompt"]["lr"] * SCALE == pytest.approx(2e-2)


def test_prompts_of_different_scales_are_in_groups_of_their_own():
    model, _, _ = adapted(LLAMA, prompt_scale=1.0)
    for name, scale in (("four", 4.0), ("one", 1.0)):
        add(model, name, seed=5, prompt_scale=scale)
    for parameter in model.base_model.layer.input_tuning_prompt.parameters():
        parameter.requires_grad_(True)
    _, one, four = input_tuning_parameter_groups(model, lr=1e-3, prompt_lr=2e-2)
    assert [(group["name"], group["lr"]) for group in (one, four)] == [("prompt", 2e-2), ("prompt", 5e-3)]
    assert names_of(model, one) == {"prompt.default.weight", "prompt.one.weight"}
    assert names_of(model, four) == {"prompt.four.weight"}


def test_prompts_are_not_decayed():
    groups = by_name(input_tuning_parameter_groups(adapted(LLAMA)[0], lr=1e-3, weight_decay=0.1))
    assert (groups["adapter"]["weight_decay"], groups["prompt"]["weight_decay"]) == (0.1, 0.0)


def test_every_trainable_parameter_is_in_one_group_and_no_other_is():
    model, _, _ = adapted(LLAMA, "seq_cls", task_type="SEQ_CLS", modules_to_save=["norm"])
    add(model, "second", seed=5)
    groups = by_name(input_tuning_parameter_groups(model, lr=1e-3))
    listed = [id(parameter) for group in groups.values() for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(listed) == sorted(trainable)
    assert len(set(listed)) == len(listed)
    assert names_of(model, groups["prompt"]) == {"prompt.default.weight"}
    assert {"base_model.model.score.modules_to_save.default.weight"} <= names_of(model, groups["adapter"])


@pytest.mark.parametrize(
    ("changes", "only"),
    [({"adapter_hidden_dim": 0}, "prompt"), ({"num_virtual_tokens": 0}, "adapter")],
    ids=["prompt only", "adapter only"],
)
def test_a_group_without_parameters_is_left_out(changes, only):
    """Some schedulers and trainers stumble over an empty group."""
    model, _, _ = adapted(LLAMA, **changes)
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3)
    assert [group["name"] for group in optimizer.param_groups] == [only]


def test_adapters_that_transformers_manages():
    model = build(LLAMA)
    model.add_adapter(config(LLAMA))
    model.requires_grad_(False)
    model.set_adapter("default")
    groups = by_name(input_tuning_parameter_groups(model, lr=1e-3))
    assert names_of(model, groups["prompt"]) == {"prompt.default.weight"}
    assert len(groups["adapter"]["params"]) == 2


def test_lora_beside_input_tuning_learns_at_the_adapter_rate():
    model = build(LLAMA).requires_grad_(False)
    model.add_adapter(config(LLAMA), "prompt")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    model.set_adapter(["prompt", "lora"])
    groups = by_name(input_tuning_parameter_groups(model, lr=1e-3))
    assert {name for name in names_of(model, groups["adapter"]) if "lora" in name}
    assert names_of(model, groups["prompt"]) == {"prompt.prompt.weight"}


# ---- steps --------------------------------------------------------------------------------------------------------


def test_a_step_of_sgd_is_the_rate_times_the_gradient():
    """By hand: p ← p - lr · g, each group with its own rate."""
    model, _, _ = adapted(LLAMA, prompt_scale=1.0)
    optimizer = create_input_tuning_optimizer(model, torch.optim.SGD, lr=1e-3, prompt_lr=5e-2)
    model(input_ids=ids(2, 6), labels=ids(2, 6)).loss.backward()
    before = {name: tensor.clone() for name, tensor in adapter_weights(model).items()}
    gradients = {n.rpartition("input_tuning_")[2]: p.grad for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, tensor in adapter_weights(model).items():
        kind, leaf = name.split(".")
        rate = 5e-2 if kind == "prompt" else 1e-3
        assert torch.allclose(tensor, before[name] - rate * gradients[f"{kind}.default.{leaf}"])


def trained(scale: float, make_optimizer, steps: int = 6) -> tuple[dict, list[float]]:
    """The weights after some steps, the prompt as the model sees it, and the losses."""
    torch.manual_seed(0)
    model = get_peft_model(build(LLAMA), config(LLAMA, prompt_scale=scale))
    randomize(model)
    optimizer, losses = make_optimizer(model), []
    for step in range(steps):
        loss = model(input_ids=ids(2, 6, seed=step), labels=ids(2, 6, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return adapter_weights(model), losses


def two_rates(model):
    return create_input_tuning_optimizer(model, torch.optim.AdamW, lr=3e-3, prompt_lr=3e-2)


@pytest.mark.parametrize("scale", [8.0, 3.0])
def test_two_rates_train_the_same_at_every_scale(scale):
    """`prompt_lr` is the rate of the prompt that the model sees; what differs is rounding, and Adam's epsilon."""
    (want, losses), (got, others) = trained(1.0, two_rates), trained(scale, two_rates)
    assert others == pytest.approx(losses, rel=1e-5)
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, atol=1e-4), name


def test_one_rate_moves_the_prompt_as_many_times_as_fast_as_the_scale_says():
    """What a Trainer does that knows nothing of two rates."""

    def one_rate(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)

    def scale_as_ratio(model):
        groups = input_tuning_parameter_groups(model, lr=3e-3, prompt_lr=8 * 3e-3)
        return torch.optim.AdamW(groups, lr=3e-3)

    (want, losses), (got, others) = trained(1.0, scale_as_ratio), trained(8.0, one_rate)
    assert others == pytest.approx(losses, rel=1e-5)
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, atol=1e-4), name
    assert (trained(1.0, one_rate)[0]["prompt.weight"] - want["prompt.weight"]).abs().max() > 1e-2


def test_a_step_of_sgd_moves_the_prompt_by_the_scale_too():
    """As the documentation says: the parameter's gradient is larger by the scale, so that p ← p - scale · lr · g."""
    steps = []
    for scale in (1.0, 4.0):
        before, _ = trained(scale, two_rates, steps=0)
        after, _ = trained(
            scale,
            lambda model: create_input_tuning_optimizer(model, torch.optim.SGD, lr=1e-3, prompt_lr=1e-2),
            steps=1,
        )
        steps.append(after["prompt.weight"] - before["prompt.weight"])
    assert torch.allclose(steps[1], 4 * steps[0], atol=1e-6)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_any_optimizer_learns(cls):
    model = get_peft_model(build(LLAMA), config(LLAMA, init_weights=True))
    optimizer = create_input_tuning_optimizer(model, cls, lr=1e-3, prompt_lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids(2, 6), labels=ids(2, 6)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_further_arguments_reach_the_optimizer():
    optimizer = create_input_tuning_optimizer(
        adapted(LLAMA)[0], torch.optim.AdamW, lr=1e-3, betas=(0.5, 0.6), eps=1e-5
    )
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.6)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}


def test_a_scheduler_keeps_the_ratio_of_the_rates():
    from transformers import get_linear_schedule_with_warmup

    model, _, _ = adapted(LLAMA)
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3, prompt_lr=3e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=6)
    rates = []
    for _ in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [rate[0] / 1e-3 for rate in rates] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert [rate[1] * SCALE / 3e-2 for rate in rates] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])


def test_its_state_is_saved_and_loaded():
    model, _, _ = adapted(LLAMA)
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3)
    model(input_ids=ids(2, 6), labels=ids(2, 6)).loss.backward()
    optimizer.step()
    other = create_input_tuning_optimizer(adapted(LLAMA)[0], torch.optim.AdamW, lr=5e-1)
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [1e-3, 1e-2 / SCALE]


# ---- Trainer ------------------------------------------------------------------------------------------------------


def arguments(directory, **changes):
    from transformers import TrainingArguments

    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": DEVICE.type == "cpu",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(output_dir=str(directory), **{**settings, **changes})


ROWS = [{"input_ids": row, "labels": row} for row in ids(4, 6).cpu()]


def test_trainer_steps_at_both_rates(tmp_path):
    """`optimizers=(optimizer, None)`: the trainer makes the schedule."""
    from transformers import Trainer

    model, _, _ = adapted(LLAMA)
    base = {name: value.clone() for name, value in model.state_dict().items() if "input_tuning" not in name}
    before = {name: value.clone() for name, value in adapter_weights(model).items()}
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3, prompt_lr=1e-1)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.global_step == 2
    moved = {name: float((value - before[name]).abs().max()) for name, value in adapter_weights(model).items()}
    # Adam's first steps have the size of the rate, whatever the gradient.
    assert moved["prompt.weight"] == pytest.approx(2e-1, rel=0.1)
    assert moved["fc1.weight"] == pytest.approx(2e-3, rel=0.1)
    assert moved["fc2.weight"] == pytest.approx(2e-3, rel=0.1)
    assert not [name for name, value in base.items() if not torch.equal(model.state_dict()[name], value)]


def test_trainer_makes_a_schedule_for_both_groups(tmp_path):
    from transformers import Trainer

    model, _, _ = adapted(LLAMA)
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3, prompt_lr=1e-1)
    settings = arguments(tmp_path, lr_scheduler_type="linear")
    trainer = Trainer(model, settings, train_dataset=ROWS, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.lr_scheduler.base_lrs == [1e-3, 1e-1 / SCALE]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_trainer_goes_on_from_a_checkpoint(tmp_path):
    """Adapter, optimizer and schedule come back: two steps and two more are four."""
    from transformers import Trainer

    def train(directory, resume=None, **changes):
        model = get_peft_model(build(LLAMA), config(LLAMA, init_weights=True))
        randomize(model)
        optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3)
        settings = arguments(directory, save_strategy="steps", save_steps=2, **changes)
        trainer = Trainer(model, settings, train_dataset=ROWS, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return adapter_weights(model)

    whole = train(tmp_path / "whole", max_steps=4)
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"), max_steps=4)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"lr": 0.0}, "`lr` must be > 0, got 0.0"),
        ({"lr": -1e-3}, "`lr` must be > 0, got -0.001"),
        ({"lr": float("nan")}, "`lr` must be > 0, got nan"),
        ({"lr": 1e-3, "prompt_lr": -1.0}, "`prompt_lr` must be > 0, got -1.0"),
        ({"lr": 1e-3, "prompt_lr": 0.0}, "`prompt_lr` must be > 0, got 0.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_rate_that_is_not_positive_is_refused(rates, said):
    with pytest.raises(ValueError, match=said):
        create_input_tuning_optimizer(adapted(LLAMA)[0], torch.optim.AdamW, **rates)


def test_a_model_with_nothing_to_train_is_refused():
    model, _, _ = adapted(LLAMA)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters") as error:
        create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3)
    assert "is_trainable=True" in str(error.value)


def test_a_model_without_input_tuning_is_refused():
    """All of the base would be trained, at the adapter's rate."""
    with pytest.raises(ValueError, match=r"`model` has no input-tuning adapter, got LlamaForCausalLM"):
        create_input_tuning_optimizer(build(LLAMA), torch.optim.AdamW, lr=1e-3)


# ---- rates of each adapter ------------------------------------------------------------------------------------------


def with_two(**changes):
    model, _, _ = adapted(LLAMA, **changes)
    add(model, "second", seed=5, prompt_scale=2.0)
    return model


def test_each_adapter_has_its_own_rates():
    """With heads of their own in the adapters' groups, and prompts divided by each one's scale."""
    model, _, _ = adapted(LLAMA, "seq_cls", task_type="SEQ_CLS")
    add(model, "second", seed=5, prompt_scale=2.0)
    model.set_requires_grad(["default", "second"])
    lr, prompt_lr = {"default": 1e-3, "second": 5e-3}, {"default": 2e-2, "second": 6e-2}
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=lr, prompt_lr=prompt_lr, weight_decay=0.1)
    found = {(group["adapter_name"], group["name"]): group for group in optimizer.param_groups}
    assert len(found) == len(optimizer.param_groups) == 4
    for name, scale in (("default", SCALE), ("second", 2.0)):
        adapter, prompt = found[name, "adapter"], found[name, "prompt"]
        assert (adapter["lr"], prompt["lr"] * scale) == (lr[name], pytest.approx(prompt_lr[name]))
        assert (adapter["weight_decay"], prompt["weight_decay"]) == (0.1, 0.0)
        assert names_of(model, prompt) == {f"prompt.{name}.weight"}
        assert names_of(model, adapter) == {
            f"fc1.{name}.weight",
            f"fc2.{name}.weight",
            f"base_model.model.score.modules_to_save.{name}.weight",
        }


@pytest.mark.parametrize("prompt_lr", [None, 4e-2])
def test_one_rate_for_all_prompts(prompt_lr):
    model = with_two()
    model.set_requires_grad(["default", "second"])
    groups = input_tuning_parameter_groups(model, lr={"default": 1e-3, "second": 5e-3}, prompt_lr=prompt_lr)
    rates = [group["lr"] * scale for group, scale in zip(groups[1::2], (SCALE, 2.0), strict=True)]
    assert rates == pytest.approx([1e-2, 5e-2] if prompt_lr is None else [4e-2, 4e-2])


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({"lr": {"default": 1e-3, "second": 1e-3}}, r"'second' is in one of them only.*set_requires_grad"),
        ({"lr": {"other": 1e-3}}, r"`lr` has rates for \['other'\], and the adapters that train are \['default'\]"),
        ({"lr": {}}, "'default' is in one of them only"),
        ({"lr": {"default": 1e-3}, "prompt_lr": {"second": 1.0}}, "`prompt_lr` has rates for"),
        (
            {"lr": 1e-3, "prompt_lr": {"default": 1e-3}},
            "`prompt_lr` has a rate for each adapter, and `lr` one for all",
        ),
        ({"lr": {"default": -1.0}}, "`lr` must be > 0, got -1.0"),
    ],
    ids=str,
)
def test_rates_that_do_not_fit_the_adapters(rates, says):
    with pytest.raises(ValueError, match=says):
        input_tuning_parameter_groups(with_two(), **rates)
