"""Each way to serve an adapter in vLLM writes the tokens of `PeftModel.generate`: adapters trained on real weights."""

from __future__ import annotations

import random

import pytest
import torch
from prepare import BASE, NEW

pytestmark = pytest.mark.vllm
NUMBERS = {"e2e": 1, "overnight": 2}


def engine(model, **settings):
    from vllm import LLM

    return LLM(str(model), **{"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, **settings})


def greedy(**changes):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": NEW, **changes})


def lora(prepared, name):
    from vllm.lora.request import LoRARequest

    return None if name == BASE else LoRARequest(name, NUMBERS[name], str(prepared / name))


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def native(prepared):
    llm = engine(prepared / "base", enable_lora=True, lora_target_modules=["embed_tokens"], max_loras=2)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def mixed(wanted) -> list[dict]:
    """Rows of two adapters and of the base, plain and chat, in an order without a pattern."""
    rows = [row for row in wanted if row["adapter"] != "input-only"]
    random.Random(0).shuffle(rows)
    assert len(rows) >= 100
    return rows


def of_ids(rows) -> list[dict]:
    return [{"prompt_token_ids": row["prompt"]} for row in rows]


def test_adapters_differ_from_the_base(wanted):
    """Otherwise equal tokens would say nothing."""
    by_text: dict[str, dict] = {}
    for row in wanted:
        by_text.setdefault(row["kind"] + row["text"], {})[row["adapter"]] = row["wanted"]
    both = [found for found in by_text.values() if {"overnight", BASE} <= found.keys()]
    assert len(both) >= 20
    assert sum(found["overnight"] != found[BASE] for found in both) > 0.9 * len(both)


def test_a_mixed_batch_of_adapters_and_base_rows(native, prepared, mixed):
    out = native.generate(of_ids(mixed), greedy(), lora_request=[lora(prepared, row["adapter"]) for row in mixed])
    assert tokens(out) == [row["wanted"] for row in mixed]


def test_texts_and_chats_get_their_virtual_tokens(native, prepared, mixed):
    for kind, run in (("plain", "generate"), ("chat", "chat")):
        rows = [row for row in mixed if row["kind"] == kind][:12]
        plain = [row["text"] + "\n" for row in rows]
        inputs = plain if kind == "plain" else [[{"role": "user", "content": row["text"]}] for row in rows]
        out = getattr(native, run)(inputs, greedy(), lora_request=[lora(prepared, row["adapter"]) for row in rows])
        assert tokens(out) == [row["wanted"] for row in rows]
        lengths = {"e2e": 8, "overnight": 20, BASE: 0}
        for row, one in zip(rows, out, strict=True):
            assert len(one.prompt_token_ids) == lengths[row["adapter"]] + len(row["prompt"])


def test_prompts_are_cached_for_each_adapter(native, prepared, mixed):
    """The same ids under another adapter must not find this one's keys and values."""
    ids = [5, 6, 7, 8] * 60  # a whole block of 128, which is what vLLM caches on a CPU
    requests = [{"prompt_token_ids": ids}] * 3
    names = ["e2e", "overnight", BASE]
    first = native.generate(requests, greedy(), lora_request=[lora(prepared, name) for name in names])
    again = native.generate(requests, greedy(), lora_request=[lora(prepared, name) for name in names])
    assert tokens(again) == tokens(first)
    assert len({tuple(one) for one in tokens(first)}) == 3
    assert all(output.num_cached_tokens > 0 for output in again)


def test_penalties_leave_virtual_tokens_out(native, prepared, mixed):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = [row for row in mixed if row["adapter"] == "e2e"][:4]
    out = native.generate(of_ids(rows), greedy(repetition_penalty=1.3), lora_request=lora(prepared, "e2e"))
    base = AutoModelForCausalLM.from_pretrained(prepared / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, prepared / "e2e").eval()
    for row, got in zip(rows, tokens(out), strict=True):
        ids = torch.tensor([row["prompt"]])
        want = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, repetition_penalty=1.3)
        assert got == want[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [("input-only", {}, "prompt_embeds"), ("e2e", {"prompt_logprobs": 1}, "prompt_logprobs")],
)
def test_what_cannot_be_is_refused_and_the_engine_lives(native, prepared, mixed, name, settings, said):
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    request = LoRARequest(name, NUMBERS.get(name, 3), str(prepared / name))
    with pytest.raises(VLLMValidationError, match=said):
        native.generate([{"prompt_token_ids": [1, 2, 3]}], greedy(**settings), lora_request=request)
    row = mixed[0]
    out = native.generate(of_ids([row]), greedy(), lora_request=lora(prepared, row["adapter"]))
    assert tokens(out) == [row["wanted"]]


def test_the_exported_folder(prepared, wanted):
    """Virtual tokens stand in its tokenizer and template, and `suppress_tokens` bans them."""
    llm = engine(prepared / "exported")
    try:
        rows = [row for row in wanted if row["adapter"] == "e2e"]
        plain, chats = ([row for row in rows if row["kind"] == kind] for kind in ("plain", "chat"))
        got = tokens(llm.generate([row["text"] + "\n" for row in plain], greedy()))
        got += tokens(llm.chat([[{"role": "user", "content": row["text"]}] for row in chats], greedy()))
        assert got == [row["wanted"] for row in plain + chats]
        virtual = list(range(49152, 49160))
        forced = greedy(max_tokens=4, logit_bias=dict.fromkeys(virtual, 100.0))
        assert not set(virtual) & set(tokens(llm.generate([plain[0]["text"]], forced))[0])
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_prompt_embeds_for_adapters_of_the_input(prepared, wanted):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from peft_input_tuning.engines import embeds_prompts

    base = AutoModelForCausalLM.from_pretrained(prepared / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, prepared / "input-only").eval()
    rows = [row for row in wanted if row["adapter"] == "input-only"]
    assert len(rows) >= 30
    llm = engine(prepared / "base", enable_prompt_embeds=True)
    try:
        base_rows = [row for row in wanted if row["adapter"] == BASE][:10]
        out = llm.generate(embeds_prompts(model, [row["prompt"] for row in rows]) + of_ids(base_rows), greedy())
        assert tokens(out) == [row["wanted"] for row in rows + base_rows]
    finally:
        llm.llm_engine.engine_core.shutdown()


def tiny(family):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "eos_token_id": 319,
        "max_position_embeddings": 256,
    }
    if family == "Gemma 3":  # multiplies embeddings by the root of their size
        model = Gemma3ForCausalLM(Gemma3TextConfig(head_dim=32, **sizes))
        model.get_input_embeddings().weight.data.mul_(0.1)  # or the tied head repeats the last word
        return model
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=family == "Qwen 2, tied", **sizes))


