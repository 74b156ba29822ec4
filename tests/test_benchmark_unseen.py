"""Domains and words that training did not have: who is held out, what a row's loss is, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import held_out
import plan
import records
import run_training
import tasks
import unseen
from device import DEVICE
from families import FAMILIES, PAD, build
from input_tuning_examples.task_data import Example
from methods import METHODS
from row_losses import row_losses

# A logical form of each domain, and one of none.
FORMS = {
    "basketball": "( listValue ( getProperty player.kobe_bryant ( num_assists ) ) )",
    "restaurants": "( listValue ( filter ( getProperty ( singleton restaurant ) ( ! type ) ) ( waiter ) ) )",
    "recipes": "( listValue ( getProperty ( singleton recipe ) ( cuisine.thai ) ) )",
    "publications": "( listValue ( getProperty article.multivariate_data ( venue ) ) )",
    "housing": "( filter ( ensureNumericEntity ( 800 square_feet ) ) ( singleton housing_unit ) )",
    "calendar": "( call ( lambda s ( meeting.weekly_standup ) ) ( location.greenberg_cafe ) )",
    None: "( listValue ( concat ( 1500 dollar ) ( 2000 dollar ) ) )",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in ("overnight", "multi30k_fr_en"):
        (folder / task).mkdir()
        for split in tasks.SPLITS:
            texts = [f"{form} {split if split == 'test' else ''}" for form in FORMS.values()]
            lines = [{"source": text, "references": [f"what is number {number}"]} for number, text in enumerate(texts)]
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# ---- held out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", FORMS)
def test_a_forms_types_tell_its_domain(domain):
    assert held_out.domain_of(FORMS[domain]) == domain


def test_types_of_two_domains_are_an_error():
    with pytest.raises(ValueError, match="basketball and housing"):
        held_out.domain_of(FORMS["basketball"] + FORMS["housing"])


def test_each_domain_is_held_out_once():
    assert sorted(domain for pair in held_out.PAIRS for domain in pair) == sorted(held_out.TYPES)


@pytest.mark.parametrize("task", held_out.HELD_OUT)
def test_training_has_none_of_the_domains_that_are_held_out(task, data):
    most = dict.fromkeys(tasks.SPLITS)
    rows = tasks.read_task(data, task, most).rows
    domains = {split: {held_out.domain_of(row.source) for row in rows[split]} for split in rows}
    others = set(held_out.TYPES) - set(held_out.domains_without(task))
    assert domains == {"train": others, "validation": others, "test": set(held_out.TYPES)}
    assert tasks.hashes_of(data, task) == tasks.hashes_of(data, "overnight")


def test_other_tasks_have_all_their_rows(data):
    assert len(tasks.read_task(data, "overnight", dict.fromkeys(tasks.SPLITS)).rows["train"]) == len(FORMS)


# ---- the loss of a row ----------------------------------------------------------------------------------------------


class Pads:
    """What the collator asks of a tokenizer."""

    padding_side = "right"

    def pad(self, features, padding=True, max_length=None, pad_to_multiple_of=None, return_tensors=None):
        longest = max(len(row["input_ids"]) for row in features)
        fill = {"input_ids": PAD, "attention_mask": 0}
        padded = {
            key: [row[key] + [value] * (longest - len(row[key])) for row in features] for key, value in fill.items()
        }
        return {key: torch.tensor(rows) for key, rows in padded.items()} | {
            key: torch.tensor([row[key] for row in features]) for key in features[0].keys() - padded.keys()
        }


@pytest.mark.parametrize("method", ["prompt-tuning", "input-tuning", "lora", "lora-embedding", "trainable-tokens"])
def test_the_loss_of_a_row_is_what_the_model_says_of_it_alone(method):
    model = run_training.trainable_model(build(FAMILIES["llama"], "lm"), METHODS[method], range(3, 30)).to(DEVICE)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length, source in ((9, 4), (5, 2), (12, 11), (7, 1), (9, 8)):
        ids = torch.randint(3, 60, (length,), generator=draw).tolist()
        labels = [-100] * source + ids[source:]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    found = row_losses(model, rows, Pads(), batch_size=2)
    model.eval()
    for (loss, count), row in zip(found, rows, strict=True):
        alone = {name: torch.tensor([values], device=DEVICE) for name, values in row.items()}
        assert count == sum(label != -100 for label in row["labels"])
        assert_close(loss, model(**alone).loss.item() * count, rtol=1e-3, atol=1e-3)


def test_a_prompt_beside_a_method_is_trained_with_it():
    for method in ("lora-embedding", "trainable-tokens"):
        model = run_training.trainable_model(build(FAMILIES["llama"], "lm"), METHODS[method], [5, 3, 5])
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert any("input_tuning_prompt" in name for name in trained)
        assert any("lora" in name or "trainable_tokens" in name for name in trained)
        ids = torch.tensor([[3, 4, 5, 6]], device=DEVICE)
        model.to(DEVICE)(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---- the tables -----------------------------------------------------------------------------------------------------


def test_a_difference_and_its_interval_are_those_of_a_loop():
    draw = np.random.default_rng(1)
    ours, others = draw.normal(2, 1, 40), draw.normal(2.2, 1, 40)
    tokens = draw.integers(3, 12, 40).astype(float)
    middle, low, high = unseen.difference(ours, others, tokens, draws=500)
    assert middle == pytest.approx((ours.sum() - others.sum()) / tokens.sum())
    again, means = np.random.default_rng(0), []
    for rows in again.integers(40, size=(500, 40)):
        means.append(sum(ours[row] - others[row] for row in rows) / sum(tokens[row] for row in rows))
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))


BUDGET = replace(plan.BUDGETS["transfer"], train_rows=None, test_rows=None)
METHODS_RUN = ("prompt-tuning", "input-tuning")


@pytest.fixture
def results(tmp_path, data) -> Path:
    """Runs of two methods on two seeds of French and on all tasks of Overnight; the loss says which run it is."""
    for method in METHODS_RUN:
        for task in BUDGET.tasks:
            for seed in (0, 1) if task == "multi30k_fr_en" else (0,):
                rows = tasks.read_task(data, task, dict.fromkeys(tasks.SPLITS)).rows["test"]
                run = plan.Run("main", task, method, seed, 1e-3, 4)
                losses = [
                    [(number + 1) * (2.0 if method == "prompt-tuning" else 1.0) + seed, 2]
                    for number in range(len(rows))
                ]
                record = {
                    "stage": "main", "task": task, "method": method, "seed": seed, "status": "finished",
                    "test_losses": losses, "metrics": {"forgetting": 0.5 if method == "prompt-tuning" else 0.25},
                }  # fmt: skip
                records.write_record(tmp_path, run.name, record)
                texts = [row.references[0] if method == "input-tuning" else "no" for row in rows]
                records.write_outputs(tmp_path, run.name, texts)
    return tmp_path


def rows_of(data: Path, chosen: list[str]) -> list[unseen.Row]:
    vocabulary: dict[str, int] = {}

    def words_of(text: str) -> list[int]:
        return [vocabulary.setdefault(word, len(vocabulary)) for word in text.split()]

    return [row for task in chosen for row in unseen.test_rows(data, task, BUDGET, words_of)]


def test_tables_by_hand(results, data):
    chosen = list(held_out.HELD_OUT)
    rows = rows_of(data, chosen)
    runs = unseen.Runs(results, records.read_records(results), rows, chosen)
    assert runs.methods == ["input-tuning", "prompt-tuning"]
    losses, gaps, bleu, prose = unseen.tables(runs)
    by_name = {row[0]: row[1:] for row in losses.rows}
    # Six rows of a domain in each of three tasks, with losses of 1 to 6 for two tokens each.
    assert by_name["all"] == ("18", "1.750", "3.500")
    assert by_name["domains that it had not"][0] == "6"
    assert by_name["domains that training had"][0] == "12"
    assert by_name["inputs with words that it had not"][0] == "18"  # "test" stands in every test row alone
    assert gaps.rows[0][2].startswith("+1.750 (+")
    assert {tuple(row[2:]) for row in bleu.rows} == {("100.0", "0.0")}
    assert prose.rows[0][1:] == ("+0.250", "+0.500")


def test_seeds_are_averaged_and_only_common_runs_count(results, data):
    (results / "runs" / "main" / "multi30k_fr_en.prompt-tuning.seed1.json").unlink()
    chosen = ["multi30k_fr_en"]
    rows = rows_of(data, chosen)
    runs = unseen.Runs(results, records.read_records(results), rows, chosen)
    assert runs.common == [("multi30k_fr_en", 0)]
    assert {row.known_domain for row in rows} == {None}
    assert runs.losses("input-tuning", rows)[0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_both_seeds(results, data):
    rows = rows_of(data, ["multi30k_fr_en"])
    runs = unseen.Runs(results, records.read_records(results), rows, ["multi30k_fr_en"])
    assert runs.losses("input-tuning", rows)[0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


def test_the_command_prints_tables(results, data, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(plan.BUDGETS, "transfer", BUDGET)
    arguments = [str(data), "--results", str(results), "--model", str(tiny_model), "--work", str(tmp_path / "work")]
    assert unseen.main(arguments) == 0
    out = capsys.readouterr().out
    assert "## Domains and words that training did not have" in out
    assert "## Words that training did not have: multi30k_fr_en" in out
    assert "| loss above input-tuning's, of inputs | rows | prompt-tuning |" in out


def test_nothing_that_all_methods_have(data, tiny_model, tmp_path, capsys):
    arguments = [str(data), "--results", str(tmp_path / "none"), "--model", str(tiny_model)]
    assert unseen.main(arguments) == 2
    assert "no task in" in capsys.readouterr().err


def test_the_page_has_the_stored_runs_figures():
    page = (Path(__file__).parent.parent / "docs" / "paper-comparison.md").read_text(encoding="utf-8")
    stored = [r for r in records.read_records(records.RESULTS / "transfer").values() if r["stage"] == "main"]
    found = {r["method"]: r for r in stored if r["task"] == "overnight_without_basketball_recipes"}
    order = ("prompt-tuning", "input-tuning", "lora", "lora-embedding", "trainable-tokens")
    losses = [np.array(found[method]["test_losses"]).sum(0) for method in order]
    assert "| all | 150 | " + " | ".join(f"{loss / tokens:.3f}" for loss, tokens in losses) + " |" in page
    prose = " | ".join(f"{found[method]['metrics']['forgetting']:+.3f}" for method in order)
    assert f"| plain prose, above the base's loss | | {prose} |" in page
    both = []
    for method in ("prompt-tuning", "input-tuning", "lora-embedding"):
        of_splits = [np.array(r["test_losses"]).sum(0) for r in stored if r["method"] == method]
        assert len(of_splits) == 2
        both.append(sum(of_splits))
    assert "| all | 300 | " + " | ".join(f"{loss / tokens:.3f}" for loss, tokens in both) + " |" in page


def test_a_task_without_held_out_domains_keeps_its_rows():
    assert held_out.rows_of("e2e", "train", [Example("a", ("b",))]) == [Example("a", ("b",))]
