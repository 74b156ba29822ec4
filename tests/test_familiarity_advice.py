"""What `familiarity` recommends, against the figures that were measured on seven tasks."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import pairwise

import pytest

from peft_input_tuning.command_line.main import main
from peft_input_tuning.familiarity.advice import advice
from peft_input_tuning.familiarity.figures import TextFigures

PROSE = 1.342
# docs/which-method.md: bits per byte of the inputs, and what input-tuning gained over prompt-tuning in BLEU
MEASURED = {"dart": (1.65, 4.1), "e2e": (1.67, 5.6), "webnlg": (1.72, 2.4), "overnight": (2.07, 12.3)}
MEASURED |= {"french": (2.40, 10.6), "german": (2.74, 6.3), "czech": (3.92, 8.2)}


def bits(value: float | None) -> TextFigures:
    return TextFigures(**{field.name: None for field in fields(TextFigures)} | {"bits_per_byte": value})


@pytest.mark.parametrize(("measured", "gain"), MEASURED.values(), ids=MEASURED)
def test_each_measured_task_gained_what_the_advice_says(measured, gain):
    said = advice(bits(measured), bits(PROSE))
    low, high = map(int, re.search(r"(\d+) to (\d+) BLEU", said).groups())
    assert low <= round(gain) <= high
    number = {"three": 3, "four": 4}[re.search(r"the (\w+) of our tasks", said)[1]]
    assert sum(advice(bits(other), bits(PROSE)) == said for other, _ in MEASURED.values()) == number


def test_nothing_is_claimed_where_nothing_was_measured():
    for inputs, prose in ((bits(PROSE), bits(PROSE)), (bits(1.5), bits(PROSE)), (bits(None), bits(PROSE))):
        assert "BLEU" not in advice(inputs, prose)
    assert "nothing is recommended" in advice(bits(2.0), bits(None))
    assert "nothing is recommended" in advice(bits(2.0), bits(0.0))


def test_it_depends_on_the_ratio_to_prose_only():
    kinds = [advice(bits(inputs), bits(PROSE)) for inputs in (1.0, 1.7, 2.1)]
    assert all(before != after for before, after in pairwise(kinds))
    assert kinds == [advice(bits(2 * inputs), bits(2 * PROSE)) for inputs in (1.0, 1.7, 2.1)]


def test_the_command_ends_with_it(tiny_model, tmp_path, capsys):
    (tmp_path / "rows").write_text('{"source": "sort the records"}\n{"source": "Release date"}\n')
    for options, expected in (([], "Next: train "), (["--no-weights"], "Next: without bits per byte nothing is")):
        assert main(["familiarity", str(tmp_path / "rows"), "--model", str(tiny_model), *options]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(expected)
