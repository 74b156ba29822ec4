"""Several adapters trained in one run, on one frozen model: each row of a batch trains its own.

    row       {"input_ids": ..., "labels": ..., "adapter_name": "a"}
    trainer   class TrainerOfMany(ManyAdapters, Trainer): ...

Only the embedding differs between adapters, and rows of a batch do not see each other. So each adapter gets the
gradient that it would get alone, if its loss is divided by its own tokens (`losses.py`) and its gradient is clipped by
its own norm (`trainer.py`).
"""

from .early_stopping import EarlyStoppingOfEach
from .losses import adapter_losses
from .trainer import ManyAdapters

__all__ = ["EarlyStoppingOfEach", "ManyAdapters", "adapter_losses"]
