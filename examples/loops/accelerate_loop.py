"""Input-tuning in a bare PyTorch loop with accelerate, on one process or many.

python examples/loops/accelerate_loop.py
accelerate launch --config_file examples/training/accelerate_configs/ddp_cpu.yaml examples/loops/accelerate_loop.py
"""

from __future__ import annotations

import argparse
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from input_tuning_examples.arguments import at_least, check_can_be_written
from input_tuning_examples.packaged_model import PACKAGED, find_model
from input_tuning_examples.task_data import InputError, load_task
from input_tuning_examples.train_and_generate import IGNORED, encode_rows, load_base, pad_rows
from peft_input_tuning import InputTuningConfig, create_input_tuning_optimizer


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--steps", type=at_least(1), default=20)
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="rows a step, of all processes together")
    parser.add_argument("--output-dir", default="outputs/accelerate-loop")
    options = parser.parse_args(argv)
    check_can_be_written(options.output_dir)  # before the training

    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    set_seed(0)
    base, tokenizer = load_base(*find_model(options.model), torch.float32)
    rows = encode_rows(tokenizer, load_task(None, None, None, 48, 0)["train"])
    model = get_peft_model(base, InputTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
    optimizer = create_input_tuning_optimizer(model, torch.optim.AdamW, lr=1e-3, prompt_lr=1e-2)
    batches = DataLoader(rows, options.batch_size // accelerator.num_processes, shuffle=True, collate_fn=pad_rows)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    losses: list[float] = []
    with tqdm(total=options.steps, disable=not accelerator.is_main_process) as bar:
        while len(losses) < options.steps:
            for batch in batches:
                # A mean over this process's targets, weighed so that the processes' mean is that of all targets.
                targets = (batch["labels"][:, 1:] != IGNORED).sum()
                loss = model(**batch).loss * targets / accelerator.reduce(targets.float(), reduction="mean")
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
                if len(losses) == options.steps:
                    break
    accelerator.unwrap_model(model).save_pretrained(
        options.output_dir, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
