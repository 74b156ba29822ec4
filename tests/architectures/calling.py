"""Cells of one call and of several: forward, padding, caches, generation, mixed batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .judging import Cell, gap, judge, tolerance
from .oracle import Oracle
from .registry import cell
from .subject import PROMPTS, Subject, forget, main_outputs, padded

NEW_TOKENS = 5
CACHES = ("cache", "past_key_values", "cache_params", "state", "past_buckets_states", "mems")


def forward_against(s: Subject, model: Callable[[], nn.Module], oracle: str, mask: Tensor | None = None) -> Cell:
    return judge(
        lambda: main_outputs(s.call(model(), s.ids, mask)),
        lambda: s.wanted(s.oracle(oracle), s.ids, mask),
        lambda: main_outputs(s.call(s.base, s.ids, mask)),
    )


@cell("forward")
def forward(s: Subject) -> Cell:
    return forward_against(s, lambda: s.model, "default")


def padding(s: Subject, side: str) -> Cell:
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
    return padding(s, "left")


@cell("right padding")
def right_padding(s: Subject) -> Cell:
    return padding(s, "right")


def by_hand(s: Subject, model: nn.Module, ids: Tensor, mask: Tensor | None, first: int) -> list[Tensor]:
    """Outputs of a first call and two more on its cache: logits of all new places, `(batch, length, ...)`."""
    forget(model)
    found, steps = [], [slice(0, first), slice(first, first + 1), slice(first + 1, None)]
    whole, given = ids, s.more(ids if s.is_seq2seq else ids[:, :first], decoded=False)
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
        return s.of_tokens(s.cut([out], o, ids.shape[1] + o.length), mask)

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
    forget(model)
    torch.manual_seed(0)
    out = model.generate(
        input_ids=ids.clone(),  # BLIP writes into them
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    logits = torch.stack(out.logits, 1)
    return [out.sequences[:, -logits.shape[1] :], logits]


def by_forwards(s: Subject, oracle: Oracle, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The same for one row, `(1, length)`, by whole forward passes, without its pads."""
    new, logits = torch.empty(1, 0, dtype=torch.long), []
    start = torch.tensor([[s.base.config.decoder_start_token_id]]) if s.is_seq2seq else None
    ids = s.fed(ids)
    ids = ids if mask is None else ids[mask[:, : ids.shape[1]].bool()][None]
    for _ in range(NEW_TOKENS):
        if start is not None:
            (out,) = s.wanted(oracle, ids, decoder_input_ids=torch.cat([start, new], 1))
        else:
            (out,) = s.wanted(oracle, torch.cat([ids, new], 1))
        logits.append(out[:, -1])
        new = torch.cat([new, out[:, -1:].argmax(-1)], 1)
    return [new, torch.stack(logits, 1)]


def _joined(each: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(x) for x in zip(*each, strict=True)]


def greedy(
    s: Subject, model: Callable[[], nn.Module], oracle: str, rows: list[Tensor], mask: bool, **settings: Any
) -> Cell:
    ids, filled = padded(rows, s.side) if mask else (torch.stack(rows), None)

    def wanted() -> list[Tensor]:
        o = s.oracle(oracle)
        if s.generates_from_other_ids:
            generated(s, s.base, ids, filled, **settings)  # if it cannot, it says so
            return _joined([by_forwards(s, o, *_row(i, ids, filled)) for i in range(len(rows))])
        return generated(s, o.model, *o.widen(ids, filled), **settings)

    def alone() -> list[Tensor]:
        return _joined([by_forwards(s, s.oracle(oracle), row[None]) for row in rows])

    found = judge(
        lambda: generated(s, model(), ids, filled, **settings),
        wanted,
        lambda: generated(s, s.base, ids, filled, **settings),
        alone,
    )
    if found.status == "refused" and (apart := gap(wanted(), alone())) > tolerance():
        return Cell("lacks", f"the base itself differs by {apart:.1e} from its forward passes")
    return found


