"""No forward pass, prefill or step of decoding looks at data that is on a device, and the adapter adds few operations.

Counts of operations, so that no device is needed: what a GPU would have to wait for goes through `WAITS` here, too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from peft import get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adapters import adapted, add, config, randomize
from device import DEVICE
from families import ALL, DECODERS, FAMILIES, PAD, SEQ2SEQ, ids, padded
from peft_input_tuning import reuse_prompts
from peft_input_tuning.virtual_tokens.backbone import has_window
from peft_input_tuning.virtual_tokens.subclass import unextend

LLAMA = FAMILIES["llama"]
PACKING = [family for family in DECODERS if family.name != "bloom"]  # it has no positions to tell sequences apart by
WAITS = {"_local_scalar_dense", "_assert_async", "nonzero", "_unique2", "unique_dim", "equal"}
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}  # of a CPU's tensors no operation is seen


pytestmark = pytest.mark.skipif(DEVICE.type == "emulated", reason="it is made of operations of the CPU")


class Operations(TorchDispatchMode):
    """Counts operations by name, and reads of data by `READS`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.counts[name] += 1
        if name.startswith("index") and any(one.dtype == torch.bool for one in _tensors(args[1])):
            self.counts["nonzero"] += 1  # what a mask picks has a size that is known on the device
        return function(*args, **(kwargs or {}))


def _tensors(value) -> list[torch.Tensor]:
    return [one for one in value if isinstance(one, torch.Tensor)] if isinstance(value, list | tuple) else []


