"""The benchmark's runner: the plan, the order of rows, the loss, every method on a tiny model, and broken-off runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer

import generation
import one_run
import plan
import records
import run_all
import run_training
import tasks
from families import EOS, FAMILIES, PAD, build
from input_tuning_examples import logic_to_text
from methods import METHODS
from oracles import likeliest
from plan import BUDGETS, GRID, Run
from target_loss import use_loss_on_targets
from tokenizers_of_families import tokenizer_of

EXAMPLES = Path(__file__).parent.parent / "examples"
BENCHMARK = EXAMPLES / "benchmark"

TRIAL = BUDGETS["trial"]
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
# The keys that a record is promised to have.
KEYS = {
    "task", "method", "seed", "config", "metrics", "versions", "data_hash", "seconds", "peak_memory_mb",
    "trainable_parameters", "curve", "samples",
}  # fmt: skip
METRICS = {
    "bleu", "chrf", "ter", "nist", "meteor", "rouge_l", "cider", "exact_match", "length_ratio", "validation_loss",
    "prose_loss", "forgetting",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task in plan.TASKS:
        (folder / task).mkdir()
        for split, rows in logic_to_text.make_splits(24, 6, 6, seed=len(task)).items():
            lines = [{"source": row.source, "references": [row.reference]} for row in rows]
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def other_models(tmp_path_factory) -> dict[str, Path]:
    """Tiny models of the kinds of t5-large and gpt2-large."""
    folders = {family: tmp_path_factory.mktemp(family) for family in ("t5", "gpt2")}
    for family, folder in folders.items():
        config = FAMILIES[family].config()
        config.n_positions = 256  # of gpt2, whose positions would not be enough
        FAMILIES[family].heads["lm"](config).save_pretrained(folder)
        tokenizer_of(FAMILIES[family]).save_pretrained(folder)
    return folders


def a_run(method: str, stage: str = "main", rate: float | None = None, steps: int = 4) -> Run:
    return Run(stage, "e2e", method, 0, rate or METHODS[method].start, steps)


def execute(run: Run, data: Path, model: Path, folder: Path) -> records.Record:
    one_run.record_run(run, TRIAL, data, str(model), "bfloat16", folder / "results", folder / "work")
    return records.read_record(folder / "results", run.name)


# ---- the plan -------------------------------------------------------------------------------------------------------


def finish(budget, loss_of) -> list[Run]:
    """All runs of a budget, each one ended as soon as it is known."""
    losses: dict[str, float] = {}
    while True:
        known = list(plan.runs(budget, losses))
        new = [run for run in known if run.name not in losses]
        if not new:
            return known
        losses[new[0].name] = loss_of(new[0])


@pytest.mark.parametrize("best", GRID)
def test_the_search_finds_the_best_rate_of_the_grid(best):
    loss = {rate: abs(math.log(rate / best)) for rate in GRID}
    tried: dict[float, float] = {}
    while set(known := plan.rates_to_try(1e-3, tried)) != set(tried):
        tried |= {rate: loss[rate] for rate in known}
    assert min(tried, key=tried.get) == best
    assert sorted(tried) == [rate for rate in GRID if rate in tried]
    start, place = GRID.index(1e-3), GRID.index(best)
    assert len(tried) == abs(place - start) + 3 - (place in (0, len(GRID) - 1))


def test_a_rate_that_diverged_is_the_worst():
    tried = {3e-4: 2.0, 1e-3: 1.0, 3e-3: math.inf}
    assert plan.rates_to_try(1e-3, tried) == [3e-4, 1e-3, 3e-3]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_has_each_run_once(name):
    budget = BUDGETS[name]
    known = finish(budget, lambda run: abs(math.log(run.rate / METHODS[run.method].start)))
    assert len({run.name for run in known}) == len(known)
    main = Counter((r.task, r.method, r.seed, r.rows) for r in known if r.stage != "rates")
    assert set(main) == {
        (task, method, seed, rows)
        for tier in budget.tiers
        for method in tier.methods
        for task in tier.tasks
        for seed in tier.seeds or budget.seeds
        for rows in tier.rows or [None]
    }
    assert all(run.steps == budget.steps for run in known if run.stage == "main")
    assert set(main.values()) == {1}
    searched = {(run.method, run.task) for run in known if run.stage == "rates"}
    assert searched == {
        (method, task)
        for tier in budget.tiers
        for method in tier.methods
        for task in budget.search_tasks
        if not METHODS[method].rates_of and method not in budget.rates
    }


def test_no_main_run_is_known_before_its_search_has_ended():
    assert {run.stage for run in plan.runs(BUDGETS["small"], {})} == {"rates"}


def test_the_small_budget_has_what_the_comparison_needs():
    known = finish(BUDGETS["small"], lambda run: 1.0)
    everywhere = {"prompt-tuning", "input-tuning", "lora", "fine-tuning"}
    main = {(run.task, run.method) for run in known if run.stage == "main"}
    assert main >= {(task, method) for task in plan.TASKS for method in everywhere}
    beside = {"lora-all-linear", "lora-embedding", "trainable-tokens"}  # of other budgets
    beside |= {"input-tuning-236", "input-tuning-380"}  # of none
    assert main >= {(task, method) for task in plan.SEARCH_TASKS for method in METHODS.keys() - beside}
    others = {(run.task, run.method) for run in known if run.seed != 0}
    firsts = {(task, method) for task in plan.TASKS for method in ("prompt-tuning", "input-tuning")}
    assert others == firsts | {(task, "fine-tuning") for task in plan.SEARCH_TASKS}


def test_runs_on_fewer_and_more_rows():
    """The methods that all tasks have, at the rates of their main runs; all rows are seen, but not without end."""
    known = finish(BUDGETS["small"], lambda run: abs(math.log(run.rate / METHODS[run.method].start)))
    main = {(run.task, run.method): run.rate for run in known if run.stage == "main"}
    varied = [run for run in known if run.stage == "amounts"]
    assert {(run.task, run.method, run.rows, run.steps) for run in varied} == {
        (task, method, *amount)
        for task in ("e2e", "overnight")
        for method in ("prompt-tuning", "input-tuning", "lora", "fine-tuning")
        for amount in ((50, 200), (500, 200), (5000, 625))  # in batches of 8: 32, 3.2 and 1 passes
        if (task, amount[0]) != ("e2e", 5000)  # it has 4,168
    }
    assert all(run.rate == main[run.task, run.method] for run in varied)
    assert [BUDGETS["full"].steps_on(rows) for rows in (1, 50, 500, 5000)] == [1, 50, 500, 3000]
    assert [BUDGETS["small"].steps_on(rows) for rows in (1, 9, 1601, 5001)] == [4, 36, 201, 626]
    assert max(tier.rows for tier in BUDGETS["full"].tiers) == (50, 500)  # main runs have some 5,000 there


def test_rates_are_carried_over_from_the_search_tasks():
    """A search task takes its own best rate, the others the best on average; ablations those of input-tuning."""
    loss = {  # of the searches that start at 1e-3
        ("e2e", 3e-4): 3.0, ("e2e", 1e-3): 1.0, ("e2e", 3e-3): 2.0,
        ("overnight", 3e-4): 9.0, ("overnight", 1e-3): 5.0, ("overnight", 3e-3): 2.0, ("overnight", 1e-2): 7.0,
    }  # fmt: skip
    known = finish(BUDGETS["small"], lambda run: loss.get((run.task, run.rate), 1.0))
    rates = {(run.task, run.method): run.rate for run in known if run.stage == "main"}
    assert rates["e2e", "input-tuning"] == rates["e2e", "input-tuning-gelu"] == 1e-3
    assert rates["overnight", "input-tuning"] == rates["overnight", "input-tuning-gelu"] == 3e-3
    assert rates["dart", "input-tuning"] == 3e-3  # 2 + 2 is less than 1 + 5


def test_a_run_of_the_plan_is_the_one_that_its_process_makes(data, tmp_path, monkeypatch):
    """All that a run is goes through the command line of its process."""
    started: list[list[str]] = []
    monkeypatch.setattr(run_all.subprocess, "Popen", lambda command, **_: started.append(command[2:]))
    options = run_all.parse_arguments([str(data), "--budget", "trial", "--work", str(tmp_path), "--workers", "1"])
    options.accelerators = 0
    known = finish(TRIAL, lambda run: abs(math.log(run.rate / METHODS[run.method].start)))
    assert {run.stage for run in known} == {"rates", "main", "amounts"}
    for run in known:
        run_all.start(run, options, 0).output.close()
    assert [one_run.asked_run(one_run.parse_arguments(command), TRIAL) for command in started] == known


def test_budgets_and_models_have_checkpoints_of_their_own(tiny_model):
    run = a_run("lora")
    places = set()
    for more in ([], ["--budget", "full"], ["--model", str(tiny_model)]):
        options = run_all.parse_arguments(["DATA", *more])
        places.add(one_run.checkpoints_of(run, one_run.results_folder(options), options.work))
    assert len(places) == 3


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_every_epoch_has_each_row_once():
    order = tasks.in_order_of_steps([5] * 48, steps=24, batch_size=4, seed=3)
    assert len(order) == 96
    assert sorted(order) == sorted([*range(48)] * 2)
    assert sorted(order[:64]) != sorted(order[32:])


def test_the_seed_alone_fixes_the_order():
    lengths = [row % 17 for row in range(200)]
    first, again, other = (tasks.in_order_of_steps(lengths, 50, 4, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_rows_of_like_length_share_a_batch_and_lengths_do_not_drift():
    lengths = [(row * 37) % 101 for row in range(512)]
    order = tasks.in_order_of_steps(lengths, 64, 8, seed=0)
    longest = [max(lengths[row] for row in order[n : n + 8]) for n in range(0, 512, 8)]
    shuffled = [max(lengths[row] for row in range(n, n + 8)) for n in range(0, 512, 8)]
    assert sum(longest) < 0.75 * sum(shuffled)
    halves = sum(longest[:32]) / sum(longest[32:])
    assert 0.9 < halves < 1.1


@pytest.mark.parametrize(("rows", "batch"), [(50, 8), (50, 32), (500, 8), (500, 32), (8, 2)])
def test_few_rows_are_not_copies_in_a_batch(rows, batch):
    """A pool that spans epochs and is sorted by length would have copies of a row side by side."""
    draw = random.Random(0)
    order = tasks.in_order_of_steps([draw.randint(20, 60) for _ in range(rows)], 200, batch, seed=0)
    different = [len(set(order[n : n + batch])) for n in range(0, len(order), batch)]
    assert sum(different) / len(different) > 0.9 * batch


@pytest.mark.parametrize("copies", [1, 2], ids=["different rows", "equal rows"])
def test_fewer_rows_are_among_more_of_them(copies, tmp_path):
    """Of the file's 4,168 rows a main run has 1,600."""
    lines = [json.dumps({"source": f"row {number // copies}", "references": ["text"]}) for number in range(4168)]
    for split in tasks.SPLITS:
        (tmp_path / "e2e").mkdir(exist_ok=True)
        (tmp_path / "e2e" / f"{split}.jsonl").write_text("\n".join(lines))
    most = {"train": 1600, "validation": 3, "test": 3}

    def drawn(rows: int | None) -> Counter:
        task = tasks.read_task(tmp_path, "e2e", most, rows)
        assert task.rows["test"] == tasks.read_task(tmp_path, "e2e", most).rows["test"]
        return Counter(task.rows["train"])

    amounts = [drawn(rows) for rows in (50, 500, None, 3000, 5000)]
    assert [some.total() for some in amounts] == [50, 500, 1600, 3000, 4168]
    assert all(some < more for some, more in pairwise(amounts))
    assert set(amounts[-1].values()) == {copies}
    assert {int(row.source[4:]) * copies // 1000 for row in amounts[0]} == {0, 1, 2, 3, 4}  # of the whole


def test_a_task_is_the_same_rows_in_every_run_and_knows_its_files(data):
    most = {"train": 10, "validation": 3, "test": None}
    task, again = (tasks.read_task(data, "dart", most) for _ in range(2))
    assert task == again
    assert {split: len(rows) for split, rows in task.rows.items()} == {"train": 10, "validation": 3, "test": 6}
    for split, found in task.data_hash.items():
        assert found == hashlib.sha256((data / "dart" / f"{split}.jsonl").read_bytes()).hexdigest()


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 7], ids=["mean", "over num_items_in_batch"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_on_targets_is_transformers_loss(family, items):
    ids = torch.randint(2, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = labels[1, 7:] = -100
    results = []
    for ours in (False, True):
        model = build(FAMILIES[family], "lm")
        if ours:
            use_loss_on_targets(model)
        more = {} if items is None else {"num_items_in_batch": items}
        loss = model(input_ids=ids, labels=labels, **more).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert_close(results[1], results[0])


# ---- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method(method, data, tiny_model, tmp_path, monkeypatch):
    parameters: dict[str, torch.nn.Parameter] = {}
    train = one_run.train

    def watched(trainer: Trainer, folder: Path):
        parameters.update(trainer.model.named_parameters())
        return train(trainer, folder)

    monkeypatch.setattr(one_run, "train", watched)
    run = a_run(method)
    record = execute(run, data, tiny_model, tmp_path)
    assert record["status"] == "finished", record["errors"]
    assert set(record) >= KEYS
    assert set(record["metrics"]) == METRICS
    assert all(math.isfinite(value) for value in record["metrics"].values())
    assert [step for step, _ in record["curve"]["train"]] == [1, 2, 3, 4]
    assert [step for step, _ in record["curve"]["validation"]] == [1, 2, 3, 4]
    assert record["curve"]["validation"][-1][1] == pytest.approx(record["metrics"]["validation_loss"], abs=1e-5)
    texts = records.read_outputs(tmp_path / "results", run.name)
    assert len(texts) == TRIAL.test_rows == len(record["samples"])
    assert not one_run.checkpoints_of(run, tmp_path / "results", tmp_path / "work").exists()

    trained = [p for p in parameters.values() if p.requires_grad]
    assert record["trainable_parameters"] == sum(p.numel() for p in trained)
    if METHODS[method].config is None:
        return
    assert {p.dtype for p in trained} == {torch.float32}
    pristine = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).state_dict()
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    for name, weight in pristine.items():
        matches = [p for key, p in frozen.items() if key.replace(".base_layer", "").endswith(name)]
        assert any(torch.equal(p.cpu(), weight) for p in matches), name


@pytest.mark.parametrize("method", ["prompt-tuning", "input-tuning", "lora", "fine-tuning"])
def test_a_run_on_fewer_rows_keeps_the_step_of_the_lowest_loss(
    method, data, tiny_model, tmp_path, monkeypatch, lowest_loss_at
):
    """Later steps have higher losses: the weights at the end are those of the best step, bit for bit."""
    measured, seen = [], []
    weights: dict[int, dict[str, torch.Tensor]] = {}
    train, say_step = one_run.train, run_training.SayStep.on_step_end

    def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights[state.global_step] = trained(model)
        return say_step(self, args, state, control, **kwargs)

    def watched(trainer: Trainer, folder: Path):
        seen.append(len({tuple(row["input_ids"]) for row in trainer.train_dataset}))
        curve = train(trainer, folder)
        measured.append(trainer.evaluate()["eval_loss"])
        weights[0] = trained(trainer.model)  # those that generate
        return curve

    lowest_loss_at(run_training.TokenMeanTrainer, 6)
    monkeypatch.setattr(run_training.SayStep, "on_step_end", on_step_end)
    monkeypatch.setattr(one_run, "train", watched)
    run = Run("amounts", "e2e", method, 0, METHODS[method].start, 13, rows=3)
    record = execute(run, data, tiny_model, tmp_path)
    assert record["status"] == "finished", record["errors"]
    assert seen == [3] == [record["config"]["rows"]["train"]] == [record["rows"]]
    steps, losses = zip(*record["curve"]["validation"], strict=True)
    assert steps == (2, 4, 6, 8, 10, 12, 13)
    assert record["step_kept"] == steps[losses.index(min(losses))] == 6
    assert record["metrics"]["validation_loss"] == min(losses) == pytest.approx(measured[0], abs=1e-5)
    same = {
        step: [name for name in weights[0] if torch.equal(weights[0][name], values[name])]
        for step, values in weights.items()
    }
    assert same.pop(0) == same.pop(6) == [*weights[0]]
    assert not any(same.values())
    assert len(records.read_outputs(tmp_path / "results", run.name)) == TRIAL.test_rows


def test_a_best_step_whose_checkpoint_is_gone_is_an_error(data, tiny_model, tmp_path, monkeypatch):
    """Trainer would only log it, and go on with the last step's weights."""
    load = Trainer._load_best_model

    def without_it(self) -> None:
        shutil.rmtree(self.state.best_model_checkpoint)
        load(self)

    monkeypatch.setattr(Trainer, "_load_best_model", without_it)
    run = Run("amounts", "e2e", "lora", 0, 1e-3, 2, rows=3)
    with pytest.raises(RuntimeError, match=r"the checkpoint of the best step is not there\. Remove .*rows3"):
        execute(run, data, tiny_model, tmp_path)
    assert records.read_record(tmp_path / "results", run.name)["status"] == "failed"


def test_sizes_by_hand(data, tiny_model, tmp_path):
    """The prompt and W1, W2 of h = 2e, of 64 and of none, with biases, as the paper counts."""
    e = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().embedding_dim
    sizes = {
        "prompt-tuning": 20 * e,
        "input-tuning": 20 * e + 4 * e * e,
        "input-tuning-64": 20 * e + 128 * e,
        "adapter-only": 4 * e * e,
        "input-tuning-prompt-100": 100 * e + 4 * e * e,
        "input-tuning-bias": 20 * e + 4 * e * e + 3 * e,
    }
    found = {
        method: execute(a_run(method, "rates", steps=1), data, tiny_model, tmp_path)["trainable_parameters"]
        for method in sizes
    }
    assert found == sizes


def test_the_prompt_has_its_own_rate(data, tiny_model, tmp_path):
    rates = {"input-tuning": 10, "input-tuning-ratio-1": 1, "input-tuning-ratio-100": 100}
    for method, ratio in rates.items():
        record = execute(a_run(method, "rates", rate=1e-3, steps=1), data, tiny_model, tmp_path)
        assert record["config"]["learning_rate"] == {"prompt": pytest.approx(1e-3 * ratio), "adapter": 1e-3}


def test_all_methods_see_the_same_rows_in_the_same_order(data, tiny_model, tmp_path, monkeypatch):
    seen: dict[str, list[list[int]]] = {}
    for method in ("prompt-tuning", "input-tuning", "lora", "fine-tuning"):
        seen[method] = []
        step = Trainer.training_step

        def training_step(self, model, inputs, *more, step=step, method=method):
            seen[method] += inputs["labels"].tolist()
            return step(self, model, inputs, *more)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "training_step", training_step)
            execute(a_run(method, "rates"), data, tiny_model, tmp_path)
    assert len(seen["lora"]) == 8
    assert all(rows == seen["lora"] for rows in seen.values())


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize(
    "method", ["prompt-tuning", "p-tuning", "prefix-tuning", "input-tuning", "lora", "fine-tuning"]
)
def test_other_models(method, family, data, other_models, tmp_path):
    record = execute(a_run(method, steps=1), data, other_models[family], tmp_path)
    assert record["status"] == "finished", record["errors"]
    decoder = {"prose_loss", "forgetting"} if family == "gpt2" else set()  # an encoder-decoder reads no prose
    assert set(record["metrics"]) == METRICS - {"prose_loss", "forgetting"} | decoder


