"""`ManyAdapters`: what a Trainer of transformers has more, so that each row of a batch trains its own adapter.

It leans on methods of Trainer with a line below (seen in transformers 5.20 to 5.24), and on nothing of the model but
`adapter_names=[...]`.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler

from ..call_state import on_device
from ..layer import named_layer
from ..optimizer import parameters_of_adapters
from ..virtual_tokens.mixed_batch import mixed_batch
from ..virtual_tokens.scope import tells_input_from_output
from .early_stopping import trained_adapters
from .losses import count_labels, row_losses, sum_by_adapter
from .rows import ARGUMENT, COLUMN, CollateNames, EvenRows, names_in, select_rows


class ManyAdapters:
    """Train several adapters at once with a Trainer, each on its own rows and as if it were alone.

        class TrainerOfMany(ManyAdapters, Trainer): ...

    Rows have a column `adapter_name`; all input-tuning adapters of the model train, until
    `model.set_requires_grad([name], False)` stops one: its rows leave the batch then. The loss is the sum of each
    adapter's mean cross-entropy over the labels of its own rows, gradient accumulation and processes included; logs
    have it as `loss_<adapter>`. Gradients are clipped adapter by adapter. An epoch has each row once, and each
    adapter's are spread evenly over it. `eval_dataset={"<adapter>": rows, ...}` gives `eval_<adapter>_loss`.

    Works with `Trainer`, `Seq2SeqTrainer` and TRL's `SFTTrainer`, of language models and classifiers, in one process
    or several (DDP). Goes before the trainer in the list of bases.

    Raises:
        ValueError: a model without input-tuning, or a setting that would mix adapters, when the trainer is made.
    """

    model: Any  # these are Trainer's
    args: Any
    accelerator: Any
    data_collator: Any
    train_dataset: Any
    _signature_columns: Any
    # Trainer's too: `compute_loss` divides by the labels of all accumulated batches.
    loss_is_scaled_for_ga: bool | None = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters: list[str] = named_layer(self.model)[1].adapter_names
        _check_settings(self)
        self.model.set_requires_grad(self.adapters)
        self.data_collator = CollateNames(self.data_collator, self.adapters)
        self._shifts = tells_input_from_output(self.model.get_base_model())
        self._logged = torch.zeros(2, len(self.adapters))  # sums of losses, and of how many

    # ---- rows ---------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer drops columns that the model's forward does not name."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, COLUMN]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not isinstance(data, Sized):
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        names = names_in(data, self.adapters)
        return EvenRows(names, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    # ---- losses and gradients -----------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor]:
        """The batches of a step, and the labels of each adapter in them: `(adapters,)`."""
        batches, counts = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._logged = self._logged.to(counts.device)
        self._logged[1] += (counts > 0) & self._are_trained(counts.device)
        return batches, counts

    def _are_trained(self, device: torch.device) -> Tensor:
        """Which of the adapters have not stopped, `(adapters,)`."""
        trained = trained_adapters(self.model)
        return on_device([name in trained for name in self.adapters], device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Labels of all processes: each adapter's loss is divided by its own."""
        counts = torch.zeros(len(self.adapters), dtype=torch.long, device=device)
        for batch in batch_samples:
            counts += self._count(batch).to(device)
        return self.accelerator.reduce(counts, "sum")

    def _count(self, batch: dict[str, Any]) -> Tensor:
        if batch.get("labels") is None:
            raise ValueError(f"`labels` are missing in a batch of {sorted(batch)}. Give each row its labels.")
        return sum_by_adapter(count_labels(batch["labels"], self._shifts), batch[ARGUMENT], self.adapters)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # `get_batch_samples` counts: a Tensor; Trainer's own type has an int too
    ) -> Any:
        """The sum of the adapters' losses; in evaluation the mean over those in the batch."""
        if not self.model.training:
            sums, outputs = self._sums(model, inputs)
            counts = self._count(inputs).to(sums.device)
            loss = (sums / counts.clamp(min=1)).sum() / counts.count_nonzero().clamp(min=1)
            return (loss, outputs) if return_outputs else loss
        trained = trained_adapters(self.model)
        rows = [row for row, name in enumerate(inputs[ARGUMENT]) if name in trained]
        if not rows:
            return self._loss_of_nothing(model, inputs, trained)
        if len(rows) < len(inputs[ARGUMENT]):
            inputs = select_rows(inputs, rows) or inputs  # those that stay train nothing
        sums, outputs = self._sums(model, inputs)
        sums = torch.where(self._are_trained(sums.device), sums, 0)
        losses = sums / self._count(inputs) if num_items_in_batch is None else sums / num_items_in_batch.clamp(min=1)
        self._logged[0] += losses.detach()
        loss = losses.sum() * self.accelerator.num_processes  # DDP takes the mean of their gradients
        return (loss, outputs) if return_outputs else loss

    def _sums(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The summed cross-entropy of each adapter, `(adapters,)`, and what the model gives."""
        labels = inputs["labels"]
        if not self._needs_labels:  # or it would work out a loss of its own
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        base, layer = self.model.get_base_model(), named_layer(self.model)[1]
        inputs, names = {key: value for key, value in inputs.items() if key != ARGUMENT}, inputs[ARGUMENT]
        with mixed_batch(base, layer, names, self.adapters):  # here, since compiled models do not read names
            outputs = model(**inputs)
        sums, _ = row_losses(outputs["logits"], labels, self._shifts, self.args.label_smoothing_factor)
        return sum_by_adapter(sums, names, self.adapters), outputs

    @property
    def _needs_labels(self) -> bool:
        """A decoder starts from them, and `adapter_scope="input"` knows by them what the output is."""
        return self.model.config.is_encoder_decoder or bool(named_layer(self.model)[1].input_only)

    def _loss_of_nothing(self, model: nn.Module, inputs: dict[str, Any], trained: list[str]) -> Tensor:
        """All rows of a batch are of adapters that have stopped. Other processes wait for the gradients of this one,
        so one row runs there, for nothing."""
        if not trained:
            raise ValueError("No adapter trains any more. Call model.set_requires_grad([...]) with those that shall.")
        if self.accelerator.num_processes == 1:
            return torch.zeros((), device=self.args.device, requires_grad=True)
        one = select_rows({**inputs, ARGUMENT: trained[:1] * len(inputs[ARGUMENT])}, [0])
        return self._sums(model, one or inputs)[0].sum() * 0

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Each adapter's gradient by its own norm, or large ones would shrink the others'."""
        self.accelerator.unscale_gradients()
        norms = [
            nn.utils.clip_grad_norm_(own, self.args.max_grad_norm)
            for own in parameters_of_adapters(self.model).values()
        ]
        return torch.stack([norm.to(self.args.device) for norm in norms]).norm()  # without gradients it is on the CPU

    # ---- logs and checkpoints -----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `loss_<adapter>`, the mean over the steps since the last that had rows of it."""
        if "loss" in logs:
            sums, steps = self.accelerator.reduce(self._logged, "mean").tolist()
            means = {
                name: total / count for name, total, count in zip(self.adapters, sums, steps, strict=True) if count
            }
            logs = {**logs, **{f"loss_{name}": mean * self.accelerator.num_processes for name, mean in means.items()}}
            self._logged.zero_()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer would freeze all adapters but the active one."""
        trained = trained_adapters(self.model)
        super()._load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]
        self.model.set_requires_grad(trained)


def _check_settings(trainer: Any) -> None:
    """Refuses what would mix adapters, or go past the loss that is made here."""
    if not isinstance(trainer.model, PeftModel):
        raise ValueError(
            f"`model` must be a PeftModel, got {type(trainer.model).__name__}. Make it by get_peft_model."
        )
    slashed = [name for name in trainer.adapters if "/" in name]
    if slashed:
        raise ValueError(
            f"Adapter {slashed[0]!r} has a slash in its name, and Trainer looks for a checkpoint's adapters one "
            "folder deep: a run would not be resumed with it. Call it otherwise."
        )
    args = trainer.args
    loss_type = getattr(args, "loss_type", "nll")  # of TRL
    one_loss = "Each adapter's loss is a cross-entropy that is made here. Leave it out."
    spreads = "It was not tried with many adapters. Use DDP, which spreads the rows."
    wrong = (
        ("compute_loss_func", trainer.compute_loss_func, one_loss),
        ("loss_type", loss_type if loss_type != "nll" else None, one_loss),
        ("use_liger_kernel", args.use_liger_kernel, "It makes one loss of all rows. Leave it out."),
        ("load_best_model_at_end", args.load_best_model_at_end, "Use callbacks=[EarlyStoppingOfEach()]."),
        ("deepspeed", trainer.is_deepspeed_enabled, spreads),
        ("fsdp", trainer.is_fsdp_enabled, spreads),
        ("n_gpu", args.n_gpu if args.n_gpu > 1 else None, "Start one process for each GPU, with torchrun."),
    )
    for name, value, remedy in wrong:
        if value:
            raise ValueError(f"`{name}` is {value!r}, which ManyAdapters cannot use. {remedy}")
    if args.ddp_find_unused_parameters is False:
        raise ValueError(
            "`ddp_find_unused_parameters` is False, but an adapter without rows in a process's batch is unused there. "
            "Leave it out, or use True."
        )
