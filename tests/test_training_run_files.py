"""What `train.py` says of a run: its card, its seconds over all lives, forgetting; what it refuses before training."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

import train
from adapter_card import hub_name
from input_tuning_examples import logic_to_text
from input_tuning_examples.forgetting import prose_loss
from input_tuning_examples.train_seconds import TrainSeconds
from input_tuning_examples.training_rows import check_test_rows
from peft_input_tuning.familiarity.prose import PLAIN_PROSE

SMALL = ["--max_steps", "4", "--logging_steps", "1", "--max_new_tokens", "4", "--learning_rate", "1e-2"]
SMALL += ["--save_steps", "2", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]
SMALL += ["--num_virtual_tokens", "3"]
pytestmark = pytest.mark.not_emulated("its scripts run on the CPU")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in logic_to_text.make_splits(16, 5, 3).items():
        lines = [json.dumps({"source": row.source, "references": [row.reference]}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def call(data: Path, model: Path, folder: Path, *more: str, splits: tuple[str, ...] = ("train",)) -> list[str]:
    files = [f"--{name}_data={data / name}.jsonl" for name in splits]
    return ["--model", str(model), *files, *SMALL, *more, "--output_dir", str(folder)]


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.fixture(scope="module")
def done(data, tiny_model, tmp_path_factory) -> Path:
    """A run with all three files, whose base is given a name."""
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    more = ["--base_name", "someone/tiny", "--license", "apache-2.0"]
    assert train.main(call(data, tiny_model, folder, *more, splits=("train", "validation", "test"))) == 0
    return folder


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_card_is_short_and_says_what_the_run_was(done):
    text, figures = (done / "README.md").read_text(), results(done)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "base_model": "someone/tiny",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["input-tuning", "peft", "base_model:adapter:someone/tiny"],
    }
    assert len(text.splitlines()) < 70
    assert "# my-run" in text
    assert "An input-tuning adapter (arXiv 2203.03131) of `someone/tiny`: 3 virtual tokens" in text
    assert "import peft_input_tuning  # registers INPUT_TUNING" in text
    assert "16 rows of `train.jsonl` (train), 5 rows of `validation.jsonl` (validation), 3 rows of" in text
    assert "4 steps of 8 rows, learning rate 0.01 (0.1 of the prompt), float32, seed 42." in text
    for name, rows in (("validation_loss", "5"), ("bleu", "3"), ("train_loss", "16"), ("forgetting", "40 sentences")):
        assert f"| {name} | {figures[name]:.4g} | {rows} |" in text
    assert f"| trainable_parameters | {3 * 32 + 2 * 32 * 64:,} |  |" in text
    assert re.search(r"peft-input-tuning \d.*, peft \d.*, transformers \d.*, torch \d", text)
    assert "More Information Needed" not in text


def test_the_card_names_no_folder(done, tiny_model, data, tmp_path):
    assert train.main(call(data, tiny_model, tmp_path / "run", "--max_steps", "1")) == 0
    for card in (done / "README.md", tmp_path / "run" / "README.md"):
        assert "/" not in re.sub(r"someone/tiny|examples/training/train.py", "", card.read_text())
    said = (tmp_path / "run" / "README.md").read_text()
    assert "of the base model: 3 virtual tokens" in said
    assert "base_model" not in said.split("---\n")[1]


def test_the_card_loads_the_adapter(done, tiny_model):
    """Its Python, with the adapter's path for the placeholder."""
    (code,) = re.findall(r"```python\n(.*?)```", (done / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code.replace("path or id of this adapter", str(done)), names)
    assert names["model"].peft_config["default"].num_virtual_tokens == 3


@pytest.mark.parametrize(
    ("model", "given", "name"),
    [
        ("org/model", None, "org/model"),
        ("packaged", None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("hub/models--Qwen--Qwen3-0.6B/snapshots/0123", None, "Qwen/Qwen3-0.6B"),
        ("packaged", "my/own", "my/own"),
    ],
)
def test_the_name_of_a_base(model, given, name):
    assert hub_name(model, given) == name


@pytest.mark.parametrize("method", ["prompt-tuning", "lora", "full"])
def test_the_card_of_other_methods(method, data, tiny_model, tmp_path):
    assert train.main(call(data, tiny_model, tmp_path / "run", "--method", method, "--max_steps", "1")) == 0
    text = (tmp_path / "run" / "README.md").read_text()
    auto = "AutoModelForCausalLM" if method == "full" else "AutoPeftModelForCausalLM"
    assert f'model = {auto}.from_pretrained("path or id of this folder")' in text
    assert ("Full fine-tuning of the base" if method == "full" else f"{method[0].upper()}{method[1:]} on") in text
    assert math.isfinite(results(tmp_path / "run")["forgetting"])


# ---- forgetting -----------------------------------------------------------------------------------------------------


def loss_by_hand(model, tokenizer) -> float:
    """A softmax for each token of each sentence."""
    total, count = 0.0, 0
    for text in PLAIN_PROSE:
        ids = tokenizer(text).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0][-len(ids) :].double()
        for place in range(len(ids) - 1):
            total -= math.log(torch.softmax(logits[place], 0)[ids[place + 1]])
            count += 1
    return total / count


def test_forgetting_is_the_loss_on_prose_with_the_adapter_minus_without(done, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(done)).eval()
    with_it, without = loss_by_hand(adapted, tokenizer), loss_by_hand(base, tokenizer)
    assert results(done)["prose_loss"] == pytest.approx(with_it, rel=1e-5)
    assert results(done)["forgetting"] == pytest.approx(with_it - without, abs=1e-5)
    assert abs(with_it - without) > 1e-3


def test_the_loss_on_prose_leaves_dropout_out_and_the_model_as_it_was(tiny_model):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.attention_dropout = 0.5
    model.train()
    assert prose_loss(model, tokenizer) == prose_loss(model, tokenizer)
    assert model.training
    assert prose_loss(copy.deepcopy(model).eval(), tokenizer) == prose_loss(model, tokenizer)


def test_full_fine_tuning_forgets_since_before_its_training(data, tiny_model, tmp_path):
    assert train.main(call(data, tiny_model, tmp_path, "--method", "full", "--learning_rate", "1e-3")) == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    before, after = (loss_by_hand(AutoModelForCausalLM.from_pretrained(p), tokenizer) for p in (tiny_model, tmp_path))
    assert results(tmp_path)["forgetting"] == pytest.approx(after - before, abs=1e-5)


# ---- seconds --------------------------------------------------------------------------------------------------------


def test_seconds_are_those_of_all_lives(data, tiny_model, tmp_path, monkeypatch):
    """A clock that stands still but for ten seconds a step; the run breaks off after its checkpoint of step 2."""
    now = [0.0]
    monkeypatch.setattr("input_tuning_examples.train_seconds.time.perf_counter", lambda: now[0])

    def later(self, args, state, control, **kwargs):
        now[0] += 10.0

    def broken(self, args, state, control, **kwargs):
        now[0] += 10.0
        if state.global_step == 3:
            raise KeyboardInterrupt

    arguments = call(data, tiny_model, tmp_path)
    monkeypatch.setattr(TrainSeconds, "on_step_end", broken)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments)
    now[0] += 1000.0  # until somebody starts it again
    monkeypatch.setattr(TrainSeconds, "on_step_end", later)
    assert train.main([*arguments, "--resume_from_checkpoint", "last"]) == 0
    assert results(tmp_path)["train_seconds"] == pytest.approx(40.0)
    assert results(tmp_path)["steps"] == 4


