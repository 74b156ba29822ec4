"""torch.compile takes the model in one graph, and gives what eager gives."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import CompileConfig

from adapters import adapted, add, config, randomize
from families import FAMILIES, PAD, build, ids, padded
from oracles import adapter_weights, greedy, row_output

pytestmark = pytest.mark.not_emulated("torch.compile does not know the device")
FULLGRAPH = [FAMILIES[name] for name in ("llama", "t5", "bert")]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.feature("torch.compile")
@pytest.mark.parametrize("family", FULLGRAPH, ids=str)
def test_forward_in_one_graph(family):
    model, _, _ = adapted(family)
    batch, mask = padded([ids(7), ids(4, seed=1)], "right")
    inputs = {"input_ids": batch, "attention_mask": mask, "use_cache": False}
    if family.kind == "seq2seq":
        inputs["decoder_input_ids"] = ids(2, 5, seed=9)
    if family.kind == "encoder":
        del inputs["use_cache"]
    with torch.no_grad():
        want = model(**inputs).logits
        compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
        assert_close(compiled(**inputs).logits, want, atol=2e-4, rtol=1e-3)
        other = {**inputs, "input_ids": ids(2, 7, seed=3)}
        assert_close(compiled(**other).logits, model(**other).logits, atol=2e-4, rtol=1e-3)


@pytest.mark.feature("torch.compile")
@pytest.mark.trains_with("Memory", "torch.compile: forward and backward in one graph")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
def test_training_step_in_one_graph(dtype, tolerance):
    family = FAMILIES["llama"]
    model = get_peft_model(build(family).to(dtype), config(family))
    randomize(model)
    row = ids(2, 7)
    model.train()
    loss = model(input_ids=row, labels=row).loss
    loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    compiled(input_ids=row, labels=row, use_cache=False).loss.backward()
    assert len(want) == 3
    for name, p in model.named_parameters():
        if name in want:
            assert p.grad.dtype == torch.float32
            assert (p.grad - want[name]).norm() <= tolerance * want[name].norm()


@pytest.mark.feature("static cache")
@pytest.mark.feature("torch.compile")
def test_generate_with_a_compiled_static_cache():
    """transformers compiles the decoding steps by itself on a GPU only; here the forward is compiled by hand."""
    from transformers import CompileConfig

    family = FAMILIES["llama"]
    model, base, weights = adapted(family)
    batch, mask = padded([ids(7, seed=7), ids(4, seed=4)], "left")
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    calls = []
    torch._dynamo.config.cache_size_limit = 64
    inner = model.get_base_model()
    compiled_call = inner.get_compiled_call
    inner.get_compiled_call = lambda config: calls.append(1) or compiled_call(config)
    out = model.generate(
        input_ids=batch,
        attention_mask=mask,
        cache_implementation="static",
        compile_config=config,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=PAD,
    )
    assert calls
    for i, n in enumerate((7, 4)):
        assert torch.equal(out[i, 7:], greedy(base, weights, ids(n, seed=n), 5))


def test_a_cache_that_compiled_code_filled_goes_on():
    """Compiled code cannot give the cache its class; the first call outside does."""
    model, base, weights = adapted(FAMILIES["llama"])
    row = ids(9)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(input_ids=row[None, :7], use_cache=True)
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        step = compiled(input_ids=row[None, 7:8], past_key_values=cache)
        assert_close(step.logits[0], row_output(base, weights, row[:8])[7:], atol=2e-4, rtol=1e-3)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    out = model.generate(input_ids=row[None], past_key_values=cache, **settings)
    assert torch.equal(out[0, 9:], greedy(base, weights, row, 5))


@pytest.mark.feature("mixed batch")
def test_mixed_batch_of_a_compiled_model_runs_eagerly():
    """The rows of a call cannot be guarded on, so compiled code must not be reused for other rows."""
    family = FAMILIES["llama"]
    model, _, _ = adapted(family)
    add(model, "b", seed=2, num_virtual_tokens=6)
    model.eval()
    batch = ids(2, 7)
    with torch.no_grad():
        want = [model(input_ids=batch, adapter_names=names).logits for names in (["b", "default"], ["default", "b"])]
        alone = model(input_ids=batch).logits
        model.base_model.model.compile(backend="aot_eager")
        assert_close(model(input_ids=batch).logits, alone, atol=2e-4, rtol=1e-3)
        for names, logits in zip((["b", "default"], ["default", "b"]), want, strict=True):
            assert_close(model(input_ids=batch, adapter_names=names).logits, logits, atol=2e-4, rtol=1e-3)
        assert_close(model(input_ids=batch).logits, alone, atol=2e-4, rtol=1e-3)


@pytest.mark.feature("mixed batch")
def test_in_training_a_compiled_model_leaves_its_graphs_for_the_rows_only():
    """One compilation serves all rows; calls without them get another. The gradients are those of the model as it is,
    which has them from the formula (test_training_many.py)."""
    family = FAMILIES["llama"]
    counter = CompileCounterWithBackend("eager")
    model, _, _ = adapted(family)
    add(model, "b", seed=2, num_virtual_tokens=6)
    model.set_requires_grad(["default", "b"])
    model.train()
    batch = ids(3, 7)

    def gradients(names) -> dict:
        model.zero_grad()
        model(input_ids=batch, **({} if names is None else {"adapter_names": names})).logits.square().mean().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    calls = (["b", "default", "b"], ["default", "b", "default"], ["b", "b", "default"], None)
    want = [gradients(names) for names in calls]
    model.base_model.model.compile(backend=counter)
    frames = []
    for names, gradient in zip(calls, want, strict=True):
        got = gradients(names)
        frames.append(counter.frame_count)
        assert got.keys() == gradient.keys()
        for key, value in gradient.items():
            assert_close(got[key], value, atol=1e-5, rtol=1e-4)
    assert counter.op_count > 100
    assert frames[0] == frames[1] == frames[2] < frames[3]


@pytest.mark.feature("mixed batch")
def test_mixed_batch_inside_a_compiled_function_is_refused():
    model, _, _ = adapted(FAMILIES["llama"])
    batch = ids(2, 7)
    compiled = torch.compile(lambda names: model(input_ids=batch, adapter_names=names).logits, backend="eager")
    with torch.no_grad(), pytest.raises(ValueError, match=r"`adapter_names` cannot be used inside torch\.compile"):
        compiled(["default", "__base__"])


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "left padding"])
@pytest.mark.parametrize("family", [FAMILIES["llama"], FAMILIES["gpt2"]], ids=str)
def test_exported_with_open_sizes(family, masked):
    """torch.export with batch and length left open, tried at others than it was traced at."""
    model, base, weights = adapted(family)
    inner, open_sizes = model.get_base_model().eval(), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    traced = {"input_ids": ids(2, 7), **({"attention_mask": torch.ones_like(ids(2, 7))} if masked else {})}
    program = torch.export.export(
        inner,
        (),
        {**traced, "use_cache": False},
        dynamic_shapes={**dict.fromkeys(traced, open_sizes), "use_cache": None},
        strict=False,
    )
    rows = [ids(9), ids(4 if masked and family.name != "gpt2" else 9, seed=1), ids(9, seed=2)]
    batch, mask = padded(rows, "left")
    out = program.module()(input_ids=batch, use_cache=False, **({"attention_mask": mask} if masked else {})).logits
    for i, row in enumerate(rows):
        assert_close(out[i, -len(row) :], row_output(base, weights, row), atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_one_graph_serves_all_lengths():
    model, base, weights = adapted(FAMILIES["llama"])
    compiled = torch.compile(model.get_base_model(), backend="eager", dynamic=True, fullgraph=True)
    for length in range(3, 18):
        row = ids(length, seed=length)
        out = compiled(input_ids=row[None], use_cache=False).logits[0]
        assert_close(out, row_output(base, weights, row), atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_padded_steps_on_a_static_cache_share_graphs():
    """As `generate` compiles them by itself on a GPU."""
    model, base, weights = adapted(FAMILIES["llama"])
    rows = [ids(9, seed=1), ids(3, seed=2)]
    batch, mask = padded(rows, "left")
    settings = CompileConfig(backend="eager", fullgraph=True)
    settings._compile_all_devices = True
    out = model.generate(
        input_ids=batch,
        attention_mask=mask,
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        pad_token_id=PAD,
        cache_implementation="static",
        compile_config=settings,
    )
    for i, row in enumerate(rows):
        assert out[i, 9:14].tolist() == greedy(base, weights, row, 5).tolist()


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_backbone(model):
    for name in ("encoder", "model"):
        if hasattr(model, name):
            setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
            break
    return model


@torch.no_grad()
@pytest.mark.parametrize("virtual", [4, 0])
@pytest.mark.parametrize("compiled", [compiled_whole, compiled_backbone])
@pytest.mark.parametrize("family", [FAMILIES["llama"], FAMILIES["t5"]], ids=str)
def test_a_base_that_was_compiled_before(family, compiled, virtual, tmp_path):
    """And its file, which fits the base whatever parts of it are compiled."""
    more = {"decoder_input_ids": ids(2, 3, seed=9)} if family.kind == "seq2seq" else {}
    given = {"input_ids": ids(2, 6), **more}
    model = get_peft_model(compiled(build(family)), config(family, num_virtual_tokens=virtual)).eval()
    randomize(model)
    weights = adapter_weights(model)
    rows = [{name: value[row : row + 1] for name, value in more.items()} for row in range(2)]
    want = torch.stack(
        [row_output(build(family), weights, ids(2, 6)[row], **of_row) for row, of_row in enumerate(rows)]
    )
    assert_close(model(**given).logits, want, atol=2e-4, rtol=1e-3)
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for base in (build(family), compiled(build(family))):
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert_close(loaded(**given).logits, want, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_backbone_that_is_compiled_afterwards_is_saved_under_plain_names(tmp_path):
    model, base, weights = adapted(FAMILIES["llama"])
    compiled_backbone(model.get_base_model())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(FAMILIES["llama"]), tmp_path).eval()
    assert_close(loaded(ids(1, 6)).logits[0], row_output(base, weights, ids(1, 6)[0]), atol=2e-4, rtol=1e-3)