class Reads(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in READS
        return function(*args, **(kwargs or {}))


def count(call: Callable) -> tuple[int, int]:
    """Operations and waits of a call, the second time that it is made."""
    call()
    with Operations() as operations, Reads() as reads:
        call()
    return operations.counts.total(), sum(operations.counts[name] for name in WAITS) + reads.count


def added(ours: Callable, base: Callable) -> tuple[int, int]:
    """What a call has more than the base's: operations and waits."""
    (operations, waits), (of_base, waits_of_base) = count(ours), count(base)
    return operations - of_base, waits - waits_of_base


def generating(model, new_tokens: int, **inputs) -> Callable:
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": PAD}
    return lambda: model.generate(**inputs, **settings)


def prefill_and_step(
    model, base, base_inputs: dict | None = None, **more
) -> tuple[tuple[int, int], tuple[float, float]]:
    """What the first token has more than the base's, and what each token after it has."""
    of_base = more if base_inputs is None else base_inputs
    first = added(generating(model, 1, **more), generating(base, 1, **of_base))
    six = added(generating(model, 6, **more), generating(base, 6, **of_base))
    return first, ((six[0] - first[0]) / 5, (six[1] - first[1]) / 5)


@pytest.fixture(scope="module")
def deep() -> transformers.LlamaForCausalLM:
    """A Llama of 16 layers: what is done in each of them shows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = transformers.LlamaConfig(
        **sizes, num_hidden_layers=16, vocab_size=97, pad_token_id=PAD, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(settings).eval().to(DEVICE)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def deep_adapted(deep):
    def make(**changes):
        model = get_peft_model(copy.deepcopy(deep), config(LLAMA, num_virtual_tokens=20, **changes)).eval()
        randomize(model)
        return model

    return make


LEFT_PADDED = padded([ids(n, seed=n) for n in (8, 5, 8, 7)], "left")
CALLS = {
    "plain": {"input_ids": ids(4, 8), "attention_mask": torch.ones(4, 8, dtype=torch.long, device=DEVICE)},
    "padded": {"input_ids": LEFT_PADDED[0], "attention_mask": LEFT_PADDED[1]},
    "no mask": {"input_ids": ids(4, 8)},
}
# Rows with prompts of different lengths need a mask, at which transformers looks: the base is given padded rows, too.
MIXED = ["default", "b", "__base__", "default"]
# More than the base's operations: of a prefill, a step and a forward pass in training.
TARGETS = {"plain": (40, 8, 40), "no mask": (40, 8, 40), "padded": (40, 9, 40)}
MIXED_TARGETS = (60, 11)  # of a prefill and a step with two adapters and the base


@pytest.mark.parametrize("name", CALLS)
def test_operations_of_generation(deep, deep_adapted, name):
    (prefill, waits), (step, waits_of_step) = prefill_and_step(deep_adapted(), deep, **CALLS[name])
    print(f"{name}: prefill +{prefill}, {waits}; a step +{step:g}, {waits_of_step:g}")
    assert waits <= 0
    assert waits_of_step <= 0
    assert prefill <= TARGETS[name][0]
    assert step <= TARGETS[name][1]


@pytest.mark.parametrize("name", CALLS)
def test_operations_of_generation_where_only_the_input_is_adapted(deep, deep_adapted, name):
    model = deep_adapted(adapter_scope="input")
    (prefill, waits), (step, waits_of_step) = prefill_and_step(model, deep, **CALLS[name])
    print(f"{name}, scope input: prefill +{prefill}, {waits}; a step +{step:g}, {waits_of_step:g}")
    assert waits <= 0
    assert waits_of_step <= 0
    assert prefill <= TARGETS[name][0] + 8  # embeddings are looked up at the entrance, and joined with a prompt
    assert step <= TARGETS[name][1]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("lengths", ["one length", "two lengths"])
def test_operations_of_a_mixed_batch(deep, deep_adapted, name, lengths):
    model = deep_adapted()
    add(model, "b", seed=2, num_virtual_tokens=20 if lengths == "one length" else 12)
    model.eval()
    call = {**CALLS[name], "adapter_names": MIXED}
    (prefill, waits), (step, waits_of_step) = prefill_and_step(model, deep, CALLS["padded"], **call)
    print(f"{name}, {lengths}: prefill +{prefill}, {waits}; a step +{step:g}, {waits_of_step:g}")
    assert waits <= 0
    assert waits_of_step <= 0
    assert prefill <= MIXED_TARGETS[0]
    assert step <= MIXED_TARGETS[1]


@pytest.mark.parametrize("name", CALLS)
def test_operations_of_a_prefill_that_starts_from_states(deep, deep_adapted, name):
    """Three for each layer, which takes keys and values as they are. The base is given padded rows: attention to what
    stands in a cache needs a mask, which costs each layer more than what it does for unpadded rows without one."""
    model = deep_adapted()
    with reuse_prompts(model):
        operations, waits = added(generating(model, 1, **CALLS[name]), generating(deep, 1, **CALLS["padded"]))
    layers = deep.config.num_hidden_layers
    print(f"{name}, states known: +{operations}, {operations / layers:.1f} a layer, {waits}")
    assert waits <= 0
    assert operations <= 3 * layers


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("scope", ["all", "input"])
def test_operations_of_a_forward_pass_in_training(deep, deep_adapted, name, scope):
    model = deep_adapted(adapter_scope=scope).train()
    labels = ids(4, 8).index_fill(1, torch.arange(4, device=DEVICE), -100)
    base = deep.train()
    try:
        operations, waits = added(
            lambda: model(**CALLS[name], labels=labels), lambda: base(**CALLS[name], labels=labels)
        )
    finally:
        deep.eval()
    print(f"{name}, scope {scope}: +{operations}, {waits}")
    assert waits <= 0
    assert operations <= TARGETS[name][2] + (5 if scope == "input" else 0)


@pytest.mark.parametrize("family", ALL, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_forward_pass_waits(family, side):
    model, base, _ = adapted(family)
    batch, mask = padded([ids(7), ids(4, seed=1)], side)
    more = {"decoder_input_ids": ids(2, 3, seed=2)} if family.kind == "seq2seq" else {}
    for inputs in ({**more, "input_ids": batch, "attention_mask": mask}, {**more, "input_ids": batch}):
        assert added(partial(model, **inputs), partial(base, **inputs))[1] <= 0


@pytest.mark.parametrize("family", DECODERS + SEQ2SEQ, ids=str)
@pytest.mark.parametrize("batch", ["plain", "padded", "chunks", "mixed", "scoped", "no cache"])
def test_no_prefill_and_no_step_waits(family, batch):
    model, base, _ = adapted(family, **({"adapter_scope": "input"} if batch == "scoped" else {}))
    more: dict = {}
    if batch == "mixed":
        add(model, "b", seed=2, num_virtual_tokens=6)
        model.eval()
        more = {"adapter_names": MIXED}
    if batch == "no cache":
        more = {"use_cache": False}
    if batch == "chunks":
        if family.kind == "seq2seq":
            pytest.skip("an encoder-decoder's input is not fed in chunks")
        more = {"prefill_chunk_size": 3}
    call = CALLS["padded" if batch == "padded" else "plain"]
    of_base = {**call, **more} if batch != "mixed" else CALLS["padded"]
    (_, waits), (_, waits_of_step) = prefill_and_step(model, base, of_base, **call, **more)
    # With a window `generate` looks once, at its start, whether a chunk is shorter than the padding.
    assert waits <= (batch == "chunks" and has_window(base))
    assert waits_of_step <= 0


@pytest.mark.parametrize("family", PACKING, ids=str)
@pytest.mark.parametrize("told_by", ["positions", "bounds"])
def test_packed_rows_wait_no_oftener_than_the_base(family, told_by):
    """Without bounds the number of sequences is not known on the host; the base looks for it, too (OPT's does not)."""
    model, base, _ = adapted(family)
    row, positions = ids(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]], device=DEVICE)
    packed = {"input_ids": row, "position_ids": positions, "use_cache": False}
    ours = dict(packed)
    if told_by == "bounds":
        bounds = torch.tensor([0, 4, 6, 9], dtype=torch.int32, device=DEVICE)
        ours |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4}
        del ours["position_ids"]
    operations, waits = added(lambda: model(**ours), lambda: base(**packed))
    print(f"{family}, {told_by}: +{operations}, {waits}")
    assert waits <= (family.name == "opt" and told_by == "positions")
    if told_by == "bounds":
        assert count(lambda: model(**ours))[1] == 0


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_going_on_by_hand_does_not_wait(family):
    model, base, _ = adapted(family)
    name = "cache" if hasattr(base(input_ids=ids(1, 3), use_cache=True), "cache") else "past_key_values"

    def two_steps(one):
        cache = getattr(one(input_ids=ids(2, 5), use_cache=True), name)
        return one(input_ids=ids(2, 1, seed=1), use_cache=True, **{name: cache})

    assert added(lambda: two_steps(model), lambda: two_steps(base))[1] <= 0


