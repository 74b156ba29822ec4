"""The page of a familiarity, the command, and the script that runs over the tasks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import build
from parsed_page import Page
from peft_input_tuning.command_line import familiarity as command
from peft_input_tuning.command_line.main import main
from peft_input_tuning.familiarity import BigramCounts, familiarity
from peft_input_tuning.familiarity.page import familiarity_page

ROOT = Path(__file__).parent.parent
HOSTILE = '<script>alert("x")</script>\n\x1b[31m[bold]&amp; </table> https://example.com'
ROWS = [f"sort(date {order} of Record{i}())[{i}]" for i in range(6) for order in ("asc", "desc")] + [HOSTILE]


@pytest.fixture(scope="module")
def found(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    counts = BigramCounts(tokenizer).add(["sort the records", "<script> and <script>"])
    return familiarity(ROWS, model, tokenizer, counts, least=20, occurrences=1)


@pytest.fixture
def files(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"source": row, "number": 1}) for row in ROWS) + "\n\n", encoding="utf-8")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("sort the records by date\nRecord one\n\nRecord two of Record one\n", encoding="utf-8")
    return tmp_path


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_escapes_inputs(found):
    html = familiarity_page(found, HOSTILE)
    page = Page(html)
    assert "script" not in page.tags
    assert repr(HOSTILE)[1:-1] in page.text  # in the table, line ends and escapes made visible
    assert "\x1b" not in html.partition("<body>")[2].partition("</h1>")[2]
    assert {"svg", "rect", "table"} <= set(page.tags)
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert not [value for key, value in page.attributes if key in ("src", "href", "xlink:href")]
    assert not [value for _, value in page.attributes if "http" in (value or "")]
    assert "url(" not in html
    assert "@import" not in html
    assert html.endswith("</html>\n")


def test_the_page_has_every_figure(found):
    text = Page(familiarity_page(found, "title")).text
    for value in (
        f"{found.inputs.bits_per_byte:.3f}",
        f"{found.prose.bits_per_byte:.3f}",
        f"{found.inputs.tokens_per_byte:.3f}",
        f"{found.inputs.bigram_score:.3f}",
        f"{found.inputs.unseen_bigrams:.1%}",
        found.reading,
        "title",
    ):
        assert value in text
    for entry in found.least_familiar_inputs:
        assert repr(entry.text)[1:-1] in text


def test_the_histograms_show_all_texts(found):
    html = familiarity_page(found, "title")
    assert len(re.findall("<svg", html)) == 2
    for svg in html.split("<svg")[1:]:
        for series in ("bar", "prose"):
            shares = re.findall(rf'<rect class="{series}"[^>]*><title>[^:]*: ([\d.]+)%', svg)
            assert sum(map(float, shares)) == pytest.approx(100, abs=0.05 * len(shares))
            heights = re.findall(rf'<rect class="{series}"[^>]*height="([\d.]+)"><title>', svg)
            assert max(map(float, heights)) <= 180


def test_a_page_without_a_model_and_one_of_a_single_text(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    page = Page(familiarity_page(familiarity(["sort"], None, tokenizer), "title"))
    assert "svg" not in page.tags
    assert "–" in page.text
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    same = familiarity_page(familiarity(["sort by"], model, tokenizer, prose=["sort by"]), "title")
    assert len(re.findall("100.0%</title>", same)) == 2


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command(files, tiny_model):
    arguments = [
        *(sys.executable, "-m", "peft_input_tuning", "familiarity", files / "data.jsonl", "--model", tiny_model),
        *("--corpus", files / "corpus.txt", "--save-counts", files / "counts.safetensors"),
        *("--html", files / "page.html", "--least", "20"),
    ]
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    counts = BigramCounts(tokenizer).add(["sort the records by date", "Record one", "Record two of Record one"])
    expected = familiarity(ROWS, model, tokenizer, counts)
    for figure in (expected.inputs.bits_per_byte, expected.prose.bits_per_byte, expected.inputs.bigram_score):
        assert f" {figure:.3f} " in done.stdout
    assert "Least familiar inputs" in done.stdout
    assert "Least familiar tokens" in done.stdout
    assert " ".join(expected.reading.split()) in " ".join(done.stdout.split())
    assert "\x1b" not in done.stdout
    assert "Reading inputs: 100%" in done.stderr
    assert "13/13" in done.stderr
    assert "Counting bigrams" in done.stderr
    page = Page((files / "page.html").read_text(encoding="utf-8"))
    assert expected.reading in page.text
    assert f"data.jsonl to {tiny_model.name}" in page.text
    assert str(tiny_model) not in page.text
    assert sorted(path.name for path in files.iterdir()) == [
        "corpus.txt",
        "counts.safetensors",
        "data.jsonl",
        "page.html",
    ]
    loaded = BigramCounts.load(files / "counts.safetensors", tokenizer)
    assert (len(loaded), loaded.total) == (len(counts), counts.total)


def test_options(files, tiny_model, capsys, monkeypatch):
    """Each reaches the measure."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    BigramCounts(tokenizer).add(["sort"]).save(files / "counts")
    (files / "prose.txt").write_text("one\n  \ntwo\n", encoding="utf-8")
    (files / "data.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n{"other": 1}\n', encoding="utf-8")
    asked = {}

    def asks(texts, model, tokenizer, counts, prose, **options):
        asked.update(options, texts=list(texts), model=model, counts=counts.total, prose=list(prose))
        return familiarity(asked["texts"], model, tokenizer, counts, asked["prose"])

    monkeypatch.setattr("peft_input_tuning.familiarity.measure.familiarity", asks)
    options = ["--field", "text", "--limit", "2", "--counts", files / "counts", "--prose", files / "prose.txt"]
    options += ["--batch-size", "3", "--window", "9", "--least", "4"]
    options += ["--dtype", "bfloat16", "--device", "cpu"]
    assert main(["familiarity", str(files / "data.jsonl"), "--model", str(tiny_model), *map(str, options)]) == 0
    assert asked["texts"] == ["first", "second"]
    assert asked["prose"] == ["one", "two"]
    assert asked["counts"] == len(tokenizer.encode("sort")) - 1
    assert str(asked["model"].dtype) == "torch.bfloat16"
    assert (asked["batch_size"], asked["window"], asked["least"]) == (3, 9, 4)


def test_without_weights(files, tiny_model, capsys):
    """An encoder-decoder model has a tokenizer, which is enough for the rest."""
    build("t5").save_pretrained(files / "t5")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(files / "t5")
    (files / "t5" / "model.safetensors").unlink()
    start = ["familiarity", str(files / "data.jsonl"), "--model", str(files / "t5")]
    assert main(start) == 2
    assert "is an encoder-decoder model (t5) and predicts no inputs. Pass --no-weights" in capsys.readouterr().err
    assert main([*start, "--no-weights", "--corpus", str(files / "corpus.txt")]) == 0
    assert "Their bigrams score" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder where nobody may write is known here")
@pytest.mark.parametrize("option", ["--html", "--save-counts"])
def test_a_file_that_cannot_be_written_is_named_before_the_model(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"source": "a"}\n')
    more = [option, "/proc/page", "--corpus", "data.jsonl"]
    assert main(["familiarity", "data.jsonl", "--model", "./no-model", *more]) == 2
    assert f"{option}: '/proc/page' cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "is empty. Write lines of"),
        (b"\n \n", [], "is empty. Write lines of"),
        (b'{"source": "a"}\n\nno\n', [], r"line 3 of '.*data\.jsonl' is not JSON"),
        (b'{"source": "a"}\n{"source": "\xff"}', [], r"line 2 of '.*' is not UTF-8"),
        (b'{"source": "\\ud800"}', [], "line 1 of '.*' has half of a surrogate pair under 'source'"),
        (b'{"text": "a"}', [], r"line 1 of '.*' has no text under 'source': its fields are \['text'\]"),
        (b'{"source": 3}', [], "line 1 of '.*' has no text under 'source'"),
        (b'["source"]', [], "line 1 of '.*' has no text under 'source': it is no object"),
        (b'{"source": "a"}', ["--field", "x"], r"no text under 'x'.* Name the field with --field"),
        (b'{"source": "a"}', ["--corpus", "nowhere"], "--corpus: there is no file"),
        (b'{"source": "a"}', ["--counts", "nowhere"], "--counts: there is no file"),
        (b'{"source": "a"}', ["--prose", "nowhere"], "--prose: there is no file"),
        (b'{"source": "a"}', ["--corpus", "empty"], "--corpus: 'empty' is empty"),
        (b'{"source": "a"}', ["--prose", "empty"], "--prose: 'empty' is empty"),
        (b'{"source": "a"}', ["--prose", "latin"], "'latin' is not UTF-8"),
        (b'{"source": "a"}', ["--save-counts", "file"], "--save-counts needs --corpus"),
        (b'{"source": "a"}', ["--html", "nowhere/page.html"], "--html: .* in a folder that does not exist"),
        (b'{"source": "a"}', ["--html", "."], "--html: .* is a folder"),
        (b'{"source": "a"}', ["--device", "nope"], "--device: 'nope' cannot be used"),
        (
            b'{"source": "a"}',
            ["--html", "./data.jsonl"],
            r"--html: 'data.jsonl' is DATA\.jsonl too, which would be lost",
        ),
        (b'{"source": "a"}', ["--corpus", "text", "--save-counts", "text"], "--save-counts: 'text' is --corpus too"),
        (b'{"source": "a"}', ["--corpus", "text", "--save-counts", "x", "--html", "x"], "'x' is --save-counts too"),
    ],
    ids=[
        "empty",
        "only spaces",
        "not JSON",
        "not UTF-8",
        "half a surrogate",
        "no field",
        "no text",
        "no object",
        "wrong --field",
        "no corpus",
        "no counts",
        "no prose",
        "empty corpus",
        "empty prose",
        "prose not UTF-8",
        "--save-counts alone",
        "no folder for the page",
        "page is a folder",
        "no device",
        "page over the inputs",
        "counts over the corpus",
        "page over the counts",
    ],
)
def test_errors_come_before_the_model(tmp_path, monkeypatch, capsys, content, options, message):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_bytes(content)
    Path("empty").write_bytes(b"\n")
    Path("latin").write_bytes(b"gr\xfcn\n")
    Path("text").write_text("a\n")
    assert main(["familiarity", "data.jsonl", "--model", ".", *options]) == 2  # a folder without a model
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1


