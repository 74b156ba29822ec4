"""TRL's trainers with an `InputTuningConfig`: losses and metrics against values worked out by hand.

The oracle runs the untouched base model on `[prompt ; T(e)]`, one row at a time, and takes logarithms itself.
"""

from __future__ import annotations

import copy
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
)

from adapters import config, randomize
from device import DEVICE
from families import FAMILIES
from oracles import adapter_weights, row_output
from peft_input_tuning import create_input_tuning_optimizer
from peft_input_tuning.training import ManyAdapters
from peft_input_tuning.training.rows import CollateNames

if sys.version_info < (3, 11):
    pytest.skip("TRL 1.15 and newer need Python 3.11", allow_module_level=True)

import trl

LLAMA = FAMILIES["llama"]
CLOSE = {"rel": 1e-3, "abs": 1e-4}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q ' + m['content'] + '\\n' }}{% else %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
TEXTS = ["count(of Movie())", "the lowest price", "sort(rating asc of Book())[1]"]
ready_or_not = pytest.mark.parametrize("ready", [False, True], ids=["peft_config", "PeftModel"])
PAIRS = [
    ("count(of Movie())", "how many movies are there", "find movies"),
    ("max(price of Hotel())", "what is the highest price", "the lowest"),
]


@pytest.fixture
def tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval().to(DEVICE)


def arguments(kind, tmp_path, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {
            "use_cpu": DEVICE.type == "cpu",
            "bf16": False,
            "report_to": "none",
            "learning_rate": 1e-2,
            "max_steps": 2,
        }
        settings |= {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
        settings |= {"gradient_checkpointing": False, "disable_tqdm": True}
        return kind(output_dir=str(tmp_path), **settings | more)


def prepared(trainer):
    """A trainer's model with weights that matter, in eval mode, and the adapter's weights."""
    randomize(trainer.model)
    if any(".ref." in name for name, _ in trainer.model.named_parameters()):
        randomize(trainer.model, "ref")
    trainer.model.eval()
    return adapter_weights(trainer.model)


def batch_of(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def rows_of(batch: dict, prefix: str = "") -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of each sequence of a batch, whether its sequences are padded or packed."""
    ids, labels = batch[f"{prefix}input_ids"], batch[f"{prefix}labels"]
    if "attention_mask" in batch:
        keep = batch["attention_mask"].bool()
        return [(row[k], label[k]) for row, label, k in zip(ids, labels, keep, strict=True)]
    rows = []
    for row, label, positions in zip(ids, labels, batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(row)]
        rows += [(row[a:b], label[a:b]) for a, b in pairwise(starts)]
    return rows


def by_hand(base, weights, rows, input_only: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all labelled tokens, and whether each is the likeliest."""
    logps, best = [], []
    for ids, labels in rows:
        unlabelled = int((labels == -100).sum()) if input_only else None
        logits = row_output(base, weights, ids, input_length=unlabelled)[:-1]
        wanted = labels[1:] != -100
        targets = labels[1:][wanted]
        logps.append(log_softmax(logits, -1)[wanted].gather(1, targets[:, None])[:, 0])
        best.append(logits[wanted].argmax(-1) == targets)
    return torch.cat(logps), torch.cat(best).float()


def trains(trainer, base) -> None:
    """The adapter changes, the base does not."""
    before = adapter_weights(trainer.model)
    trainer.train()
    after = adapter_weights(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    state = {k.replace(".base_layer", ""): v for k, v in trainer.model.get_base_model().state_dict().items()}
    for name, value in base.state_dict().items():
        assert torch.equal(state[name], value), name


# ---- SFT ------------------------------------------------------------------------------------------------------------

SFT_DATA = {
    "text": [{"text": text} for text in TEXTS],
    "completion": [{"prompt": prompt, "completion": good} for prompt, good, _ in PAIRS],
    "chat": [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]}
        for prompt, good, _ in PAIRS
    ],
}
SFT_CASES = {
    "nll": ("text", {}),
    "dft": ("text", {"loss_type": "dft"}),
    "completion only": ("completion", {}),
    "completion only, dft": ("completion", {"loss_type": "dft"}),
    "assistant only": ("chat", {"assistant_only_loss": True}),
    "padding free": ("completion", {"padding_free": True, "max_length": None}),
    "packing": ("text", {"packing": True, "max_length": 40}),
    "packing, dft": ("completion", {"packing": True, "max_length": 60, "loss_type": "dft"}),
    "gradient checkpointing": ("text", {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.trains_with("TRL", f"SFTTrainer: {case}")) for case in SFT_CASES],
)
@ready_or_not
def test_sft(base, tokenizer, tmp_path, case, ready):
    data, more = SFT_CASES[case]
    model = copy.deepcopy(base)
    if ready:
        model = get_peft_model(model, config(LLAMA))
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path, **more),
        train_dataset=Dataset.from_list(SFT_DATA[data]),
        processing_class=tokenizer,
        peft_config=None if ready else config(LLAMA),
    )
    weights = prepared(trainer)
    batch = batch_of(trainer)
    logps, best = by_hand(base, weights, rows_of(batch))
    want = -(logps * logps.exp() if "dft" in case else logps).mean()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert float(loss) == pytest.approx(float(want), **CLOSE)
    metrics = trainer._metrics["eval"] or trainer._metrics["train"]
    assert metrics["mean_token_accuracy"][-1] == pytest.approx(float(best.mean()), **CLOSE)
    trains(trainer, base)


