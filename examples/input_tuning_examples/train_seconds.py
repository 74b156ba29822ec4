"""Seconds of training over all lives of a run that broke off and went on."""

from __future__ import annotations

import time
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


class TrainSeconds(TrainerCallback, ExportableState):
    """Counts seconds of training; checkpoints keep them, so that a life that goes on adds its own.

    Needs `restore_callback_states_from_checkpoint`. What a life did behind its last checkpoint is not counted.
    """

    def __init__(self) -> None:
        self.earlier = 0.0
        self._started: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.earlier, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        return self.earlier + (0.0 if self._started is None else time.perf_counter() - self._started)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"earlier": self.seconds}}

    @staticmethod
    def of(trainer: Trainer) -> float:
        """The seconds that a trainer's callback has counted; Trainer replaces the object when a run goes on."""
        return next(one.seconds for one in trainer.callback_handler.callbacks if isinstance(one, TrainSeconds))
