"""Trained adapters, prompts, and what `PeftModel.generate` writes for them, in a folder: the oracle of these tests.

A program of its own, since vLLM's threads and transformers' get in each other's way:

    python tests/serving/prepare.py FOLDER DATA

    base/              SmolLM2-135M-Instruct in float32, as a folder
    e2e/ overnight/    adapters trained for a few steps on tasks of DATA, of different sizes, activations and prompts
    input-only/        one with adapter_scope="input"
    exported/          e2e as a plain checkpoint
    wanted.json        rows: adapter, kind ("plain" or "chat"), text, prompt ids, and the tokens of PeftModel.generate
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from input_tuning_examples.task_data import Example, read_json_lines
from input_tuning_examples.train_and_generate import encode_source
from peft_input_tuning import InputTuningConfig, export_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from trained import packaged, train

NEW = 24
STEPS = 40
PLAIN, CHATS = 30, 20  # prompts of each adapter
CLEAR = 1e-3  # a prompt is left out if two words are closer anywhere: rounding would decide
ADAPTERS = {
    "e2e": ("e2e", {"num_virtual_tokens": 8, "adapter_hidden_dim": 64}),
    "overnight": ("overnight", {"num_virtual_tokens": 20, "adapter_activation": "gelu", "adapter_bias": True}),
    "input-only": ("overnight", {"num_virtual_tokens": 5, "adapter_hidden_dim": 32, "adapter_scope": "input"}),
}
BASE = "__base__"


def write_base(folder: Path) -> None:
    """As a plain folder: vLLM does not read the package's GGUF file."""
    model, tokenizer = packaged()
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_adapter(
    base: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Example], folder: Path, **settings
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, InputTuningConfig(task_type="CAUSAL_LM", **settings))
    print(folder.name, "loss", train(model, tokenizer, rows, STEPS), flush=True)
    model.save_pretrained(folder)


def prompts_of(tokenizer: PreTrainedTokenizerBase, rows: list[Example]) -> list[dict]:
    """Plain texts as the tasks have them, and the same as chats."""
    texts = [row.source for row in random.Random(1).sample(rows, PLAIN + CHATS)]
    plain = [{"kind": "plain", "text": text, "prompt": encode_source(tokenizer, text)} for text in texts[:PLAIN]]
    chats = []
    for text in texts[PLAIN:]:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        chats.append({"kind": "chat", "text": text, "prompt": list(ids)})
    return plain + chats


@torch.no_grad()
def answered(model: PeftModel, adapter: str, prompts: list[dict]) -> list[dict]:
    """The prompts with what the adapter writes; without those whose words are close."""
    done = []
    for prompt in prompts:
        ids = torch.tensor([prompt["prompt"]])
        settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        names = {} if adapter == "input-only" else {"adapter_names": [adapter]}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=2, **settings, **names)
        best = torch.stack(out.logits)[:, 0].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > CLEAR:
            wanted = out.sequences[0, ids.shape[1] :].tolist()
            logprobs = [float(step[0].log_softmax(-1).max()) for step in out.logits]
            done.append({"adapter": adapter, **prompt, "wanted": wanted, "logprobs": logprobs})
    return done


def main(folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    write_base(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tasks = {
        task: [read_json_lines(str(data / task / f"{split}.jsonl"), "DATA") for split in ("train", "test")]
        for task in ("e2e", "overnight")
    }
    for name, (task, settings) in ADAPTERS.items():
        train_adapter(folder / "base", tokenizer, tasks[task][0], folder / name, **settings)
    rows = []
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "e2e", adapter_name="e2e")
    model.load_adapter(folder / "overnight", adapter_name="overnight")
    model.eval()
    for name, task in (("e2e", "e2e"), ("overnight", "overnight"), (BASE, "overnight")):
        rows += answered(model, name, prompts_of(tokenizer, tasks[task][1]))
    export_model(model, folder / "exported", tokenizer, adapter_name="e2e")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "input-only").eval()
    rows += answered(model, "input-only", prompts_of(tokenizer, tasks["overnight"][1]))
    (folder / "wanted.json").write_text(json.dumps(rows), encoding="utf-8")
    print({name: sum(row["adapter"] == name for row in rows) for name in (*ADAPTERS, BASE)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
