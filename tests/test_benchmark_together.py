"""Trainings side by side: each is what it is alone, and broken-off ones go on to the same end."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import get_linear_schedule_with_warmup, set_seed

import bench
import one_run
import plan
import records
import report
import rescore
import run_together
import tasks
from device import DEVICE
from ensemble import Ensemble, trained_weights
from families import FAMILIES, PAD, build
from input_tuning_examples import logic_to_text
from methods import METHODS
from run_training import trainable_model

TASKS = ("e2e", "overnight", "dart")
METRICS = {
    "bleu", "chrf", "ter", "nist", "meteor", "rouge_l", "cider", "exact_match", "length_ratio", "validation_loss",
    "prose_loss", "forgetting",
}  # fmt: skip
METHODS_TOGETHER = list(plan.CONVERGED_RATES)
TINY = replace(
    plan.BUDGETS["converged"],
    name="tiny",
    steps=6,
    batch_size=4,
    validation_rows=5,
    test_rows=3,
    tiers=(plan.Tier(("input-tuning",), TASKS), plan.Tier(("lora",), ("e2e",))),
    together=(("e2e", "overnight"),),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        (folder / task).mkdir()
        for split, rows in logic_to_text.make_splits(24, 6, 6, seed=len(task)).items():
            lines = [{"source": row.source, "references": [row.reference]} for row in rows]
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# ---- an ensemble ----------------------------------------------------------------------------------------------------


def random_rows(draw: torch.Generator, trainings: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of many lengths, padded on the right, with targets at their ends."""
    ids = torch.randint(3, 60, (trainings, 4, 12), generator=draw)
    labels = ids.clone()
    for training in range(trainings):
        for row in range(4):
            length = int(torch.randint(6, 13, (1,), generator=draw))
            ids[training, row, length:] = PAD
            labels[training, row, length:] = -100
            labels[training, row, : 2 + training] = -100
    return ids.to(DEVICE), labels.to(DEVICE)


@pytest.mark.parametrize("method", METHODS_TOGETHER)
def test_each_training_is_what_it_is_alone(method):
    """The oracle is a plain loop: transformers' loss with an attention mask, torch's clipping and AdamW."""
    rate, steps, prompt_rate = 1e-2, 6, METHODS[method].rate_of_prompt(1e-2)
    base = build(FAMILIES["llama"], "lm")
    models = []
    for seed in range(3):
        set_seed(seed)
        model = trainable_model(copy.deepcopy(base), METHODS[method]).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)  # nothing is left as it starts
        models.append(model)
    groups = bench.groups_by_name(models[0], METHODS[method], rate)
    members = [trained_weights(model) for model in models]
    ensemble = Ensemble(copy.deepcopy(models[0]), members, rate, steps, groups)
    draw = torch.Generator().manual_seed(0)
    batches = [random_rows(draw, 3) for _ in range(steps)]
    found = [ensemble.step(*batch) for batch in batches]
    ensemble.validate(iter(batches[:1]))

    for training, model in enumerate(models):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        prompts = [name for name in named if "prompt" in name and prompt_rate is not None]
        optimizer = torch.optim.AdamW(
            [
                {"params": [named[name] for name in prompts], "lr": prompt_rate or rate},
                {"params": [p for name, p in named.items() if name not in prompts], "lr": rate},
            ],
            weight_decay=0.0,
        )
        schedule = get_linear_schedule_with_warmup(optimizer, 1, steps)
        for step, (ids, labels) in enumerate(batches):
            mask = (ids[training] != PAD).long()
            loss = model(input_ids=ids[training], attention_mask=mask, labels=labels[training]).loss
            assert_close(found[step][training], loss.detach(), rtol=1e-4, atol=1e-5)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        given = dict(ensemble.give(training).named_parameters())
        for name, parameter in named.items():
            assert_close(given[name].detach(), parameter.detach(), rtol=1e-3, atol=1e-4)


