"""Tests beside vLLM, in an environment of their own: `make test-vllm`. Without vLLM they are not collected."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TASK_DATA", ROOT.parent / "shared" / "data"))
PREPARED = Path(os.environ.get("PREPARED", ROOT / "outputs" / "vllm"))

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="session")
def prepared() -> Path:
    """The folder of `prepare.py`, made once; remove it to have it made again."""
    if not (PREPARED / "wanted.json").is_file():
        if not DATA.is_dir():
            pytest.skip(f"needs the tasks' data at {DATA}: set TASK_DATA")
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("prepare.py")), str(PREPARED), str(DATA)], check=True
        )
    return PREPARED


@pytest.fixture(scope="session")
def wanted(prepared) -> list[dict]:
    """Prompts, and the tokens that `PeftModel.generate` writes for them."""
    return json.loads((prepared / "wanted.json").read_text(encoding="utf-8"))
