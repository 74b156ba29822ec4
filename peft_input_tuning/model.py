"""`InputTuningModel`: input-tuning as a tuner of PEFT.

It wraps the word embedding of a model (`layer.py`) and gives the modules that a call goes through more than their
classes (`virtual_tokens/`). All the rest, saving, switching, disabling, is PEFT's. What is added here: checks before
anything is changed, mixed batches (`adapter_names=[...]`), and a strict reading of adapter files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .checkpoint import checked_state_dict, name_in_file, under_as_many_peft_models
from .config import InputTuningConfig
from .layer import InputTuningLayer, named_layer
from .nesting import (
    Configurations,
    check_inner_reads_ids,
    check_is_only_owner,
    check_trained_modules_inside,
    own_modules,
    plain_model,
    without_trained_modules_inside,
)
from .placement import (
    Placement,
    add_unnamed_head,
    check_adapter_name,
    check_modules_to_save,
    holds_our_layer,
    place_of,
)
from .prompt_embeds import INSTEAD_OF_PROMPT_TUNING, OF_PROMPT_TUNING
from .tested_versions import newer_than_tested
from .tied_tables import keep_merged_table
from .virtual_tokens.backbone import path_of
from .virtual_tokens.cache_check import check_cached_equals_uncached
from .virtual_tokens.install import install, uninstall
from .virtual_tokens.mixed_batch import mixed_batch
from .virtual_tokens.scope import tells_input_from_output
from .weighted import add_weighted_adapter


class InputTuningModel(BaseTuner):
    """The tuner that `get_peft_model` makes of a model and an `InputTuningConfig`.

    Args:
        model: a model of transformers (or any module with `get_input_embeddings` around one); without virtual tokens
            any module with `get_input_embeddings`; or a `PeftModel` with another method's adapters, which are frozen
            then and stay as they are (`nesting.py`).
        peft_config: the configuration, or a dict of one for each adapter.
        adapter_name: the adapter's name.
    """

    prefix = "input_tuning_"
    tuner_layer_cls = InputTuningLayer
    place: Placement
    peft_config: dict[str, PeftConfig]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        of_peft_model = isinstance(peft_config, dict)  # transformers passes one configuration
        check_is_only_owner(model, adapter_name, of_peft_model)
        check_inner_reads_ids(model)
        inner = model.peft_config if isinstance(model, PeftModel) else None
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if of_peft_model:
            self.peft_config = Configurations(self.peft_config)
            self.model.peft_config = self.peft_config if inner is None else inner

    def __getattr__(self, name: str) -> Any:
        if name == "peft_config" and isinstance(self._modules.get("model"), PeftModel):
            raise AttributeError(name)  # the inner model's, in which PEFT would put ours
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in OF_PROMPT_TUNING:
                raise AttributeError(INSTEAD_OF_PROMPT_TUNING.format(name=name)) from error
            raise

    # ---- injection ----------------------------------------------------------------------------------------------

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """First step of PEFT's `inject_adapter`: whatever is wrong is said here, before the model is touched."""
        super()._check_new_adapter_config(config)
        if not isinstance(config, InputTuningConfig):
            raise ValueError(f"`peft_config` must be an InputTuningConfig, got {type(config).__name__}.")
        plain = plain_model(self.model)
        self.place = place_of(plain, config)
        self.embedding_path = ".".join(filter(None, (path_of(self.model, plain), self.place.embedding_path)))
        name = next(name for name, one in self.peft_config.items() if one is config)
        check_trained_modules_inside(self.model, name, self.place.embedding)
        check_modules_to_save(config, self.model, self.embedding_path)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        if isinstance(model, PeftModel) and not holds_our_layer(model):
            model.requires_grad_(False)  # what the inner adapters learned now would not be saved with the outer one
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            place = self.place
            install(place.model, place.backbone_path, place.embedding_path, place.seen)
            self._try_cache_out(model, adapter_name)
        except BaseException:
            self._share_embedding_again(model)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            raise

    def _try_cache_out(self, model: nn.Module, adapter_name: str) -> None:
        """Beside versions that were never tested, an adapter is refused, and taken away again, if the model's cache
        loses its prompt."""
        if not newer_than_tested() or not self.layer.prompt_length(adapter_name):
            return
        try:
            check_cached_equals_uncached(self.backbone, self.layer)
        except BaseException:
            self.layer.delete_adapter(adapter_name)
            if not self.layer.adapter_names:
                parent, _, name = self.embedding_path.rpartition(".")
                setattr(model.get_submodule(parent), name, self.layer.base_layer)
                uninstall(plain_model(model))
            raise

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        add_unnamed_head(peft_config, self.place.model)
        return peft_config  # no target_modules to look up

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """After `resize_token_embeddings`, T5 and BART use one module in three places. The encoder gets its own (with
        the same weight), or wrapping its embedding would wrap the decoder's too or miss the encoder's."""
        embedding = model.get_submodule(self.embedding_path)
        places = [path for path, module in model.named_modules(remove_duplicate=False) if module is embedding]
        if len(places) == 1 or isinstance(embedding, InputTuningLayer):
            return
        own = copy.copy(embedding)
        own._parameters = dict(embedding._parameters)
        own._buffers = dict(embedding._buffers)
        parent, _, name = self.embedding_path.rpartition(".")
        setattr(model.get_submodule(parent), name, own)
        self._shared_embedding = next(path for path in places if path != self.embedding_path)

    def _share_embedding_again(self, model: nn.Module) -> None:
        shared = getattr(self, "_shared_embedding", None)
        if shared is not None and not isinstance(model.get_submodule(self.embedding_path), InputTuningLayer):
            parent, _, name = self.embedding_path.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_submodule(shared))

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key == self.embedding_path

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        input_only = peft_config.adapter_scope == "input" and tells_input_from_output(plain_model(self.model))
        if isinstance(target, InputTuningLayer):
            target.update_layer(adapter_name, peft_config, input_only)
            return
        layer = InputTuningLayer(target)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, input_only)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @property
    def backbone(self) -> nn.Module:
        """The module that gets virtual tokens; the whole model if none has a place for them."""
        return plain_model(self.model).get_submodule(self.place.backbone_path or "")

    @property
    def layer(self) -> InputTuningLayer:
        """The wrapped embedding."""
        return self.model.get_submodule(self.embedding_path)

    @property
    def word_embeddings(self) -> InputTuningLayer:
        """The wrapped embedding, under the name that `PeftModel` has for prompt-tuning."""
        return self.layer

    # ---- switching, unloading, merging --------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Unknown adapter {unknown[0]!r}. Known: {sorted(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Called by PEFT (>= 0.18) to disable and to enable: ours only, as prompt-tuning does, and not the layers of
        other methods inside or around."""
        for _, module in own_modules(self.model, self.peft_config):
            module.enable_adapters(enabled)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT does; around a `PeftModel` without merging the adapters inside.

        Raises:
            ValueError: the adapter has virtual tokens, or another one that has is active.
        """
        self.layer.check_active_beside(adapter_names)
        if isinstance(self.model, PeftModel):
            self.layer.merge(safe_merge, adapter_names)
        else:
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        if isinstance(self.model, PeftModel):
            self.layer.unmerge()
        else:
            super().unmerge_adapter()

    def _check_merge_allowed(self) -> None:
        """PEFT warns of tied embeddings here. Merging unties ours (`InputTuningLayer.merge`)."""

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layer = self.layer
        if merge:
            layer.check_mergeable(adapter_names)  # before any module is unloaded
        if isinstance(self.model, PeftModel):
            model = self._unload_outer(self.model, merge, safe_merge, adapter_names)
        else:
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        uninstall(plain_model(model))
        if layer.merged:
            keep_merged_table(plain_model(model), self.place.embedding_path)
        else:
            self._share_embedding_again(model)
        return model

    def _unload_outer(
        self, inner: PeftModel, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> PeftModel:
        """Gives the inner `PeftModel` back; PEFT would unload, and merge, its adapters too."""
        for path, module in own_modules(inner, self.peft_config):
            parent, _, name = path.rpartition(".")
            unloaded = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            setattr(inner.get_submodule(parent), name, unloaded)
        return inner

    add_weighted_adapter = add_weighted_adapter

    # ---- files --------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args, **kwargs):
        """Hook of PEFT (>= 0.21) that chooses what is saved: all methods' layers with an adapter of this name. The
        configuration is saved after it; one object may serve for several models, so it learns here what is of one."""
        config.prompt_start = named_layer(model)[1].prompt_start.get(adapter_name)
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return {key: tensor for key, tensor in found.items() if f".{cls.prefix}" in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Hook of PEFT (>= 0.21): a tensor's name in files, by its name in the model."""
        return name_in_file(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Hook of PEFT (>= 0.21) between reading a file and using it: refuses files that do not fit."""
        state_dict = under_as_many_peft_models(model, state_dict)
        state_dict = without_trained_modules_inside(model, config, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return checked_state_dict(model, config, adapter_name, remapped)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with self.layer.small_places(adapter_name):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    # ---- calls --------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around `forward` and `generate`: `adapter_names=[...]` gives each row its adapter."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with mixed_batch(self.model, self.layer, names, list(self.peft_config)):
            yield