def small_ensemble(steps: int = 6, members: int = 2) -> Ensemble:
    base = build(FAMILIES["llama"], "lm")
    set_seed(0)
    models = [trainable_model(copy.deepcopy(base), METHODS["lora"]) for _ in range(members)]
    return Ensemble(models[0], [trained_weights(model) for model in models], 3e-2, steps)


def test_the_best_step_of_each_training_is_kept():
    ensemble = small_ensemble()
    draw = torch.Generator().manual_seed(0)
    batches = [random_rows(draw, 2) for _ in range(6)]
    history, kept = [], []
    for batch in batches:
        ensemble.step(*batch)
        history.append(ensemble.validate(iter(batches[:2])))
        kept.append({name: tensor.detach().clone() for name, tensor in ensemble.weights.items()})
    losses = torch.stack(history)
    assert ensemble.best_loss.tolist() == losses.min(0).values.tolist()
    assert ensemble.best_step.tolist() == [step + 1 for step in losses.argmin(0).tolist()]
    for training, step in enumerate(losses.argmin(0).tolist()):
        for name, tensor in ensemble.best.items():
            assert torch.equal(tensor[training], kept[step][name][training])


def test_the_validation_loss_is_the_mean_of_all_targets_however_many_a_batch_has():
    ensemble = small_ensemble()
    ids, labels = random_rows(torch.Generator().manual_seed(1), 2)
    halves = [(ids[:, :1], labels[:, :1]), (ids[:, 1:], labels[:, 1:])]
    nothing = (ids, torch.full_like(labels, -100))
    assert_close(ensemble.validate(iter([*halves, nothing])), ensemble.validate(iter([(ids, labels)])))


def test_trainings_of_other_sizes_are_refused():
    base = build(FAMILIES["llama"], "lm")
    sizes = [trained_weights(trainable_model(copy.deepcopy(base), METHODS[name])) for name in ("lora", "input-tuning")]
    with pytest.raises(ValueError, match="Train these apart"):
        Ensemble(base, sizes, 1e-3, 4)


def test_short_batches_of_all_meet_and_each_row_has_its_turn():
    lengths = [[(7 * n) % 50 for n in range(256)], [(11 * n) % 90 for n in range(512)]]
    batches = tasks.side_by_side(lengths, 64, 4, seed=3)
    assert [len(of_one) for of_one in batches] == [64, 64]
    assert sorted(row for batch in batches[0] for row in batch) == list(range(256))
    assert len({row for batch in batches[1] for row in batch}) == 256
    longest = [
        [max(of_one[row] for row in batch) for batch in some] for of_one, some in zip(lengths, batches, strict=True)
    ]
    assert torch.corrcoef(torch.tensor(longest, dtype=torch.float))[0, 1] > 0.9
    assert batches == tasks.side_by_side(lengths, 64, 4, seed=3) != tasks.side_by_side(lengths, 64, 4, seed=4)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(data, tiny_model, tmp_path, monkeypatch):
    """Calls the command with a tiny budget; returns its exit status."""
    monkeypatch.setitem(plan.BUDGETS, "tiny", TINY)
    monkeypatch.setattr(run_together, "quiet", lambda: None)

    def call(*arguments: str, results: str = "results") -> int:
        common = ["--budget", "tiny", "--model", str(tiny_model), "--dtype", "float32"]
        folders = ["--results", str(tmp_path / results), "--work", str(tmp_path / f"{results}-work")]
        return run_together.main([str(data), *common, *folders, *arguments])

    return call


def test_what_cannot_be_trained_together_is_apart():
    together = bench.grouped(TINY, plan.runs(TINY, {}))
    assert [[(run.method, run.task) for run in one.runs] for one in together] == [
        [("input-tuning", "e2e"), ("input-tuning", "overnight")],
        [("input-tuning", "dart")],
        [("lora", "e2e")],
    ]
    assert len({one.name for one in together}) == 3


