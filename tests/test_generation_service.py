"""The HTTP service of examples/, over a real socket with clients at the same time.

The oracle for a row of a shared batch is its adapter alone: `set_adapter` and `generate` on that row.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from adapters import adapted, add
from device import DEVICE
from families import FAMILIES
from tokenizers_of_families import tokenizer_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from batching import BASE, Batcher, OverloadedError, UnknownAdapterError
from generation_app import make_app
from generation_service import load_model, main

PROMPTS = {"default": 4, "short": 1, "long": 7, "bare": 0}  # virtual tokens
TEXTS = ("abc", "hello world", "x", "some longer text than the others")
NEW = 6


def make_model(family):
    model, *_ = adapted(family)
    for seed, (name, count) in enumerate(PROMPTS.items()):
        if name != "default":
            add(model, name, seed=seed + 10, num_virtual_tokens=count)
    return model


@pytest.fixture(scope="module", params=["llama", "t5"])
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def oracle(family):
    model, tokenizer = make_model(family), tokenizer_of(family)

    def alone(adapter: str, text: str, new: int = NEW) -> str:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(DEVICE)
        options = {
            "max_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": tokenizer.eos_token_id,
        }
        if adapter == BASE:
            with model.disable_adapter():
                out = model.generate(input_ids=ids, **options)
        else:
            model.set_adapter(adapter)
            out = model.generate(input_ids=ids, **options)
        start = 1 if model.config.is_encoder_decoder else ids.shape[1]
        return tokenizer.decode(out[0, start:], skip_special_tokens=True).strip()

    return alone


class Server:
    """The service in a thread, on a port that the system chooses."""

    def __init__(self, app) -> None:
        self.app = app
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60)

    def post_all(self, bodies: list[dict]) -> list[httpx2.Response]:
        """All at the same time."""

        async def together():
            async with httpx2.AsyncClient(base_url=self.url, timeout=60) as client:
                return await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))

        return asyncio.run(together())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def server(family, tmp_path):
    started = []

    def start(**options) -> Server:
        options = {"window": 0.2, "max_input_tokens": 40, **options}
        started.append(Server(make_app(make_model(family), tokenizer_of(family), tmp_path, **options)))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_concurrent_clients_get_what_each_adapter_gives_alone(server, oracle):
    names = [*PROMPTS, BASE]
    bodies = [
        {"adapter": name, "text": text, "max_new_tokens": 2 + (i + j) % NEW}
        for i, name in enumerate(names)
        for j, text in enumerate(TEXTS)
    ]
    responses = server(max_rows=5, window=60.0).post_all(bodies)  # batches are full, however slowly requests come
    rows = []
    for body, response in zip(bodies, responses, strict=True):
        assert response.status_code == 200, response.text
        got = response.json()
        assert got["text"] == oracle(body["adapter"], body["text"], body["max_new_tokens"]), body
        assert got["adapter"] == body["adapter"]
        assert 1 <= got["generated_tokens"] <= body["max_new_tokens"]
        rows.append(got["batch_rows"])
    assert rows == [5] * len(bodies)
    texts = {(body["adapter"]): response.json()["text"] for body, response in zip(bodies, responses, strict=True)}
    assert len(set(texts.values())) > 1  # the adapters do differ


def test_what_is_wrong_has_a_status_of_its_own(server, family):
    with server().client() as client:
        unknown = client.post("/generate", json={"adapter": "nobody", "text": "abc"})
        assert unknown.status_code == 404
        assert unknown.json()["known_adapters"] == [*sorted(PROMPTS), BASE]
        for text in ("a " * 41, "a" * 100_000):
            assert client.post("/generate", json={"adapter": "default", "text": text}).status_code == 413
        right = {"adapter": "default", "text": "abc"}
        for wrong in (
            {"adapter": "default"},
            {**right, "text": ""},
            {**right, "max_new_tokens": 0},
            {**right, "max_new_tokens": "many"},
            {**right, "temperature": 1},
        ):
            assert client.post("/generate", json=wrong).status_code == 422, wrong
        no_json = client.post("/generate", content=b"{", headers={"content-type": "application/json"})
        assert no_json.status_code == 422
        assert client.post("/generate", json={**right, "max_new_tokens": 2}).status_code == 200


def hold(batcher: Batcher) -> threading.Event:
    """Keeps the batcher's thread from the requests until the event is set."""
    held, gate = threading.Event(), threading.Event()
    batcher._queue_job(lambda: held.set() or gate.wait(60))
    assert held.wait(60)
    return gate


