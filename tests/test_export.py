"""Exported = adapted: the plain checkpoint gives the same logits and tokens, without this package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from adapters import adapted, add, config, randomize
from device import DEVICE, on_device
from families import ALL, DECODERS, FAMILIES, GENERATORS, PAD, build, ids, padded
from oracles import encoder_of, greedy, row_output, transform
from peft_input_tuning import export_model
from peft_input_tuning.export.state import folded_table
from tokenizers_of_families import tokenizer_of

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
each_generator = pytest.mark.parametrize("family", GENERATORS, ids=str)


def exported(family, tmp_path, head="lm", **changes):
    model, base, weights = adapted(family, head, **changes)
    report = export_model(model, tmp_path / "plain")
    plain = type(base).from_pretrained(tmp_path / "plain").eval().to(DEVICE)
    plain.generation_config.eos_token_id = None
    return model, base, weights, plain, torch.tensor(report.virtual_token_ids, dtype=torch.long, device=DEVICE)


@pytest.mark.feature("export")
@pytest.mark.parametrize(
    "adapter", [{}, {"num_virtual_tokens": 0}, {"adapter_hidden_dim": 0}], ids=["both", "adapter", "prompt"]
)
@each_generator
def test_logits(family, adapter, tmp_path):
    _, base, weights, plain, virtual = exported(family, tmp_path, **adapter)
    row = ids(7)
    more = {"decoder_input_ids": ids(1, 5, seed=9)} if family.kind == "seq2seq" else {}
    out = plain(input_ids=torch.cat([virtual, row])[None], **more).logits[0, :, : base.config.vocab_size]
    out = out if family.kind == "seq2seq" else out[len(virtual) :]
    assert_close(out, row_output(base, weights, row, **more), **TOLERANCE)


@pytest.mark.feature("export")
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static cache"],
)
@each_generator
def test_generated_tokens(family, options, tmp_path):
    model, base, weights, plain, virtual = exported(family, tmp_path)
    rows = [ids(n, seed=n) for n in (7, 4, 9)]
    side = "right" if family.kind == "seq2seq" else "left"
    batch, mask = padded(rows, side)
    long, long_mask = padded([torch.cat([virtual, row]) for row in rows], side)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, **options}
    want = model.generate(input_ids=batch, attention_mask=mask, **options)
    out = plain.generate(input_ids=long, attention_mask=long_mask, **options)
    start = 1 if family.kind == "seq2seq" else None
    want = want[:, start or batch.shape[1] :]
    out = out[:, start or long.shape[1] :]
    assert not torch.isin(out, virtual).any()
    assert torch.equal(out, want)
    if "num_beams" not in options:
        assert torch.equal(want[0], greedy(base, weights, rows[0], 6))


@pytest.mark.feature("export")
@each_generator
def test_sampling_with_a_seed(family, tmp_path):
    """Against a loop: the model with the adapter draws among fewer words, so its random numbers fall elsewhere."""
    _, base, weights, plain, virtual = exported(family, tmp_path)
    rows = [ids(n, seed=n) for n in (7, 4)]
    long, mask = padded([torch.cat([virtual, row]) for row in rows], "right" if family.kind == "seq2seq" else "left")
    torch.manual_seed(3)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": True, "top_k": 0, "pad_token_id": PAD}
    out = plain.generate(input_ids=long, attention_mask=mask, **options)[:, -5:]
    torch.manual_seed(3)
    tokens = [[], []]
    for _ in range(5):
        last = []
        for row, new in zip(rows, tokens, strict=True):
            if family.kind == "seq2seq":
                start = torch.tensor([[base.config.decoder_start_token_id, *new]], device=DEVICE)
                logits = row_output(base, weights, row, decoder_input_ids=start)[-1]
            else:
                logits = row_output(base, weights, torch.cat([row, row.new_tensor(new)]))[-1]
            last.append(torch.nn.functional.pad(logits, (0, len(virtual)), value=-torch.inf))
        for new, token in zip(
            tokens, torch.multinomial(torch.stack(last).softmax(-1), 1).flatten().tolist(), strict=True
        ):
            new.append(token)
    assert torch.equal(out, torch.tensor(tokens, device=DEVICE))


@pytest.mark.feature("export")
@each_generator
def test_table_is_the_formula_and_the_rest_is_the_base(family, tmp_path):
    _, base, weights, plain, virtual = exported(family, tmp_path)
    file = on_device(load_file(tmp_path / "plain" / "model.safetensors"))
    embedding = encoder_of(base).get_input_embeddings()
    name = next(n for n, m in base.named_modules(remove_duplicate=False) if m is embedding)
    scale = float(getattr(embedding, "embed_scale", 1.0))
    want = transform(weights, embedding(torch.arange(base.config.vocab_size, device=DEVICE))) / scale
    table = file.pop(f"{name}.weight")
    assert_close(table[: len(want)], want, **TOLERANCE)
    assert_close(table[virtual], weights["prompt.weight"] / scale, **TOLERANCE)
    own = base.state_dict()
    assert not [key for key in file if key.startswith("base_model") or "input_tuning" in key or "base_layer" in key]
    plain_state = plain.state_dict()  # transformers renames some tensors in files
    plain_state.pop(f"{name}.weight")
    for key, tensor in plain_state.items():
        if tensor.shape == own[key].shape:
            assert torch.equal(tensor, own[key]), key
        else:
            assert torch.equal(tensor[tuple(slice(0, n) for n in own[key].shape)], own[key]), key
    with torch.no_grad():
        assert torch.equal(base.state_dict()[f"{name}.weight"], build(family).state_dict()[f"{name}.weight"])


@pytest.mark.feature("export")
@pytest.mark.parametrize("family", ALL, ids=str)
def test_task_heads_and_bare_models(family, tmp_path):
    for head, task in (("seq_cls", "SEQ_CLS"), ("token_cls", "TOKEN_CLS"), ("qa", "QUESTION_ANS"), ("base", None)):
        if head not in family.heads:
            continue
        reads_input_elsewhere = family.kind == "encoder" or (family.kind == "seq2seq" and head in ("seq_cls", "qa"))
        tokens = 0 if reads_input_elsewhere else 4
        model, _, _ = adapted(family, head, task_type=task, num_virtual_tokens=tokens)
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.data.normal_()
        report = export_model(model, tmp_path / head)
        plain = family.heads[head].from_pretrained(tmp_path / head).eval().to(DEVICE)
        row = ids(1, 7)
        row[0, -1] = 1  # the end token that T5 and BART pool
        virtual = torch.tensor([report.virtual_token_ids], dtype=torch.long, device=DEVICE)
        more = {"decoder_input_ids": row} if family.kind == "seq2seq" and head == "base" else {}
        want, out = model(input_ids=row, **more), plain(input_ids=torch.cat([virtual, row], 1), **more)
        got, main = out.to_tuple()[0], want.to_tuple()[0]
        if got.ndim > 1 and got.shape != main.shape:
            got = got[:, tokens:]
        assert_close(got, main, **TOLERANCE)


@pytest.mark.parametrize("head", ["seq_cls", "qa"])
@pytest.mark.parametrize("family", [FAMILIES["t5"], FAMILIES["bart"]], ids=str)
def test_classifiers_that_show_the_input_to_the_decoder(family, head, tmp_path):
    task = {"seq_cls": "SEQ_CLS", "qa": "QUESTION_ANS"}[head]
    model = adapted(family, head, task_type=task)[0]
    with pytest.raises(ValueError, match="shows its input to the decoder"):
        export_model(model, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", [FAMILIES["bert"], FAMILIES["roberta"]], ids=str)
def test_encoders_with_virtual_tokens(family, tmp_path):
    model, base, weights = adapted(family)
    report = export_model(model, tmp_path / "plain")
    plain = type(base).from_pretrained(tmp_path / "plain").eval().to(DEVICE)
    row = ids(7)
    out = plain(input_ids=torch.cat([torch.tensor(report.virtual_token_ids, device=DEVICE), row])[None]).logits
    assert_close(out[0, 4:, : base.config.vocab_size], row_output(base, weights, row), **TOLERANCE)
    pooled = adapted(family, "seq_cls", task_type="SEQ_CLS")[0]
    with pytest.raises(ValueError, match="reads the first place of a row"):
        export_model(pooled, tmp_path / "pooled")
    assert not (tmp_path / "pooled").exists()


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.feature("export")
@each_generator
def test_the_tokenizer_puts_the_prompt_in_front(family, tmp_path):
    """Each family with a tokenizer of its own kind, loaded again with AutoTokenizer."""
    model, base, weights = adapted(family)
    tokenizer = tokenizer_of(family)
    before = tokenizer("a b c")["input_ids"]
    report = export_model(model, tmp_path / "plain", tokenizer=tokenizer)
    assert tokenizer("a b c")["input_ids"] == before
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    virtual = list(report.virtual_token_ids)
    assert loaded("a b c")["input_ids"] == virtual + before
    assert (
        loaded("a b c", add_special_tokens=False)["input_ids"]
        == tokenizer("a b c", add_special_tokens=False)["input_ids"]
    )
    assert loaded.decode(virtual + before, skip_special_tokens=True) == tokenizer.decode(
        before, skip_special_tokens=True
    )
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert loaded("a b c d e", truncation=True, max_length=7)["input_ids"][:4] == virtual
    auto = transformers.AutoModelForSeq2SeqLM if family.kind == "seq2seq" else transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(tmp_path / "plain").eval().to(DEVICE)
    plain.generation_config.eos_token_id = None
    loaded.padding_side = "right" if family.kind == "seq2seq" else "left"
    texts = ["a b c d", "e f"]
    inputs = loaded(texts, return_tensors="pt", padding=True).to(DEVICE)
    inputs.pop("token_type_ids", None)
    out = plain.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for i, text in enumerate(texts):
        row = torch.tensor(tokenizer(text)["input_ids"], device=DEVICE)
        assert torch.equal(out[i, -5:], greedy(base, weights, row, 5))


@pytest.mark.feature("export")
@pytest.mark.parametrize("start", ["{{ bos_token }}", "\n\n"], ids=repr)
def test_chat_template_starts_with_the_prompt(start, tmp_path):
    family = FAMILIES["llama"]
    model, _, _ = adapted(family)
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = start + "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    report = export_model(model, tmp_path / "plain", tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    want = tokenizer.apply_chat_template(chat, return_dict=False)
    assert loaded.apply_chat_template(chat, return_dict=False) == list(report.virtual_token_ids) + want
    texts = [one.apply_chat_template(chat, tokenize=False) for one in (loaded, tokenizer)]
    assert texts[0].endswith(texts[1])


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_loads_in_a_process_without_the_package(tmp_path):
    model, base, weights = adapted(FAMILIES["llama"])
    export_model(model, tmp_path / "plain", tokenizer=tokenizer_of(FAMILIES["llama"]))
    code = (
        "import sys; sys.modules['peft_input_tuning'] = None; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(tmp_path / 'plain')!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "inputs = tokenizer('a b c', return_tensors='pt', return_token_type_ids=False)\n"
        "out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)\n"
        "print(out[0, -5:].tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    row = torch.tensor(tokenizer_of(FAMILIES["llama"])("a b c")["input_ids"], device=DEVICE)
    assert result.stdout.strip().endswith(str(greedy(base, weights, row, 5).tolist()))


def test_card(tmp_path):
    model, _, _ = adapted(FAMILIES["llama"])
    report = export_model(model, tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "needs neither PEFT nor" in card
    assert "Do not call `tie_weights()`" in card
    assert "4 virtual tokens (ids 97 to 100)" in card
    assert f"{report.largest_difference:.2g}" in card
    assert 0 <= report.largest_difference < 1e-3 < report.largest_output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_dtypes(family, dtype, tmp_path):
    base = build(family).to(torch.bfloat16)
    model = get_peft_model(base, config(family)).eval()
    randomize(model)
    export_model(model, tmp_path / "plain", dtype=dtype if dtype != torch.float16 else None)
    file = load_file(tmp_path / "plain" / "model.safetensors")
    assert {tensor.dtype for tensor in file.values()} == {torch.bfloat16 if dtype == torch.float16 else dtype}


def test_chosen_adapter_and_untouched_model(tmp_path):
    model, base, _ = adapted(FAMILIES["llama"])
    second = add(model, "b", seed=2, num_virtual_tokens=6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    row = ids(7)
    want = model(input_ids=row[None]).logits
    report = export_model(model, tmp_path / "plain", adapter_name="b")
    assert len(report.virtual_token_ids) == 6
    plain = type(base).from_pretrained(tmp_path / "plain").eval().to(DEVICE)
    virtual = torch.tensor(report.virtual_token_ids, device=DEVICE)
    out = plain(input_ids=torch.cat([virtual, row])[None]).logits[0, 6:, :97]
    assert_close(out, row_output(base, second, row), **TOLERANCE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(input_ids=row[None]).logits, want)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_target_in_use(tmp_path):
    model, _, _ = adapted(FAMILIES["llama"])
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export_model(model, tmp_path / "plain")
    assert [p.name for p in tmp_path.rglob("*")] == ["plain", "mine.txt"]


def test_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    model, _, _ = adapted(FAMILIES["llama"])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_input_tuning.export.export._compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(model, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_an_export_through_a_link_over_what_a_killed_one_left(tmp_path):
    """tests/test_output_folders.py has the other places."""
    model, base, weights = adapted(FAMILIES["llama"])
    (tmp_path / "real" / ".unfinished").mkdir(parents=True)
    (tmp_path / "real" / ".unfinished" / "model.safetensors").write_text("cut off")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    report = export_model(model, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert not (tmp_path / "real" / ".unfinished").exists()
    plain = type(base).from_pretrained(tmp_path / "real").eval().to(DEVICE)
    virtual = torch.tensor(report.virtual_token_ids, device=DEVICE)
    out = plain(input_ids=torch.cat([virtual, ids(7)])[None]).logits[0, 4:, :97]
    assert_close(out, row_output(base, weights, ids(7)), **TOLERANCE)
    assert "\n# real\n" in (tmp_path / "real" / "README.md").read_text()


def test_a_wrong_table_is_noticed(tmp_path, monkeypatch):
    model, _, _ = adapted(FAMILIES["llama"])
    monkeypatch.setattr("peft_input_tuning.export.export.folded_table", lambda *args: folded_table(*args) * 1.01)
    with pytest.raises(RuntimeError, match="gives other outputs than the adapter"):
        export_model(model, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_models_and_names_that_cannot_be_exported(tmp_path):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="no input-tuning adapter, got LlamaForCausalLM"):
        export_model(build("llama"), tmp_path / "plain")
    model, _, _ = adapted(FAMILIES["llama"])
    with pytest.raises(ValueError, match=r"`adapter_name` is 'x'.*\['default'\]"):
        export_model(model, tmp_path / "plain", adapter_name="x")
    both = build("llama")
    both.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    both.add_adapter(config(), "default")
    with pytest.raises(ValueError, match="adapters of another method too"):
        export_model(both, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_was_exported_before(tmp_path):
    model, _, _ = adapted(FAMILIES["llama"])
    export_model(model, tmp_path / "plain", tokenizer=tokenizer_of(FAMILIES["llama"]))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has the token '<\|virtual_0\|>' already"):
        export_model(model, tmp_path / "other", tokenizer=again)


def test_an_adapter_that_is_not_active_with_a_head_of_its_own(tmp_path):
    """The head that is compared is the exported adapter's; the model's modes and gradients stay as they were."""
    family = FAMILIES["llama"]
    model, base, weights = adapted(family, modules_to_save=["lm_head"])
    add(model, "b", seed=2, modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save
    torch.nn.init.normal_(head["default"].weight)
    torch.nn.init.normal_(head["b"].weight)
    model.set_adapter("b")
    model.train()
    model.get_base_model().model.norm.eval()
    before = [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    report = export_model(model, tmp_path / "plain", adapter_name="default")
    assert [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()] == before
    assert model.active_adapter == "b"
    plain = type(base).from_pretrained(tmp_path / "plain").eval().to(DEVICE)
    base.lm_head.weight = head["default"].weight
    out = plain(input_ids=torch.cat([torch.tensor(report.virtual_token_ids, device=DEVICE), ids(7)])[None]).logits
    assert_close(out[0, 4:, :97], row_output(base, weights, ids(7)), **TOLERANCE)


@pytest.mark.not_emulated("torch.compile does not know the device")
def test_compiled_static_cache(tmp_path):
    """transformers compiles the decoding steps by itself on a GPU only; here it is told to."""
    _, base, weights, plain, virtual = exported(FAMILIES["llama"], tmp_path)
    torch.compiler.reset()
    compile_config = transformers.CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    compile_config._compile_all_devices = True
    row = ids(7)
    out = plain.generate(
        input_ids=torch.cat([virtual, row])[None],
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=PAD,
        cache_implementation="static",
        compile_config=compile_config,
    )
    torch.compiler.reset()
    assert torch.equal(out[0, -6:], greedy(base, weights, row, 6))


def test_an_offloaded_base_is_refused(tmp_path):
    base = cpu_offload(build(FAMILIES["llama"]), execution_device=DEVICE)
    model = get_peft_model(base, config(FAMILIES["llama"]))
    with pytest.raises(ValueError, match=r"`model` is offloaded: `model\.\S+` is not in memory\. Load the base model"):
        export_model(model, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_virtual_tokens_take_rows_of_the_table_that_are_no_words(tmp_path, tiny_model):
    """Many bases have more rows than words; the check of the exported folder must not read those rows as words."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(420)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = get_peft_model(base.to(DEVICE), config(FAMILIES["llama"], num_virtual_tokens=4)).eval()
    randomize(model)
    report = export_model(model, tmp_path / "checkpoint", tokenizer=tokenizer)
    assert report.virtual_token_ids == (400, 401, 402, 403)
    row = torch.arange(5, 12)[None]
    virtual = torch.tensor(report.virtual_token_ids)[None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    with torch.no_grad():
        got = plain(input_ids=torch.cat([virtual, row], 1)).logits[:, 4:, :400]
        assert_close(got, model(input_ids=row.to(DEVICE)).logits[..., :400].cpu(), atol=2e-4, rtol=1e-3)