def test_the_converged_budget_has_every_method_on_every_task_in_the_order_of_worth():
    budget = plan.BUDGETS["converged"]
    together = bench.grouped(budget, plan.runs(budget, {}))
    methods = list(dict.fromkeys(one.runs[0].method for one in together))
    assert methods == METHODS_TOGETHER
    for method in methods:
        trained = [run.task for one in together for run in one.runs if run.method == method]
        assert sorted(trained) == sorted(plan.TASKS)
    assert all(run.steps >= 1500 for one in together for run in one.runs)


def test_records_are_those_of_the_other_runner(command, data, tiny_model, tmp_path):
    assert command() == 0
    found = records.read_records(tmp_path / "results")
    assert set(found) == {run.name for run in plan.runs(TINY, {})}
    run = plan.Run("main", "e2e", "lora", 0, 3e-3, 6)
    one_run.record_run(run, TINY, data, str(tiny_model), "float32", tmp_path / "alone", tmp_path / "work")
    alone, together = records.read_record(tmp_path / "alone", run.name), found[run.name]
    assert set(together) == set(alone)
    assert set(together["metrics"]) == {"validation_loss", "prose_loss", "forgetting", "bleu"}
    assert together["config"].keys() - alone["config"].keys() == {"trained_beside"}
    assert together["config"]["peft"] == alone["config"]["peft"]
    assert together["trainable_parameters"] == alone["trainable_parameters"]
    # One task alone has the same rows in the same order, so that the loss before the first step is the same.
    assert together["curve"]["train"][0][1] == pytest.approx(alone["curve"]["train"][0][1], rel=1e-3)
    assert len(records.read_outputs(tmp_path / "results", run.name)) == TINY.test_rows
    assert found["main/e2e.input-tuning.seed0"]["config"]["trained_beside"] == ["overnight"]
    assert command() == 0  # and nothing is done again
    assert records.read_records(tmp_path / "results") == found


def test_the_report_reads_its_records(command, data, tmp_path):
    assert command() == 0
    assert rescore.main([str(data), "--budget", "tiny", "--results", str(tmp_path / "results")]) == 0
    metrics = {frozenset(record["metrics"]) for record in records.read_records(tmp_path / "results").values()}
    assert metrics == {frozenset(METRICS)}
    results = ["--results", str(tmp_path / "results"), "--samples", "10"]
    assert report.main([str(data), "--budget", "tiny", *results]) == 0
    text = (tmp_path / "results" / "report.md").read_text(encoding="utf-8")
    assert "input-tuning" in text
    assert "overnight" in text


def test_a_benchmark_whose_time_is_up_goes_on_to_the_same_end(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_together, "EVALUATIONS", 3)
    assert command(results="whole") == 0
    stops = 0
    while command("--minutes", "1e-6") == 130:
        stops += 1
        assert stops < 40
    assert stops >= 3
    assert "The same command goes on" in capsys.readouterr().err
    whole, resumed = (records.read_records(tmp_path / folder) for folder in ("whole", "results"))
    assert resumed.keys() == whole.keys()
    for name, record in whole.items():
        for key in ("curve", "metrics", "test_losses", "step_kept", "samples"):
            assert resumed[name][key] == record[key], (name, key)
    assert not list((tmp_path / "results-work").rglob("*.pt"))


def test_the_plan_estimates_and_changes_nothing(command, tmp_path, capsys):
    assert command("--plan") == 0
    out = capsys.readouterr().out
    assert "input-tuning.seed0.e2e+overnight" in out
    assert "in all" in out
    assert not (tmp_path / "results").exists()


def test_results_of_another_type_of_weights_are_not_taken(command, tmp_path, capsys):
    run = plan.runs(TINY, {})[0]
    records.write_record(tmp_path / "results", run.name, {"status": "finished", "config": {"dtype": "bfloat16"}})
    assert command() == 2
    assert "--dtype: 'float32' is wanted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be > 0, got 0.0"),
        (["--memory", "-1"], "--memory must be > 0"),
        (["--budget", "small"], "searches the rates of prompt-tuning"),
    ],
)
def test_wrong_arguments_are_answered_before_any_work(arguments, message, command, capsys):
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err
