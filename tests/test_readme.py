"""What README and docs say is run: their examples, their tables, what they say of prompt-tuning."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model
from torch.testing import assert_close

from adapters import adapted, config, randomize
from device import DEVICE
from families import FAMILIES, PAD, build, ids, padded
from input_tuning_examples import logic_to_text
from peft_input_tuning import InputTuningConfig, create_input_tuning_optimizer

ROOT = Path(__file__).parent.parent
CONFIGURATION = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
DIFFERENCES = (ROOT / "docs" / "prompt-tuning.md").read_text(encoding="utf-8")
NAME = 'name = "HuggingFaceTB/SmolLM2-135M-Instruct"\n'  # replaced by a tiny model's, since no hub is at hand
LLAMA = FAMILIES["llama"]
# The blocks that are not run here, by what they hold, and why not.
NOT_RUN = {
    "import xllamacpp": "llama.cpp is no dependency: tests/engines does what the block does",
    "embeds_base64(": "vLLM is no dependency: tests/serving and tests/test_prompt_embeds.py do what the block does",
    "torch.onnx.export(": "onnxruntime is no dependency: tests/engines does what the block does",
}


def blocks(path: str, language: str = "python") -> list[tuple[int, str]]:
    """A text's blocks of code and the lines that they start at."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def run(path: str, block: tuple[int, str], names: dict[str, Any]) -> None:
    """Executes a block as it stands in the text; errors have its line."""
    line, source = block
    exec(compile("\n" * line + source, str(ROOT / path), "exec"), names)


def save_adapter(model_folder: Path, folder: str, adapter: peft.PeftConfig) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(model, adapter)
    randomize(model)
    model.save_pretrained(folder)


def rates(trainer: transformers.Trainer) -> dict[str, float]:
    """How fast each part moves at the start: the prompt's parameter is the prompt divided by `prompt_scale`."""
    scales = {"prompt": trainer.model.peft_config["default"].prompt_scale}
    groups = trainer.optimizer.param_groups
    return {group["name"]: group["initial_lr"] * scales.get(group["name"], 1) for group in groups}


@pytest.fixture
def session(tiny_model, tmp_path, monkeypatch) -> dict[str, Any]:
    """Names as in a new Python, in a folder with what the README speaks of."""
    monkeypatch.chdir(tmp_path)
    rows = logic_to_text.make_splits(180, 1, 1)["train"]
    lines = [json.dumps({"source": row.source, "references": [row.reference]}) for row in rows]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_adapter(tiny_model, "another-adapter", config(LLAMA, num_virtual_tokens=7))
    save_adapter(tiny_model, "my-prompt-tuning", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    return {}


@pytest.fixture
def quickstart(tiny_model) -> tuple[int, str]:
    """The README's first block, with a model that is there."""
    line, source = blocks("README.md")[0]
    assert source.count(NAME) == 1
    return line, source.replace(NAME, f"name = {str(tiny_model)!r}\n")


def test_the_quickstart_trains_saves_and_loads(session, quickstart, capsys):
    _, loading = blocks("README.md")
    run("README.md", quickstart, session)
    trained, trainer = session["model"].eval(), session["trainer"]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) > 2
    assert losses[-1] < losses[0] - 0.3
    (validation,) = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert validation < losses[0] - 0.3
    batch = trainer.data_collator(session["rows"][:3])
    for row, labels in zip(session["rows"], batch["labels"].tolist(), strict=False):
        assert [label for label in labels if label != -100] == row["input_ids"][row["labels"].count(-100) :]
    assert rates(trainer) == pytest.approx({"adapter": 3e-3, "prompt": 3e-2})

    fresh: dict[str, Any] = {}  # as in another process
    run("README.md", loading, fresh)
    row = ids(2, 6).cpu()  # where the blocks load their models
    assert_close(fresh["model"](input_ids=row).logits, trained.cpu()(input_ids=row).logits, atol=2e-4, rtol=1e-3)
    assert "sort(releaseDate asc of MusicRecording())[1]" in capsys.readouterr().out


