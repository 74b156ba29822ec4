"""`InputTuningLayer`: the word embedding of the base model with the adapters around it.

    input_ids ──► base_layer ──► T_a(e) = e + W2 · act(W1 · e) ──► embeddings          a: the adapter of the row

It also keeps each adapter's soft prompt; putting the prompt into the batch is the backbone's part (`virtual_tokens/`),
since only there the virtual tokens can be taken out again. Containers are flat and prefixed, `input_tuning_fc1[a]`,
because PEFT takes an adapter's name out of a file's keys only where it is the second to last part of the key.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .base_weights import base_embedding, execution_device
from .call_state import current_row_adapters, on_device, out_of_graphs_if_mixed
from .config import InputTuningConfig
from .merging import MergeableTable
from .mixed_rows import MixedRows
from .modules import VIRTUAL, InputDtypeLinear, SoftPrompt
from .prompt_start import initial_prompt, start_words
from .prompt_states import PromptStates

IsOutput = Tensor | bool  # which tokens are the output's: `(batch, length)` booleans, or one for all

CANNOT_TELL = (
    '`adapter_scope` is "input", but nothing tells the tokens of the input from those of the output. Pass `labels` '
    "(-100 at the input's tokens) to the model, or call `generate` of the PeftModel with `input_ids`. Where that is "
    'impossible (a trainer with a loss of its own, embeddings, a compiled decoding step), use adapter_scope="all".'
)

ONE_ID = (
    "The embedding was asked for that of one id, without a dimension. Models of images do so where they are called "
    "with `inputs_embeds`, to find an image's places by comparing embeddings, and adapted ones differ by rounding. "
    'Pass `input_ids` beside images, and use adapter_scope="all".'
)


class InputTuningLayer(MergeableTable, MixedRows, PromptStates):
    """The wrapped word embedding.

    How it merges stands in `merging.py`, how it runs input-adapters, in mixed batches too, in `mixed_rows.py`, what it
    does while weights have still to come in `pending_weights.py`.

    Args:
        base_layer: the embedding, `(batch, length)` ids → `(batch, length, embedding_dim)`.
    """

    adapter_layer_names = ("input_tuning_prompt", "input_tuning_fc1", "input_tuning_activation", "input_tuning_fc2")
    other_param_names = ("input_tuning_dropout",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.input_tuning_prompt = nn.ModuleDict()
        self.input_tuning_fc1 = nn.ModuleDict()
        self.input_tuning_fc2 = nn.ModuleDict()
        self.input_tuning_activation = nn.ModuleDict()
        self.input_tuning_dropout = nn.ModuleDict()
        self.input_only: set[str] = set()  # adapters that leave the output's tokens alone, see virtual_tokens/scope.py
        self.prompt_start: dict[str, list[int]] = {}  # the words that prompts started from, where they are known
        self.seen_labels: set[tuple[str, bool]] = set()  # of those, whose labels were looked at, in training or not

    def get_base_layer(self) -> nn.Module:
        """The table itself, under what other methods put around it; PEFT stops at their `AuxiliaryTrainingWrapper`."""
        return base_embedding(self.base_layer)

    @property
    def embedding_dim(self) -> int:
        return self.get_base_layer().embedding_dim

    @property
    def num_embeddings(self) -> int:
        return self.get_base_layer().num_embeddings

    @property
    def adapter_names(self) -> list[str]:
        """All adapters of this layer."""
        return self._all_available_adapter_names()

    def has_adapter(self, name: str) -> bool:
        return name in self.input_tuning_prompt or name in self.input_tuning_fc1

    @property
    def enabled_adapter(self) -> str | None:
        """The adapter that serves a whole batch; None while adapters are disabled or none of ours is active."""
        if self.disable_adapters:
            return None
        ours = [name for name in self.active_adapters if self.has_adapter(name)]
        return ours[0] if ours else None

    @property
    def slots(self) -> int:
        """Length of the longest prompt in the call under way; 0 where nothing is to be put in."""
        if self.disable_adapters:
            return 0
        rows = current_row_adapters(self)
        if rows is not None:
            return rows.slots
        name = self.enabled_adapter
        return 0 if name is None else self.prompt_length(name)

    @property
    def adapts_input_only(self) -> bool:
        """Whether the call under way has an adapter that leaves the output's tokens alone."""
        if not self.input_only or self.disable_adapters:
            return False
        rows = current_row_adapters(self)
        return not self.input_only.isdisjoint([self.enabled_adapter] if rows is None else rows.names)

    def check_weights_in_use(self) -> None:
        """Raises if an adapter of the call under way still waits for its file."""
        if self.pending:
            rows = current_row_adapters(self)
            for name in [self.enabled_adapter] if rows is None else rows.names:
                self.check_weights_have_come(str(name))

    def prompt_length(self, name: str) -> int:
        """Number of virtual tokens of an adapter; 0 for `"__base__"`."""
        return self.input_tuning_prompt[name].weight.shape[0] if name in self.input_tuning_prompt else 0

    # ---- making and removing adapters ---------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: InputTuningConfig, input_only: bool = False) -> None:
        """Adds an adapter with its first weights; `input_only` for one that leaves the output's tokens alone.

        An adapter that will be read from a file gets NaN instead (`pending_weights.py`): what the file does not hold
        is then noticed at the first use, not silently random.
        """
        width = self.embedding_dim
        hidden = 2 * width if config.adapter_hidden_dim is None else config.adapter_hidden_dim
        from_file = config.weights_in_checkpoint or config.inference_mode
        prompt, words = None, config.prompt_start
        if self.merged:
            raise ValueError(
                f"Adapter {self.merged_adapters[0]!r} is merged into the embedding. Call unmerge_adapter() before "
                "adding another."
            )
        if config.num_virtual_tokens and not from_file:
            words = start_words(  # may fail, so before anything is changed
                self.base_layer,
                config.num_virtual_tokens,
                config.prompt_tuning_init,
                text=config.prompt_tuning_init_text,
                tokenizer_name=config.tokenizer_name_or_path,
                tokenizer_kwargs=config.tokenizer_kwargs,
            )
            prompt = initial_prompt(self.base_layer, config.num_virtual_tokens, words)
        for container in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]
        device = "meta" if from_file else None  # no memory for what the file may not hold
        if config.num_virtual_tokens:
            scale = cast(float, config.prompt_scale)  # the configuration has put a number for None
            self.input_tuning_prompt[adapter_name] = SoftPrompt(config.num_virtual_tokens, width, scale, device)
        if hidden:
            self.input_tuning_fc1[adapter_name] = InputDtypeLinear(width, hidden, config.adapter_bias, device)
            self.input_tuning_fc2[adapter_name] = InputDtypeLinear(hidden, width, config.adapter_bias, device)
            self.input_tuning_activation[adapter_name] = ACT2FN[config.adapter_activation]
            self.input_tuning_dropout[adapter_name] = nn.Dropout(config.adapter_dropout)
        self.forget_prompt_states()
        self.seen_labels -= {(adapter_name, True), (adapter_name, False)}
        if input_only and hidden:
            self.input_only.add(adapter_name)
        else:
            self.input_only.discard(adapter_name)
        if from_file or (prompt is not None and prompt.is_meta):  # a base on "meta" has no embeddings to start from
            self.pending.add(adapter_name)
        self.record_start(adapter_name, None if prompt is not None and prompt.is_meta else words)
        if from_file:
            self.hold_places(adapter_name, execution_device(self.base_layer))
        self._reset_adapter(adapter_name, prompt, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _reset_adapter(self, name: str, prompt: Tensor | None, zero_start: bool) -> None:
        if name in self.pending or any(p.is_meta for _, p in self.named_adapter_parameters(name)):
            return  # a file's tensors take the place of these
        if prompt is not None:
            self.input_tuning_prompt[name].start_from(prompt)
        if name in self.input_tuning_fc2 and zero_start:
            for parameter in self.input_tuning_fc2[name].parameters():
                parameter.zero_()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        ours = [name for name in names if self.has_adapter(name)]
        if len(ours) > 1:
            raise ValueError(
                f"Only one input-tuning adapter can be active for a whole batch, got {ours}. Activate one of them, or "
                "give each row its adapter with `adapter_names=[...]`."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def record_start(self, name: str, words: list[int] | None) -> None:
        """Keeps which words an adapter's prompt started from; None where that is not known."""
        self.prompt_start.pop(name, None)
        if words is not None:
            self.prompt_start[name] = words

    def delete_adapter(self, adapter_name: str) -> None:
        self.pending.discard(adapter_name)
        self.record_start(adapter_name, None)
        self.input_only.discard(adapter_name)
        self.forget_prompt_states()
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        with self.small_places(adapter_name):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device or execution_device(self.base_layer))

    # ---- forward ------------------------------------------------------------------------------------------------

    @out_of_graphs_if_mixed
    def forward(self, input_ids: Tensor, *args: Any, is_output: IsOutput | None = None, **kwargs: Any) -> Tensor:
        """`(batch, length)` ids → `(batch, length, embedding_dim)` adapted embeddings.

        An id below `VIRTUAL` is a virtual token: -1 from there is the last row of the prompt; a call shorter than the
        prompt has none. `is_output` is for adapters with `adapter_scope="input"` (`virtual_tokens/scope.py`).
        """
        if self.merged and self.disable_adapters:
            self.unmerge()  # as PEFT's other methods do
        slots = self.slots
        if not slots or input_ids.ndim < 1 or input_ids.shape[-1] < slots:
            return self._adapted(self.base_layer(input_ids, *args, **kwargs), is_output)
        is_virtual = input_ids < VIRTUAL
        words = self._adapted(self.base_layer(input_ids.masked_fill(is_virtual, 0), *args, **kwargs), is_output)
        ids, is_virtual = input_ids.to(words.device), is_virtual.to(words.device)
        return torch.where(is_virtual.unsqueeze(-1), self._virtual_tokens(ids, slots).to(words.dtype), words)

    def _adapted(self, embeddings: Tensor, is_output: IsOutput | None) -> Tensor:
        if self.merged:
            return embeddings
        rows = None if self.disable_adapters else current_row_adapters(self)
        name = self.enabled_adapter
        if embeddings.ndim == 1 and (rows is not None or name in self.input_tuning_fc2):
            raise ValueError(ONE_ID)
        if rows is not None:
            return self.adapt_rows(embeddings, rows, is_output)
        return embeddings if name is None else self.adapt_in_scope(embeddings, name, is_output)

    def _virtual_tokens(self, ids: Tensor, slots: int) -> Tensor:
        """The rows of the prompts that ids name, `(batch, length, embedding_dim)`; anything for words and for places
        that a row's prompt leaves over."""
        places = (ids + (slots - VIRTUAL)).clamp(max=slots - 1)
        rows = current_row_adapters(self)
        if rows is None:
            return nn.functional.embedding(places, self._prompt(str(self.enabled_adapter), slots))
        names = rows.names_of(len(ids))
        with_prompt = [name for name in dict.fromkeys(names) if self.prompt_length(name)]
        table = torch.cat([self._prompt(name, slots) for name in with_prompt])
        first = {name: at * slots for at, name in enumerate(with_prompt)}
        return nn.functional.embedding(places + on_device([[first.get(name, 0)] for name in names], ids.device), table)

    def _prompt(self, name: str, slots: int) -> Tensor:
        """An adapter's prompt at the right end of `slots` rows, `(slots, embedding_dim)`."""
        self.check_weights_have_come(name)
        prompt = self.input_tuning_prompt[name]()
        return prompt if len(prompt) == slots else nn.functional.pad(prompt, (0, 0, slots - len(prompt), 0))

    def adapt_in_scope(self, embeddings: Tensor, name: str, is_output: IsOutput | None) -> Tensor:
        """One adapter's T(e) of the tokens that it is for, `(batch, length, embedding_dim)` → the same shape."""
        if name not in self.input_only or is_output is False:
            return self.adapt(embeddings, name)
        if is_output is None:
            raise ValueError(CANNOT_TELL)
        if is_output is True:
            return embeddings
        return torch.where(is_output.unsqueeze(-1), embeddings, self.adapt(embeddings, name))

    # ---- being the embedding for the rest of the world ------------------------------------------------------------

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """`tie_weights()` of T5 and BART assigns to `.weight`: that is the base layer's, of which a merged adapter
        has put its own aside."""
        if name == "weight" and self.merged:
            self._unmerged_weight = (cast(nn.Parameter, param),)
        elif name == "weight":
            self.get_base_layer().register_parameter(name, param)
        else:
            super().register_parameter(name, param)

    def __repr__(self) -> str:
        return "input_tuning." + super().__repr__()


def named_layer(model: nn.Module) -> tuple[str, InputTuningLayer]:
    """The wrapped embedding of a model, and its path; a model has at most one.

    Raises:
        ValueError: a model without an input-tuning adapter.
    """
    for path, module in model.named_modules():
        if isinstance(module, InputTuningLayer):
            return path, module
    raise ValueError(
        f"`model` has no input-tuning adapter, got {type(model).__name__}. Call get_peft_model with an "
        "InputTuningConfig, or load an adapter first."
    )
