"""A small HTTP service: one frozen model, many input-tuning adapters, requests that come together share a batch.

    python examples/many_tasks.py  # trains adapters, among them the one below
    python examples/generation_service.py --adapter logic=outputs/many-tasks/logic-to-text
    curl localhost:8000/generate --json '{"adapter": "logic", "text": "sort(releaseDate asc of MusicRecording())[1]"}'

| | |
| :-- | :-- |
| POST /generate | {"adapter", "text", "max_new_tokens"} → {"text", ...}; adapter "__base__" is the bare model |
| GET /adapters | the names that are known |
| PUT /adapters/NAME | {"folder"}: loads an adapter from the folder that --adapter-dir names |
| DELETE /adapters/NAME | drops it |
| GET /healthz | whether it serves |
| GET /metrics | for Prometheus |

There is no authentication: put a proxy in front of it that has some, and a limit on the size of requests.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from extras import needs
from packaged_model import PACKAGED, find_model
from peft_input_tuning import reuse_prompts  # and registers INPUT_TUNING with PEFT
from peft_input_tuning.command_line.gguf import dense_weights
from task_data import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI


def check_installed() -> None:
    """Raises InputError where a package of the service is missing."""
    needs("serve", "fastapi", "prometheus_client", "uvicorn")


def load_model(base: str, adapters: dict[str, str]) -> tuple[PeftModel, Any]:
    """The base model with its adapters, and the tokenizer.

    Raises:
        InputError: a folder is not there, or does not fit.
    """
    for name, folder in adapters.items():
        if not (Path(folder) / "adapter_config.json").is_file():
            raise InputError(f"--adapter {name}: {folder!r} has no adapter_config.json. Pass an adapter's folder.")
    name, gguf_file = find_model(base)
    more = {"gguf_file": gguf_file} if gguf_file else {}
    first, *others = adapters.items()
    is_seq2seq = PeftConfig.from_pretrained(first[1]).task_type == "SEQ_2_SEQ_LM"
    auto = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    base_model = auto.from_pretrained(name, **dense_weights(gguf_file))
    model = PeftModel.from_pretrained(base_model, first[1], adapter_name=first[0])
    for adapter, folder in others:
        model.load_adapter(folder, adapter_name=adapter)
    return model, AutoTokenizer.from_pretrained(name, **more)


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serves until the process is told to stop; requests that are under way are answered first."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning")


def _adapter(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, got {text!r}")
    return name, folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=PACKAGED, help="a hub id or a folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", type=_adapter, action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--adapter-dir", type=Path, help="folder under which adapters may be loaded from over HTTP")
    parser.add_argument("--suffix", default="\n", help="put behind each text, as in training (default: a line end)")
    parser.add_argument("--max-rows", type=int, default=16, help="rows of a batch (%(default)s)")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests that may wait (%(default)s)")
    parser.add_argument("--max-input-tokens", type=int, default=512, help="of one request (%(default)s)")
    parser.add_argument("--max-adapters", type=int, default=16, help="loaded at a time (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(argv)
    limits = {name: getattr(options, name) for name in ("max_rows", "max_waiting", "max_input_tokens", "max_adapters")}
    try:
        check_installed()
        from generation_app import make_app

        model, tokenizer = load_model(options.base, dict(options.adapter))
        app = make_app(model, tokenizer, options.adapter_dir, suffix=options.suffix, **limits)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Serving {', '.join(app.state.batcher.adapters)} on http://{options.host}:{options.port}")
    with reuse_prompts(model):  # nothing changes the weights here
        serve(app, options.host, options.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
