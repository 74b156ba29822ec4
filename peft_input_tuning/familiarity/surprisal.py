"""How surprised a frozen decoder-only language model is at each token of a text.

    surprisal of token i = -log2 p(token i | start tokens, tokens before i)          in bits

A text longer than a window is read in windows that overlap by a half, so that every token has at least half a window
before it and nothing is cut off:

    [ 1 2 3 4 5 6 7 8 ]
            [ 5 6 7 8 | 9 10 11 12 ]                      tokens behind the bar are scored in the second window
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

DEFAULT_WINDOW = 512
# Logits that are held at once, half a gigabyte in float32; one window is always possible.
LOGITS_AT_ONCE = 1 << 27


@dataclass(frozen=True)
class _Window:
    """Tokens `start` to `end` of a row, of which those from `scored` on count."""

    row: int
    start: int
    scored: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def check_causal(model: nn.Module) -> None:
    """Raises ValueError unless the model predicts each token from those before it alone."""
    config = model.config
    remedy = "Pass a decoder-only language model, or None to leave the model's own view out."
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"`model` is an encoder-decoder model ({config.model_type}): it predicts no inputs. {remedy}")
    if not isinstance(model, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("`model` has adapters that are not in a PeftModel. Pass it without them, or the PeftModel.")
    device = next(model.parameters()).device
    with torch.no_grad(), base_alone(model):
        one, other = (model(input_ids=torch.tensor([[3, 4, 5, last]], device=device)) for last in (6, 7))
    if getattr(one, "logits", None) is None or one.logits.dim() != 3 or one.logits.shape[1] != 4:
        raise ValueError(f"`model` ({type(model).__name__}) gives no logits for each token. {remedy}")
    before, changed = one.logits[:, :3].float(), other.logits[:, :3].float()
    if not torch.allclose(before, changed, rtol=0, atol=1e-3 * float(before.abs().max())):
        raise ValueError(f"`model` ({config.model_type}) sees the tokens behind the one it predicts. {remedy}")


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """The frozen base model: adapters off, no dropout. Both are put back afterwards."""
    training = [module for module in model.modules() if module.training]
    off: AbstractContextManager[None] = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    model.eval()
    try:
        with off:
            yield
    finally:
        for module in training:
            module.training = True


def longest_window(model: nn.Module, start: Sequence[int]) -> int | None:
    """How many tokens of a text fit behind the start tokens; None if the model sets no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else positions - len(start)


@torch.no_grad()
def token_bits(
    model: nn.Module, rows: Sequence[list[int]], start: list[int], window: int, batch_size: int
) -> list[Tensor]:
    """Surprisals of all tokens but the first, which has nothing before it.

    Args:
        model: a causal language model, inside `base_alone`.
        rows: token ids of each text, of any lengths.
        start: ids that stand before every text, or part of one.
        window: tokens of a text that are read at once, at least 2.
        batch_size: windows in a batch, at most. There are fewer if their logits would be too many.

    Returns:
        for each row of n tokens, `(n,)` bits in float32 on the CPU; the first is NaN.

    Raises:
        ValueError: a token that the model does not know.
    """
    device = next(model.parameters()).device
    words = model.config.get_text_config().vocab_size
    largest = max((max(row) for row in rows if row), default=0)
    if largest >= words:
        raise ValueError(f"`tokenizer` gives the token {largest}, but `model` knows {words}. Pass the model's own.")
    bits = [torch.full((len(row),), math.nan) for row in rows]
    # Windows of like length share a batch, so that little is padding.
    waiting = sorted((w for i, row in enumerate(rows) for w in _windows(i, len(row), window)), key=len)
    while waiting:
        width = len(start) + len(waiting[-1])
        size = max(1, min(batch_size, LOGITS_AT_ONCE // (width * words)))
        batch = waiting[-size:]
        del waiting[-size:]
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, part in enumerate(batch):
            tokens = [*start, *rows[part.row][part.start : part.end]]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        ids = ids.to(device)
        logits = model(input_ids=ids, attention_mask=mask.to(device), use_cache=False).logits
        for i, part in enumerate(batch):
            first, last = (len(start) + place - part.start for place in (part.scored, part.end))
            before = logits[i, first - 1 : last - 1].float()  # the logits at a place predict the next one
            chosen = before.gather(1, ids[i, first:last, None]).squeeze(1)
            bits[part.row][part.scored : part.end] = ((before.logsumexp(1) - chosen) / math.log(2)).cpu()
    return bits


def _windows(row: int, length: int, window: int) -> Iterator[_Window]:
    start, scored = 0, 1
    while scored < length:
        end = min(start + window, length)
        yield _Window(row, start, scored, end)
        start, scored = end - window // 2, end