def test_overload_is_refused_at_once_and_what_was_taken_is_answered(server, oracle):
    running = server(max_rows=2, max_waiting=3)
    gate = hold(running.app.state.batcher)
    body = {"adapter": "long", "text": "abc", "max_new_tokens": NEW}

    async def together() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=running.url, timeout=60) as client:
            answers = []
            for answer in asyncio.as_completed([client.post("/generate", json=body) for _ in range(24)]):
                answers.append(await answer)
                if len(answers) == 21:
                    gate.set()
            return answers

    responses = asyncio.run(together())
    assert [response.status_code for response in responses] == [503] * 21 + [200] * 3
    assert all(int(response.headers["Retry-After"]) >= 1 for response in responses[:21])
    assert {response.json()["text"] for response in responses[21:]} == {oracle("long", "abc")}


def test_adapters_are_loaded_and_dropped_while_it_serves(server, family, oracle, tmp_path):
    donor = make_model(family)
    donor.save_pretrained(tmp_path / "saved", selected_adapters=["long"])
    running = server(max_adapters=5)
    stop, seen = threading.Event(), []

    def keep_asking():
        with running.client() as client:
            while not stop.is_set():
                response = client.post("/generate", json={"adapter": "short", "text": "abc", "max_new_tokens": NEW})
                seen.append((response.status_code, response.json().get("text")))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        with running.client() as client:
            loaded = client.put("/adapters/again", json={"folder": "saved/long"})
            assert loaded.status_code == 201, loaded.text
            assert "again" in loaded.json()
            answer = client.post("/generate", json={"adapter": "again", "text": "abc", "max_new_tokens": NEW})
            assert answer.json()["text"] == oracle("long", "abc")
            assert client.put("/adapters/again", json={"folder": "saved/long"}).status_code == 409
            assert client.put("/adapters/one-more", json={"folder": "saved/long"}).status_code == 409  # the sixth
            assert client.delete("/adapters/long").json() == ["again", "bare", "default", "short", BASE]
            assert client.delete("/adapters/long").status_code == 404
            assert client.post("/generate", json={"adapter": "long", "text": "abc"}).status_code == 404
            for name in ("again", "bare", "default"):
                assert client.delete(f"/adapters/{name}").status_code == 200
            assert client.delete("/adapters/short").status_code == 409  # the last one
            assert client.get("/adapters").json() == ["short", BASE]
    finally:
        stop.set()
        asking.join()
    assert set(seen) == {(200, oracle("short", "abc"))}


def test_an_adapter_that_does_not_fit_leaves_the_others_serving(server, family, oracle, tmp_path):
    other, *_ = adapted(FAMILIES["gpt2"])
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    other.save_pretrained(outside)
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"torn")
    with server().client() as client:
        for folder, status in (("other", 422), ("empty", 422), ("nowhere", 422), ("../x", 403), ("link", 403)):
            response = client.put("/adapters/new", json={"folder": folder})
            assert response.status_code == status, (folder, response.text)
        assert client.put("/adapters/new", json={"folder": str(outside)}).status_code == 403
        assert client.put("/adapters/a.b", json={"folder": "other"}).status_code == 422
        assert client.get("/adapters").json() == [*sorted(PROMPTS), BASE]
        for name in PROMPTS:
            answer = client.post("/generate", json={"adapter": name, "text": "abc", "max_new_tokens": NEW})
            assert answer.json()["text"] == oracle(name, "abc")


def test_loading_is_off_without_a_folder(family):
    running = Server(make_app(make_model(family), tokenizer_of(family)))
    try:
        with running.client() as client:
            assert client.put("/adapters/new", json={"folder": "x"}).status_code == 403
    finally:
        running.stop()


def test_a_failing_batch_is_answered_and_the_next_one_runs(server, oracle, monkeypatch):
    running = server()
    model = running.app.state.batcher.model
    generate = model.generate
    model.generate = lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    body = {"adapter": "default", "text": "abc", "max_new_tokens": NEW}
    failed = running.post_all([body, body])
    assert [response.status_code for response in failed] == [500, 500]
    assert "out of memory" in failed[0].json()["detail"]
    model.generate = generate
    (answer,) = running.post_all([body])
    assert answer.json()["text"] == oracle("default", "abc")


