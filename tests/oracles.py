"""What input-tuning should give, worked out without the package: the formula of the paper on an untouched base model,
one row at a time, without masks, caches or hooks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


def adapter_weights(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter by their last names ("prompt.weight", "fc1.weight", ...), from the state dict; the
    prompt as the model is to see it, times the `prompt_scale` of the configuration."""
    found = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if len(parts) > 2 and parts[-2] == name and parts[-3].startswith("input_tuning_"):
            found[f"{parts[-3].removeprefix('input_tuning_')}.{parts[-1]}"] = value.detach().clone()
    if "prompt.weight" in found:
        found["prompt.weight"] *= model.peft_config[name].prompt_scale
    return found


def adapter_gradients(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Gradients by the names of `adapter_weights`; the prompt's is that of the prompt, not of the parameter."""
    found = {}
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        if len(parts) > 2 and parts[-2] == name and parts[-3].startswith("input_tuning_"):
            found[f"{parts[-3].removeprefix('input_tuning_')}.{parts[-1]}"] = parameter.grad.clone()
    if "prompt.weight" in found:
        found["prompt.weight"] /= model.peft_config[name].prompt_scale
    return found


def transform(weights: dict[str, Tensor], e: Tensor, activation: str = "relu") -> Tensor:
    """T(e) = e + W2 · act(W1 · e), written out, in the dtype of e."""
    if "fc1.weight" not in weights:
        return e
    weights = {name: value.to(e.dtype) for name, value in weights.items()}
    hidden = e @ weights["fc1.weight"].T
    if "fc1.bias" in weights:
        hidden = hidden + weights["fc1.bias"]
    out = ACT2FN[activation](hidden) @ weights["fc2.weight"].T
    if "fc2.bias" in weights:
        out = out + weights["fc2.bias"]
    return e + out


def encoder_of(base: nn.Module) -> nn.Module:
    return base.get_encoder() if base.config.is_encoder_decoder else base


def embed(
    base: nn.Module,
    weights: dict[str, Tensor],
    row: Tensor,
    activation: str = "relu",
    input_length: int | None = None,
) -> Tensor:
    """`(length,)` ids → `(1, P + length, dim)`: the prompt, then the embeddings, adapted up to `input_length`."""
    e = encoder_of(base).get_input_embeddings()(row.to(base.device))
    count = len(row) if input_length is None else input_length
    e = torch.cat([transform(weights, e[:count], activation), e[count:]])
    prompt = weights.get("prompt.weight")
    return (e if prompt is None else torch.cat([prompt.to(e.dtype), e])).unsqueeze(0)


@torch.no_grad()
def grown(
    base: nn.Module, weights: dict[str, Tensor], activation: str = "relu", table: nn.Module | None = None
) -> tuple[nn.Module, Tensor]:
    """A copy of the base whose table holds T(e) for every word and one word more for each virtual token, and the ids
    of those: what input-tuning does with ids only. For models that do more with ids than look them up."""
    table = encoder_of(base).get_input_embeddings() if table is None else table
    memo: dict[int, object] = {}
    model = copy.deepcopy(base, memo)
    table = memo[id(table)]
    words = table.num_embeddings
    ids = torch.arange(words, device=base.device)
    e = table(ids)
    scale = (e / table.weight[:words].to(e.dtype)).nanmedian()  # what the module multiplies its rows with
    prompt = weights.get("prompt.weight", e[:0]).to(e.dtype)
    rows = torch.cat([transform(weights, e, activation), prompt]) / scale
    table.weight = nn.Parameter(rows.to(table.weight.dtype), requires_grad=False)
    table.num_embeddings = len(rows)
    return model, torch.arange(words, len(rows), device=base.device)


def prompt_length(weights: dict[str, Tensor]) -> int:
    return len(weights["prompt.weight"]) if "prompt.weight" in weights else 0


@torch.no_grad()
def row_output(
    base: nn.Module,
    weights: dict[str, Tensor],
    row: Tensor,
    activation: str = "relu",
    input_length: int | None = None,
    **kwargs,
) -> Tensor:
    """Logits, or the last hidden state of a model without a head, for one row of ids: `(length, ...)`.

    Tokens from `input_length` on are not adapted (`adapter_scope="input"`); None adapts all.
    """
    x = embed(base, weights, row, activation, input_length)
    out = base(inputs_embeds=x, **kwargs)
    main = out.logits if "logits" in out else out.last_hidden_state
    if base.config.is_encoder_decoder or main.ndim == 2:
        return main[0]
    return main[0, prompt_length(weights) :]


@torch.no_grad()
def head_output(base: nn.Module, weights: dict[str, Tensor], row: Tensor, head: str) -> Tensor:
    """What a classifier says of one row of ids, by hand: the base without its head on [prompt; T(E)], then the head.

    Args:
        head: "seq_cls", "token_cls" or "qa" (its start logits). For "seq_cls" T5 and BART read the last token, an end.

    Returns:
        `(labels,)` logits for "seq_cls", `(length, labels)` for "token_cls", `(length,)` for "qa".
    """
    x, config, slots = embed(base, weights, row), base.config, prompt_length(weights)
    more = {}
    if config.is_encoder_decoder:  # the decoder reads the shifted input
        more["decoder_input_ids"] = torch.cat([row.new_tensor([config.decoder_start_token_id]), row[:-1]])[None]
    if head != "seq_cls":
        out = base(inputs_embeds=x, **more)
        main = out.start_logits if head == "qa" else out.logits
        return main[0] if config.is_encoder_decoder else main[0, slots:]
    if config.is_encoder_decoder:
        body = base.transformer if hasattr(base, "transformer") else base.model
        return base.classification_head(body(inputs_embeds=x, **more).last_hidden_state[:, -1])[0]
    states = base.base_model(inputs_embeds=x).last_hidden_state
    if hasattr(base, "score"):  # decoders read the last token
        return base.score(states[0, -1])
    states = states[:, slots:]  # encoders read the first
    return base.classifier(states if config.model_type == "roberta" else base.base_model.pooler(states))[0]


def likeliest(logits: Tensor) -> int:
    """The token with the largest of `(vocabulary,)` logits. Two that are all but level are an error: which one is
    larger would be up to how the processor rounds. Then the test wants other weights, or another row."""
    best, second = logits.topk(2).values
    assert best - second > 2e-5 * logits.abs().max(), f"level: {float(best)} and {float(second)}"
    return int(logits.argmax())


@torch.no_grad()
def greedy(
    base: nn.Module, weights: dict[str, Tensor], row: Tensor, new_tokens: int, activation: str = "relu"
) -> Tensor:
    """Greedy decoding of one row by full forward passes without a cache: the new tokens, `(new_tokens,)`."""
    new: list[int] = []
    for _ in range(new_tokens):
        if base.config.is_encoder_decoder:
            start = [base.config.decoder_start_token_id]
            decoded = torch.tensor([start + new], device=base.device)
            logits = row_output(base, weights, row, activation, decoder_input_ids=decoded)
        else:
            logits = row_output(base, weights, torch.cat([row, row.new_tensor(new)]), activation)
        new.append(likeliest(logits[-1]))
    return torch.tensor(new, device=base.device)
