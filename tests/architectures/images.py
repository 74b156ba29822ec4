"""Images for models that see them, by hand: what a processor would give for a picture of a few patches.

Which tensors a model wants, and how many places an image takes, differs. Both are found by trying: the first way in
which the base runs, and in which other pixels give other outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .sizes import IMAGE, VOCAB

START, END = 93, 94  # of an image, where there are such tokens
COUNTS = (4, 1, 5, 16, 2, 9, 8, 6, 3, 10, 20)


@dataclass(frozen=True)
class Image:
    """How a row has an image.

    Args:
        prefix: the ids in front of the text.
        inputs: by name, what makes a tensor for a batch of ids.
    """

    prefix: tuple[int, ...]
    inputs: dict[str, Callable[[Tensor], Tensor]]


def noise(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.get_default_dtype())


def _repeated(one: Tensor) -> Callable[[Tensor], Tensor]:
    """The same for each row: `(n, ...)` → `(batch * n, ...)`."""
    return lambda ids: one.repeat(len(ids), *[1] * (one.ndim - 1))


def _ways(vision: Any, names: set[str], seed: int) -> Iterator[dict[str, Callable[[Tensor], Tensor]]]:
    """Inputs that processors make."""
    patch = getattr(vision, "patch_size", 14)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    size = getattr(vision, "image_size", 28) or 28
    size = size[0] if isinstance(size, (list, tuple)) else size
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", 3))
    frames = getattr(vision, "temporal_patch_size", 1)
    if "image_grid_thw" in names:
        for times in dict.fromkeys((frames, 1)):
            yield {
                "pixel_values": _repeated(noise(16, channels * times * patch**2, seed=seed)),
                "image_grid_thw": _repeated(torch.tensor([[1, 4, 4]])),
            }
    if "image_position_ids" in names:
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
        pixels = noise(1, 16, channels * patch**2, seed=seed)
        yield {"pixel_values": _repeated(pixels), "image_position_ids": _repeated(places)}
    if "spatial_shapes" in names:
        yield {
            "pixel_values": _repeated(noise(1, 16, channels * patch**2, seed=seed)),
            "pixel_attention_mask": _repeated(torch.ones(1, 16, dtype=torch.long)),
            "spatial_shapes": _repeated(torch.tensor([[4, 4]])),
        }
    if "aspect_ratio_ids" in names:
        tiles = getattr(vision, "max_num_tiles", 4)
        yield {
            "pixel_values": _repeated(noise(1, 1, tiles, channels, size, size, seed=seed)),
            "aspect_ratio_ids": _repeated(torch.ones(1, 1, dtype=torch.long)),
            "aspect_ratio_mask": _repeated(torch.ones(1, 1, tiles, dtype=torch.long)),
            # A prompt is in front of the image.
            "cross_attention_mask": lambda ids: (ids < VOCAB).long()[..., None, None].expand(-1, -1, 1, tiles),
        }
    for side in dict.fromkeys((size, 2 * patch, 4 * patch)):
        square = _repeated(noise(1, channels, side, side, seed=seed))
        yield {"pixel_values": square}
        sizes = {"image_sizes": _repeated(torch.tensor([[side, side]]))} if "image_sizes" in names else {}
        several = _repeated(noise(1, 1, channels, side, side, seed=seed))
        yield {"pixel_values": square, **sizes}
        yield {"pixel_values": several, **sizes}
        yield {"pixel_values": _repeated(noise(1, 2, channels, side, side, seed=seed)), **sizes}
        if "pixel_attention_mask" in names:
            yield {"pixel_values": several, "pixel_attention_mask": _repeated(torch.ones(1, 1, side, side).bool())}


def find_image(model: nn.Module, run: Callable[[Image], Tensor]) -> Image | None:
    """The first way in which the base sees an image; None if none was found.

    Args:
        model: the base.
        run: gives its outputs with an image.
    """
    names = set(inspect.signature(model.forward).parameters)
    vision = getattr(model.config, "vision_config", None)
    if vision is None or "pixel_values" not in names:
        return None
    types = {n: (lambda ids: (ids == IMAGE).long()) for n in ("mm_token_type_ids", "token_type_ids") if n in names}
    for count, (one, other) in product(COUNTS, zip(_ways(vision, names, 9), _ways(vision, names, 10), strict=True)):
        prefix = (START, *[IMAGE] * count, END)
        try:
            first, second = (run(Image(prefix, {**inputs, **types})) for inputs in (one, other))
        except Exception:  # another way may be right
            continue
        if first.isfinite().all() and not torch.allclose(first, second):
            return Image(prefix, {**one, **types})
    return None