@pytest.mark.trains_with("TRL", "SFTTrainer: adapter_scope input")
@pytest.mark.parametrize("more", [{}, {"loss_type": "dft"}, {"padding_free": True, "max_length": None}], ids=str)
def test_sft_with_an_adapter_for_the_input_only(base, tokenizer, tmp_path, more):
    trainer = trl.SFTTrainer(
        model=copy.deepcopy(base),
        args=arguments(trl.SFTConfig, tmp_path, **more),
        train_dataset=Dataset.from_list(SFT_DATA["completion"]),
        processing_class=tokenizer,
        peft_config=config(LLAMA, adapter_scope="input"),
    )
    weights = prepared(trainer)
    batch = batch_of(trainer)
    logps, _ = by_hand(base, weights, rows_of(batch), input_only=True)
    everywhere, _ = by_hand(base, weights, rows_of(batch))
    assert (logps - everywhere).abs().max() > 1e-2, "the case shows nothing"
    want = -(logps * logps.exp() if "loss_type" in more else logps).mean()
    assert float(trainer.compute_loss(trainer.model, dict(batch))) == pytest.approx(float(want), **CLOSE)
    trains(trainer, base)


@pytest.mark.trains_with("TRL", "SFTTrainer: a learning rate for the prompt, one for the adapter")
def test_sft_with_two_learning_rates(base, tokenizer, tmp_path):
    """Adam's first step moves each weight that has a gradient by the rate."""
    model = get_peft_model(copy.deepcopy(base), config(LLAMA))
    randomize(model)
    before = adapter_weights(model)
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=3e-3, weight_decay=0.0)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(SFT_DATA["text"]),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.train()
    after = adapter_weights(trainer.model)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert moved == {name: pytest.approx(3e-2 if "prompt" in name else 3e-3, rel=1e-2) for name in before}


# ---- many adapters at once ------------------------------------------------------------------------------------------


class SFTTrainerOfMany(ManyAdapters, trl.SFTTrainer):
    pass


def sft_of_many(base, tokenizer, tmp_path, **more):
    model = get_peft_model(copy.deepcopy(base), config(LLAMA), adapter_name="a")
    model.add_adapter("b", config(LLAMA, num_virtual_tokens=7))
    for seed, name in enumerate("ab"):
        randomize(model, name, seed=seed)
    rows = [{"prompt": prompt, "completion": good} for prompt, good, _ in PAIRS]
    return SFTTrainerOfMany(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path, **more),
        train_dataset=Dataset.from_list([{**row, "adapter_name": name} for name in "ab" for row in rows]),
        processing_class=tokenizer,
    )


@pytest.mark.trains_with("TRL", "SFTTrainer: many adapters at once, completion only")
def test_sft_of_many_adapters(base, tokenizer, tmp_path):
    trainer = sft_of_many(base, tokenizer, tmp_path)
    batch = batch_of(trainer)
    names, rows, total = batch["adapter_names"], rows_of(batch), 0
    assert sorted(names) == list("aabb")
    before = {name: adapter_weights(trainer.model, name) for name in "ab"}
    for name in "ab":
        own = [row for row, of in zip(rows, names, strict=True) if of == name]
        assert all((labels == -100).any() for _, labels in own)
        total -= float(by_hand(base, before[name], own)[0].mean())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total, **CLOSE)
    for name in "ab":
        assert all(not torch.equal(v, before[name][k]) for k, v in adapter_weights(trainer.model, name).items())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"loss_type": "dft"}, "`loss_type` is 'dft', which ManyAdapters cannot use"),
        ({"padding_free": True, "max_length": None}, r"made \[1\] rows of 4: .*padding_free=False"),
        ({"packing": True, "max_length": 40}, "has no `adapter_name`.*packing=False"),
    ],
    ids=str,
)
def test_sft_that_would_mix_adapters(base, tokenizer, tmp_path, more, says):
    with pytest.raises(ValueError, match=says):
        sft_of_many(base, tokenizer, tmp_path, **more).train()