# ---- generation -----------------------------------------------------------------------------------------------------


class Tokenizer:
    """Texts are the numbers of the tokens."""

    pad_token_id, eos_token_id = PAD, EOS

    @staticmethod
    def batch_decode(rows, skip_special_tokens):
        return [" ".join(str(token) for token in row.tolist() if token not in (PAD, EOS)) for row in rows]


def prompts_of_many_lengths() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (length,), generator=draw).tolist() for length in (4, 9, 4, 7, 4, 4, 2, 9)]


def one_by_one(model, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens by full forward passes without a cache, as `generation.py` should find them."""
    found = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + generation.MAX_NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != EOS):
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            ids.append(likeliest(logits[0, -1]))
        found.append([token for token in ids[len(prompt) :] if token not in (PAD, EOS)])
    return found


@pytest.mark.parametrize(
    "method", ["prompt-tuning", "p-tuning", "prefix-tuning", "input-tuning", "lora", "fine-tuning"]
)
def test_batches_give_what_each_prompt_gives_alone(method, monkeypatch):
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 6)
    torch.manual_seed(5)  # with 0, two tokens were level
    model = one_run.trainable_model(build(FAMILIES["llama"], "lm"), METHODS[method]).eval()
    for parameter in model.parameters():  # nothing is left as it starts
        if parameter.requires_grad and method != "fine-tuning":
            torch.nn.init.normal_(parameter, std=0.5)
    prompts = prompts_of_many_lengths()
    with torch.no_grad():
        expected = one_by_one(model, prompts)
    assert len({tuple(tokens) for tokens in expected}) > 3
    found = generation.generate(model, Tokenizer, prompts, at_once=3)
    assert found == [" ".join(map(str, tokens)) for tokens in expected]


@pytest.mark.parametrize(
    ("family", "method"),
    [("bart", "input-tuning"), ("bart", "lora"), ("bart", "fine-tuning"), ("t5", "lora"), ("t5", "fine-tuning")],
)
def test_batches_of_encoder_decoder_models_give_what_each_gives_alone(family, method, monkeypatch):
    """BART numbers the places of a row, pads included."""
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 6)
    torch.manual_seed(0)
    model = one_run.trainable_model(build(FAMILIES[family], "lm"), METHODS[method]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and method != "fine-tuning":
            torch.nn.init.normal_(parameter, std=0.05 if method == "input-tuning" else 0.5)

    prompts = prompts_of_many_lengths()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    alone = [model.generate(input_ids=torch.tensor([prompt], device=model.device), **options) for prompt in prompts]
    expected = [Tokenizer.batch_decode(out, skip_special_tokens=True)[0] for out in alone]
    assert len(set(expected)) > 3
    assert generation.generate(model, Tokenizer, prompts) == expected


def test_checkpoints_of_another_run_under_the_same_name_are_not_gone_on_from(tmp_path):
    folder, run = tmp_path / "main" / "e2e.lora.seed0", {"rate": 0.001, "model": "a", "data": {"train": "1"}}

    def left_by(other: dict) -> bool:
        one_run.drop_checkpoints_of_another(folder, other)
        (folder / "checkpoint-4").mkdir()
        one_run.drop_checkpoints_of_another(folder, run)
        return (folder / "checkpoint-4").is_dir()

    assert left_by(run)
    for changed in ({"rate": 0.1}, {"model": "b"}, {"data": {"train": "2"}}):
        shutil.rmtree(folder)
        assert not left_by(run | changed)
    shutil.rmtree(folder)
    (folder / "checkpoint-4").mkdir(parents=True)  # by whom, nothing says
    one_run.drop_checkpoints_of_another(folder, run)
    assert not (folder / "checkpoint-4").is_dir()


def test_padding_is_for_methods_that_are_right_beside_it():
    prompts = [[1] * length for length in (3, 5, 3, 4)]
    assert generation.batches_of(prompts, padded=True, at_once=64) == [[0, 2, 3, 1]]
    assert generation.batches_of(prompts, padded=False, at_once=64) == [[0, 2], [3], [1]]
    padded = {}
    for name, method in METHODS.items():
        if method.config is not None:
            model = one_run.trainable_model(build(FAMILIES["llama"], "lm"), method, words=[3, 4])
            padded[name] = generation.for_padded_batches(model)[1]
    assert {name for name, may in padded.items() if not may} == {"p-tuning", "prefix-tuning"}


# ---- runs that break off --------------------------------------------------------------------------------------------


def test_a_run_that_diverges_is_recorded_as_such(data, tiny_model, tmp_path):
    run = a_run("prompt-tuning", "rates", rate=1e39)
    record = execute(run, data, tiny_model, tmp_path)
    assert record["status"] == "diverged"
    assert "TrainingError" in record["errors"][0]
    assert records.losses({run.name: record}) == {run.name: math.inf}


def test_a_run_that_fails_is_recorded_with_its_error(data, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(one_run, "generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute(a_run("lora"), data, tiny_model, tmp_path)
    record = records.read_record(tmp_path / "results", "main/e2e.lora.seed0")
    assert (record["status"], record["errors"]) == ("failed", ["ZeroDivisionError: division by zero"])


def test_a_run_that_is_terminated_says_that_it_was_interrupted(data, tiny_model, tmp_path, monkeypatch):
    """As `run_all.py` does to its runs when it is stopped."""
    monkeypatch.setattr(one_run, "execute", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    places = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = one_run.main([str(data), "--task", "e2e", "--method", "lora", "--rate", "1e-3", *places])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130
    assert records.read_record(tmp_path / "results", "main/e2e.lora.seed0")["status"] == "interrupted"


@pytest.mark.parametrize(
    ("stage", "method"),
    [("main", "input-tuning"), ("main", "fine-tuning"), ("amounts", "lora"), ("amounts", "fine-tuning")],
)
@pytest.mark.parametrize("where", ["training", "generation"])
def test_an_interrupted_run_goes_on_to_the_same_end(
    where, stage, method, data, tiny_model, tmp_path, monkeypatch, lowest_loss_at
):
    run, undisturbed = a_run(method), tmp_path / "undisturbed"
    if stage == "amounts":
        run = Run(stage, "e2e", method, 0, METHODS[method].start, 4, rows=3)
        lowest_loss_at(run_training.TokenMeanTrainer, 1)
    expected = execute(run, data, tiny_model, undisturbed)
    if stage == "amounts":
        assert expected["step_kept"] == 1  # long before the checkpoint that the run goes on from
    step = run_training.SayStep.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if where == "training" and state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, args, state, control, **kwargs)

    def no_generation(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_training.SayStep, "on_step_end", interrupted)
        if where == "generation":
            patch.setattr(one_run, "generate", no_generation)
        assert execute(run, data, tiny_model, tmp_path)["status"] == "interrupted"
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            run_training.SayStep, "on_step_end", lambda self, args, state, *_, **__: steps.append(state.global_step)
        )
        record = execute(run, data, tiny_model, tmp_path)
    assert steps == ([3, 4] if where == "training" else [])
    assert (record["status"], record["attempts"]) == ("finished", 2)
    assert record["curve"] == expected["curve"]
    assert record["metrics"] == expected["metrics"]
    outputs = [records.read_outputs(folder / "results", run.name) for folder in (tmp_path, undisturbed)]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows must be >= 1, got 0."),
        (["--rows", "-1"], "--rows must be >= 1, got -1."),
        (["--rows", "5", "--stage", "rates"], "--rows: a run of --stage rates takes the budget's. Leave"),
    ],
)
def test_rows_that_cannot_be(options, message, data, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    given = [str(data), "--task", "e2e", "--method", "lora", "--rate", "1e-3", "--results", str(tmp_path / "results")]
    try:
        assert one_run.main([*given, *options]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


# ---- the command ----------------------------------------------------------------------------------------------------


def command(data: Path, model: Path, folder: Path, *more: str) -> list[str]:
    places = ["--results", str(folder / "results"), "--work", str(folder / "work")]
    return [
        sys.executable,
        str(BENCHMARK / "run_all.py"),
        str(data),
        "--budget",
        "trial",
        "--model",
        str(model),
        *places,
        *more,
    ]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_and_skips_what_is_done(data, tiny_model, tmp_path):
    arguments = command(data, tiny_model, tmp_path)
    first = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while {r["status"] for r in records.read_records(tmp_path / "results").values()} < {"finished", "running"}:
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = records.read_records(tmp_path / "results")
    assert "running" in {record["status"] for record in before.values()}
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    after = records.read_records(tmp_path / "results")
    assert {name: after[name] for name, r in before.items() if r["status"] == "finished"} == {
        name: r for name, r in before.items() if r["status"] == "finished"
    }
    assert {record["status"] for record in after.values()} == {"finished"}
    assert {record["attempts"] for record in after.values()} == {1, 2}
    known = {run.name for run in plan.runs(TRIAL, records.losses(after))}
    assert set(after) == known
    assert f"{len(known)} of {len(known)} runs" in done.stderr


def test_a_run_whose_process_is_killed_has_failed_and_the_others_go_on(data, tmp_path, monkeypatch):
    """Processes that write a record and end; that of one run ends without."""
    broken = "rates/e2e.input-tuning.rate0.001"
    script = tmp_path / "process.py"
    script.write_text(
        "import json, os, pathlib, signal, sys\n"
        "def write(record):\n"
        "    scratch = path.with_suffix('.scratch')\n"
        "    scratch.write_text(json.dumps(record))\n"
        "    scratch.replace(path)\n"
        "name, loss = sys.argv[1], float(sys.argv[2])\n"
        f"path = pathlib.Path({str(tmp_path / 'results' / 'runs')!r}, name + '.json')\n"
        "path.parent.mkdir(parents=True, exist_ok=True)\n"
        "record = {'status': 'running', 'errors': [], 'metrics': {'validation_loss': loss}}\n"
        "write(record)\n"
        f"if name == {broken!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write({**record, 'status': 'finished'})\n"
    )

    def start(run, options, device):
        log = options.work / "log"
        log.parent.mkdir(exist_ok=True)
        loss = abs(math.log(run.rate / METHODS[run.method].start))
        process = subprocess.Popen([sys.executable, str(script), run.name, str(loss)])
        return run_all.Active(run, process, log, log.open("wb"), device)

    monkeypatch.setattr(run_all, "start", start)
    monkeypatch.setattr(run_all, "LOOK_EVERY", 0.01)
    options = run_all.parse_arguments([str(data), "--budget", "trial"])
    options.results, options.work, options.workers = tmp_path / "results", tmp_path / "work", 2
    assert run_all.run_all(TRIAL, options) == 1
    found = records.read_records(tmp_path / "results")
    assert found[broken]["status"] == "failed"
    assert found[broken]["errors"] == ["the process ended with code -9"]
    assert {record["status"] for name, record in found.items() if name != broken} == {"finished"}
    assert "main/overnight.prompt-tuning.seed0" in found
    assert not any("main" in name and "input-tuning" in name for name in found)  # its rate is not known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], r"DATA: there is no e2e/train.jsonl in 'nowhere'\. Name the tasks' folder\."),
        (["nowhere", "--tasks", "e3e"], r"--tasks: 'e3e' is not one of e2e, "),
        (["nowhere", "--workers", "0"], r"--workers must be >= 1, got 0\."),
        (["DATA", "--model", "./no-model"], r"--model: there is no folder './no-model'\."),
    ],
)
def test_wrong_arguments_are_answered_before_any_run(arguments, message, data, tmp_path, capsys):
    arguments = [str(data) if argument == "DATA" else argument for argument in arguments]
    assert run_all.main([*arguments, "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "results").exists()


def test_results_of_another_model_are_not_taken_for_this_ones(data, tiny_model, tmp_path, capsys):
    config = {"model": "another", "dtype": "bfloat16"}
    records.write_record(tmp_path, "rates/e2e.lora.rate0.001", {"status": "finished", "config": config})
    assert run_all.main([str(data), "--model", str(tiny_model), "--results", str(tmp_path)]) == 2
    assert "but rates/e2e.lora.rate0.001 of --results was run with 'another'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"budget": "trial"}, r"--budget: 'small' is wanted, but rates/e2e\.lora\.rate0\.001 .* was run with 'trial'"),
        ({"data_hash": {"train": "0"}}, r"DATA: e2e/train\.jsonl is not the file that rates/e2e\.lora\.rate0\.001 of"),
        (None, r"rate0\.001\.json' is no record \(.*\)\. Remove it"),
    ],
    ids=["budget", "data", "cut off"],
)
def test_results_of_another_budget_or_of_other_data_are_not_taken(record, message, data, tiny_model, tmp_path, capsys):
    name = "rates/e2e.lora.rate0.001"
    records.write_record(tmp_path, name, {"status": "interrupted", "task": "e2e", **(record or {})})
    if record is None:
        path = records.record_file(tmp_path, name)
        path.write_text(path.read_text()[:-4])
    assert run_all.main([str(data), "--model", str(tiny_model), "--results", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_package_is_named_before_any_run(data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert run_all.main([str(data)]) == 2
    said = "pycocoevalcap is missing. In a clone: pip install 'pip>=25.1', then pip install --group benchmark"
    assert said in capsys.readouterr().err


def test_some_tasks_only(data, tmp_path):
    options = run_all.parse_arguments([str(data), "--results", str(tmp_path), "--tasks", "dart", "webnlg"])
    for rate in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1):
        for task in plan.SEARCH_TASKS:
            for method in METHODS:
                name = Run("rates", task, method, 0, rate, 1).name
                loss = abs(math.log(rate / METHODS[method].start))
                record = {"status": "finished", "metrics": {"validation_loss": loss}}
                records.write_record(tmp_path, name, record)
    known = run_all.wanted_runs(BUDGETS["small"], options, records.read_records(tmp_path))
    assert {run.task for run in known if run.stage != "rates"} == {"dart", "webnlg"}
    assert {run.task for run in known if run.stage == "rates"} == set(plan.SEARCH_TASKS)


def test_each_model_has_a_folder_of_results(tiny_model):
    parse = run_all.parse_arguments
    folders = [one_run.results_folder(parse(["DATA", *more])) for more in ([], ["--model", str(tiny_model)])]
    assert [folder.name for folder in folders] == ["small", f"small-{tiny_model.name}"]
