"""Input-tuning as a LightningModule, on one device or many.

python examples/loops/lightning_loop.py --devices 2
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from input_tuning_examples.extras import needs
from input_tuning_examples.packaged_model import PACKAGED, find_model
from input_tuning_examples.task_data import InputError, load_task
from input_tuning_examples.train_and_generate import encode_rows, load_base, pad_rows


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step, of all devices together")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--output-dir", default="outputs/lightning-loop")
    options = parser.parse_args(argv)

    needs("all", "lightning")
    import lightning

    from lightning_module import InputTuning

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
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
