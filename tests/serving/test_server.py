"""vLLM's HTTP server and the openai client: every answer is what `PeftModel.generate` writes."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from prepare import BASE, NEW

pytestmark = pytest.mark.vllm
openai = pytest.importorskip("openai")
SOAK = int(os.environ.get("SOAK_REQUESTS", "1000"))
CHANGES = 40


class Server:
    """A server process, and what a client needs to know of it."""

    def __init__(self, prepared, log) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.base = str(prepared / "base")
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.base]
        program += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"]
        program += ["--kv-cache-memory-bytes", str(256 << 20)]  # memory of a CPU is taken when it is first written to
        program += ["--enable-lora", "--lora-target-modules", "embed_tokens", "--max-loras", "9"]
        program += ["--lora-modules", f"e2e={prepared / 'e2e'}", "--port", self.url.rpartition(":")[2]]
        settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_LORA_RESOLVER_CACHE_DIR": str(prepared)}
        self.process = subprocess.Popen(
            program, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
        )

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError("the server did not start")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)

    def post(self, path: str, **body) -> tuple[int, str]:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def load(self, name: str, folder) -> tuple[int, str]:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder))

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("/v1/unload_lora_adapter", lora_name=name)


@pytest.fixture(scope="module")
def server(prepared):
    log = prepared / "server.log"
    with log.open("w") as file:
        server = Server(prepared, file)
        try:
            server.wait(300)
            yield server
        except RuntimeError:
            pytest.fail(log.read_text()[-3000:])
        finally:
            server.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def rows(wanted) -> list[dict]:
    rows = [row for row in wanted if row["adapter"] != "input-only"]
    random.Random(2).shuffle(rows)
    assert len(rows) >= 100
    return rows


def ask(client, server, row, **changes):
    """One request, as a user would send it: the text of a row, or the row as a chat."""
    model = server.base if row["adapter"] == BASE else row["adapter"]
    settings = {"model": model, "max_tokens": NEW, "temperature": 0, "extra_body": {"return_token_ids": True}}
    if row["kind"] == "chat":
        messages = [{"role": "user", "content": row["text"]}]
        return client.chat.completions.create(messages=messages, **{**settings, **changes})
    return client.completions.create(prompt=row["text"] + "\n", **{**settings, **changes})


def token_ids(answer) -> list[int]:
    return answer.choices[0].token_ids


def test_concurrent_requests_for_adapters_and_base(server, client, rows):
    """`overnight` is loaded by the resolver, at its first request."""
    with ThreadPoolExecutor(16) as threads:
        got = list(threads.map(lambda row: token_ids(ask(client, server, row)), rows))
    assert got == [row["wanted"] for row in rows]


def test_streams(server, client, rows):
    def streamed(row):
        found: list[int] = []
        for part in ask(client, server, row, stream=True):
            for choice in part.choices:
                found += getattr(choice, "token_ids", None) or []  # a part may have no new token
        return found

    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(streamed, rows[:40]))
    assert got == [row["wanted"] for row in rows[:40]]


def test_logprobs(server, client, rows):
    for row in [row for row in rows if row["kind"] == "plain" and row["adapter"] != BASE][:10]:
        answer = ask(client, server, row, logprobs=1)
        assert token_ids(answer) == row["wanted"]
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(row["logprobs"], abs=2e-3)
    for row in [row for row in rows if row["kind"] == "chat" and row["adapter"] != BASE][:10]:
        answer = ask(client, server, row, logprobs=True, top_logprobs=2)
        got = [part.logprob for part in answer.choices[0].logprobs.content]
        assert got == pytest.approx(row["logprobs"], abs=2e-3)


def test_usage_counts_virtual_tokens(server, client, rows):
    for row in rows[:10]:
        virtual = {"e2e": 8, "overnight": 20, BASE: 0}[row["adapter"]]
        assert ask(client, server, row, max_tokens=1).usage.prompt_tokens == virtual + len(row["prompt"])


def test_an_echo_is_the_prompt_without_virtual_tokens(server, client, rows):
    row = next(row for row in rows if row["kind"] == "plain" and row["adapter"] == "e2e")
    text = ask(client, server, row).choices[0].text
    # with token ids vLLM leaves the prompt's text out
    assert ask(client, server, row, echo=True, extra_body={}).choices[0].text == row["text"] + "\n" + text


def test_sampling_never_leaves_the_vocabulary(server, client, rows):
    row = next(row for row in rows if row["adapter"] == "overnight")
    for seed in range(5):
        got = token_ids(ask(client, server, row, temperature=2.0, seed=seed, max_tokens=64))
        assert max(got) < 49152


def test_what_is_refused_is_said_and_the_server_goes_on(server, client, rows, prepared):
    status, said = server.load("scoped", prepared / "input-only")
    assert status >= 400
    assert "prompt_embeds" in said
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        client.completions.create(model="e2e", prompt="x", max_tokens=1, extra_body={"prompt_logprobs": 1})
    with pytest.raises(openai.BadRequestError, match="maximum"):
        client.completions.create(model="e2e", prompt=[5] * 505, max_tokens=1)
    assert token_ids(ask(client, server, rows[0])) == rows[0]["wanted"]


def test_an_adapter_that_is_loaded_again_is_not_answered_from_the_cache(server, client, rows, prepared, tmp_path):
    """The same name and path, other weights in the folder."""
    import shutil

    texts = {row["text"]: row for row in rows if row["adapter"] == "overnight" and row["kind"] == "plain"}
    pairs = [(texts[row["text"]], row) for row in rows if row["adapter"] == BASE and row["text"] in texts]
    row = pairs[0][0]
    shutil.copytree(prepared / "e2e", tmp_path / "a")
    assert server.load("again", tmp_path / "a")[0] == 200
    first = token_ids(ask(client, server, {**row, "adapter": "again"}))
    assert first != row["wanted"]
    assert server.unload("again")[0] == 200
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(prepared / "overnight", tmp_path / "a")
    assert server.load("again", tmp_path / "a")[0] == 200
    assert token_ids(ask(client, server, {**row, "adapter": "again"})) == row["wanted"]
    server.unload("again")


def memory_of(process) -> int:
    import psutil

    parent = psutil.Process(process.pid)
    return sum(one.memory_info().rss for one in [parent, *parent.children(recursive=True)])


def test_soak(server, client, rows, prepared):
    """Adapters come and go under load: nothing wrong, nothing lost.

    One is unloaded when its own requests are done. vLLM 0.32 tells adapters of a batch apart by name, so that its
    engine stops if requests for two of one name, from before and after, meet in it.
    """
    names = [f"task{i}" for i in range(8)]
    folder = {name: ("e2e", "overnight")[i % 2] for i, name in enumerate(names)}
    by_adapter = {kind: [row for row in rows if row["adapter"] == kind] for kind in ("e2e", "overnight", BASE)}
    loaded, lock, changes = set(names), threading.Lock(), 0
    for name in names:
        assert server.load(name, prepared / folder[name])[0] == 200
    done, wrong, under_way = 0, [], dict.fromkeys([*names, BASE], 0)

    def work(number: int) -> None:
        nonlocal done
        draw = random.Random(number)
        with lock:
            name = draw.choice([*sorted(loaded), BASE])
            under_way[name] += 1
        row = draw.choice(by_adapter[folder.get(name, BASE)])
        got = token_ids(ask(client, server, {**row, "adapter": name}, max_tokens=6))
        if got != row["wanted"][:6]:
            wrong.append((name, row["text"], got))
        with lock:
            done += 1
            under_way[name] -= 1

    def change() -> None:
        nonlocal changes
        draw = random.Random(0)
        while done < SOAK:
            name = draw.choice(names)
            with lock:
                loaded.discard(name)
            while under_way[name]:
                time.sleep(0.05)
            assert server.unload(name)[0] == 200
            assert server.load(name, prepared / folder[name])[0] == 200
            with lock:
                loaded.add(name)
            changes += 1
            time.sleep(1)

    with ThreadPoolExecutor(17) as threads:
        changing = threads.submit(change)
        list(threads.map(work, range(SOAK)))
        changing.result()
    print(f"{done} requests, {changes} adapters unloaded and loaded")
    assert not wrong
    assert changes >= 8


def test_adapters_that_come_and_go_leave_nothing_in_memory(server, client, rows, prepared):
    """The same request again and again, so that only adapters change.

    Under mixed traffic a server without adapters grows too: vLLM's matrix products on a CPU keep something for each
    number of tokens that a step had. An adapter has 5 MB of weights, which would be left if it stayed.
    """
    row = next(row for row in rows if row["adapter"] == "overnight")

    def come_and_go(times: int) -> int:
        for _ in range(times):
            assert server.load("again", prepared / "overnight")[0] == 200
            assert token_ids(ask(client, server, {**row, "adapter": "again"}, max_tokens=3)) == row["wanted"][:3]
            assert server.unload("again")[0] == 200
        return memory_of(server.process)

    before = come_and_go(10)
    after = come_and_go(CHANGES)
    print(f"{CHANGES} adapters: memory {before >> 20} to {after >> 20} MiB")
    assert after - before < CHANGES << 20
