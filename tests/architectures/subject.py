"""One architecture under trial: its base, its adapters, its oracles, and rows of text."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_input_tuning import InputTuningConfig

from .build import Architecture, build
from .images import Image, find_image
from .oracle import Oracle, Weights, hide_new_words, tables
from .sizes import EOS, PAD, WORDS

PROMPTS = {"default": 4, "same": 4, "longer": 6}  # adapters and their numbers of virtual tokens


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


def forget(model: nn.Module) -> None:
    """Drops what a call on a text with images leaves on the model for the calls that follow on its cache."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None


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
        torch.set_default_dtype(torch.float64)
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
                if self.is_generator:
                    model.generate(input_ids=ids, max_new_tokens=2, **self.more(ids, decoded=False))
        except Exception:
            return False
        return not any(bool(x.isnan().any()) for x in self.of_tokens(out, mask))

    @cached_property
    def with_image(self) -> Subject | None:
        """The same with an image in each row; None for models that see none, or need one always."""
        always = "pixel_values" in self.arch.overrides.get("inputs", {})
        if self.arch.mapping != "image" or always or "blind" in self.arch.overrides:
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
    def generates_from_other_ids(self) -> bool:
        return "fed" in self.arch.overrides

    def fed(self, ids: Tensor) -> Tensor:
        """What the model's `generate` makes of a caller's ids, before it generates."""
        return self.arch.overrides["fed"](ids) if self.generates_from_other_ids else ids

    @cached_property
    def task(self) -> str | None:
        """None for a model that does not take what PEFT's models of a task pass on (LoRA's as well)."""
        try:
            with torch.no_grad():
                self.call(self.base, self.ids, inputs_embeds=None)
        except TypeError:
            return None
        if self.head is not None:
            kinds = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "question": "QUESTION_ANS"}
            return kinds[self.head.split()[0]]
        if self.is_seq2seq:
            return "SEQ_2_SEQ_LM"
        return "CAUSAL_LM" if self.is_generator else "FEATURE_EXTRACTION"

    @property
    def side(self) -> str:
        return "left" if self.is_generator and not self.is_seq2seq else "right"

    @property
    def takes_virtual_tokens(self) -> bool:
        """Whether an adapter with some can be made."""
        try:
            return self.mixed is not None
        except ValueError:
            return False

    @property
    def side_of_slack(self) -> str:
        """Where the package has masked places in the rows of a batch with prompts of several lengths."""
        return self.mixed.base_model.backbone.input_tuning_traits.slack

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
        needed = {**(self.image.inputs if self.image else {}), **self.arch.overrides.get("inputs", {})}
        found = {name: make(ids) for name, make in needed.items()}
        if self.is_seq2seq and self.head is None and decoded and "decoder_input_ids" not in found:
            found["decoder_input_ids"] = self.decoder_ids[:batch]
        return found

    def call(self, model: nn.Module, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
        forget(model)
        torch.manual_seed(0)  # some draw
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
        size, found = self.size_of_embeddings, {}
        for key, parameter in model.named_parameters():
            kind = next((k for k in ("prompt", "fc1", "fc2") if key.endswith(f"input_tuning_{k}.{name}.weight")), None)
            if kind is None:
                continue
            generator = torch.Generator().manual_seed(sum(map(ord, f"{name} {kind}")))
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if kind == "prompt":
                values = values * size
            elif kind == "fc1":
                values = values / (size * math.sqrt(parameter.shape[1]))
            else:
                values = values * 0.7 * size / math.sqrt(parameter.shape[1])
            parameter.data.copy_(values)
            found[kind] = values.to(torch.get_default_dtype())
        if not found:
            raise ValueError(f"the model has no parameters of an adapter {name!r}")
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
            one = Oracle.of(self.base, self.tables[0], self._other_tables, weights)
            hide_new_words(one.model, len(one.base_rows), self.arch.overrides.get("hidden", ()))
            self._oracles[name] = one
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

    def cut(self, out: list[Tensor], oracle: Oracle, length: int) -> list[Tensor]:
        """The outputs of an oracle for rows of `length` places with the prompt, without the prompt's places."""
        if self.is_seq2seq or not oracle.length or self.head == "sequence classification":
            return out
        return [x[:, oracle.length :] if x.shape[1] == length else x for x in out]

    def wanted(self, oracle: Oracle, ids: Tensor, mask: Tensor | None = None, **more: Any) -> list[Tensor]:
        """What the oracle gives for a batch, aligned with it."""
        if self.head is not None:
            has_decoder = self.is_seq2seq and any(path.endswith("decoder") for path, _ in self.base.named_modules())
            inside = oracle.widening() if has_decoder else oracle.around(oracle.model.base_model)
            with inside:
                return main_outputs(self.call(oracle.model, ids, mask, **more))
        out = main_outputs(self.call(oracle.model, *oracle.widen(ids, mask), **more))
        return self.cut(out, oracle, ids.shape[1] + oracle.length)

    def of_tokens(self, out: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        """What is not at a pad."""
        if mask is None or self.is_seq2seq or self.head == "sequence classification":
            return out
        return [x[mask.bool()] if x.shape[:2] == mask.shape else x for x in out]


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