# ---- refusals before training ---------------------------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch):
    """Training is an error: what is wrong has to be said before."""

    def trains(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(train.TokenMeanTrainer, "train", trains)


def write(path: Path, *rows: tuple[str, str]) -> None:
    path.write_text("".join(json.dumps({"source": s, "references": [r]}) + "\n" for s, r in rows))


def test_rows_longer_than_the_model_are_named(tiny_model, tmp_path, capsys, no_training):
    long = "\u20ac " * 90  # four tokens each
    write(tmp_path / "train.jsonl", ("a", "b"), (long, "b"), ("c", "d"), ("a", long))
    arguments = call(tmp_path, tiny_model, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ((long + "\n", "b"), ("a\n", long))
    lengths = [len(tokenizer(source).input_ids) + len(tokenizer(target).input_ids) + 1 for source, target in texts]
    assert min(lengths) > 256
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert f"--train_data: 2 rows have up to {max(lengths)} tokens (row 2 {lengths[0]}, row 4 {lengths[1]})" in said
    assert "3 virtual tokens for the 256 positions of the model. Pass --max_length 253" in said


def test_rows_longer_than_max_length_are_named_and_left_out(tiny_model, tmp_path, capsys):
    long = "\u20ac " * 90
    write(tmp_path / "train.jsonl", ("a", "b"), (long, "b"), ("c", "d"))
    assert train.main(call(tmp_path, tiny_model, tmp_path / "run", "--max_length", "253", "--max_steps", "1")) == 0
    out = capsys.readouterr().out
    assert re.search(r"--train_data: row 2 has \d+ tokens, more than --max_length 253: left out of 3 rows", out)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == {"train": 2}


@pytest.mark.parametrize("new", [4, 200])
def test_test_rows_need_places_for_their_new_tokens(new, tiny_model, tmp_path, capsys, no_training):
    write(tmp_path / "train.jsonl", ("a", "b"))
    write(tmp_path / "test.jsonl", ("a", "b"), ("\u20ac " * (90 if new == 4 else 20), "b"))
    arguments = call(tmp_path, tiny_model, tmp_path / "run", "--max_new_tokens", str(new), splits=("train", "test"))
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(rf"--test_data: row 2 has \d+ tokens, too many beside 3 virtual and {new} new tokens", said)


def test_an_encoder_decoder_counts_source_and_target_apart(tiny_model, tmp_path, capsys, no_training):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "vocab_size": 400}
    config = BartConfig(**sizes, max_position_embeddings=40, eos_token_id=0, decoder_start_token_id=0, pad_token_id=1)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "bart")
    fits, long = "\u20ac " * 8, "\u20ac " * 12
    write(tmp_path / "train.jsonl", (fits, fits))
    with pytest.raises(AssertionError, match="training began"):
        train.main(call(tmp_path, tmp_path / "bart", tmp_path / "run"))
    for row in ((long, "b"), ("a", long)):
        write(tmp_path / "train.jsonl", (fits, fits), row)
        assert train.main(call(tmp_path, tmp_path / "bart", tmp_path / "run")) == 2
        assert "--train_data: row 2 has" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder where nobody may write is known here")
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(data, tiny_model, capsys, no_training):
    for folder in ("/proc/run", "/proc"):
        assert train.main(call(data, tiny_model, Path(folder))) == 2
        assert f"error: --output_dir: '{folder}' cannot be written (" in capsys.readouterr().err


def test_prose_is_read_as_far_as_the_model_has_places(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    losses = []
    for text in PLAIN_PROSE:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :5]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())  # a mean of four tokens in each text
    assert prose_loss(model, tokenizer, most=5) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert math.isnan(prose_loss(model, tokenizer, most=1))


def test_without_test_rows_their_lengths_are_no_matter():
    check_test_rows([], None, None, False, positions=5, virtual=0, max_new_tokens=64)
