"""What `lightning_loop.py` trains."""

from __future__ import annotations

import lightning
import torch
from peft import get_peft_model

from input_tuning_examples.train_and_generate import IGNORED
from peft_input_tuning import InputTuningConfig, create_input_tuning_optimizer


class InputTuning(lightning.LightningModule):
    """A frozen language model with an input-tuning adapter."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.model = get_peft_model(base, InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        # A mean over this process's targets, weighed so that the processes' mean is that of all targets.
        targets = (batch["labels"][:, 1:] != IGNORED).sum()
        loss = self.model(**batch).loss * targets / self.all_gather(targets).float().mean()
        self.losses.append(self.all_gather(loss.detach()).mean().item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return create_input_tuning_optimizer(self.model, torch.optim.AdamW, lr=1e-3, prompt_lr=1e-2)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keeps what is trained; the base model is read from its own files."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