@pytest.fixture
def places_adapted():
    """A decoder that counts places, its base, and a second adapter with a longer prompt."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 97}
    settings = transformers.BlenderbotConfig(**sizes, pad_token_id=PAD, forced_eos_token_id=None)
    base = transformers.BlenderbotForCausalLM(settings).eval().to(DEVICE)
    base.generation_config.eos_token_id = None
    model = get_peft_model(copy.deepcopy(base), config(LLAMA)).eval()
    add(model, "b", seed=2, num_virtual_tokens=6)
    return model.eval(), base


def test_a_table_of_positions_costs_nothing_where_rows_have_one_length(places_adapted):
    model, _ = places_adapted
    calls = [partial(model, **CALLS[name], **more) for name in CALLS for more in ({}, {"adapter_names": ["b"] * 4})]
    counted = [count(call) for call in calls]
    unextend(model.get_base_model().model.decoder.embed_positions)
    assert [count(call) for call in calls] == counted


@pytest.mark.parametrize("name", CALLS)
def test_a_table_of_positions_does_not_wait(places_adapted, name):
    model, base = places_adapted
    (_, waits), (_, waits_of_step) = prefill_and_step(model, base, CALLS["padded"], **CALLS[name], adapter_names=MIXED)
    assert (waits <= 0, waits_of_step <= 0) == (True, True)


def test_the_counts_see_what_would_wait():
    """The test's own test."""
    x = torch.arange(4, device=DEVICE)
    looks = (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x[x > 1],
        lambda: torch.equal(x, x),
        lambda: x.unique(),
        lambda: x.tolist(),
        lambda: torch._assert_async(x.any()),
    )
    for look in looks:
        assert count(look)[1] > 0
    assert count(lambda: x + 1) == (1, 0)