def test_the_examples_run_in_order_in_one_session(session, quickstart):
    run("README.md", quickstart, session)
    after = [session["model"]]
    loading, mixing = blocks("docs/using.md")
    (starting,) = blocks("docs/prompt-tuning.md")
    exporting, serving, *_ = blocks("docs/serving.md")
    using, prompts, export = "docs/using.md", "docs/prompt-tuning.md", "docs/serving.md"
    for path, block in ((using, loading), (prompts, starting), (using, mixing), (export, exporting)):
        run(path, block, session)
        after.append(session["model"])
    trained, _, from_prompt, mixed, exported = after
    assert not torch.equal(
        *(m.get_input_embeddings().input_tuning_fc2["default"].weight.cpu() for m in (trained, from_prompt))
    )
    row = ids(2, 6).cpu()  # where the blocks load their models
    prompt_tuned = AutoPeftModelForCausalLM.from_pretrained("my-prompt-tuning").eval()
    want = prompt_tuned(input_ids=row).logits[:, 5:]
    assert_close(from_prompt.eval()(input_ids=row).logits, want, atol=2e-4, rtol=1e-3)
    assert sorted(mixed.peft_config) == ["another", "default"]
    plain = transformers.AutoModelForCausalLM.from_pretrained("my-checkpoint").eval()
    words = plain.config.vocab_size - 20
    virtual = torch.arange(words, words + 20).expand(2, -1)
    logits = plain(input_ids=torch.cat([virtual, row], 1)).logits[:, 20:, :words]
    assert_close(exported.eval()(input_ids=row).logits, logits, atol=2e-4, rtol=1e-3)

    run("docs/serving.md", serving, session)
    assert_close(session["model"](input_ids=torch.cat([virtual, row], 1)).logits[:, 20:, :words], logits)


def test_the_example_of_a_lora(session, tiny_model):
    shutil.copytree(tiny_model, "my-base")
    save_adapter(tiny_model, "my-adapter", config(LLAMA, num_virtual_tokens=20))
    names = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "AutoTokenizer")}
    (lora,) = (block for block in blocks("docs/serving.md") if "save_as_lora(" in block[1])
    run("docs/serving.md", lora, names)
    ids = names["tokenizer"]("sort(count asc of Book())", return_tensors="pt").input_ids
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted_base = peft.PeftModel.from_pretrained(base, "my-adapter").eval()
    with torch.no_grad():
        logits = names["model"].eval()(input_ids=ids).logits[:, 20:, :400]
        assert_close(logits, adapted_base(input_ids=ids[:, 20:]).logits, atol=2e-4, rtol=1e-3)


def test_the_examples_of_training(session, tiny_model):
    """They go on from a script that is there: its names are made here."""
    trl = pytest.importorskip("trl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 6).tolist()]
    few = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}

    def base() -> torch.nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(tiny_model)

    groups, sft, many = blocks("docs/training.md")
    model = get_peft_model(base(), InputTuningConfig(task_type="CAUSAL_LM"))
    trainer = partial(transformers.Trainer, train_dataset=rows)  # the block has no data
    names = {"torch": torch, "model": model, "Trainer": trainer, "arguments": transformers.TrainingArguments(**few)}
    run("docs/training.md", groups, names)
    names["trainer"].train()
    assert rates(names["trainer"]) == pytest.approx({"adapter": 3e-3, "prompt": 3e-2})

    names = {
        "torch": torch,
        "model": base(),
        "get_peft_model": get_peft_model,
        "InputTuningConfig": InputTuningConfig,
        "create_input_tuning_optimizer": create_input_tuning_optimizer,
        "SFTTrainer": trl.SFTTrainer,
        "arguments": trl.SFTConfig(**few, bf16=False, max_length=32),
        "rows": Dataset.from_list([{"text": "sort(count asc of Book())"}] * 4),
        "tokenizer": tokenizer,
    }
    run("docs/training.md", sft, names)
    names["trainer"].train()
    assert rates(names["trainer"]) == pytest.approx({"adapter": 3e-3, "prompt": 3e-2})

    both = [{**row, "adapter_name": name} for row in rows for name in ("e2e", "dart")]
    settings = {**few, "eval_strategy": "steps", "eval_steps": 1}
    names |= {"model": base(), "arguments": transformers.TrainingArguments("many", **settings), "rows": both[:-4]}
    run("docs/training.md", many, {**names, "held_out": both[-4:]})
    for name, length in (("e2e", 20), ("dart", 10)):
        loaded = AutoPeftModelForCausalLM.from_pretrained(f"many/{name}", adapter_name=name)
        assert loaded.peft_config[name].num_virtual_tokens == length


