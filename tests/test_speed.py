"""Speed and memory: the arithmetic of rounds, the count of memory, and every measure once on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

SPEED = Path(__file__).parent.parent / "examples" / "speed"


def test_rounds_take_turns_and_leave_the_warm_up_out():
    from input_tuning_examples.rounds import run_rounds

    now, order = [0.0], []

    def work(name, seconds):
        order.append(name)
        now[0] += 100.0 if len(order) <= 2 else seconds  # the warm-up is slow

    variants = {"a": lambda: work("a", 2.0), "b": lambda: work("b", 3.0)}
    figures = run_rounds(variants, 4, clock=lambda: now[0])
    assert figures == {"a": [2.0] * 4, "b": [3.0] * 4}
    assert [set(order[i : i + 2]) for i in range(0, 10, 2)] == [{"a", "b"}] * 5
    assert order[2:6] == ["a", "b", "b", "a"]


def test_a_variant_may_bring_its_own_figure():
    from input_tuning_examples.rounds import run_rounds

    assert run_rounds({"a": lambda: 7.0}, 2) == {"a": [7.0, 7.0]}


def test_ratios_are_those_of_the_medians():
    from input_tuning_examples.rounds import Measure, compare, markdown

    measure = Measure("work", "ms", {}, [("a", "b", 1.03), ("b", "a", None)])
    rows = compare(measure, {"a": [1.0, 2.0, 9.0], "b": [4.0, 1.0, 2.0]})
    assert (rows[0].figure, rows[0].reference, rows[0].ratio) == (2000.0, 2000.0, 1.0)
    assert rows[0].met
    assert rows[0].low <= 2.0 <= rows[0].high  # of 0.25, 2, 4.5
    assert rows[1].met is None
    table = markdown(rows)
    assert "| work | a | b | 2000.0 ms | 2000.0 ms | 1.000 |" in table
    assert "≤ 1.03 ✓" in table
    assert "≤ 1.03 missed" in markdown(compare(measure, {"a": [2.0], "b": [1.0]}))


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_memory_of_known_tensors(device):
    from memory import peak_of

    def work():
        first = torch.ones(1_000_000, device=device)
        second = torch.ones(2_000_000, device=device)
        del second
        return first, torch.ones(500_000, device=device)

    assert peak_of(work, torch.device(device)) == pytest.approx(12_000_000, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offloaded_activations(dtype):
    """The same gradients with less memory, and no file is left."""
    import memory

    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)]).to(dtype)
    x = torch.randn(256, 64, dtype=dtype, requires_grad=True)

    def work():
        x.grad = None
        out = x
        for layer in model:
            out = layer(out).tanh()
        out.sum().backward()

    device = torch.device("cpu")
    plain, want = memory.peak_of(work, device), (work(), x.grad.clone())[1]
    offloading = memory.offloaded_activations(model, device)
    with offloading:
        folder = Path(offloading._folder.name)
        peak = memory.peak_of(work, device)
        assert len(list(folder.iterdir())) >= 8
    assert torch.equal(x.grad, want)
    assert peak < 0.7 * plain
    assert not folder.exists()


def test_resident_counts_shared_weights_once():
    from memory import resident

    model = torch.nn.ModuleList([torch.nn.Embedding(100, 10), torch.nn.Linear(10, 100, bias=False)])
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    assert resident(model, optimizer) == 4000
    model[1](torch.ones(10)).sum().backward()
    optimizer.step()
    assert 4 * 4000 <= resident(model, optimizer) <= 4 * 4000 + 8  # weight, gradient, two moments, a step


def test_every_measure_on_a_tiny_model(tmp_path, capsys):
    from measures import MEASURES
    from run import main

    files = ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "table.md")]
    assert main(["--size", "tiny", "--rounds", "1", *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {"training step", "training memory", "decoding, a token", "8 adapters x 2 rows"} <= {
        row["measure"] for row in rows
    }
    assert len({row["measure"] for row in rows}) == len(MEASURES)
    assert all(row["ratio"] == pytest.approx(row["figure"] / row["reference"]) and row["figure"] > 0 for row in rows)
    header, _, table = (tmp_path / "table.md").read_text().partition("\n\n")
    assert table in capsys.readouterr().out  # where libraries may have printed too
    assert "tiny model, float32" in header


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(capsys):
    from run import main

    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_rounds_below_one(capsys):
    from run import main

    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "at least 1, got 0" in capsys.readouterr().err
