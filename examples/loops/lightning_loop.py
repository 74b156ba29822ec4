"""Input-tuning as a LightningModule, on one device or many.

python examples/loops/lightning_loop.py --devices 2
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # beside the other examples

import lightning
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader

from packaged_model import PACKAGED, find_model
from peft_input_tuning import InputTuningConfig, create_input_tuning_optimizer
from task_data import load_task
from train_and_generate import IGNORED, encode_rows, load_base, pad_rows


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


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step, of all devices together")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--output-dir", default="outputs/lightning-loop")
    options = parser.parse_args(argv)

    lightning.seed_everything(0)
    base, tokenizer = load_base(*find_model(options.model), torch.float32)
    rows = encode_rows(tokenizer, load_task(None, None, None, 48, 0)["train"])
    random.Random(0).shuffle(rows)
    module = InputTuning(base)
    strategy = "ddp" if options.devices > 1 else "auto"
    more = {"default_root_dir": options.output_dir, "logger": False, "use_distributed_sampler": False}
    trainer = lightning.Trainer(max_steps=options.steps, devices=options.devices, strategy=strategy, **more)
    rows = rows[trainer.global_rank :: options.devices]  # Lightning's sampler would shuffle otherwise than one process
    trainer.fit(module, DataLoader(rows, options.batch_size // options.devices, collate_fn=pad_rows))
    if trainer.is_global_zero:
        module.model.save_pretrained(str(Path(options.output_dir) / "adapter"))
    return module.losses


if __name__ == "__main__":
    main()
