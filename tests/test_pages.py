"""The pages in a real browser: no word of an error in its console, and nothing wider than a window of 1,000 pixels."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import adapted, config
from browser import in_a_browser, opened
from families import FAMILIES, VOCAB, build
from parsed_page import Page
from peft_input_tuning import inspect_adapter
from peft_input_tuning.familiarity import BigramCounts, familiarity
from peft_input_tuning.familiarity.page import familiarity_page
from peft_input_tuning.inspection.page import inspection_page
from peft_input_tuning.output.html import html_page, table
from peft_input_tuning.run_comparison import read_runs
from peft_input_tuning.run_comparison.page import comparison_page

LONG = "https://example.com/" + "x" * 400 + "<img src=nowhere.png onerror=alert(1)>"


class LongWords:
    """A tokenizer whose words have no place to break."""

    def get_vocab(self):
        return {str(i): i for i in range(VOCAB)}

    def decode(self, ids):
        return f"{ids[0]}{LONG}"


def inspection() -> str:
    model = get_peft_model(build(FAMILIES["llama"]), config(FAMILIES["llama"], num_virtual_tokens=60)).eval()
    return inspection_page(inspect_adapter(model, LongWords()))


def familiar(folder) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    counts = BigramCounts(tokenizer).add(["sort the records"])
    return familiarity_page(familiarity([LONG, "sort by date"], model, tokenizer, counts, occurrences=1), LONG)


def compared(folder) -> str:
    """Three runs with a setting, a figure and a name that have no place to break."""
    for name in ("a", "b", "x" * 200):
        curve = [{"loss": 1.0 / step, "eval_loss": 1.5 / step, "step": step} for step in range(1, 9)]
        report = {"options": {"source_column": LONG + name}, "results": {LONG: 1.0}, "curve": curve}
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(report), encoding="utf-8")
    return comparison_page(read_runs(sorted(folder.iterdir())))


@in_a_browser
@pytest.mark.parametrize("page", ["inspection", "familiarity", "comparison", "wide table"])
def test_a_page_fits_and_has_no_errors(page, tiny_model, tmp_path):
    makers = {
        "inspection": inspection,
        "familiarity": lambda: familiar(tiny_model),
        "comparison": lambda: compared(tmp_path / "runs"),
        "wide table": lambda: html_page(LONG, [table([f"column{i}" for i in range(60)], [["figure"] * 60])]),
    }
    wide, console = opened(makers[page](), tmp_path)
    assert console == []
    assert wide <= 1000


@in_a_browser
def test_the_browser_notices_what_is_wrong(tmp_path):
    wide, console = opened(
        "<body><pre>" + "x" * 1000 + '</pre><img src="nowhere.png"><script>no()</script></body>', tmp_path
    )
    assert wide > 1000
    assert any("no is not defined" in line for line in console)


def test_a_page_says_first_what_is_seen(tiny_model):
    pages = [(inspection(), "What this adapter has learned"), (familiar(tiny_model), "How familiar these inputs are")]
    for html, said in pages:
        assert html.split("</h1>")[1].lstrip().startswith(f"<p>{said}")
        assert "{" not in Page(html.partition("<body>")[2]).text


def test_whatever_is_no_markup_is_escaped():
    html = html_page("<b>", ["<i>meant</i>"], lead="<u>")
    assert Page(html).tags.count("i") == 1
    assert not {"b", "u"} & set(Page(html).tags)
    assert inspection_page(inspect_adapter(adapted(FAMILIES["llama"])[0])).count("<script") == 0
