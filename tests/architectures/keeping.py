"""Cells of an adapter's life: training, saving, leaving; without virtual tokens; with images; under other heads."""

from __future__ import annotations

import copy
import tempfile

import torch
from peft import PeftModel
from torch import Tensor, nn

from .build import HEADS
from .calling import forward_against, generate_padded, greedy, padding
from .judging import Cell, gap, judge
from .registry import cell
from .sizes import WORDS
from .subject import Subject, dtype_of, main_outputs


def _loss(s: Subject, model: nn.Module, ids: Tensor, pads: int) -> Tensor:
    """The model's own loss if it has one, and a sum over its outputs, of which the prompt's places are left out."""
    labels = {}
    if s.is_seq2seq:
        labels = {"labels": s.decoder_ids[: ids.shape[0]]}
    elif s.head is None:
        own = torch.cat([torch.full((ids.shape[0], pads), -100), s.ids], 1)
        own[:, pads] = -100  # the first token: the oracle would predict it from the prompt
        labels = {"labels": own}
    try:
        out = s.call(model, ids, **labels)
    except (TypeError, ValueError):  # it takes none, or counts them in its own way
        out = s.call(model, ids)
    main = main_outputs(out)
    if pads:
        main = s.cut(main, s.oracle(), ids.shape[1])
    loss = getattr(out, "loss", None)
    return sum(x.double().tanh().square().mean() for x in main) + (0 if loss is None else loss)


@cell("training step")
def training_step(s: Subject) -> Cell:
    def wanted(train: bool = True) -> list[Tensor]:
        o = s.oracle()
        model = o.model.train(train)
        table = model.get_submodule(o.table).weight
        table.requires_grad_(True).grad = None
        try:
            loss = _loss(s, model, o.widen(s.ids)[0], o.length)
            loss.backward()
            return [loss.detach()[None], *o.gradients().values()]
        finally:
            table.requires_grad_(False).grad = None
            model.eval()

    def ours() -> list[Tensor]:
        model = s.fresh().train(mode)
        loss = _loss(s, model, s.ids, 0)
        loss.backward()
        grads = {kind: p.grad for key, p in model.named_parameters() for kind in ("prompt", "fc1", "fc2")
                 if key.endswith(f"input_tuning_{kind}.default.weight")}  # fmt: skip
        unreached = [kind for kind, grad in grads.items() if grad is None]
        if unreached:
            raise AssertionError(f"no gradient reaches {', '.join(unreached)}")
        return [loss.detach()[None], *(grads[kind] for kind in s.oracle().weights)]

    def base() -> list[Tensor]:
        model = copy.deepcopy(s.base).train(mode)
        table = model.get_submodule(s.tables[0]).weight.requires_grad_(True)
        longer = torch.cat(
            [torch.full((len(s.ids), s.oracle().length), WORDS[0]), s.ids], 1
        )  # as many places as the oracle's
        main_outputs(s.call(model, longer))[0].double().tanh().square().mean().backward()
        return [table.grad]

    mode = True
    with torch.enable_grad():
        try:
            mode = gap(wanted(), wanted()) == 0  # some draw noise in training
        except Exception:
            mode = False
        return judge(ours, lambda: wanted(mode), base)


@cell("save and load")
def save_and_load(s: Subject) -> Cell:
    def ours() -> list[Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            s.model.save_pretrained(folder)
            model = PeftModel.from_pretrained(copy.deepcopy(s.base), folder).eval()
        found = main_outputs(s.call(model, s.ids))
        if not all(torch.equal(*pair) for pair in zip(found, main_outputs(s.call(s.model, s.ids)), strict=True)):
            raise AssertionError("loaded, the adapter gives other values than before")
        return found

    return judge(ours, lambda: s.wanted(s.oracle(), s.ids), lambda: main_outputs(s.call(s.base, s.ids)))


@cell("base unchanged")
def base_unchanged(s: Subject) -> Cell:
    """While the adapter is disabled, and after unloading: outputs, weights and classes, to the last bit."""

    def ours() -> list[Tensor]:
        model = s.fresh()
        s.call(model, s.ids)
        with model.disable_adapter():
            disabled = main_outputs(s.call(model, s.ids))
        plain = model.unload()
        after = main_outputs(s.call(plain, s.ids))
        changed = sorted(f"{key}: {value}" for key, value in _plain(plain).items() ^ _plain(s.base).items())
        if changed:
            raise AssertionError(f"after unloading there differ {'; '.join(changed[:4])}")
        return [*disabled, *after, *plain.state_dict().values()]

    def wanted() -> list[Tensor]:
        out = main_outputs(s.call(s.base, s.ids))
        return [*out, *out, *s.base.state_dict().values()]

    found = judge(ours, wanted, wanted)
    if found.status == "exact" and found.gap:
        return Cell("failure", "not bit-identical", found.gap)
    return found


def _plain(model: nn.Module) -> dict[str, str]:
    """The classes of all modules, their attributes that are no tensors, and the names of weights, as text."""
    found = dict.fromkeys(model.state_dict(), "")
    for path, module in model.named_modules():
        found[path] = str(type(module))
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))):
                found[f"{path}.{name}"] = repr(value)
    return found


@cell("adapter alone")
def adapter_alone(s: Subject) -> Cell:
    return forward_against(s, lambda: s.alone, "alone")


@cell("adapter alone, generate")
def adapter_alone_generate(s: Subject) -> Cell | None:
    return greedy(s, lambda: s.alone, "alone", s.rows[:2], mask=True) if s.is_generator else None


# ---- images


@cell("image")
def image(s: Subject) -> Cell | None:
    other = s.with_image
    if other is None:
        return None
    with dtype_of(other.base):
        return forward_against(other, lambda: other.model, "default")


@cell("image, generate, padded")
def image_generate(s: Subject) -> Cell | None:
    other = s.with_image
    if other is None or not other.is_generator:
        return None
    with dtype_of(other.base):
        return generate_padded(other)


# ---- heads


def _head(s: Subject, head: str) -> Cell | None:
    if not s.arch.has_heads:
        return None
    other = Subject(s.arch, head)
    if other.base is None:
        return None
    first = forward_against(other, lambda: other.model, "default")
    if first.status != "exact" or other.is_seq2seq:
        return first
    return padding(other, "right")


for _name in HEADS:
    cell(_name)(lambda s, name=_name: _head(s, name))
