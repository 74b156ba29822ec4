"""What is tried with each architecture, and how a trial is judged.

A cell is one of
    exact     the values of the oracle
    lacks     the base itself cannot do it, or does not do it right: shown by running the base
    refused   an error of the package, raised on purpose
    failure   another value than the oracle's, or somebody else's error
"""

from __future__ import annotations

import copy
import linecache
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peft_input_tuning
from peft_input_tuning import InputTuningConfig

from .build import HEADS, Architecture, build
from .images import Image, find_image
from .oracle import Oracle, Weights, tables
from .sizes import EOS, PAD, WORDS

PACKAGE = str(Path(peft_input_tuning.__file__).parent)
NEW_TOKENS = 5
PROMPTS = {"default": 4, "same": 4, "longer": 6}
CACHES = ("cache", "past_key_values", "cache_params", "state", "past_buckets_states", "mems")


@dataclass
class Cell:
    """How a trial ended.

    Args:
        status: "exact", "lacks", "refused" or "failure".
        note: the error, or what the base lacks.
        gap: the largest difference from the oracle, over the oracle's largest value.
    """

    status: str
    note: str = ""
    gap: float | None = None


# ---- judging --------------------------------------------------------------------------------------------------------


def tolerance() -> float:
    """How far values may be apart, over the largest; in float64 too models compute norms and rotations in float32."""
    return 1e-5 if torch.get_default_dtype() == torch.float64 else 1e-3


def describe(error: BaseException) -> str:
    """An error and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(Path(frame.filename).parts[-2:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({place}:{frame.lineno})"


def is_ours(error: BaseException) -> bool:
    """Whether the package raised it on purpose: the last frame is one of its `raise` statements."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return frame.filename.startswith(PACKAGE) and line.startswith("raise")


def gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference over the largest value; infinite where shapes differ."""
    worst = 0.0
    for x, y in zip(found, wanted, strict=True):
        if x.shape != y.shape:
            return math.inf
        difference = float((x.double() - y.double()).abs().max()) if y.numel() else 0.0
        worst = max(worst, difference / max(float(y.double().abs().max()) if y.numel() else 1.0, 1e-30))
        if math.isnan(worst) or not x.isfinite().all():
            return math.inf
    return worst


Run = Callable[[], list[Tensor]]


def judge(ours: Run, wanted: Run, base: Run, also: Run | None = None) -> Cell:
    """Compares what the adapter gives with what the oracle gives.

    Args:
        ours: the adapted model.
        wanted: the oracle in the same situation.
        base: the untouched base in the same situation; asked where the oracle fails.
        also: the oracle in a situation that should come to the same (no padding, no cache). Where the base makes a
            difference between the two, either counts.
    """
    try:
        values = _finite(wanted())
    except Exception as error:
        lacking = _error_of(base)
        if lacking is not None:
            return Cell("lacks", lacking)
        try:
            ours()
        except Exception as refusal:
            if is_ours(refusal):
                return Cell("refused", describe(refusal))
        return Cell("failure", f"no oracle: {describe(error)}")
    try:
        found = ours()
    except Exception as error:
        if is_ours(error):
            return Cell("refused", describe(error))
        lacking = _error_of(base)
        return Cell("failure", describe(error)) if lacking is None else Cell("lacks", lacking)
    first = gap(found, values)
    if first <= tolerance():
        return Cell("exact", gap=first)
    if also is not None:
        try:
            others = _finite(also())
            second, apart = gap(found, others), gap(values, others)
        except Exception:
            return Cell("failure", "wrong value", first)
        if second <= tolerance():
            return Cell("exact", gap=second)
        if apart > tolerance():
            return Cell("lacks", f"the base itself differs by {apart:.1e}; we by {first:.1e} and {second:.1e}", first)
    return Cell("failure", "wrong value", first)


def _finite(values: list[Tensor]) -> list[Tensor]:
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError("values that are not finite")
    return values


def _error_of(run: Run) -> str | None:
    """What a run of the base ends with; None if all is well."""
    try:
        _finite(run())
    except Exception as error:
        return describe(error)
    return None


# ---- the models of one architecture ---------------------------------------------------------------------------------


def main_outputs(out: Any) -> list[Tensor]:
    """Logits, or what a model without a head gives."""
    for names in (("logits",), ("start_logits", "end_logits"), ("prediction_logits",), ("last_hidden_state",)):
        if all(getattr(out, name, None) is not None for name in names):
            return [getattr(out, name) for name in names]
    return [out[0]]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        places = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, places], mask[i, places] = row, 1
    return ids, mask


@contextmanager
def dtype_of(model: nn.Module) -> Iterator[None]:
    """Meanwhile new tensors have the dtype of a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Subject:
    """An architecture under trial.

    Args:
        arch: the architecture.
        head: of another class on the same backbone ("sequence classification", ...), or None.
        image: what each row has in front of its text.
    """

    arch: Architecture
    head: str | None = None
    image: Image | None = None
    _adapted: dict[str, Any] = field(default_factory=dict)
    _oracles: dict[str, Oracle] = field(default_factory=dict)

    @cached_property
    def base(self) -> nn.Module | None:
        """In float64; in float32 if it cannot compute in that, or has no way to mask whole rows in it."""
        found = build(self.arch, self.head)
        if found is None or self._computes(found):
            return found
        other = build(self.arch, self.head).float()
        torch.set_default_dtype(torch.float32)
        if self._computes(other):
            return other
        torch.set_default_dtype(torch.float64)
        return found

    def _computes(self, model: nn.Module) -> bool:
        self.__dict__["base"] = model
        ids, mask = padded(self.rows[:2], "left")
        try:
            with torch.no_grad():
                out = main_outputs(self.call(model, ids, mask))
        except Exception:
            return False
        same = all(x.shape[:2] == mask.shape for x in out) or self.head is not None or self.is_seq2seq
        return same and all(bool(x.isfinite().all()) for x in self.of_tokens(out, mask))

    @cached_property
    def with_image(self) -> Subject | None:
        """The same with an image in each row; None for models that see none, or need one always."""
        if self.arch.mapping != "image" or "inputs" in self.arch.overrides:
            return None

        def of(image: Image, base: nn.Module) -> Subject:
            other = Subject(self.arch, image=image)
            other.__dict__["base"] = base
            return other

        for base in (self.base, copy.deepcopy(self.base).float()):  # some compute images in float32 only
            with dtype_of(base):
                found = find_image(base, lambda image, b=base: main_outputs((s := of(image, b)).call(b, s.ids))[0])
            if found is not None:
                return of(found, base)
        return None

    @property
    def is_seq2seq(self) -> bool:
        return bool(getattr(self.base.config, "is_encoder_decoder", False)) and self.arch.mapping != "causal"

    @property
    def is_generator(self) -> bool:
        can = self.base.can_generate() and hasattr(self.base, "prepare_inputs_for_generation")
        return self.head is None and self.arch.mapping != "masked" and can

    @property
    def task(self) -> str:
        if self.head is not None:
            kinds = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "question": "QUESTION_ANS"}
            return kinds[self.head.split()[0]]
        if self.is_seq2seq:
            return "SEQ_2_SEQ_LM"
        return "CAUSAL_LM" if self.is_generator else "FEATURE_EXTRACTION"

    @property
    def side(self) -> str:
        return "left" if self.is_generator and not self.is_seq2seq else "right"

    @cached_property
    def rows(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        rows = [torch.randint(WORDS.start, WORDS.stop, (n,), generator=generator) for n in (7, 4, 7)]
        if self.head is not None and self.is_seq2seq:
            for row in rows:
                row[-1] = EOS  # whose place such a head looks at
        prefix = [*self.arch.overrides.get("prefix", ()), *(self.image.prefix if self.image else ())]
        return [torch.cat([torch.tensor(prefix, dtype=torch.long), row]) for row in rows]

    @property
    def ids(self) -> Tensor:
        """`(2, 7)`, without padding."""
        return torch.stack([self.rows[0], self.rows[2]])

    @cached_property
    def decoder_ids(self) -> Tensor:
        return torch.randint(WORDS.start, WORDS.stop, (3, 4), generator=torch.Generator().manual_seed(5))

    def more(self, ids: Tensor, decoded: bool = True) -> dict[str, Any]:
        """What calls need beside ids and mask."""
        batch = ids.shape[0]
        needed = {**self.arch.overrides.get("inputs", {}), **(self.image.inputs if self.image else {})}
        found = {name: make(ids) for name, make in needed.items()}
        if self.is_seq2seq and self.head is None and decoded and "decoder_input_ids" not in found:
            found["decoder_input_ids"] = self.decoder_ids[:batch]
        return found

    def call(self, model: nn.Module, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
        given = {"input_ids": ids, **self.more(ids, "decoder_input_ids" not in more), **more}
        if mask is not None:
            given["attention_mask"] = mask
        return model(**given)

    # ---- adapters and oracles

    @cached_property
    def tables(self) -> list[str]:
        found = tables(self.base, lambda model: self.call(model, self.ids), self.ids)
        named = self.arch.overrides.get("table")
        if named is not None:
            found = [named, *(path for path in found if path != named)]
        if not found:
            raise ValueError("no table that is called with the ids was found")
        return found

    @cached_property
    def size_of_embeddings(self) -> float:
        with torch.no_grad():
            return float(self.base.get_submodule(self.tables[0])(self.ids).std())

    def weights(self, model: nn.Module, name: str) -> Weights:
        """Gives an adapter weights of the size of the embeddings, and returns them."""
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        size, found = self.size_of_embeddings, {}
        for key, parameter in model.named_parameters():
            kind = next((k for k in ("prompt", "fc1", "fc2") if key.endswith(f"input_tuning_{k}.{name}.weight")), None)
            if kind is None:
                continue
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if kind == "prompt":
                values = values * size
            elif kind == "fc1":
                values = values / (size * math.sqrt(parameter.shape[1]))
            else:
                values = values * 0.7 * size / math.sqrt(parameter.shape[1])
            parameter.data.copy_(values)
            found[kind] = values.to(torch.get_default_dtype())
        return found

    def config(self, length: int) -> InputTuningConfig:
        return InputTuningConfig(
            num_virtual_tokens=length,
            adapter_hidden_dim=16,
            prompt_scale=1.0,
            init_weights=False,
            task_type=self.task,
        )

    def _once(self, name: str, make: Callable[[], PeftModel]) -> PeftModel:
        """Made once; an error of making it is raised each time."""
        if name not in self._adapted:
            try:
                self._adapted[name] = make()
            except Exception as error:
                self._adapted[name] = error
        if isinstance(self._adapted[name], Exception):
            raise self._adapted[name]
        return self._adapted[name]

    def fresh(self, name: str = "default", length: int | None = None) -> PeftModel:
        """A copy of the base with a new adapter that has the weights of its oracle."""
        model = get_peft_model(copy.deepcopy(self.base), self.config(PROMPTS[name] if length is None else length))
        self.weights(model, "default")
        return model.eval()

    @property
    def model(self) -> PeftModel:
        return self._once("model", self.fresh)

    @property
    def alone(self) -> PeftModel:
        """With an adapter without virtual tokens."""
        return self._once("alone", lambda: self.fresh(length=0))

    @property
    def mixed(self) -> PeftModel:
        """With all adapters."""
        return self._once("mixed", self._mixed)

    def _mixed(self) -> PeftModel:
        model = self.fresh()
        for name, length in PROMPTS.items():
            if name != "default":
                model.add_adapter(name, self.config(length))
                self.weights(model, name)
        return model.eval()

    def oracle(self, name: str = "default") -> Oracle:
        """The oracle of an adapter; "alone" is the default one without virtual tokens, "__base__" none at all."""
        if name not in self._oracles:
            width = self.base.get_submodule(self.tables[0]).weight.shape[1]
            shapes = {"fc1": (16, width), "fc2": (width, 16)}
            if PROMPTS.get(name):
                shapes = {"prompt": (PROMPTS[name], width), **shapes}
            holder = _Holder(shapes, "default" if name == "alone" else name)
            weights = self.weights(holder, "default" if name == "alone" else name)
            if name == "__base__":
                weights = {kind: torch.zeros_like(value) for kind, value in weights.items()}
            self._oracles[name] = Oracle.of(self.base, self.tables[0], self._other_tables, weights)
        return self._oracles[name]

    @cached_property
    def _other_tables(self) -> list[str]:
        words = self.base.get_submodule(self.tables[0]).weight.shape[0]
        sized = [
            path
            for path, module in self.base.named_modules()
            if isinstance(module, nn.Embedding) and module.weight.shape[0] == words
        ]
        return list(dict.fromkeys([*self.tables[1:], *sized]))

    def cut(self, out: list[Tensor], oracle: Oracle, places: bool = True) -> list[Tensor]:
        """The oracle's outputs without the prompt's places."""
        if self.is_seq2seq or not oracle.length or self.head == "sequence classification":
            return out
        return [x[:, oracle.length :] for x in out]

    def wanted(self, oracle: Oracle, ids: Tensor, mask: Tensor | None = None, **more: Any) -> list[Tensor]:
        """What the oracle gives for a batch, aligned with it."""
        if self.head is not None:
            has_decoder = self.is_seq2seq and any(path.endswith("decoder") for path, _ in self.base.named_modules())
            inside = oracle.widening() if has_decoder else oracle.around(oracle.model.base_model)
            with inside:
                return main_outputs(self.call(oracle.model, ids, mask, **more))
        return self.cut(main_outputs(self.call(oracle.model, *oracle.widen(ids, mask), **more)), oracle)

    def of_tokens(self, out: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        """What is not at a pad."""
        if mask is None or self.is_seq2seq or self.head == "sequence classification":
            return out
        return [x[mask.bool()] for x in out]


class _Holder(nn.Module):
    """Parameters with the names of an adapter's, so that its weights can be drawn without one."""

    def __init__(self, shapes: dict[str, tuple[int, int]], name: str) -> None:
        super().__init__()
        for kind, shape in shapes.items():
            part = nn.ModuleDict({name: nn.Module()})
            part[name].weight = nn.Parameter(torch.zeros(shape))
            self.add_module(f"input_tuning_{kind}", part)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((f"x.{key}", value) for key, value in super().named_parameters(*args, **kwargs))


# ---- cells ----------------------------------------------------------------------------------------------------------

CELLS: dict[str, Callable[[Subject], Cell | None]] = {}


def cell(name: str) -> Callable:
    """Adds a cell; a function that returns None says that it does not apply."""

    def add(function: Callable[[Subject], Cell | None]) -> Callable[[Subject], Cell | None]:
        CELLS[name] = function
        return function

    return add


def _forward(s: Subject, model: Callable[[], nn.Module], oracle: str, mask: Tensor | None = None) -> Cell:
    return judge(
        lambda: main_outputs(s.call(model(), s.ids, mask)),
        lambda: s.wanted(s.oracle(oracle), s.ids, mask),
        lambda: main_outputs(s.call(s.base, s.ids, mask)),
    )


@cell("forward")
def forward(s: Subject) -> Cell:
    return _forward(s, lambda: s.model, "default")


def _padding(s: Subject, side: str) -> Cell:
    rows = s.rows[:2]
    ids, mask = padded(rows, side)

    def alone() -> list[Tensor]:
        o = s.oracle()
        if s.is_seq2seq:
            each = [s.wanted(o, row[None], decoder_input_ids=s.decoder_ids[i : i + 1]) for i, row in enumerate(rows)]
            return [torch.cat(x) for x in zip(*each, strict=True)]
        each = [s.wanted(o, row[None]) for row in rows]
        return [torch.cat([y.squeeze(0) if y.ndim > 1 and s.head != "sequence classification" else y for y in x])
                for x in zip(*each, strict=True)]  # fmt: skip

    return judge(
        lambda: s.of_tokens(main_outputs(s.call(s.model, ids, mask)), mask),
        lambda: s.of_tokens(s.wanted(s.oracle(), ids, mask), mask),
        lambda: main_outputs(s.call(s.base, ids, mask)),
        alone,
    )


@cell("left padding")
def left_padding(s: Subject) -> Cell:
    return _padding(s, "left")


@cell("right padding")
def right_padding(s: Subject) -> Cell:
    return _padding(s, "right")


def by_hand(s: Subject, model: nn.Module, ids: Tensor, mask: Tensor | None, first: int) -> list[Tensor]:
    """Outputs of a first call and two more on its cache: logits of all new places, `(batch, length, ...)`."""
    found, steps = [], [slice(0, first), slice(first, first + 1), slice(first + 1, None)]
    whole, given = ids, s.more(ids, decoded=False)
    if s.is_seq2seq:
        encoder = model.get_encoder()
        given["encoder_outputs"] = encoder(ids) if mask is None else encoder(ids, attention_mask=mask)
        whole, steps = s.decoder_ids[: ids.shape[0]], [slice(0, 2), slice(2, 3), slice(3, None)]
        if mask is not None:
            given["attention_mask"] = mask
    for step in steps:
        if s.is_seq2seq:
            out = model(decoder_input_ids=whole[:, step], use_cache=True, **given)
        else:
            if mask is not None:
                given["attention_mask"] = mask[:, : step.stop]
            out = model(**{**given, "input_ids": whole[:, step], "use_cache": True})
            given = {}
        found.append(main_outputs(out)[0])
        names = [name for name in CACHES if getattr(out, name, None) is not None]
        if not names:
            raise ValueError("no cache comes back")
        for name in CACHES:
            given.pop(name, None)
        given[names[0]] = getattr(out, names[0])
    return [torch.cat(found, 1)]


def _by_hand(s: Subject, ids: Tensor, mask: Tensor | None) -> Cell:
    first = ids.shape[1] - 2

    def wanted() -> list[Tensor]:
        o = s.oracle()
        (out,) = by_hand(s, o.model, *o.widen(ids, mask), first + o.length)
        return s.of_tokens(s.cut([out], o), mask)

    return judge(
        lambda: s.of_tokens(by_hand(s, s.model, ids, mask, first), mask),
        wanted,
        lambda: by_hand(s, s.base, ids, mask, first),
        lambda: s.of_tokens(s.wanted(s.oracle(), ids, mask), mask),
    )


@cell("cache by hand")
def cache_by_hand(s: Subject) -> Cell | None:
    return _by_hand(s, s.ids, None) if s.is_generator else None


@cell("cache by hand, padded")
def cache_by_hand_padded(s: Subject) -> Cell | None:
    return _by_hand(s, *padded(s.rows[:2], s.side)) if s.is_generator else None


def generated(s: Subject, model: nn.Module, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> list[Tensor]:
    """New tokens and the logits that they were chosen by, of greedy decoding."""
    if mask is not None:
        settings["attention_mask"] = mask
    settings = {**s.more(ids, decoded=False), **settings}
    out = model.generate(
        input_ids=ids,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    logits = torch.stack(out.logits, 1)
    return [out.sequences[:, -logits.shape[1] :], logits]


def by_forwards(s: Subject, oracle: Oracle, row: Tensor) -> list[Tensor]:
    """The same for one row by whole forward passes."""
    new, logits = torch.empty(1, 0, dtype=torch.long), []
    start = torch.tensor([[s.base.config.decoder_start_token_id]]) if s.is_seq2seq else None
    for _ in range(NEW_TOKENS):
        if start is not None:
            (out,) = s.wanted(oracle, row[None], decoder_input_ids=torch.cat([start, new], 1))
        else:
            (out,) = s.wanted(oracle, torch.cat([row[None], new], 1))
        logits.append(out[:, -1])
        new = torch.cat([new, out[:, -1:].argmax(-1)], 1)
    return [new, torch.stack(logits, 1)]


def _joined(each: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(x) for x in zip(*each, strict=True)]


def _greedy(
    s: Subject, model: Callable[[], nn.Module], oracle: str, rows: list[Tensor], mask: bool, **settings: Any
) -> Cell:
    ids, filled = padded(rows, s.side) if mask else (torch.stack(rows), None)
    return judge(
        lambda: generated(s, model(), ids, filled, **settings),
        lambda: generated(s, (o := s.oracle(oracle)).model, *o.widen(ids, filled), **settings),
        lambda: generated(s, s.base, ids, filled, **settings),
        lambda: _joined([by_forwards(s, s.oracle(oracle), row) for row in rows]),
    )


@cell("generate")
def generate(s: Subject) -> Cell | None:
    return _greedy(s, lambda: s.model, "default", [s.rows[0], s.rows[2]], mask=False) if s.is_generator else None


@cell("generate without cache")
def generate_without_cache(s: Subject) -> Cell | None:
    if not s.is_generator:
        return None
    return _greedy(s, lambda: s.model, "default", [s.rows[0], s.rows[2]], mask=False, use_cache=False)


@cell("generate, padded")
def generate_padded(s: Subject) -> Cell | None:
    return _greedy(s, lambda: s.model, "default", s.rows[:2], mask=True) if s.is_generator else None


@cell("static cache")
def static_cache(s: Subject) -> Cell | None:
    if not s.is_generator:
        return None
    return _greedy(s, lambda: s.model, "default", s.rows[:2], mask=True, cache_implementation="static")


# ---- mixed batches


def _mixed(s: Subject, names: list[str], rows: list[Tensor], run: str) -> Cell:
    """Rows of several adapters against each row's oracle: alone, or in the same padding."""
    is_padded = len({len(row) for row in rows}) > 1
    ids, mask = padded(rows, s.side) if is_padded else (torch.stack(rows), None)

    def ours(model: nn.Module, **more: Any) -> list[Tensor]:
        if run == "generate":
            return generated(s, model, ids, mask, **more)
        return s.of_tokens(main_outputs(s.call(model, ids, mask, **more)), mask)

    def row_by_row(keep_pads: bool) -> list[Tensor]:
        each = []
        for i, (name, row) in enumerate(zip(names, rows, strict=True)):
            o = s.oracle(name)
            one, filled = (ids[i : i + 1], mask[i : i + 1]) if keep_pads and mask is not None else (row[None], None)
            if run == "generate":
                each.append(generated(s, o.model, *o.widen(one, filled)))
                continue
            more = {"decoder_input_ids": s.decoder_ids[i : i + 1]} if s.is_seq2seq else {}
            out = s.of_tokens(s.wanted(o, one, filled, **more), filled)
            flat = is_padded and not s.is_seq2seq and filled is None
            each.append([x.squeeze(0) for x in out] if flat else out)
        return _joined(each)

    return judge(
        lambda: ours(s.mixed, adapter_names=names),
        lambda: row_by_row(keep_pads=False),
        lambda: ours(s.base),
        (lambda: row_by_row(keep_pads=True)) if is_padded else None,
    )


@cell("mixed batch, equal prompts")
def mixed_equal(s: Subject) -> Cell:
    return _mixed(s, ["same", "default"], [s.rows[0], s.rows[2]], "forward")


@cell("mixed batch, unequal prompts")
def mixed_unequal(s: Subject) -> Cell:
    return _mixed(s, ["default", "longer", "__base__"], [s.rows[0], s.rows[2], s.rows[0]], "forward")


@cell("mixed batch, padded")
def mixed_padded(s: Subject) -> Cell:
    return _mixed(s, ["longer", "default"], s.rows[:2], "forward")


@cell("mixed batch, generate")
def mixed_generate(s: Subject) -> Cell | None:
    return _mixed(s, ["longer", "default"], s.rows[:2], "generate") if s.is_generator else None


# ---- training, saving, leaving


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
    except TypeError:
        out = s.call(model, ids)
    main = main_outputs(out)
    if pads:
        main = s.cut(main, s.oracle())
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
        return [loss.detach()[None], *(grads[kind] for kind in s.oracle().weights)]

    def base() -> list[Tensor]:
        model = copy.deepcopy(s.base).train(mode)
        table = model.get_submodule(s.tables[0]).weight.requires_grad_(True)
        _loss(s, model, s.ids, 0).backward()
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
        return [*disabled, *main_outputs(s.call(plain, s.ids)), *_state(plain)]

    def wanted() -> list[Tensor]:
        out = main_outputs(s.call(s.base, s.ids))
        return [*out, *out, *_state(s.base)]

    found = judge(ours, wanted, wanted)
    if found.status == "exact" and found.gap:
        return Cell("failure", "not bit-identical", found.gap)
    return found


def _state(model: nn.Module) -> list[Tensor]:
    """Weights and buffers, and a number that stands for their names and the classes of modules."""
    state = model.state_dict()
    names = [*state, *(f"{path} {type(module)}" for path, module in model.named_modules())]
    number = sum(sum(name.encode()) for name in names)
    return [torch.tensor([float(number)]), *(value.float().flatten() for value in state.values())]


@cell("adapter alone")
def adapter_alone(s: Subject) -> Cell:
    return _forward(s, lambda: s.alone, "alone")


@cell("adapter alone, generate")
def adapter_alone_generate(s: Subject) -> Cell | None:
    return _greedy(s, lambda: s.alone, "alone", s.rows[:2], mask=True) if s.is_generator else None


# ---- images


@cell("image")
def image(s: Subject) -> Cell | None:
    other = s.with_image
    if other is None:
        return None
    with dtype_of(other.base):
        return _forward(other, lambda: other.model, "default")


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
    first = _forward(other, lambda: other.model, "default")
    if first.status != "exact" or other.is_seq2seq:
        return first
    return _padding(other, "right")


for _name in HEADS:
    cell(_name)(lambda s, name=_name: _head(s, name))


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(arch: Architecture, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Cell]:
    """All cells of an architecture that apply to it."""
    torch.set_default_dtype(torch.float64)  # some models make tensors of their own
    found: dict[str, Cell] = {}
    with _quiet(), torch.no_grad():
        if "lacks" in arch.overrides:
            return {"base": Cell("lacks", arch.overrides["lacks"])}
        subject = Subject(arch)
        try:
            main_outputs(subject.call(subject.base, subject.ids))
        except Exception as error:
            return {"base": Cell("failure", describe(error))}
        for name, function in CELLS.items():
            if wanted(name):
                try:
                    result = function(subject)
                except Exception as error:
                    result = Cell("failure", f"the trial itself: {describe(error)}")
                if result is not None:
                    found[name] = result
    return found
