"""`examples/train.py` and the loops, run as a user runs them: in processes of their own, one or two."""

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
from peft import AutoPeftModelForCausalLM
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from torch.testing import assert_close

from families import FAMILIES, build
from tokenizers_of_families import tokenizer_of

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = EXAMPLES / "accelerate_configs"
sys.path.insert(0, str(EXAMPLES))

import logic_to_text  # noqa: E402
import train  # noqa: E402

SMALL = ["--max_steps", "6", "--logging_steps", "1", "--max_new_tokens", "5", "--learning_rate", "1e-2"]
SMALL += ["--save_steps", "3", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]


EVALUATION = ["--eval_strategy", "steps", "--eval_steps", "3"]
train_py = partial(pytest.mark.trains_with, "examples/train.py")


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


def curve(folder: Path) -> list[float]:
    return [log["loss"] for log in json.loads((folder / "results.json").read_text())["curve"] if "loss" in log]


# ---- train.py -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(data, tiny_model, tmp_path_factory) -> Path:
    """A run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    files = [f"--{name}_data={data / name}.jsonl" for name in ("train", "validation", "test")]
    more = ["--per_device_train_batch_size", "4", *EVALUATION]
    done = start(
        str(EXAMPLES / "train.py"), "--model", str(tiny_model), *files, *SMALL, *more, "--output_dir", str(folder),
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@train_py("adapter, card with figures, curves, generations, results")
def test_what_a_run_leaves(alone, data):
    files = {path.name for path in alone.iterdir()}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "README.md", "results.json", "curves.png"}
    assert wanted | {"generations.jsonl", "checkpoint-3", "checkpoint-6"} <= files
    results = json.loads((alone / "results.json").read_text())["results"]
    assert {"bleu", "chrf", "rouge_l", "exact_match", "validation_loss", "train_seconds"} <= set(results)
    assert len(curve(alone)) == 6
    card = (alone / "README.md").read_text()
    assert f"| validation_loss | {results['validation_loss']:.4g} |" in card
    assert "import peft_input_tuning" in card
    generations = [json.loads(line) for line in (alone / "generations.jsonl").read_text().splitlines()]
    sources = [json.loads(line)["source"] + "\n" for line in (data / "test.jsonl").read_text().splitlines()]
    assert [row["source"] for row in generations] == sources


def test_the_adapter_gives_the_generations(alone, tiny_model):
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(str(alone)).eval()
    tokenizer = AutoTokenizer.from_pretrained(alone)
    for line in (alone / "generations.jsonl").read_text().splitlines():
        row = json.loads(line)
        inputs = tokenizer(row["source"], return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        new = out[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == row["text"]


# A configuration of accelerate and the options that make it one for CPUs; `ddp.yaml` and the two of DeepSpeed ask for
# GPUs and bf16. fsdp2.yaml is not here: accelerate has FSDP on GPUs only (tests/test_distributed.py has torch's own).
ON_CPU = ["--mixed_precision", "no"]
LAUNCHES = {
    "ddp_cpu.yaml": ([], ["--use_cpu"], "2"),
    "ddp_cpu.yaml, one process": (["--num_processes", "1"], ["--use_cpu"], "4"),
    "ddp.yaml": (ON_CPU, ["--use_cpu"], "2"),
    "deepspeed_zero2.yaml": (ON_CPU, ["--ddp_backend", "gloo"], "2"),
    "deepspeed_zero3.yaml": (ON_CPU, ["--ddp_backend", "gloo"], "2"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.trains_with("accelerate and processes", f"accelerate launch examples/train.py: {name}"),
                *([] if name == "ddp_cpu.yaml" else [pytest.mark.slow]),
            ],
        )
        for name in LAUNCHES
    ],
)
def test_processes_give_the_curve_of_one(alone, options, tmp_path, name):
    of_launcher, of_script, rows = LAUNCHES[name]
    options = [option for option in options if option != "--use_cpu"]
    call = [str(EXAMPLES / "train.py"), *options, *of_script, "--per_device_train_batch_size", rows]
    done = launch(
        name.partition(",")[0], *of_launcher, *call, *EVALUATION, "--output_dir", str(tmp_path), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(tmp_path) == pytest.approx(curve(alone), rel=1e-4)
    got, want = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, alone))
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], atol=1e-4, rtol=1e-3)
    assert (tmp_path / "generations.jsonl").read_text() == (alone / "generations.jsonl").read_text()


@pytest.mark.gpu
@pytest.mark.trains_with("accelerate and processes", "accelerate launch examples/train.py: fsdp2.yaml")
def test_fsdp2_on_two_gpus(alone, options, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    options = [option for option in options if option != "--use_cpu"]
    call = [str(EXAMPLES / "train.py"), *options, "--per_device_train_batch_size", "2", *EVALUATION]
    done = launch("fsdp2.yaml", *ON_CPU, *call, "--output_dir", str(tmp_path), cwd=tmp_path, gpus=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(tmp_path) == pytest.approx(curve(alone), rel=1e-3)


@train_py("resume = uninterrupted run")
def test_an_interrupted_run_goes_on(alone, options, tmp_path):
    """From the checkpoint in the middle, as a run leaves it that is interrupted behind it."""
    shutil.copytree(alone / "checkpoint-3", tmp_path / "checkpoint-3")
    more = ["--per_device_train_batch_size", "4", *EVALUATION, "--output_dir", str(tmp_path)]
    assert train.main([*options, *more, "--resume_from_checkpoint", "last"]) == 0
    assert curve(tmp_path) == pytest.approx(curve(alone), rel=1e-6)
    got, want = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, alone))
    for name in want:
        assert_close(got[name], want[name])


@train_py("early stopping")
def test_early_stopping(options, tmp_path):
    more = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "true"]
    more += ["--early_stopping_patience", "2", "--max_steps", "30", "--learning_rate", "0.5"]
    assert train.main([*options, *more, "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    evaluations = {log["step"]: log["eval_loss"] for log in report["curve"] if "eval_loss" in log}
    assert report["results"]["steps"] < 30
    best = min(evaluations, key=evaluations.get)
    assert report["results"]["validation_loss"] == pytest.approx(evaluations[best], rel=1e-5)
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        assert_close(value, saved[name])


@pytest.mark.parametrize("method", [pytest.param(m, marks=train_py(f"method {m}")) for m in train.METHODS])
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
    rows = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == [f"number {n}\n" for n in range(3)]
    assert [row["references"] for row in rows] == [[f"it is {n}"] for n in range(3)]


@train_py("chat messages")
def test_chat_messages(data, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<answer>"
    tokenizer.save_pretrained(tmp_path / "model")
    files = [f"--{name}_data={data / name}-chat.jsonl" for name in ("train", "test")]
    call = ["--model", str(tmp_path / "model"), *files, *SMALL, "--messages_column", "messages"]
    assert train.main([*call, "--output_dir", str(tmp_path / "out")]) == 0
    first = json.loads((tmp_path / "out" / "generations.jsonl").read_text().splitlines()[0])
    assert first["source"].startswith("<user>")
    assert first["source"].endswith("\n<answer>")


@train_py("encoder-decoder models are found by themselves")
def test_an_encoder_decoder_model(data, tmp_path):
    build(FAMILIES["t5"]).save_pretrained(tmp_path / "model")
    tokenizer_of(FAMILIES["t5"]).save_pretrained(tmp_path / "model")
    files = [f"--{name}_data={data / name}.jsonl" for name in ("train", "test")]
    assert train.main(["--model", str(tmp_path / "model"), *files, *SMALL, "--output_dir", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("INPUT_TUNING", "SEQ_2_SEQ_LM")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--train_data", "nowhere.jsonl"], "--train_data"),
        (["--source_column", "input"], "'input'"),
        (["--max_length", "3"], "--max_length"),
        (["--early_stopping_patience", "2"], "--load_best_model_at_end"),
        (["--model", "./nowhere"], "--model"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(options, tmp_path, capsys, wrong, named):
    assert train.main([*options, *wrong, "--output_dir", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_the_configurations(path):
    assert load_config_from_file(str(path)).num_processes == 2


@train_py("BLEU, chrF, ROUGE through evaluate, offline")
def test_the_metric_is_what_its_libraries_say():
    predictions = ["the cat sat on the mat", "a dog", "nothing alike"]
    references = [["the cat sat on a mat", "a cat sat"], ["A dog"], ["quite different words"]]
    got = evaluate.load(train.METRIC).compute(predictions=predictions, references=references)
    streams = [[texts[min(n, len(texts) - 1)] for texts in references] for n in range(2)]
    streams[1][1:] = [None, None]
    assert got["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)
    assert got["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score)
    # By hand: 5 of 6 words in common with the first reference, all of the second row, none of the third.
    assert got["rouge_l"] == pytest.approx(100 * (5 / 6 + 1 + 0) / 3)
    assert RougeScorer(["rougeL"]).score("a b", "a b")["rougeL"].fmeasure == 1
    assert got["exact_match"] == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match=r"references\[0\]"):
        evaluate.load(train.METRIC).compute(predictions=["a"], references=[[]])


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


@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_loop"])
def test_loops_are_short(name):
    assert len((EXAMPLES / "loops" / f"{name}.py").read_text().splitlines()) < 80
