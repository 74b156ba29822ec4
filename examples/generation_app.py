"""The HTTP side of `generation_service.py`, which says what it answers: routes, metrics, and errors as statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse
from peft import PeftModel
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from batching import (
    BASE,
    Answer,
    Batcher,
    ConflictError,
    OverloadedError,
    TooLongError,
    UnknownAdapterError,
)

NAME = r"^[A-Za-z0-9_-]{1,64}$"  # a part of a module's path in the model: no dots


class Generate(BaseModel):
    """Body of POST /generate."""

    model_config = ConfigDict(extra="forbid")
    adapter: str
    text: str = Field(min_length=1)
    max_new_tokens: int = Field(default=64, ge=1, le=1024)


class Folder(BaseModel):
    """Body of PUT /adapters/NAME."""

    model_config = ConfigDict(extra="forbid")
    folder: str = Field(min_length=1)


class Metrics:
    """What /metrics shows. Adapters' names are labels; unknown ones are not, or anyone could make labels."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "Answered requests by status", ["status"], registry=self.registry)
        self.seconds = Histogram("request_seconds", "From request to answer", registry=self.registry)
        self.batches = Histogram(
            "batch_rows", "Rows of a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.batch_seconds = Histogram("batch_seconds", "Seconds of a batch", registry=self.registry)
        self.tokens = Counter("generated_tokens", "Generated tokens by adapter", ["adapter"], registry=self.registry)
        self.waiting = Gauge("waiting_requests", "Requests that wait", registry=self.registry)

    def on_batch(self, rows: int, seconds: float, answers: list[Answer]) -> None:
        self.batches.observe(rows)
        self.batch_seconds.observe(seconds)
        for answer in answers:
            self.tokens.labels(answer.adapter).inc(answer.generated_tokens)


def make_app(model: PeftModel, tokenizer: Any, adapter_dir: Path | None = None, **limits: Any) -> FastAPI:
    """The service as an ASGI application.

    Args:
        model: a `PeftModel` with at least one input-tuning adapter.
        tokenizer: of the base model.
        adapter_dir: folder under which adapters may be loaded from; None forbids loading.
        limits: of `Batcher`.
    """
    metrics = Metrics()
    batcher = Batcher(model, tokenizer, on_batch=metrics.on_batch, **limits)
    metrics.waiting.set_function(lambda: batcher.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)  # what waits gets its answer

    app = FastAPI(title="Input-tuning adapters", lifespan=lifespan)
    app.state.batcher = batcher

    @app.middleware("http")
    async def measure(request: Request, call_next: Any) -> Response:
        if request.url.path != "/generate":
            return await call_next(request)
        start = time.perf_counter()
        response = await call_next(request)
        metrics.seconds.observe(time.perf_counter() - start)
        metrics.requests.labels(str(response.status_code)).inc()
        return response

    def answer_with(status: int, kind: type[Exception]) -> None:
        @app.exception_handler(kind)
        async def handle(request: Request, error: Exception) -> JSONResponse:
            content: dict[str, Any] = {"detail": str(error)}
            headers = {}
            if isinstance(error, UnknownAdapterError):
                content["known_adapters"] = error.known
            if isinstance(error, OverloadedError):
                headers["Retry-After"] = str(error.retry_after)
            return JSONResponse(content, status, headers)

    answer_with(404, UnknownAdapterError)
    answer_with(409, ConflictError)
    answer_with(413, TooLongError)
    answer_with(503, OverloadedError)

    @app.post("/generate")
    async def generate(body: Generate) -> Answer:
        future = await asyncio.to_thread(batcher.submit, body.adapter, body.text, body.max_new_tokens)
        try:
            return await asyncio.wrap_future(future)
        except (UnknownAdapterError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise HTTPException(500, f"The model failed on this batch: {error}") from error

    @app.get("/adapters")
    async def adapters() -> list[str]:
        return [*batcher.adapters, BASE]

    @app.put("/adapters/{name}", status_code=201)
    async def load(name: Annotated[str, PathParameter(pattern=NAME)], body: Folder) -> list[str]:
        folder = _allowed(body.folder, adapter_dir)
        try:
            await asyncio.wrap_future(batcher.load(name, folder))
        except (ConflictError, OverloadedError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise HTTPException(422, f"{body.folder!r} cannot be loaded: {error}") from error
        return await adapters()

    @app.delete("/adapters/{name}")
    async def drop(name: str) -> list[str]:
        await asyncio.wrap_future(batcher.drop(name))
        return await adapters()

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        ready = batcher.alive
        content = {
            "status": "ready" if ready else "stopping",
            "base_model": model.config._name_or_path,
            "adapters": batcher.adapters,
            "waiting": batcher.waiting,
        }
        return JSONResponse(content, 200 if ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _allowed(folder: str, adapter_dir: Path | None) -> Path:
    """The folder as a path inside of `adapter_dir`; links that lead out of it are outside."""
    if adapter_dir is None:
        raise HTTPException(403, "Adapters cannot be loaded: the service was started without --adapter-dir.")
    path = (adapter_dir / folder).resolve()
    if not path.is_relative_to(adapter_dir.resolve()):
        raise HTTPException(403, f"`folder` {folder!r} is not inside the folder that adapters are loaded from.")
    if not (path / "adapter_config.json").is_file():
        raise HTTPException(422, f"`folder` {folder!r} has no adapter_config.json. Pass an adapter's folder.")
    return path