@pytest.mark.parametrize("family", ["Gemma 3", "Qwen 2", "Qwen 2, tied"])
def test_other_families(family, tmp_path):
    from peft import get_peft_model
    from vllm.lora.request import LoRARequest

    from peft_input_tuning import InputTuningConfig

    torch.manual_seed(0)
    base = tiny(family)
    base.save_pretrained(tmp_path / "base")
    config = InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, adapter_hidden_dim=16, init_weights=False)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "input_tuning_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    prompts = [torch.randint(0, 319, (1, length)) for length in (3, 9, 20, 33)]
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = [model.generate(input_ids=ids, **how)[0, ids.shape[1] :].tolist() for ids in prompts]
    with model.disable_adapter():
        of_base = [model.generate(input_ids=ids, **how)[0, ids.shape[1] :].tolist() for ids in prompts]
    assert all(a != b for a, b in zip(want, of_base, strict=True))
    lora = {"enable_lora": True, "lora_target_modules": ["embed_tokens"], "max_loras": 1}
    llm = engine(tmp_path / "base", skip_tokenizer_init=True, **{**lora, "max_model_len": 128})
    try:
        requests = [{"prompt_token_ids": ids[0].tolist()} for ids in prompts]
        loras = [LoRARequest("a", 1, str(tmp_path / "adapter"))] * 4 + [None] * 4
        out = llm.generate(requests * 2, greedy(max_tokens=12, detokenize=False), lora_request=loras)
        assert tokens(out) == want + of_base
    finally:
        llm.llm_engine.engine_core.shutdown()
