"""One model, one thread, many adapters: requests that wait together share a batch.

    submit ──► queue ──► batch of up to `max_rows`, each row with its adapter ──► one `generate` ──► answers
    load, drop ──► the same queue: done between two batches, in the order in which they came

Only the thread touches the model, so nothing has to be locked. No HTTP here: `generation_service.py` has that.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, StoppingCriteria

BASE = "__base__"  # what PEFT calls a row without an adapter


class UnknownAdapterError(LookupError):
    """No adapter of this name is loaded."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"`adapter` is {name!r}, which is not loaded. Known: {', '.join(known)}.")
        self.known = known


class TooLongError(ValueError):
    """The text has more tokens than are allowed."""


class OverloadedError(RuntimeError):
    """As many requests wait as may wait."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already. Try again in {retry_after} seconds.")
        self.retry_after = retry_after


class ConflictError(ValueError):
    """An adapter cannot be loaded or dropped as things stand."""


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    Args:
        text: the generated text.
        adapter: whose it is.
        input_tokens, generated_tokens: numbers of tokens, the end token included.
        batch_rows: rows of the batch it was in.
    """

    text: str
    adapter: str
    input_tokens: int
    generated_tokens: int
    batch_rows: int


@dataclass
class _Request:
    adapter: str
    ids: list[int]
    max_new_tokens: int
    answer: Future[Answer] = field(default_factory=Future)


@dataclass
class _Job:
    """Something to do to the model between two batches."""

    do: Callable[[], None]
    done: Future[None] = field(default_factory=Future)


class _OwnLimits(StoppingCriteria):
    """Ends each row at its own number of new tokens."""

    def __init__(self, limits: list[int], start: int) -> None:
        self.limits, self.start = torch.tensor(limits), start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (self.limits <= input_ids.shape[1] - self.start).to(input_ids.device)


