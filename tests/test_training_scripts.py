"""`examples/training/train.py` and the loops, run as a user runs them: in processes of their own, one or two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import evaluate
import pytest
import sacrebleu
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer_utils import validate_quantization_for_training

import quantized_bases
import train
from families import FAMILIES, build
from input_tuning_examples import logic_to_text, packaged_model
from input_tuning_examples.task_data import InputError
from peft_input_tuning import InputTuningConfig
from tokenizers_of_families import tokenizer_of
from train_options import LEARNING_RATES, parse_arguments

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
CONFIGS = EXAMPLES / "training" / "accelerate_configs"
TRAIN = str(EXAMPLES / "training" / "train.py")

SMALL = ["--max_steps", "6", "--logging_steps", "1", "--max_new_tokens", "5", "--learning_rate", "1e-2"]
SMALL += ["--save_steps", "3", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]
pytestmark = pytest.mark.not_emulated("its scripts run on the CPU, in processes of their own")


EVALUATION = ["--eval_strategy", "steps", "--eval_steps", "3"]
train_py = partial(pytest.mark.trains_with, "examples/training/train.py")


def start(*command: str, cwd: Path, gpus: bool = False) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def launch(config: str, *command: str, **more) -> subprocess.CompletedProcess:
    return start(
        "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), "--main_process_port", "0",
        *command, **more
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in logic_to_text.make_splits(48, 10, 7).items():
        lines = [{"source": row.source, "references": [row.reference, "something else"]} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        chats = [
            {"messages": [{"role": "user", "content": r.source}, {"role": "assistant", "content": r.reference}]}
            for r in rows
        ]
        (folder / f"{name}-chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chats))
    return folder


@pytest.fixture
def options(data, tiny_model):
    files = [f"--{name}_data={data / name}.jsonl" for name in ("train", "validation", "test")]
    return ["--model", str(tiny_model), *files, *SMALL]


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [log[key] for log in json.loads((folder / "results.json").read_text())["curve"] if key in log]


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "results.json").read_text())["results"]


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- train.py -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(data, tiny_model, tmp_path_factory) -> Path:
    """A run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    files = [f"--{name}_data={data / name}.jsonl" for name in ("train", "validation", "test")]
    more = ["--per_device_train_batch_size", "4", *EVALUATION]
    done = start(
        TRAIN, "--model", str(tiny_model), *files, *SMALL, *more, "--output_dir", str(folder),
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@train_py("adapter, card with figures, curves, generations, results")
def test_what_a_run_leaves(alone, data):
    files = {path.name for path in alone.iterdir()}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "README.md", "results.json", "curves.png"}
    assert wanted | {"generations.jsonl", "checkpoint-3", "checkpoint-6"} <= files
    figures = results(alone)
    assert {"bleu", "chrf", "rouge_l", "exact_match", "validation_loss", "train_seconds"} <= set(figures)
    assert len(curve(alone)) == 6
    card = (alone / "README.md").read_text()
    assert f"| validation_loss | {figures['validation_loss']:.4g} | 10 |" in card
    assert "import peft_input_tuning" in card
    sources = [row["source"] + "\n" for row in rows_of(data / "test.jsonl")]
    assert [row["source"] for row in rows_of(alone / "generations.jsonl")] == sources


def test_a_model_out_of_a_gguf_file_can_be_trained(tmp_path):
    pytest.importorskip("gguf")
    quantized_bases.write_plain(tmp_path)
    as_it_is = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    base = train.Base(str(tmp_path), "model.gguf", False, None).load("float32")
    for name, weight in quantized_bases.gguf_file(tmp_path).state_dict().items():
        assert torch.equal(weight, base.state_dict()[name])
    config = InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="do not support training"):
        validate_quantization_for_training(get_peft_model(as_it_is, config))
    validate_quantization_for_training(get_peft_model(base, config))