def test_a_client_that_leaves_takes_nobody_along(server, oracle):
    running = server(window=0.5)
    body = {"adapter": "default", "text": "abc", "max_new_tokens": NEW}
    with pytest.raises(httpx2.TimeoutException), httpx2.Client(base_url=running.url, timeout=0.1) as client:
        client.post("/generate", json=body)
    (answer,) = running.post_all([{**body, "adapter": "short"}])
    assert answer.json()["text"] == oracle("short", "abc")


def test_health_and_metrics(server):
    running = server()
    running.post_all([{"adapter": name, "text": "abc", "max_new_tokens": 3} for name in ("default", "short")])
    running.post_all([{"adapter": "nobody", "text": "abc"}])
    with running.client() as client:
        health = client.get("/healthz")
        assert health.status_code == 200
        assert health.json()["status"] == "ready"
        assert health.json()["adapters"] == sorted(PROMPTS)
        shown = client.get("/metrics")
    assert shown.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in text_string_to_metric_families(shown.text)
        for sample in metric.samples
    }
    assert samples["requests_total", "200"] == 2
    assert samples["requests_total", "404"] == 1
    assert samples["batch_rows_sum",] == 2
    assert 1 <= samples["batch_rows_count",] <= 2
    assert samples["request_seconds_count",] == 3
    assert samples["waiting_requests",] == 0
    assert 1 <= samples["generated_tokens_total", "short"] <= 3
    assert not any("nobody" in labels for labels in samples)


def test_stopping_answers_what_waits(family, oracle):
    running = Server(make_app(make_model(family), tokenizer_of(family)))
    batcher, (sockets,) = running.app.state.batcher, running.server.servers
    gate = hold(batcher)
    answers: list = []
    body = {"adapter": "default", "text": "abc", "max_new_tokens": NEW}
    asking = threading.Thread(target=lambda: answers.extend(running.post_all([body] * 3)))
    asking.start()
    while batcher.waiting < 3:
        time.sleep(0.01)
    running.server.should_exit = True
    while sockets.is_serving():
        time.sleep(0.01)
    gate.set()
    running.stop()
    asking.join()
    assert [answer.json()["text"] for answer in answers] == [oracle("default", "abc")] * 3


def test_a_request_whose_adapter_is_dropped_meanwhile(family):
    batcher = Batcher(make_model(family), tokenizer_of(family), window=0.0)
    try:
        gate = threading.Event()
        batcher._queue_job(gate.wait)  # holds the thread
        before = batcher.submit("short", "abc", 2)
        dropped = batcher.drop("short")
        after = batcher.submit("short", "abc", 2)
        gate.set()
        assert before.result(30).adapter == "short"
        assert dropped.result(30) is None
        with pytest.raises(UnknownAdapterError, match=r"'short'.*bare, default, long"):
            after.result(30)
    finally:
        batcher.close()
    with pytest.raises(OverloadedError):
        batcher.submit("default", "abc", 2)


def test_the_model_is_loaded_from_folders(family, oracle, tmp_path):
    from families import build

    build(family).save_pretrained(tmp_path / "base")
    tokenizer_of(family).save_pretrained(tmp_path / "base")
    donor = make_model(family)
    donor.save_pretrained(tmp_path / "saved", selected_adapters=["long", "short"])
    folders = {"a": str(tmp_path / "saved" / "long"), "b": str(tmp_path / "saved" / "short")}
    model, tokenizer = load_model(str(tmp_path / "base"), folders)
    batcher = Batcher(copy.deepcopy(model), tokenizer)
    try:
        for name, donor_name in (("a", "long"), ("b", "short")):
            assert batcher.submit(name, "abc", NEW).result(30).text == oracle(donor_name, "abc")
    finally:
        batcher.close()


def test_wrong_arguments_are_named(tmp_path, capsys):
    assert main(["--adapter", f"a={tmp_path}"]) == 2
    assert "--adapter a:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--adapter", "a"])
    assert "NAME=FOLDER" in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_rows"):
        Batcher(None, None, max_rows=0)