class Batcher:
    """Runs a model with adapters in a thread of its own.

    Args:
        model: a `PeftModel` with at least one input-tuning adapter. Nobody else may use it meanwhile.
        tokenizer: of the base model.
        suffix: put behind each text, as it was in training.
        max_rows: rows of a batch.
        max_waiting: requests that may wait.
        max_input_tokens: of one request, the suffix included.
        max_adapters: adapters that may be loaded at a time.
        window: seconds for which a batch that is not full waits for more requests.
        on_batch: called after each batch with its rows, seconds and answers.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        suffix: str = "",
        max_rows: int = 16,
        max_waiting: int = 64,
        max_input_tokens: int = 512,
        max_adapters: int = 16,
        window: float = 0.01,
        on_batch: Callable[[int, float, list[Answer]], None] | None = None,
    ) -> None:
        for name, number in (("max_rows", max_rows), ("max_waiting", max_waiting), ("max_adapters", max_adapters)):
            if number < 1:
                raise ValueError(f"`{name}` must be >= 1, got {number}.")
        self.model, self.tokenizer, self.suffix = model.eval(), tokenizer, suffix
        self.max_rows, self.max_waiting, self.max_adapters = max_rows, max_waiting, max_adapters
        self.max_input_tokens, self.window, self.on_batch = max_input_tokens, window, on_batch
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        self._queue: deque[_Request | _Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._last_batch_seconds = 1.0
        self._adapters = tuple(sorted(model.peft_config))
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    # ---- what other threads call ------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._adapters)

    @property
    def waiting(self) -> int:
        """Requests and jobs that nobody works at yet."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, adapter: str, text: str, max_new_tokens: int) -> Future[Answer]:
        """Queues one text, to be continued greedily by an adapter, or by the bare model ("__base__").

        The future raises UnknownAdapterError where the adapter was dropped before the text's turn came.

        Raises:
            UnknownAdapterError, TooLongError, OverloadedError: nothing was queued.
        """
        self._check_known(adapter)
        if len(text) > self.max_input_tokens * self._longest_token:  # no need to tokenize a novel to know
            raise TooLongError(
                f"`text` has {len(text)} characters, more than {self.max_input_tokens} tokens can be. Shorten it."
            )
        ids = self.tokenizer(text + self.suffix).input_ids
        if len(ids) > self.max_input_tokens:
            raise TooLongError(f"`text` has {len(ids)} tokens, {self.max_input_tokens} are allowed. Shorten it.")
        request = _Request(adapter, ids, max_new_tokens)
        with self._changed:
            self._check_open()
            if len(self._queue) >= self.max_waiting:
                batches = math.ceil(len(self._queue) / self.max_rows)
                raise OverloadedError(len(self._queue), max(1, math.ceil(batches * self._last_batch_seconds)))
            self._queue.append(request)
            self._changed.notify_all()
        return request.answer

    def load(self, name: str, folder: str | Path) -> Future[None]:
        """Queues the loading of an adapter; the future raises what is wrong with it, and the others go on serving."""

        def do() -> None:
            if name == BASE or name in self.model.peft_config:
                raise ConflictError(f"`name` is {name!r}, which is there already. Drop it first, or choose another.")
            if len(self.model.peft_config) >= self.max_adapters:
                raise ConflictError(f"{self.max_adapters} adapters are loaded, and no more may be. Drop one first.")
            try:
                self.model.load_adapter(str(folder), adapter_name=name)
            except BaseException:
                if name in self.model.peft_config:
                    self.model.delete_adapter(name)
                raise
            self.model.eval()

        return self._queue_job(do)

    def drop(self, name: str) -> Future[None]:
        """Queues the removal of an adapter. Requests that came before still get their answers."""

        def do() -> None:
            if name not in self.model.peft_config:
                raise UnknownAdapterError(name, self.adapters)
            if len(self.model.peft_config) == 1:
                raise ConflictError(f"{name!r} is the last adapter. Load another one before it is dropped.")
            self.model.delete_adapter(name)

        return self._queue_job(do)

    def close(self) -> None:
        """Takes nothing new, answers what waits, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _check_known(self, adapter: str) -> None:
        if adapter not in self._adapters and adapter != BASE:
            raise UnknownAdapterError(adapter, [*self._adapters, BASE])

    def _check_open(self) -> None:
        if not self.alive:
            raise OverloadedError(len(self._queue), retry_after=10)

    def _queue_job(self, do: Callable[[], None]) -> Future[None]:
        job = _Job(do)
        with self._changed:
            self._check_open()
            self._queue.append(job)
            self._changed.notify_all()
        return job.done

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._take()) is not None:
            if isinstance(work, _Job):
                self._do(work)
            else:
                self._answer(work)

    def _take(self) -> _Job | list[_Request] | None:
        """Waits for work: a job, or the requests up to the next job. None when closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            if isinstance(self._queue[0], _Job):
                return self._queue.popleft()
            self._changed.wait_for(lambda: self._closing or len(self._queue) >= self.max_rows, timeout=self.window)
            batch: list[_Request] = []
            while self._queue and len(batch) < self.max_rows and isinstance(self._queue[0], _Request):
                request = self._queue.popleft()
                if request.answer.set_running_or_notify_cancel():
                    batch.append(request)
            return batch

    def _do(self, job: _Job) -> None:
        if not job.done.set_running_or_notify_cancel():
            return
        try:
            job.do()
        except Exception as error:
            job.done.set_exception(error)
        else:
            self._adapters = tuple(sorted(self.model.peft_config))
            job.done.set_result(None)

    def _answer(self, batch: list[_Request]) -> None:
        known = []
        for request in batch:  # an adapter may have been dropped since
            try:
                self._check_known(request.adapter)
                known.append(request)
            except UnknownAdapterError as error:
                request.answer.set_exception(error)
        if not known:
            return
        start = time.perf_counter()
        try:
            answers = self._generate(known)
        except Exception as error:  # of this batch; the next one may be fine
            for request in known:
                request.answer.set_exception(error)
            return
        self._last_batch_seconds = time.perf_counter() - start
        if self.on_batch is not None:
            self.on_batch(len(known), self._last_batch_seconds, answers)
        for request, answer in zip(known, answers, strict=True):
            request.answer.set_result(answer)

    def _generate(self, batch: list[_Request]) -> list[Answer]:
        longest = max(len(request.ids) for request in batch)
        pads = [longest - len(request.ids) for request in batch]
        device, end = self.model.device, self.tokenizer.eos_token_id
        filler = next((token for token in (self.tokenizer.pad_token_id, end) if token is not None), 0)  # never seen
        ids = torch.tensor([[filler] * n + request.ids for n, request in zip(pads, batch, strict=True)], device=device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pads], device=device)
        limits = [request.max_new_tokens for request in batch]
        start = 1 if self.model.config.is_encoder_decoder else longest
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            adapter_names=[request.adapter for request in batch],
            do_sample=False,
            max_new_tokens=max(limits),
            pad_token_id=filler,
            eos_token_id=end,
            stopping_criteria=[_OwnLimits(limits, start)],
        )
        answers = []
        for request, row in zip(batch, out[:, start:].tolist(), strict=True):
            new = row[: request.max_new_tokens]
            if end in new:
                new = new[: new.index(end) + 1]
            text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
            answers.append(Answer(text, request.adapter, len(request.ids), len(new), len(batch)))
        return answers
