"""`InputTuningLayer`: the word embedding of the base model with the adapters around it.

    input_ids ──► base_layer ──► T_a(e) = e + W2 · act(W1 · e) ──► embeddings          a: the adapter of the row

It also keeps each adapter's soft prompt; putting the prompt into the batch is the backbone's part (`calls.py`),
since only there the virtual tokens can be taken out again. Containers are flat and prefixed, `input_tuning_fc1[a]`,
because PEFT takes an adapter's name out of a file's keys only where it is the second to last part of the key.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN

from .config import InputTuningConfig
from .folding import Progress, fold
from .initialization import execution_device, initial_prompt
from .modules import InputDtypeLinear, SoftPrompt, adapt
from .quantized import is_quantized
from .row_adapters import BASE, RowAdapters, current_row_adapters, on_device

IsOutput = Tensor | bool  # which tokens are the output's: `(batch, length)` booleans, or one for all

CANNOT_TELL = (
    '`adapter_scope` is "input", but nothing tells the tokens of the input from those of the output. Pass `labels` '
    "(-100 at the input's tokens) to the model, or call `generate` of the PeftModel with `input_ids`. Where that is "
    'impossible (a trainer with a loss of its own, embeddings, a compiled decoding step), use adapter_scope="all".'
)
INSTEAD_OF_MERGING = (
    "Keep the adapter, or write a plain checkpoint with peft_input_tuning.export_model, which needs neither PEFT nor "
    "this package."
)


class InputTuningLayer(nn.Module, BaseTunerLayer):
    """The wrapped word embedding.

    Args:
        base_layer: the embedding, `(batch, length)` ids → `(batch, length, embedding_dim)`.
    """

    adapter_layer_names = ("input_tuning_prompt", "input_tuning_fc1", "input_tuning_activation", "input_tuning_fc2")
    caches_prompt = False  # see prompt_cache.py
    other_param_names = ("input_tuning_dropout",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.input_tuning_prompt = nn.ModuleDict()
        self.input_tuning_fc1 = nn.ModuleDict()
        self.input_tuning_fc2 = nn.ModuleDict()
        self.input_tuning_activation = nn.ModuleDict()
        self.input_tuning_dropout = nn.ModuleDict()
        self.awaiting_weights: set[str] = set()  # adapters whose file has still to be read
        self.input_only: set[str] = set()  # adapters that leave the output's tokens alone, see scope.py
        self.seen_labels: set[tuple[str, bool]] = set()  # of those, whose labels were looked at, in training or not
        self.merged_adapters: list[str] = []
        self._unmerged_weight: tuple[nn.Parameter, ...] = ()  # in a tuple, or it would be a parameter of this module
        self.prompt_states: dict[str, Any] = {}
        self.register_state_dict_post_hook(_put_unmerged_weight)
        self.register_load_state_dict_pre_hook(_refuse_weight_while_merged)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compute their prompts' states again."""
        return {**self.__dict__, "prompt_states": {}}

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

    def prompt_length(self, name: str) -> int:
        """Number of virtual tokens of an adapter; 0 for `"__base__"`."""
        return self.input_tuning_prompt[name].weight.shape[0] if name in self.input_tuning_prompt else 0

    # ---- making and removing adapters ---------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: InputTuningConfig, input_only: bool = False) -> None:
        """Adds an adapter with its first weights; `input_only` for one that leaves the output's tokens alone.

        An adapter that will be read from a file gets NaN instead: what the file does not hold is then noticed at the
        first use, not silently random.
        """
        width = self.embedding_dim
        hidden = 2 * width if config.adapter_hidden_dim is None else config.adapter_hidden_dim
        from_file = config.weights_in_checkpoint or config.inference_mode
        prompt = None
        if self.merged:
            raise ValueError(
                f"Adapter {self.merged_adapters[0]!r} is merged into the embedding. Call unmerge_adapter() before "
                "adding another."
            )
        if config.num_virtual_tokens and not from_file:
            prompt = initial_prompt(config, self.base_layer)  # may fail, so before anything is changed
        for container in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]
        if config.num_virtual_tokens:
            scale = cast(float, config.prompt_scale)  # the configuration has put a number for None
            self.input_tuning_prompt[adapter_name] = SoftPrompt(config.num_virtual_tokens, width, scale)
        if hidden:
            self.input_tuning_fc1[adapter_name] = InputDtypeLinear(width, hidden, bias=config.adapter_bias)
            self.input_tuning_fc2[adapter_name] = InputDtypeLinear(hidden, width, bias=config.adapter_bias)
            self.input_tuning_activation[adapter_name] = ACT2FN[config.adapter_activation]
            self.input_tuning_dropout[adapter_name] = nn.Dropout(config.adapter_dropout)
        self.seen_labels -= {(adapter_name, True), (adapter_name, False)}
        if input_only and hidden:
            self.input_only.add(adapter_name)
        else:
            self.input_only.discard(adapter_name)
        if from_file or (prompt is not None and prompt.is_meta):  # a base on "meta" has no embeddings to start from
            self.awaiting_weights.add(adapter_name)
        self._reset_adapter(adapter_name, prompt, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _reset_adapter(self, name: str, prompt: Tensor | None, zero_start: bool) -> None:
        parameters = [p for _, p in self.named_adapter_parameters(name)]
        if any(p.is_meta for p in parameters):
            return  # low_cpu_mem_usage: the file's tensors take the place of these
        if name in self.awaiting_weights:
            for parameter in parameters:
                parameter.fill_(float("nan"))
            return
        if prompt is not None:
            self.input_tuning_prompt[name].start_from(prompt)
        if name in self.input_tuning_fc2 and zero_start:
            for parameter in self.input_tuning_fc2[name].parameters():
                parameter.zero_()

    def named_adapter_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters of one adapter, as `("input_tuning_fc1.weight", parameter)`."""
        return [
            (f"{container}.{key}", parameter)
            for container in self.adapter_layer_names
            if name in getattr(self, container)
            for key, parameter in getattr(self, container)[name].named_parameters()
        ]

    def check_weights_have_come(self, name: str) -> None:
        """Raises where an adapter that was to be read from a file still has values that the file did not bring."""
        if name not in self.awaiting_weights or torch.compiler.is_compiling():
            return
        for key, parameter in self.named_adapter_parameters(name):
            if parameter.is_meta and self._is_offloaded(key, name):
                continue
            if parameter.is_meta or not torch.isfinite(parameter).all():
                raise ValueError(
                    f"Adapter {name!r} has no usable weights: `{key}` was not in the file that was loaded, or the "
                    "file holds NaN or infinite values. Load the adapter again from a complete file. To train "
                    "a new adapter with a saved configuration, set its `weights_in_checkpoint` and `inference_mode` "
                    "to False."
                )
        self.awaiting_weights.discard(name)

    def has_no_weights(self, name: str) -> bool:
        """Whether an adapter that is to be read from a file has none of the file's values yet."""
        return name in self.awaiting_weights and all(
            not self._is_offloaded(key, name) if parameter.is_meta else bool(torch.isnan(parameter).all())
            for key, parameter in self.named_adapter_parameters(name)
        )

    def _is_offloaded(self, key: str, name: str) -> bool:
        """Whether accelerate keeps a parameter elsewhere, to fetch it when its module runs."""
        return any(hasattr(module, "_hf_hook") for module in getattr(self, key.partition(".")[0])[name].modules())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        ours = [name for name in names if self.has_adapter(name)]
        if len(ours) > 1:
            raise ValueError(
                f"Only one input-tuning adapter can be active for a whole batch, got {ours}. Activate one of them, or "
                "give each row its adapter with `adapter_names=[...]`."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.awaiting_weights.discard(adapter_name)
        self.input_only.discard(adapter_name)
        self.prompt_states.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or execution_device(self.base_layer))

    # ---- merging ------------------------------------------------------------------------------------------------

    def fold_into(self, table: Tensor, name: str, progress: Progress | None = None) -> None:
        """Writes one adapter's T(E) / scale into the first rows of `table`, `(>= num_embeddings, embedding_dim)`."""
        self.check_weights_have_come(name)
        self.check_foldable(name)
        if self.merged:
            raise ValueError(
                f"Adapter {self.merged_adapters[0]!r} is merged into the embedding. Call unmerge_adapter() first."
            )
        fold(table, self.base_layer, self.float32_adapter(name), self.num_embeddings, self.embed_scale, progress)

    def check_foldable(self, name: str) -> None:
        """Raises where a table cannot hold what an adapter does."""
        if name in self.input_only:
            raise ValueError(
                f'Adapter {name!r} has adapter_scope="input": a token has one embedding in the input and another in '
                "the output, and a table holds one for each. Keep the adapter, or train one with "
                'adapter_scope="all".'
            )

    @property
    def embed_scale(self) -> Tensor:
        """What the embedding module multiplies its rows with: a float32 scalar on the device where it runs."""
        scale = self._get_embed_scale()  # PEFT, since 0.18
        device = execution_device(self.base_layer)
        if scale is None:
            return torch.ones((), device=device)
        return scale.to(self.weight.dtype).to(device, torch.float32)

    def float32_adapter(self, name: str) -> Callable[[Tensor], Tensor]:
        """One adapter's T with its arithmetic in float32, without dropout."""
        if name not in self.input_tuning_fc1:
            return lambda embeddings: embeddings
        fc1, fc2 = self.input_tuning_fc1[name], self.input_tuning_fc2[name]
        activation = self.input_tuning_activation[name]
        return partial(adapt, fc1=fc1, activation=activation, dropout=nn.Identity(), fc2=fc2)

    def check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Raises where adapters (None: the active ones) cannot be merged exactly."""
        names = [name for name in adapter_names or self.active_adapters if self.has_adapter(name)]
        names = list(dict.fromkeys([*self.merged_adapters, *names]))
        if len(names) > 1:
            raise ValueError(f"Only one input-tuning adapter can be merged at a time, got {names}.")
        for name in names:
            self.check_foldable(name)
            if self.prompt_length(name):
                raise ValueError(
                    f"Adapter {name!r} cannot be merged into the base model: its {self.prompt_length(name)} virtual "
                    f"tokens are not weights of the base. {INSTEAD_OF_MERGING}"
                )
            self.check_weights_have_come(name)
        if self.weight.is_meta or is_quantized(self.weight) or isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                "The embedding is quantized, offloaded, or has an adapter of another method: nothing can be merged "
                "into it. Load the base model in its own dtype on one device, with this adapter alone."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Gives the base embedding the adapted table, as a parameter of its own: a tied head keeps the base's.

        Args:
            safe_merge: whether to look for NaN and infinite values first.
            adapter_names: the adapter; None is the active one.

        Raises:
            ValueError: the adapter has virtual tokens, or the embedding cannot take a new table.
        """
        self.check_mergeable(adapter_names)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not names:
            return
        base = self.get_base_layer()
        table = torch.empty_like(base.weight, requires_grad=False)
        self.fold_into(table, names[0])
        if safe_merge and not torch.isfinite(table).all():
            raise ValueError(f"Adapter {names[0]!r} would bring NaN or infinite values into the embedding.")
        self._unmerged_weight = (base.weight,)
        base.weight = nn.Parameter(table, requires_grad=base.weight.requires_grad)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Gives the base embedding its own table back, bit for bit; a tied head is tied again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        (weight,) = self._unmerged_weight
        weight.data = weight.data.to(base.weight)  # the model may have been moved or cast since
        base.weight = weight
        self._unmerged_weight, self.merged_adapters = (), []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Called by PEFT. Gives back exactly what was wrapped, another method's layer included."""
        if merge:
            self.merge(safe_merge, adapter_names)
        elif self.merged:
            self.unmerge()
        return self.base_layer

    def unadapted(self, input_ids: Tensor) -> Tensor:
        """The base model's own embeddings, also while an adapter is merged."""
        if not self.merged:
            return self.base_layer(input_ids)
        return torch.func.functional_call(self.base_layer, {"weight": self._unmerged_weight[0]}, input_ids)

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None,
        *args: Any,
        is_output: IsOutput | None = None,
        prompts: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`(batch, length)` ids → `(batch, length, embedding_dim)` adapted embeddings.

        `is_output` is asked for by adapters with `adapter_scope="input"` (`scope.py`); `prompts` is how `prompt_rows`
        gets what it returns where the layer is sharded.
        """
        if prompts is not None:
            return self._prompt_rows(*prompts)
        if self.merged and self.disable_adapters:
            self.unmerge()  # as PEFT's other methods do
        embeddings = self.base_layer(input_ids, *args, **kwargs)
        if self.merged:
            return embeddings
        rows = None if self.disable_adapters else current_row_adapters(self)
        if rows is not None:
            return self._adapt_rows(embeddings, rows, is_output)
        name = self.enabled_adapter
        return embeddings if name is None else self.adapt_in_scope(embeddings, name, is_output)

    def adapt_in_scope(self, embeddings: Tensor, name: str, is_output: IsOutput | None) -> Tensor:
        """One adapter's T(e) of the tokens that it is for, `(batch, length, embedding_dim)` → the same shape."""
        if name not in self.input_only or is_output is False:
            return self.adapt(embeddings, name)
        if is_output is None:
            raise ValueError(CANNOT_TELL)
        if is_output is True:
            return embeddings
        return torch.where(is_output.unsqueeze(-1), embeddings, self.adapt(embeddings, name))

    def adapt(self, embeddings: Tensor, name: str) -> Tensor:
        """One adapter's T(e), `(..., embedding_dim)` → `(..., embedding_dim)` (paper, figure 4)."""
        self.check_weights_have_come(name)
        if name not in self.input_tuning_fc1:
            return embeddings
        return adapt(
            embeddings,
            self.input_tuning_fc1[name],
            self.input_tuning_activation[name],
            self.input_tuning_dropout[name],
            self.input_tuning_fc2[name],
        )

    def _adapt_rows(self, embeddings: Tensor, rows: RowAdapters, is_output: IsOutput | None) -> Tensor:
        """Each row with its own adapter; an adapter's work is done for its rows only."""
        adapted = embeddings.clone()
        for name in dict.fromkeys(rows.names):
            if name == BASE:
                continue
            own = rows.rows_of(name, len(embeddings), embeddings.device)
            of_rows = is_output[own] if isinstance(is_output, Tensor) else is_output
            adapted[own] = self.adapt_in_scope(embeddings[own], name, of_rows)
        return adapted

    def prompt_rows(self, batch: int, slots: int) -> Tensor:
        """The prompt of each row, at the right end of its slots: `(batch, slots, embedding_dim)`.

        Accelerate's FSDP2 shards a model's input embeddings as one unit, whose weights, the prompt among them, are
        whole only while that unit's own forward runs: the layer is called as a module then. Nowhere else, since hooks
        on the embedding (NEFTune's noise) are not meant for the prompt.
        """
        if any(isinstance(prompt.weight, DTensor) for prompt in self.input_tuning_prompt.values()):
            return self(None, prompts=(batch, slots))
        return self._prompt_rows(batch, slots)

    def _prompt_rows(self, batch: int, slots: int) -> Tensor:
        rows = current_row_adapters(self)
        if rows is None:
            name = str(self.enabled_adapter)
            self.check_weights_have_come(name)
            return self.input_tuning_prompt[name]().unsqueeze(0).expand(batch, -1, -1)
        names = rows.names_of(batch)
        distinct = list(dict.fromkeys(names))
        table = torch.stack([self._padded_prompt(name, slots) for name in distinct])
        return table[on_device([distinct.index(name) for name in names], table.device)]

    def _padded_prompt(self, name: str, slots: int) -> Tensor:
        if not self.prompt_length(name):
            reference = next(iter(self.input_tuning_prompt.values())).weight
            return reference.new_zeros(slots, reference.shape[1])
        self.check_weights_have_come(name)
        prompt = self.input_tuning_prompt[name]()
        return nn.functional.pad(prompt, (0, 0, slots - prompt.shape[0], 0))

    # ---- being the embedding for the rest of the world ------------------------------------------------------------

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """`tie_weights()` of T5 and BART assigns to `.weight`: that is the base layer's."""
        if name == "weight":
            self.get_base_layer().register_parameter(name, param)
        else:
            super().register_parameter(name, param)

    def __repr__(self) -> str:
        return "input_tuning." + super().__repr__()


def _put_unmerged_weight(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Files hold the adapter beside the base it belongs to: beside the merged table it would be applied twice."""
    key = f"{prefix}base_layer.weight"
    if isinstance(layer, InputTuningLayer) and layer.merged and key in state:
        state[key] = layer._unmerged_weight[0].detach()


def _refuse_weight_while_merged(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is loaded would be lost at the next unmerging, or be taken for merged."""
    if isinstance(layer, InputTuningLayer) and layer.merged and f"{prefix}base_layer.weight" in state:
        raise ValueError(
            f"`{prefix}base_layer.weight` cannot be loaded while adapter {layer.merged_adapters[0]!r} is merged into "
            "it. Call unmerge_adapter() first."
        )


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