def test_names_beside_the_usual_collator(tokenizer):
    """By itself, DataCollatorForSeq2Seq would make tensors of the names."""
    rows = [{"input_ids": [5] * n, "labels": [5] * n, "adapter_name": name} for n, name in ((3, "a"), (8, "b"))]
    batch = CollateNames(DataCollatorForSeq2Seq(tokenizer), ["a", "b"])(rows)
    assert batch["adapter_names"] == ["a", "b"]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)


# ---- preferences ----------------------------------------------------------------------------------------------------

PREFERENCES = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in PAIRS]


def sums(base, weights, ids: Tensor, mask: Tensor, completion: Tensor) -> Tensor:
    """Log-probability of each row's completion."""
    totals = []
    for row, keep, wanted in zip(ids, mask.bool(), completion.bool(), strict=True):
        logits = log_softmax(row_output(base, weights, row[keep])[:-1], -1)
        targets, counted = row[keep][1:], wanted[keep][1:]
        totals.append(logits.gather(1, targets[:, None])[:, 0][counted].sum())
    return torch.stack(totals)


def ready_model(base):
    """A PeftModel with an adapter of its own, and that adapter's weights."""
    model = get_peft_model(copy.deepcopy(base), config(LLAMA))
    randomize(model)
    return model, adapter_weights(model)


def policy_and_reference(trainer, start: dict) -> tuple[dict, dict]:
    """Weights of the policy and of its reference, both of a kind that matters.

    TRL keeps an adapter that it was given (`start`) as a second one, "ref"; a new one it switches off.
    """
    if not start:
        return prepared(trainer), {}
    assert all(torch.equal(value, start[name]) for name, value in adapter_weights(trainer.model, "ref").items())
    for name, parameter in trainer.model.named_parameters():
        if ".default." in name:
            parameter.data.mul_(1.1)
    trainer.model.eval()
    return adapter_weights(trainer.model), start


@pytest.mark.trains_with("TRL", "DPOTrainer; the reference is the adapter switched off, or as it came")
@ready_or_not
def test_dpo(base, tokenizer, tmp_path, ready):
    model, start = ready_model(base) if ready else (copy.deepcopy(base), {})
    trainer = trl.DPOTrainer(
        model=model,
        args=arguments(trl.DPOConfig, tmp_path, beta=0.3),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        peft_config=None if ready else config(LLAMA),
    )
    weights, reference = policy_and_reference(trainer, start)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    args = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    policy, ref = sums(base, weights, *args), sums(base, reference, *args)
    half = len(policy) // 2
    rewards = 0.3 * (policy - ref)
    assert float(loss) == pytest.approx(float(-logsigmoid(rewards[:half] - rewards[half:]).mean()), **CLOSE)
    metrics = trainer._metrics["eval"] or trainer._metrics["train"]
    assert metrics["logps/chosen"][-1] == pytest.approx(float(policy[:half].mean()), **CLOSE)
    assert metrics["logps/rejected"][-1] == pytest.approx(float(policy[half:].mean()), **CLOSE)
    assert metrics["rewards/chosen"][-1] == pytest.approx(float(rewards[:half].mean()), **CLOSE)
    trains(trainer, base)
    if ready:
        assert all(torch.equal(value, start[name]) for name, value in adapter_weights(trainer.model, "ref").items())


@pytest.mark.trains_with("TRL", "KTOTrainer; the reference is the adapter switched off, or as it came")
@ready_or_not
def test_kto(base, tokenizer, tmp_path, ready):
    rows = [
        {"prompt": prompt, "completion": text, "label": text == good}
        for prompt, good, bad in PAIRS
        for text in (good, bad)
    ]
    model, start = ready_model(base) if ready else (copy.deepcopy(base), {})
    trainer = trl.KTOTrainer(
        model=model,
        args=arguments(trl.KTOConfig, tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if ready else config(LLAMA),
    )
    weights, reference = policy_and_reference(trainer, start)
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, dict(batch))
    metrics = trainer._metrics["eval"] or trainer._metrics["train"]
    args = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    policy = sums(base, weights, *args)
    good = torch.as_tensor(batch["label"], dtype=torch.bool)
    assert metrics["logps/chosen"][-1] == pytest.approx(float(policy[good].mean()), **CLOSE)
    assert metrics["logps/rejected"][-1] == pytest.approx(float(policy[~good].mean()), **CLOSE)
    rewards = 0.1 * (policy - sums(base, reference, *args))
    assert metrics["rewards/chosen"][-1] == pytest.approx(float(rewards[good].mean()), **CLOSE)
    trains(trainer, base)


