"""llama.cpp's server inside of Python, from the prebuilt package xllamacpp; GGUF files by the commands of the docs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONVERTER = os.environ.get("LLAMA_CPP_CONVERTER")
TEXTS = [
    "The capital of France is",
    "sort(releaseDate asc of MusicRecording())[1] means",
    "Once upon a time there",
    "SELECT name FROM users WHERE",
    "Ein Hund läuft über die Straße, 数字 12345",
]
THREADS = 1  # more of them wait for each other in loops, which takes minutes where other work runs
needs_engines = [
    pytest.mark.engines,
    pytest.mark.skipif(CONVERTER is None, reason="needs llama.cpp's converter and engines: run `make test-engines`"),
]


def to_gguf(source: Path, target: Path, *more: object, outtype: str = "f32") -> Path:
    script = ROOT / "examples" / "serving" / "to_gguf.py"
    command = [sys.executable, script, source, target, "--outtype", outtype, *more]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


class LlamaServer:
    """A model, and LoRAs of which each request chooses."""

    def __init__(self, model: Path, loras: Sequence[Path] = ()) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.warmup = str(model), 1024, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
        entries = [xllamacpp.CommonAdapterLoraInfo() for _ in loras]
        for entry, lora in zip(entries, loras, strict=True):
            entry.path, entry.scale = str(lora), 0.0
        settings.lora_adapters, settings.lora_init_without_apply = entries, True
        self.server = xllamacpp.Server(settings)

    def tokens(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]

    def complete(self, prompt: str | list[int], new: int, banned: Sequence[int], **more: Any) -> str:
        settings = {"max_tokens": new, "temperature": 0, "cache_prompt": False}
        ban = {str(id): -100 for id in banned}  # as to_gguf.py prints it
        answer = self.server.handle_completions({"prompt": prompt, "logit_bias": ban, **settings, **more})
        return answer["choices"][0]["text"]

    def chat(self, messages: list[dict], new: int, banned: Sequence[int]) -> dict[str, Any]:
        settings = {"max_tokens": new, "temperature": 0, "cache_prompt": False}
        ban = {str(id): -100 for id in banned}  # as to_gguf.py prints it
        return self.server.handle_chat_completions({"messages": messages, "logit_bias": ban, **settings})
