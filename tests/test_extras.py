"""Without extras and groups: scripts and commands answer to --help, and say in one line what to install."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dependency_groups import EXTRAS, GROUPS, PYPROJECT, group

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(
    str(path.relative_to(EXAMPLES))
    for path in EXAMPLES.rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
COMMAND = "peft-input-tuning"
GENERATED = "input_tuning_examples/logic_to_text.py"  # prints rows, and takes no arguments
BROUGHT_BY_EXTRAS = {"datasets", "pandas", "pyarrow"}

# Runs scripts one after the other in one process, which imports torch and transformers once.
RUN = """
import contextlib, io, json, runpy, sys, traceback
from pathlib import Path

calls, blocked = json.loads(sys.argv[1])
for name in blocked:
    sys.modules[name] = None  # importing it raises ImportError, looking it up finds nothing
answers = []
for script, *arguments in calls:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if Path(script).suffix == ".py":
                sys.path.insert(0, str(Path(script).parent))
                runpy.run_path(script, run_name="__main__")
            else:
                from peft_input_tuning.command_line.main import main
                sys.exit(main())
            code = 0
        except SystemExit as end:
            code = 0 if end.code is None else end.code
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def modules_of_extras() -> list[str]:
    """What is imported of the packages that an installation without extras and groups does not bring."""
    # Of the group `all` lightning alone is tried: what others need of themselves is no matter here.
    extras = [r.name for name in ("demo", "embeddings", "benchmark") for r in group(name)] + ["lightning"]
    names = {name.replace("-", "_") for name in extras}
    distributions = packages_distributions()
    names |= {module for module, of in distributions.items() if set(of) & set(extras) and not module.startswith("_")}
    return sorted((names | BROUGHT_BY_EXTRAS) - {"peft_input_tuning"})


def answers(calls: list[list[str]], cwd: Path) -> list[tuple[int, str, str]]:
    calls = [[str(EXAMPLES / script) if script != COMMAND else script, *arguments] for script, *arguments in calls]
    command = [sys.executable, "-c", RUN, json.dumps([calls, modules_of_extras()])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(one) for one in json.loads(done.stdout.splitlines()[-1])]