@pytest.mark.trains_with("TRL", "RewardTrainer")
@ready_or_not
def test_reward(tiny_model, tokenizer, tmp_path, ready):
    tokenizer.pad_token = "~"  # of its own: models pool the last token that is no padding
    pad = tokenizer.pad_token_id
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, pad_token_id=pad)
    base = base.eval().to(DEVICE)
    ours = config(task_type="SEQ_CLS")
    model = copy.deepcopy(base)
    trainer = trl.RewardTrainer(
        model=get_peft_model(model, ours) if ready else model,
        args=arguments(trl.RewardConfig, tmp_path),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        peft_config=None if ready else ours,
    )
    weights = prepared(trainer)
    batch = batch_of(trainer)
    scores = torch.stack(
        [
            row_output(base, weights, row[keep])
            for row, keep in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ]
    )[:, 0]
    half = len(scores) // 2
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert float(loss) == pytest.approx(float(-logsigmoid(scores[:half] - scores[half:]).mean()), **CLOSE)
    before = adapter_weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[n], value) for n, value in adapter_weights(trainer.model).items())


# ---- online ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.trains_with("TRL", f"{kind}Trainer, generation by transformers"))
        for kind in ("GRPO", "RLOO")
    ],
)
@ready_or_not
def test_online(base, tokenizer, tmp_path, kind, ready):
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    model = copy.deepcopy(base)
    settings = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "per_device_train_batch_size": 2}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=get_peft_model(model, config(LLAMA)) if ready else model,
        reward_funcs=reward,
        args=arguments(getattr(trl, f"{kind}Config"), tmp_path, **settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, *_ in PAIRS]),
        processing_class=tokenizer,
        peft_config=None if ready else config(LLAMA),
    )
    weights = prepared(trainer)
    # Log-probabilities as the trainer works them out, of a batch that is padded on the left and on the right.
    rows = [tokenizer(text).input_ids for text in TEXTS[:2]]
    longest = max(map(len, rows))
    completion = tokenizer(TEXTS[2]).input_ids[:5]
    ids = torch.tensor([[0] * (longest - len(row)) + row + completion for row in rows], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * (len(row) + 5) for row in rows], device=DEVICE)
    got = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, logits_to_keep=5)[0]
    for i, row in enumerate(rows):
        full = torch.tensor(row + completion, device=DEVICE)
        logps = log_softmax(row_output(base, weights, full)[:-1] / trainer.temperature, -1)
        want = logps.gather(1, full[1:, None])[-5:, 0]
        torch.testing.assert_close(got[i], want, atol=2e-4, rtol=1e-3)
    trains(trainer, base)
    assert len(seen) >= 4


@pytest.mark.trains_with("TRL", "DistillationTrainer")
@ready_or_not
def test_distillation(base, tokenizer, tmp_path, ready):
    """It calls the backbone itself, around PEFT, and so refuses PEFT's own prompt methods."""
    trainer = trl.DistillationTrainer(
        model=get_peft_model(copy.deepcopy(base), config(LLAMA)) if ready else copy.deepcopy(base),
        teacher_model=copy.deepcopy(base),
        args=arguments(
            trl.DistillationConfig,
            tmp_path,
            beta=0.0,
            temperature=1.0,
            max_completion_length=8,
            per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, *_ in PAIRS]),
        processing_class=tokenizer,
        peft_config=None if ready else config(LLAMA),
    )
    weights = prepared(trainer)
    prompt, completion = (tokenizer(text, return_tensors="pt").input_ids.to(DEVICE) for text in PAIRS[0][:2])
    batch = {"prompt_ids": prompt, "completion_ids": completion}
    batch |= {"prompt_mask": torch.ones_like(prompt), "completion_mask": torch.ones_like(completion)}
    row = torch.cat([prompt, completion], dim=1)[0]
    start = prompt.shape[1] - 1
    teacher, student = (log_softmax(row_output(base, w, row)[start:-1], -1) for w in ({}, weights))
    want = (teacher.exp() * (teacher - student)).sum(-1).mean()  # beta = 0 is the Kullback-Leibler divergence
    assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(float(want), **CLOSE)
    trains(trainer, base)