def test_a_missing_file_and_a_missing_model(files, capsys):
    assert main(["familiarity", str(files / "none.jsonl"), "--model", "./no-model"]) == 2
    assert "DATA.jsonl: there is no file" in capsys.readouterr().err
    assert main(["familiarity", str(files / "data.jsonl"), "--model", "./no-model"]) == 2
    assert "./no-model" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_the_old_one(files, tiny_model, monkeypatch):
    page = files / "page.html"
    page.write_text("old")

    def fails(found, title):
        raise RuntimeError("no page")

    monkeypatch.setattr("peft_input_tuning.familiarity.page.familiarity_page", fails)
    arguments = ["familiarity", str(files / "data.jsonl"), "--model", str(tiny_model), "--html", str(page)]
    assert main(arguments) == 1
    assert page.read_text() == "old"
    assert not list(files.glob(".*"))


def test_long_lines_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "LINE_CHARACTERS", 4)
    (tmp_path / "text").write_text("abcdefghij\n\nklm\nno", encoding="utf-8")
    assert list(command.lines(tmp_path / "text")) == ["abcd", "efgh", "ij", "klm", "no"]


# ---- the script -----------------------------------------------------------------------------------------------------


def test_the_script_over_tasks(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmark"))
    import familiarity_of_tasks

    for task, source in (("logic", "argmax ( type.player )"), ("names", "the records")):
        (tmp_path / "data" / task).mkdir(parents=True)
        row = json.dumps({"source": source, "references": ["x"]})
        (tmp_path / "data" / task / "test.jsonl").write_text(f"{row}\n" * 5)
    (tmp_path / "corpus").write_text("the records\n")
    options = ["--model", str(tiny_model), "--limit", "3", "--output", str(tmp_path / "out" / "f.json")]
    options += ["--corpus", str(tmp_path / "corpus")]
    assert familiarity_of_tasks.main([str(tmp_path / "data"), *options]) == 0
    written = json.loads((tmp_path / "out" / "f.json").read_text(encoding="utf-8"))
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = familiarity(["argmax ( type.player )"] * 3, model, tokenizer)
    assert written["logic"]["texts"] == 3
    assert written["logic"]["bits_per_byte"] == pytest.approx(expected.inputs.bits_per_byte, abs=1e-3)
    assert written["logic"]["prose_bits_per_byte"] == pytest.approx(expected.prose.bits_per_byte, abs=1e-3)
    assert written["names"]["unseen_bigrams"] == 0 < written["logic"]["unseen_bigrams"]
    assert familiarity_of_tasks.main([str(tmp_path)]) == 2
    assert "there is no */test.jsonl" in capsys.readouterr().err