HELP = [[script] for script in SCRIPTS if script != GENERATED]
HELP += [
    [COMMAND],
    *(
        [COMMAND, command]
        for command in ("export", "to-lora", "grow-base", "inspect", "familiarity", "compare", "run")
    ),
]
# In the folder that `said` makes. `model` has a GGUF file, `data` a task.
MISSING = [
    (["quickstart/quickstart.py"], "evaluate", "demo"),
    (["training/train.py", "--train_data", "rows.jsonl", "--output_dir", "out"], "datasets", "demo"),
    (["serving/many_tasks.py"], "rich", "demo"),
    (["embeddings/embeddings.py"], "sentence_transformers", "embeddings"),
    (["serving/to_gguf.py", "checkpoint", "out.gguf", "--converter", "convert.py"], "gguf", "demo"),
    (["loops/accelerate_loop.py", "--model", "model"], "gguf", "demo"),
    (["loops/lightning_loop.py"], "lightning", "all"),
    (["training/many_at_once.py"], "gguf", "demo"),
    (["training/time_a_row.py"], "gguf", "demo"),
    (["speed/run.py"], "rich", "demo"),
    (["benchmark/familiarity_of_tasks.py", "data", "--model", "model"], "gguf", "demo"),
    (["benchmark/one_run.py", "data", "--task", "e2e", "--method", "lora", "--rate", "1"], "datasets", "benchmark"),
    (["benchmark/run_all.py", "data"], "datasets", "benchmark"),
    (["benchmark/report.py"], "matplotlib", "benchmark"),
    (["benchmark/rescore.py", "data"], "datasets", "benchmark"),
    (["benchmark/seen_inputs.py", "data"], "datasets", "benchmark"),
    (["benchmark/told_facts.py", "data"], "datasets", "benchmark"),
    (["benchmark/run_together.py", "data"], "datasets", "benchmark"),
    (["benchmark/unseen.py", "data"], "datasets", "benchmark"),
    (["benchmark/moved_words.py", "data", "adapter"], "matplotlib", "benchmark"),
    (["benchmark/lower_ranks.py", "data", "adapter"], "datasets", "benchmark"),
    ([COMMAND, "inspect", "adapter"], "rich", "inspect"),
    ([COMMAND, "compare", "one", "another"], "rich", "inspect"),
    ([COMMAND, "familiarity", "rows.jsonl", "--model", "model"], "rich", "inspect"),
    ([COMMAND, "export", "adapter", "plain"], "gguf", "gguf"),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[tuple[str, ...], tuple[int, str, str]]:
    """What each call answers with: status, output, errors. All in one process."""
    folder = tmp_path_factory.mktemp("bare")
    row = '{"source": "f(x)", "references": ["the f of x"]}\n'
    (folder / "rows.jsonl").write_text(row)
    (folder / "data" / "e2e").mkdir(parents=True)
    (folder / "data" / "e2e" / "test.jsonl").write_text(row)
    for name in ("model", "adapter"):
        (folder / name).mkdir()
    (folder / "model" / "model.gguf").touch()
    config = {"peft_type": "INPUT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "model"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter" / "adapter_model.safetensors").touch()
    calls = [[*call, "--help"] for call in HELP] + [call for call, _, _ in MISSING]
    return dict(zip(map(tuple, calls), answers(calls, folder), strict=True))


@pytest.mark.parametrize("call", HELP, ids=" ".join)
def test_help_needs_no_extra(said, call):
    code, out, err = said[(*call, "--help")]
    assert code == 0, err
    assert out.startswith("usage: ")


@pytest.mark.parametrize(("call", "module", "extra"), MISSING, ids=[" ".join(call[:2]) for call, _, _ in MISSING])
def test_a_missing_extra_is_named_in_one_line(said, call, module, extra):
    code, _, err = said[tuple(call)]
    assert code in (1, 2)
    assert "Traceback" not in err
    *_, last = err.splitlines()
    of_clone = f"In a clone: pip install 'pip>=25.1', then pip install --group {extra}"
    remedy = f"Install it with: pip install 'peft-input-tuning[{extra}]'" if call[0] == COMMAND else of_clone
    assert last.endswith(f": {module} is missing. {remedy}")


def test_every_script_is_tried():
    of_vllm = {"serving/measure_vllm.py", "serving/time_in_adapters.py"}  # which is no extra
    tried = {call[0] for call, _, _ in MISSING} | {GENERATED, "benchmark/collect.py"} | of_vllm
    assert tried - {COMMAND} == set(SCRIPTS)


def test_the_extra_or_group_that_is_named_brings_the_module():
    """Each `needs(...)` of the code: its modules belong to packages of its extra, or of an example's group."""
    distributions = packages_distributions()

    def brings(named: str, is_group: bool) -> set[str]:
        assert named in (GROUPS if is_group else EXTRAS)
        own = group(named) if is_group else [Requirement(line) for line in EXTRAS[named]]
        names = {r.name for r in own} | {Requirement(line).name for line in PYPROJECT["project"]["dependencies"]}
        return names | ({"datasets"} if "evaluate" in names else set())

    found = 0
    for path in [*EXAMPLES.rglob("*.py"), *(ROOT / "peft_input_tuning").rglob("*.py")]:
        for extra, modules in re.findall(r'\bneeds\("(\w+)", ((?:"\w+"(?:, )?)+)', path.read_text(encoding="utf-8")):
            for module in re.findall(r'"(\w+)"', modules):
                names = {*distributions.get(module, ()), module.replace("_", "-")}
                is_group = EXAMPLES in path.parents
                assert names & brings(extra, is_group), f"{path.name}: {extra} does not bring {module}"
                found += 1
    assert found > 10