def _row(i: int, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return ids[i : i + 1], None if mask is None else mask[i : i + 1]


@cell("generate")
def generate(s: Subject) -> Cell | None:
    return greedy(s, lambda: s.model, "default", [s.rows[0], s.rows[2]], mask=False) if s.is_generator else None


@cell("generate without cache")
def generate_without_cache(s: Subject) -> Cell | None:
    if not s.is_generator:
        return None
    return greedy(s, lambda: s.model, "default", [s.rows[0], s.rows[2]], mask=False, use_cache=False)


@cell("generate, padded")
def generate_padded(s: Subject) -> Cell | None:
    return greedy(s, lambda: s.model, "default", s.rows[:2], mask=True) if s.is_generator else None


@cell("static cache")
def static_cache(s: Subject) -> Cell | None:
    if not s.is_generator:
        return None
    return greedy(s, lambda: s.model, "default", s.rows[:2], mask=True, cache_implementation="static")


# ---- mixed batches


def what_masks_change(s: Subject) -> str:
    """Whether the base itself gives a row something else for masked places, where prompts of several lengths would
    need them: then what it lacks, in words; else nothing. Positions and token types go along with the tokens."""
    side, row = s.side_of_slack, s.rows[0]
    more = {"decoder_input_ids": s.decoder_ids[:1]} if s.is_seq2seq else {}
    alone = main_outputs(s.call(s.base, row[None], **more))
    at = torch.arange(len(row))[None]
    takes_positions = "position_ids" in inspect.signature(s.base.forward).parameters
    for count in (2, 4, 6):
        other = torch.cat([s.rows[2], s.rows[2][-count:]])
        ids, mask = padded([row, other], side)
        here = mask[0].bool()
        given = {name: value.expand(2, *value.shape[1:]) for name, value in more.items()}
        for first in (0, 1, 2) if takes_positions else ():
            if _is_counted_from(s, row, at + first, alone, more):
                places = (mask.cumsum(-1) - 1).clamp(min=0) + first
                given["position_ids"] = places
                break
        found = [x[:1] for x in main_outputs(s.call(s.base, ids, mask, **given))]
        if not s.is_seq2seq:
            found = [x[:, here] for x in found]
        apart = gap(found, alone)
        if apart > tolerance():
            return (
                f"what is masked counts: a row of the base with {count} masked places on the {side} differs from the "
                f"same row alone by {apart:.0e} of the largest value"
            )
    return ""


def _is_counted_from(s: Subject, row: Tensor, at: Tensor, alone: list[Tensor], more: dict[str, Tensor]) -> bool:
    """Whether a row of the base with these positions is what it is without; not if it cannot be run with any
    (Reformer with a part of a chunk)."""
    try:
        return gap(main_outputs(s.call(s.base, row[None], position_ids=at, **more)), alone) <= tolerance()
    except RuntimeError:
        return False


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
            one, filled = _row(i, ids, mask) if keep_pads else (row[None], None)
            if run == "generate":
                of_row = by_forwards(s, o, one, filled) if s.generates_from_other_ids else None
                each.append(of_row or generated(s, o.model, *o.widen(one, filled)))
                continue
            more = {"decoder_input_ids": s.decoder_ids[i : i + 1]} if s.is_seq2seq else {}
            out = s.of_tokens(s.wanted(o, one, filled, **more), filled)
            flat = is_padded and not s.is_seq2seq and filled is None
            each.append([x.squeeze(0) for x in out] if flat else out)
        return _joined(each)

    found = judge(
        lambda: ours(s.mixed, adapter_names=names),
        lambda: row_by_row(keep_pads=False),
        lambda: ours(s.base),
        (lambda: row_by_row(keep_pads=True)) if is_padded else None,
    )
    unequal = len({PROMPTS.get(name, 0) for name in names}) > 1
    if found.status != "refused" or not unequal or not s.takes_virtual_tokens:
        return found
    lacking = what_masks_change(s) or (what_masks_change_in_generate(s) if run == "generate" else "")
    return Cell("lacks", lacking) if lacking else found


def what_masks_change_in_generate(s: Subject) -> str:
    """The same of its `generate`, if that numbers positions by the mask."""
    if "position_ids" not in inspect.signature(s.base.forward).parameters:
        return ""
    ids, mask = padded(s.rows[:2], s.side)
    apart = gap(generated(s, s.base, *_row(1, ids, mask)), generated(s, s.base, s.rows[1][None]))
    if apart <= tolerance():
        return ""
    return (
        f"what is masked counts in the base's `generate`: a padded row differs from the same row alone by {apart:.0e}"
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
