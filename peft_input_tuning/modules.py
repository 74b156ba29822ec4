"""The two things that input-tuning trains, as plain modules. Knows torch only.

    SoftPrompt          num_virtual_tokens rows in front of the input                       (paper, figure 2)
    adapt               T(x) = x + W2 · act(W1 · x), a residual MLP over word embeddings    (paper, figure 4)
    InputDtypeLinear    W1 and W2: float32 weights, products in the dtype of the embeddings

`adapt` is a function rather than a module: PEFT keeps one flat, prefixed container for each kind of weight
(`input_tuning_fc1[adapter]`, `input_tuning_fc2[adapter]`, ...), since an adapter's name is taken out of a file's keys
only where it is the second to last part of the key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

VIRTUAL = -(1 << 30)  # ids below are virtual tokens; far from the -1 and -100 that callers pass by mistake


class SoftPrompt(nn.Module):
    """The virtual tokens of one adapter: `prompt = weight * scale`.

    Adam moves every parameter by about the learning rate a step, whatever its gradient. A prompt wants a higher rate
    than the input-adapter; with its parameter divided by `scale`, one rate moves it `scale` times as fast.

    A module around a single parameter, not an `nn.Parameter` in a `ParameterDict`: those lose `requires_grad=False`
    when PEFT casts the adapter's dtype.

    Args:
        num_virtual_tokens: number of rows, >= 1.
        embedding_dim: size of the word embeddings.
        scale: what the parameter is multiplied by.
        device: where the parameter is made, as in torch's own modules.
    """

    def __init__(
        self, num_virtual_tokens: int, embedding_dim: int, scale: float = 1.0, device: str | None = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_virtual_tokens, embedding_dim, device=device))

    @torch.no_grad()
    def start_from(self, prompt: Tensor) -> None:
        """Makes the prompt `(num_virtual_tokens, embedding_dim)` what is given; to the bit if `scale` is a power of
        two."""
        self.weight.copy_(prompt / self.scale)

    def forward(self) -> Tensor:
        """Returns the prompt, `(num_virtual_tokens, embedding_dim)`.

        A new tensor also if `scale` is 1: DeepSpeed ZeRO-3 takes a parameter's data away again when the forward of its
        module returns.
        """
        return self.weight * self.scale

    def extra_repr(self) -> str:
        rows, width = self.weight.shape
        return f"num_virtual_tokens={rows}, embedding_dim={width}, scale={self.scale}"


class InputDtypeLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input; the weights keep theirs, and so do their gradients.

    PEFT keeps adapters in float32 over a bfloat16 base: small steps would be lost in bfloat16 weights. The products
    need no more than the base model's own layers have, and cost several times as much in float32. In float16 too,
    values and gradients have the range of the base model's layers: a base that needs loss scaling to train in float16
    needs it here.

    Weights are cast inside of `forward`: there, offloaded and sharded ones (accelerate, DeepSpeed ZeRO-3) are at hand.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """`(rows, in)` → `(rows, out)`, added to `residual`, `(rows, out)`, in the latter's dtype."""
        if autocasts(input):  # it chooses the dtype, and keeps the weights that it has cast
            product = super().forward(input)
        elif residual is not None and self.bias is None and type(self.weight) is nn.Parameter:
            # One operation for product and sum. Subclasses, quantized weights among them, may know linear layers only.
            return torch.addmm(residual, input, self.weight.to(input.dtype).t())
        else:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            product = nn.functional.linear(input, self.weight.to(input.dtype), bias)
        return product if residual is None else residual + product.to(residual.dtype)


def autocasts(tensor: Tensor) -> bool:
    """Whether products with a tensor are in autocast's dtype."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):  # the device "meta"
        return False
    return torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64  # which autocast leaves alone


def adapt(embeddings: Tensor, fc1: nn.Module, activation: Callable, dropout: nn.Module, fc2: nn.Module) -> Tensor:
    """The input-adapter, T(x) = x + W2 · act(W1 · x) (paper, figure 4).

    All of it is computed in the dtype of the embeddings, or as autocast says. A zero W2 changes no bit.

    Args:
        embeddings: `(..., embedding_dim)`.
        fc1: W1, embedding_dim → hidden_dim, an `InputDtypeLinear`, like `fc2`, or what a library has put in its place.
        activation: element-wise; one with parameters of its own (PReLU) runs in their dtype.
        dropout: over the activations; the paper draws none.
        fc2: W2, hidden_dim → embedding_dim.

    Returns:
        `(..., embedding_dim)`, the dtype of `embeddings`.
    """
    rows = embeddings.reshape(-1, embeddings.shape[-1])  # a linear layer takes more operations over three dimensions
    hidden = dropout(activated(activation, fc1(rows)))
    added = fc2(hidden, rows) if isinstance(fc2, InputDtypeLinear) else rows + fc2(hidden).to(rows.dtype)
    return added.view(embeddings.shape)


def activated(activation: Callable, hidden: Tensor) -> Tensor:
    """The activations, in the dtype of `hidden`."""
    own = next(activation.parameters(), None) if isinstance(activation, nn.Module) else None
    return activation(hidden) if own is None else activation(hidden.to(own.dtype)).to(hidden.dtype)
