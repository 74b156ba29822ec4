"""The folders for PEFT's method comparison: what they hold, and a run of PEFT's own script on a tiny model."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "examples" / "benchmark" / "metamathqa" / "experiments" / "input_tuning"
NAMES = sorted(path.name for path in EXPERIMENTS.iterdir())
CHECKOUT = Path(os.environ.get("PEFT_CHECKOUT", ROOT.parent / "peft"))
RUNNER = CHECKOUT / "method_comparison" / "MetaMathQA"

# Imported by Python when it starts: data that no network brings, and what the runner asks of a GPU's memory.
STUBS = """
import datasets, torch

for name in ("max_memory_reserved", "memory_allocated", "memory_reserved"):
    setattr(torch.cpu, name, lambda: 0)
for name in ("reset_peak_memory_stats", "empty_cache"):
    setattr(torch.cpu, name, lambda: None)
torch.cpu.manual_seed_all = torch.manual_seed
torch.cpu.get_device_name = lambda number: "a CPU"

def load_dataset(name, *args, **kwargs):
    sums = [(f"What is {n} plus 1?", f"It is {n + 1}. The answer is: {n + 1}") for n in range(60)]
    if "finewiki" in name:
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": f"The number {n}."} for n in range(9)]))
    if "MetaMath" in name:
        return {"train": datasets.Dataset.from_list(
            [{"query": q, "response": r, "type": "x", "original_question": q} for q, r in sums])}
    rows = [{"question": q, "answer": f"{r}\\n#### {n + 1}"} for n, (q, r) in enumerate(sums)]
    return datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:4]))

datasets.load_dataset = load_dataset
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_starts_a_training(name):
    """`weights_in_checkpoint`, which `save_pretrained` writes, would leave the weights to a file that is not there."""
    config = PeftConfig.from_pretrained(str(EXPERIMENTS / name))
    assert config.peft_type.value == "INPUT_TUNING"
    assert config.task_type == "CAUSAL_LM"
    assert not config.weights_in_checkpoint
    assert config.base_model_name_or_path is None
    assert config.prompt_scale == 8.0


def test_one_experiment_is_the_default_and_one_is_not():
    assert NAMES == ["llama-3.2-3B-default", "llama-3.2-3B-tokens50-h256-text_init-lr_0.001"]
    default, tuned = (PeftConfig.from_pretrained(str(EXPERIMENTS / name)) for name in NAMES)
    assert default.to_dict() == type(default)(task_type="CAUSAL_LM").to_dict() | {"base_model_name_or_path": None}
    assert not (EXPERIMENTS / NAMES[0] / "training_params.json").exists()
    assert (tuned.num_virtual_tokens, tuned.adapter_hidden_dim) == (50, 256)
    parameters = json.loads((EXPERIMENTS / NAMES[1] / "training_params.json").read_text())
    assert parameters == {"optimizer_kwargs": {"lr": 1e-3, "weight_decay": 0.0}}


def test_the_page_has_the_numbers_of_trained_parameters():
    page = (EXPERIMENTS.parents[1] / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        config = PeftConfig.from_pretrained(str(EXPERIMENTS / name))
        hidden = config.adapter_hidden_dim or 2 * 3072
        number = 3072 * config.num_virtual_tokens + 2 * 3072 * hidden
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert f" {number:,} |" in row


@pytest.mark.slow
@pytest.mark.skipif(
    not (RUNNER / "run.py").is_file(),
    reason="no checkout of huggingface/peft: PEFT_CHECKOUT names its folder, by default one beside this clone",
)
@pytest.mark.parametrize("name", NAMES)
def test_pefts_own_runner_takes_the_folder(name, tiny_model, tmp_path):
    """On the CPU, two steps, made-up rows. PEFT's script is as it is, but for the line that lets GPUs only in."""
    comparison = tmp_path / "MetaMathQA"
    shutil.copytree(RUNNER, comparison, ignore=shutil.ignore_patterns("experiments", "*results"))
    (comparison / "results").mkdir()
    utils = (comparison / "utils.py").read_text()
    assert utils.count('["cuda", "xpu"]') == 1
    (comparison / "utils.py").write_text(utils.replace('["cuda", "xpu"]', '["cuda", "xpu", "cpu"]'))
    experiment = comparison / "experiments" / "input_tuning" / name
    shutil.copytree(EXPERIMENTS / name, experiment)
    parameters = experiment / "training_params.json"
    own = json.loads(parameters.read_text()) if parameters.exists() else {}
    sizes = {"max_steps": 2, "eval_steps": 1, "batch_size": 2, "batch_size_eval": 25, "max_seq_length": 120}
    sizes |= {"generation_kwargs": {"max_length": 130, "max_new_tokens": 2}}
    parameters.write_text(json.dumps(own | sizes | {"model_id": str(tiny_model), "dtype": "float32"}))
    adapter = experiment / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace("meta-llama/Llama-3.2-3B", str(tiny_model)))
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "sitecustomize.py").write_text(STUBS)
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=tmp_path, check=True)
    git = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", *git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "stubs"), str(ROOT), os.environ["PYTHONPATH"]]),
        "GIT_DIR": str(tmp_path / ".git"),  # it asks for the branch of the PEFT that is imported
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    # -O: without the assertion that the base reads Wikipedia well, which a random model does not.
    command = [sys.executable, "-O", "-m", "peft_input_tuning", "run", "run.py", "-v", "--clean"]
    done = subprocess.run(
        [*command, f"experiments/input_tuning/{name}"],
        cwd=comparison,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = comparison.glob("*results/*.json")
    report = json.loads(written.read_text())
    assert report["train_info"]["status"] == "success", report["run_info"]["error_msg"]
    *steps, last = report["train_info"]["metrics"]
    assert [one["step"] for one in steps] == [1, 2]
    assert all(math.isfinite(one["train loss"]) for one in steps)
    assert math.isfinite(last["forgetting"])
    assert last["test accuracy"] >= 0.0
    config = PeftConfig.from_pretrained(str(EXPERIMENTS / name))
    hidden = config.adapter_hidden_dim or 2 * 32
    assert report["train_info"]["num_trainable_params"] == 32 * config.num_virtual_tokens + 2 * 32 * hidden
    assert report["run_info"]["peft_config"]["peft_type"] == "INPUT_TUNING"
