"""What the README says is run: its examples, its table, what it says of prompt-tuning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from adapters import adapted, config, randomize
from device import DEVICE
from families import FAMILIES, PAD, VOCAB, build, ids, padded
from peft_input_tuning import InputTuningConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LLAMA = FAMILIES["llama"]


def blocks(language: str) -> list[tuple[int, str]]:
    """The README's blocks of code and the lines that they start at."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [(README.count("\n", 0, block.start(1)), block[1]) for block in found]


def save_tiny_model(folder: Path) -> None:
    """A tiny Llama with a tokenizer of words: what stands in for a model of the hub."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    build("llama").save_pretrained(folder)


def save_adapter(model_folder: Path, folder: str, adapter: peft.PeftConfig) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(model, adapter)
    randomize(model)
    model.save_pretrained(folder)


def test_the_examples_run_in_order_in_one_session(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_folder = tmp_path / "model"
    save_tiny_model(model_folder)
    save_adapter(model_folder, "another-adapter", config(LLAMA, num_virtual_tokens=7))
    save_adapter(model_folder, "my-prompt-tuning", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    rows = [{"input_ids": row, "labels": row} for row in ids(16, 6).tolist()]
    names = {"train_dataset": rows}
    after = {}
    for line, source in blocks("python"):
        source = source.replace(HUB_ID, str(model_folder))
        exec(compile("\n" * line + source, str(ROOT / "README.md"), "exec"), names)
        after[line] = names["model"]

    trained, loaded, from_prompt, mixed, exported = after.values()
    assert not torch.equal(
        *(m.get_input_embeddings().input_tuning_fc2["default"].weight.cpu() for m in (trained, from_prompt))
    )
    row = ids(2, 6).to(trained.device)
    trained.eval()
    assert_close(loaded(input_ids=row.cpu()).logits, trained(input_ids=row).logits.cpu(), atol=2e-4, rtol=1e-3)
    prompt_tuned = AutoPeftModelForCausalLM.from_pretrained("my-prompt-tuning").eval()
    want = prompt_tuned(input_ids=row.cpu()).logits[:, 5:]
    assert_close(from_prompt.eval()(input_ids=row.cpu()).logits, want, atol=2e-4, rtol=1e-3)
    assert sorted(mixed.peft_config) == ["another", "default"]
    plain = transformers.AutoModelForCausalLM.from_pretrained("my-checkpoint").eval()
    virtual = torch.arange(VOCAB, VOCAB + 20).expand(2, -1)
    logits = plain(input_ids=torch.cat([virtual, row.cpu()], 1)).logits[:, 20:, :VOCAB]
    assert_close(exported.eval()(input_ids=row.cpu()).logits, logits, atol=2e-4, rtol=1e-3)
    assert "w" in capsys.readouterr().out


def test_the_swap_is_short():
    (_, swap), *_ = blocks("python")
    assert "PromptTuningConfig(...)" in swap
    assert len([line for line in swap.splitlines() if line.strip()]) <= 15


def test_the_table_of_what_works_where_is_what_the_tests_say():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compatibility.py"), "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_fields_has_the_defaults():
    said = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", README, re.MULTILINE))
    defaults = InputTuningConfig()
    assert {"num_virtual_tokens", "adapter_hidden_dim", "adapter_activation"} <= set(said)
    for name, value in said.items():
        default = getattr(defaults, name)
        default = getattr(default, "value", default)
        assert value.strip("`") in (str(default), f'"{default}"'), name


# ---- what differs from prompt-tuning --------------------------------------------------------------------------------

NEW = 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
VERSIONS = re.search(r"As seen with PEFT\s+([\d.]+) and transformers ([\d.]+)", README)
of_these_versions = pytest.mark.skipif(
    VERSIONS is None or VERSIONS.groups() != (peft.__version__, transformers.__version__),
    reason="the README speaks of other versions of PEFT and transformers",
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
    return torch.equal(model.generate(input_ids=row, **GREEDY, **options), model.generate(input_ids=row, **GREEDY))


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
    assert is_greedy(model, cache_implementation="static")
    assert is_greedy(model, prefill_chunk_size=3)
    assert is_greedy(model, assistant_model=build(LLAMA))