def test_every_block_is_run_or_has_a_reason_not_to_be():
    by_tests_above = {
        "README.md": 2,
        "docs/prompt-tuning.md": 1,
        "docs/serving.md": 3,
        "docs/training.md": 3,
        "docs/using.md": 2,
    }
    pages = ["README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
    sources = [(page, source) for page in pages for _, source in blocks(page)]
    left = [path for path, source in sources if not any(mark in source for mark in NOT_RUN)]
    assert Counter(left) == by_tests_above
    assert all(any(mark in source for _, source in sources) for mark in NOT_RUN)


def test_the_readme_is_short():
    (_, quickstart), *_ = blocks("README.md")
    assert len([line for line in quickstart.splitlines() if line.strip()]) <= 36
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_table_of_what_works_where_is_what_the_tests_say():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compatibility.py"), "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_fields_has_the_defaults():
    said = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", CONFIGURATION, re.MULTILINE))
    defaults = InputTuningConfig()
    assert {"num_virtual_tokens", "adapter_hidden_dim", "adapter_activation"} <= set(said)
    for name, value in said.items():
        default = getattr(defaults, name)
        default = getattr(default, "value", default)
        assert value.strip("`") in (str(default), f'"{default}"'), name


# ---- what differs from prompt-tuning --------------------------------------------------------------------------------

NEW = 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
VERSIONS = re.search(r"As seen with PEFT\s+([\d.]+) and transformers ([\d.]+)", DIFFERENCES)
of_these_versions = pytest.mark.skipif(
    VERSIONS is None or VERSIONS.groups() != (peft.__version__, transformers.__version__),
    reason="docs/prompt-tuning.md speaks of other versions of PEFT and transformers",
)


def prompt_tuned() -> peft.PeftModel:
    model = get_peft_model(build(LLAMA), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.3)
    return model


def input_tuned() -> peft.PeftModel:
    return adapted(LLAMA)[0]


def left_padding_changes_a_row(model: peft.PeftModel) -> bool:
    row = ids(4, seed=1)
    batch, mask = padded([ids(9), row], "left")
    alone = model(input_ids=row[None], attention_mask=torch.ones(1, 4, dtype=torch.long, device=DEVICE)).logits[0, -4:]
    in_batch = model(input_ids=batch, attention_mask=mask).logits[1, -4:]
    return not torch.allclose(in_batch, alone, atol=2e-4, rtol=1e-3)


def is_greedy(model: peft.PeftModel, **options) -> bool:
    row = ids(1, 7)
    want = model.generate(input_ids=row, **GREEDY, use_cache=False)
    return torch.equal(model.generate(input_ids=row, **GREEDY, **options), want)


@of_these_versions
def test_prompt_tuning_is_as_the_readme_says():
    model, names = prompt_tuned(), ["default", "__base__"]
    row = ids(2, 7)
    logits = model(input_ids=row).logits
    assert logits.shape[1] == 11
    assert left_padding_changes_a_row(model)
    assert torch.equal(model(input_ids=row, adapter_names=names).logits, logits)
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(input_ids=row, adapter_names=names, **GREEDY)
    with pytest.raises(KeyError):
        model.generate(input_ids=row, cache_implementation="static", **GREEDY)
    assert not is_greedy(model)
    assert not is_greedy(model, prefill_chunk_size=3)
    assert not is_greedy(model, assistant_model=build(LLAMA))


def test_input_tuning_is_as_the_readme_says():
    model, names = input_tuned(), ["default", "__base__"]
    row = ids(2, 7)
    assert model(input_ids=row).logits.shape[1] == 7
    assert not left_padding_changes_a_row(model)
    mixed = model(input_ids=row, adapter_names=names).logits[1]
    assert_close(mixed, build(LLAMA)(input_ids=row).logits[1], atol=2e-4, rtol=1e-3)
    assert model.generate(input_ids=row, adapter_names=names, **GREEDY).shape == (2, 7 + NEW)
    assert is_greedy(model)
    assert is_greedy(model, cache_implementation="static")
    assert is_greedy(model, prefill_chunk_size=3)
    assert is_greedy(model, assistant_model=build(LLAMA))


def test_the_readme_says_when_transformers_asks_for_a_newer_peft(peft_asked_for):
    asked = f"transformers {transformers.__version__} asks for PEFT {peft_asked_for}, which is not released"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (asked in readme) == (Version(peft_asked_for) > Version(peft.__version__))