@pytest.mark.slow
def test_one_step_of_the_default_model(data, tmp_path):
    """As packaged_model.py's error advises: without --model."""
    try:
        packaged_model.find_packaged_model()
    except ValueError as error:
        pytest.skip(str(error))
    done = start(
        TRAIN, "--train_data", str(data / "train.jsonl"), "--output_dir", str(tmp_path / "out"),
        "--max_steps", "1", "--per_device_train_batch_size", "1", "--report_to", "none", "--use_cpu",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "out")["steps"] == 1
    assert "Warning: No artists" not in done.stderr


def test_the_adapter_gives_the_generations(alone, tiny_model):
    model = AutoPeftModelForCausalLM.from_pretrained(str(alone)).eval()
    tokenizer = AutoTokenizer.from_pretrained(alone)
    for row in rows_of(alone / "generations.jsonl"):
        inputs = tokenizer(row["source"], return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        new = out[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == row["text"]


def validation_loss_by_hand(model, folder: Path, rows: list[dict]) -> float:
    """Row by row: over all targets, the end token among them."""
    tokenizer, seq2seq = AutoTokenizer.from_pretrained(folder), model.config.is_encoder_decoder
    total = count = 0.0
    for row in rows:
        source = tokenizer(row["source"] + "\n").input_ids
        target = [*tokenizer(row["references"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids, labels = (source, target) if seq2seq else (source + target, [-100] * len(source) + target)
        with torch.no_grad():
            loss = model.eval()(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * len(target), count + len(target)
    return total / count


def test_the_validation_loss_is_the_mean_over_all_targets(alone, data):
    """Ten rows in batches of eight: neither the batches' means, nor rows counted twice."""
    model = AutoPeftModelForCausalLM.from_pretrained(str(alone))
    by_hand = validation_loss_by_hand(model, alone, rows_of(data / "validation.jsonl"))
    assert results(alone)["validation_loss"] == pytest.approx(by_hand, rel=1e-5)
    assert curve(alone, "eval_loss")[-1] == pytest.approx(by_hand, rel=1e-5)


# A configuration of accelerate and the options that make it one for CPUs; `ddp.yaml` and the two of DeepSpeed ask for
# GPUs and bf16. For fsdp2.yaml, see tests/fsdp2_on_cpus.py.
ON_CPU = ["--mixed_precision", "no"]
LAUNCHES = {
    "ddp_cpu.yaml": ([], ["--use_cpu"], "2"),
    "ddp_cpu.yaml, one process": (["--num_processes", "1"], ["--use_cpu"], "4"),
    "ddp.yaml": (ON_CPU, ["--use_cpu"], "2"),
    "deepspeed_zero2.yaml": (ON_CPU, ["--ddp_backend", "gloo"], "2"),
    "deepspeed_zero3.yaml": (ON_CPU, ["--ddp_backend", "gloo"], "2"),
}


def assert_same_run(got: Path, want: Path) -> None:
    assert curve(got) == pytest.approx(curve(want), rel=1e-4)
    assert curve(got, "eval_loss") == pytest.approx(curve(want, "eval_loss"), rel=1e-4)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (got, want))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_close(ours[name], value, atol=1e-4, rtol=1e-3)
    assert (got / "generations.jsonl").read_text() == (want / "generations.jsonl").read_text()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.trains_with(
                    "accelerate and processes", f"accelerate launch examples/training/train.py: {name}"
                ),
                *([] if name == "ddp_cpu.yaml" else [pytest.mark.slow]),
            ],
        )
        for name in LAUNCHES
    ],
)
def test_processes_give_the_curve_of_one(alone, options, tmp_path, name):
    of_launcher, of_script, rows = LAUNCHES[name]
    options = [option for option in options if option != "--use_cpu"]
    call = [TRAIN, *options, *of_script, "--per_device_train_batch_size", rows]
    call += ["--per_device_eval_batch_size", "4"]  # ten rows: the last batches have two, and none
    done = launch(
        name.partition(",")[0], *of_launcher, *call, *EVALUATION, "--output_dir", str(tmp_path), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.trains_with(
    "accelerate and processes",
    "accelerate launch examples/training/train.py: fsdp2.yaml, where accelerate is told that there is a GPU; resume",
)
def test_fsdp2_on_cpus(alone, options, tmp_path):
    """All of the run, then the rest of it from its checkpoint in the middle."""
    options = [option for option in options if option != "--use_cpu"]
    call = [str(TESTS / "fsdp2_on_cpus.py"), TRAIN, *options, *EVALUATION]
    call += ["--per_device_train_batch_size", "2"]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    for folder, more in ((whole, []), (rest, ["--resume_from_checkpoint", "last"])):
        done = launch("fsdp2.yaml", *ON_CPU, *call, "--output_dir", str(folder), *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert_same_run(folder, alone)
        if folder == whole:
            assert list((whole / "checkpoint-3").glob("pytorch_model_fsdp*")), "nothing was sharded"
            shutil.copytree(whole / "checkpoint-3", rest / "checkpoint-3")


@pytest.mark.gpu
@pytest.mark.trains_with("accelerate and processes", "accelerate launch examples/training/train.py: fsdp2.yaml")
def test_fsdp2_on_two_gpus(alone, options, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    options = [option for option in options if option != "--use_cpu"]
    call = [TRAIN, *options, "--per_device_train_batch_size", "2", *EVALUATION]
    done = launch("fsdp2.yaml", *ON_CPU, *call, "--output_dir", str(tmp_path), cwd=tmp_path, gpus=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(tmp_path) == pytest.approx(curve(alone), rel=1e-3)


@train_py("resume = uninterrupted run")
def test_an_interrupted_run_goes_on(alone, options, tmp_path):
    """From what a run leaves that is interrupted behind its third step: the same figures, bit for bit."""
    shutil.copytree(alone / "checkpoint-3", tmp_path / "checkpoint-3")
    more = ["--per_device_train_batch_size", "4", *EVALUATION, "--output_dir", str(tmp_path)]
    assert train.main([*options, *more, "--resume_from_checkpoint", "last"]) == 0
    assert curve(tmp_path) == curve(alone)
    assert curve(tmp_path, "eval_loss") == curve(alone, "eval_loss")
    assert {**results(tmp_path), "train_seconds": 0} == {**results(alone), "train_seconds": 0}
    got, want = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, alone))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@train_py("early stopping")
def test_early_stopping(options, tmp_path, lowest_loss_at):
    lowest_loss_at(train.TokenMeanTrainer, 3)
    more = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "true"]
    more += ["--early_stopping_patience", "2", "--max_steps", "30"]
    assert train.main([*options, *more, "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    *evaluations, at_the_end = [(log["eval_loss"], log["step"]) for log in report["curve"] if "eval_loss" in log]
    assert report["results"]["steps"] == at_the_end[1] == 5  # after two that are no better
    assert min(evaluations)[1] == 3
    assert report["results"]["validation_loss"] == at_the_end[0] == pytest.approx(min(evaluations)[0], rel=1e-5)
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (3, 5))
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        assert_close(value, best[name])
        assert not torch.equal(value, last[name]), "the case shows nothing"


@pytest.mark.parametrize("method", [pytest.param(m, marks=train_py(f"method {m}")) for m in LEARNING_RATES])
def test_each_method_runs(options, tmp_path, method):
    assert train.main([*options, "--method", method, "--output_dir", str(tmp_path), "--max_steps", "2"]) == 0
    saved = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (tmp_path / saved).is_file()
    assert "## Results" in (tmp_path / "README.md").read_text()


@train_py("a dataset of `datasets`, its splits by name, columns of other names")
def test_a_dataset_by_its_name(tiny_model, tmp_path):
    """A folder of Parquet files here; a name on a hub is read by the same call."""
    for split, count in (("train", 8), ("test", 3)):
        table = {"question": [f"number {n}" for n in range(count)], "answer": [f"it is {n}" for n in range(count)]}
        Dataset.from_dict(table).to_parquet(tmp_path / "data" / f"{split}.parquet")
    files = [f"--{name}_data={tmp_path / 'data'}" for name in ("train", "test")]
    call = ["--model", str(tiny_model), *files, *SMALL, "--source_column", "question", "--target_column", "answer"]
    assert train.main([*call, "--max_steps", "1", "--output_dir", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out" / "generations.jsonl")
    assert [row["source"] for row in rows] == [f"number {n}\n" for n in range(3)]
    assert [row["references"] for row in rows] == [[f"it is {n}"] for n in range(3)]


@pytest.fixture
def chat_model(tiny_model, tmp_path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<answer>"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@train_py("chat messages")
def test_chat_messages(data, chat_model, tmp_path):
    files = [f"--{name}_data={data / name}-chat.jsonl" for name in ("train", "test")]
    call = ["--model", str(chat_model), *files, *SMALL, "--messages_column", "messages"]
    assert train.main([*call, "--output_dir", str(tmp_path / "out")]) == 0
    first = rows_of(tmp_path / "out" / "generations.jsonl")[0]
    assert first["source"].startswith("<user>")
    assert first["source"].endswith("\n<answer>")


@train_py("encoder-decoder models are found by themselves")
def test_an_encoder_decoder_model(data, tmp_path):
    build(FAMILIES["t5"]).save_pretrained(tmp_path / "model")
    tokenizer_of(FAMILIES["t5"]).save_pretrained(tmp_path / "model")
    files = [f"--{name}_data={data / name}.jsonl" for name in ("train", "validation", "test")]
    out = tmp_path / "out"
    assert train.main(["--model", str(tmp_path / "model"), *files, *SMALL, "--output_dir", str(out)]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("INPUT_TUNING", "SEQ_2_SEQ_LM")
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(str(out))
    by_hand = validation_loss_by_hand(model, out, rows_of(data / "validation.jsonl"))
    assert results(out)["validation_loss"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_each_method_has_a_learning_rate_of_its_own(method, tmp_path):
    """transformers' default is one for all, 5e-5: so low that a prompt would stay where it started."""
    given = ["--train_data", "rows.jsonl", "--output_dir", str(tmp_path), "--method", method]
    rates = [parse_arguments([*given, *more])[1].learning_rate for more in ([], ["--learning_rate", "5e-5"])]
    assert rates == [LEARNING_RATES[method], 5e-5]
    assert rates[0] > TrainingArguments(str(tmp_path)).learning_rate


WRONG = {  # the options, what has to be said
    "no such file": (["--train_data", "nowhere.jsonl"], "--train_data: 'nowhere.jsonl' cannot be read"),
    "no such model": (["--model", "./nowhere"], "--model: there is no folder './nowhere'"),
    "no such model on the hub": (["--model", "nobody/nothing"], "--model: 'nobody/nothing' cannot be read"),
    "no such column": (["--source_column", "input"], "has no column 'input', but source, references"),
    "no chat template": (["--messages_column", "source"], "--messages_column: the tokenizer of"),
    "all rows too long": (["--max_length", "3"], "--max_length: no row of 48 has 3 tokens or fewer"),
    "no tokens to generate": (["--max_new_tokens", "0"], "--max_new_tokens must be >= 1, got 0"),
    "no rows": (["--train_rows", "0"], "--train_rows must be >= 1, got 0"),
    "a prompt of -1": (["--num_virtual_tokens", "-1"], "`num_virtual_tokens` must be >= 0, got -1"),
    "a prompt of none": (["--method=prompt-tuning", "--num_virtual_tokens=0"], "--num_virtual_tokens must be >= 1"),
    "no rows in a batch": (
        ["--per_device_train_batch_size", "0"],
        "--per_device_train_batch_size must be >= 1, got 0",
    ),
    "no batches in a step": (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be >= 1"),
    "a seed of -1": (["--seed", "-1"], "--seed must be >= 0, got -1"),
    "no steps": (["--max_steps", "0"], "there is nothing to train"),
    "a prompt without an end": (
        ["--num_virtual_tokens", "5000"],
        "--num_virtual_tokens: 5000 leave no place for a row",
    ),
    "a rank of 0": (["--method", "lora", "--lora_rank", "0"], "--lora_rank must be >= 1, got 0"),
    "a rate of 0": (["--prompt_learning_rate", "0"], "--prompt_learning_rate must be > 0, got 0.0"),
    "patience alone": (["--early_stopping_patience", "2"], "needs --load_best_model_at_end"),
    "two strategies": (["--load_best_model_at_end", "true"], "--load_best_model_at_end requires"),
    "an unknown option": (["--no_such_option", "1"], "--no_such_option"),
}


@pytest.mark.parametrize(("wrong", "said"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named_before_any_work(options, tmp_path, capsys, monkeypatch, wrong, said):
    monkeypatch.setattr(train.Base, "load", lambda *_: pytest.fail("the weights are loaded already"))
    assert train.main([*options, *wrong, "--output_dir", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluation_needs_rows(options, tmp_path, capsys):
    options = [option for option in options if not option.startswith("--validation_data")]
    assert train.main([*options, *EVALUATION, "--output_dir", str(tmp_path)]) == 2
    assert "--eval_strategy needs --validation_data" in capsys.readouterr().err


LINES = {  # a second row, what has to be said
    "nothing": (None, "is empty"),
    "no JSON": ('{"source": ', "--train_data: line 2 of 'rows.jsonl' is not JSON ("),
    "no object": ('["a", "b"]', "--train_data: line 2 of 'rows.jsonl' holds a list. Write one object"),
    "no source": (
        '{"source": null, "references": ["a"]}',
        "row 2 of 'rows.jsonl' has no text under 'source', got None",
    ),
    "no target": (
        '{"source": "a", "references": []}',
        "row 2 of 'rows.jsonl' has no texts under 'references', got []",
    ),
    "an empty target": (
        '{"source": "a", "references": [""]}',
        "row 2 of 'rows.jsonl' has no texts under 'references'",
    ),
}


@pytest.mark.parametrize(("line", "said"), LINES.values(), ids=LINES)
def test_a_row_without_its_texts_is_named(options, tmp_path, capsys, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    first = '{"source": "a", "references": ["b"]}\n'
    (tmp_path / "rows.jsonl").write_text("" if line is None else first + line + "\n")
    assert train.main([*options, "--train_data", "rows.jsonl", "--output_dir", "out"]) == 2
    assert said in capsys.readouterr().err


def test_files_of_any_name_and_bytes(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_bytes(b'{"source": "gr\xfcn", "references": ["b"]}\n')
    assert train.main([*options, "--train_data", "rows.txt", "--output_dir", "out"]) == 2
    assert "line 1 of 'rows.txt' is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json"])
def test_a_model_is_not_written_over(options, tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    for more in ([], ["--resume_from_checkpoint", "last"]):
        assert train.main([*options, *more, "--output_dir", str(tmp_path)]) == 2
        assert f"holds {name}, and no run of this script" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "value", ["hello", {"role": "user", "content": "a"}, ["a", "b"]], ids=["text", "object", "texts"]
)
def test_what_are_no_messages_is_named(chat_model, tmp_path, capsys, value):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": value}) + "\n")
    call = ["--model", str(chat_model), "--train_data", str(tmp_path / "rows.jsonl"), "--messages_column", "messages"]
    assert train.main([*call, "--output_dir", str(tmp_path / "out")]) == 2
    assert "has no text to learn under 'messages'" in capsys.readouterr().err


def test_a_conversation_without_an_answer_is_named(data, chat_model, tmp_path, capsys):
    line = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    call = ["--model", str(chat_model), "--train_data", str(tmp_path / "rows.jsonl"), "--messages_column", "messages"]
    assert train.main([*call, "--output_dir", str(tmp_path / "out")]) == 2
    assert "has no text to learn under 'messages'" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_the_configurations(path):
    assert load_config_from_file(str(path)).num_processes == 2


@train_py("BLEU, chrF, ROUGE through evaluate, offline")
def test_the_metric_is_what_its_libraries_say():
    predictions = ["the cat sat on the mat", "a dog", "nothing alike"]
    references = [["the cat sat on a mat", "a cat sat"], ["A dog"], ["quite different words"]]
    got = evaluate.load(train.GENERATION_METRICS).compute(predictions=predictions, references=references)
    streams = [[texts[min(n, len(texts) - 1)] for texts in references] for n in range(2)]
    streams[1][1:] = [None, None]
    assert got["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)
    assert got["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score)
    # By hand: 5 of 6 words in common with the first reference, all of the second row, none of the third.
    assert got["rouge_l"] == pytest.approx(100 * (5 / 6 + 1 + 0) / 3)
    assert RougeScorer(["rougeL"]).score("a b", "a b")["rougeL"].fmeasure == 1
    assert got["exact_match"] == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match=r"references\[0\]"):
        evaluate.load(train.GENERATION_METRICS).compute(predictions=["a"], references=[[]])


# ---- loops ----------------------------------------------------------------------------------------------------------

PRINT = "import sys, os; sys.path.insert(0, {folder!r}); import {name}\nlosses = {name}.main(sys.argv[1:])\n"
PRINT += "if os.environ.get('LOCAL_RANK', '0') == '0': print('LOSSES', losses)\n"


def losses_of(done: subprocess.CompletedProcess) -> list[float]:
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOSSES")]
    return json.loads(line.removeprefix("LOSSES"))


@pytest.mark.trains_with("Other engines", "a bare PyTorch loop with accelerate, one process and two")
def test_the_accelerate_loop_in_one_process_and_in_two(tiny_model, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(PRINT.format(folder=str(EXAMPLES / "loops"), name="accelerate_loop"))
    call = [str(script), "--model", str(tiny_model), "--steps", "4"]
    one = losses_of(start(*call, "--output-dir", str(tmp_path / "one"), cwd=tmp_path))
    two = losses_of(launch("ddp_cpu.yaml", *call, "--output-dir", str(tmp_path / "two"), cwd=tmp_path))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)
    got, want = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    for name in want:
        assert_close(got[name], want[name], atol=1e-4, rtol=1e-3)


@pytest.mark.trains_with("Other engines", "Lightning, one process and two (DDP)")
@pytest.mark.slow
def test_the_lightning_loop_in_one_process_and_in_two(tiny_model, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(PRINT.format(folder=str(EXAMPLES / "loops"), name="lightning_loop"))
    call = [str(script), "--model", str(tiny_model), "--steps", "4"]
    one = losses_of(start(*call, "--output-dir", str(tmp_path / "one"), cwd=tmp_path))
    two = losses_of(start(*call, "--devices", "2", "--output-dir", str(tmp_path / "two"), cwd=tmp_path))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)
    (checkpoint,) = (tmp_path / "two").rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert state
    assert all("input_tuning_" in name for name in state)


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--output-dir", "/proc/nothing"]], ids=" ".join)
def test_the_accelerate_loop_says_what_is_wrong_before_it_trains(tiny_model, monkeypatch, capsys, wrong):
    monkeypatch.syspath_prepend(str(EXAMPLES / "loops"))
    import accelerate_loop

    monkeypatch.setattr(accelerate_loop, "load_base", lambda *_: pytest.fail("the work began"))
    with pytest.raises((SystemExit, InputError)):
        accelerate_loop.main(["--model", str(tiny_model), *wrong])


@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_loop"])
def test_loops_are_short(name):
    assert len((EXAMPLES / "loops" / f"{name}.py").read_text().splitlines()) < 80
