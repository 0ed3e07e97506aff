"""Requests within and beyond the limits, without a server: messages of ASGI in and out."""

import asyncio
import json
import threading

import numpy as np
import pytest
from starlette.requests import Request

from grainmill.corpus.embedder import Answer
from grainmill.serve.http import Endpoint, Limits

HERE, ELSEWHERE = "127.0.0.1", "192.0.2.7"
BAD = Answer(None, None, None, None, "is not an image")


def embed(contents):
    """Embed each content as its length."""
    good = [Answer(np.array([len(content)], np.float32), 0, "shade", 0.5, None) for content in contents]
    return "models:/shades/1", [BAD if content == b"bad" else one for content, one in zip(contents, good, strict=True)]


def endpoint(token=None, embed=embed, **limits):
    return Endpoint(embed, lambda: "models:/shades/1", Limits(**limits), token)


async def ask(served, method="POST", path="/", parts=(b"content",), client=HERE, ends=True, **headers):
    """Send a request whose body comes in parts, and possibly never ends; return status, headers and text."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages += [{"type": "http.request"}] if ends else []
    sent = []

    async def receive():
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": named, "client": (client, 1)}
    scope |= {"query_string": b"", "server": ("127.0.0.1", 80), "scheme": "http"}
    await (await served(Request(scope, receive)))(scope, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]).decode()


def status(served, **request):
    return asyncio.run(ask(served, **request))[0]


def test_an_image_is_embedded_and_a_bad_one_gets_its_reason():
    code, _, text = asyncio.run(ask(endpoint(), parts=[b"ab", b"c"]))
    answer = {"embedding": [3.0], "class_id": 0, "class_name": "shade", "score": 0.5, "error": None}
    assert (code, json.loads(text)) == (200, {"model": "models:/shades/1", **answer})
    code, _, text = asyncio.run(ask(endpoint(), parts=[b"bad"]))
    assert (code, json.loads(text)) == (400, {"model": "models:/shades/1", "error": "is not an image"})


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"method": "GET"}, 200),
        ({"method": "HEAD"}, 200),
        ({"method": "PUT"}, 405),
        ({"method": "POST", "path": "/healthz"}, 405),
        ({"method": "GET", "path": "/healthz", "client": ELSEWHERE}, 200),
        ({"method": "GET", "path": "/metrics"}, 200),
        ({"path": "/other"}, 404),
        ({"client": ELSEWHERE}, 403),
        ({"client": "::1"}, 200),
        ({"client": "::ffff:127.0.0.1"}, 200),
        ({"client": "localhost.example"}, 403),
        ({"method": "GET", "path": "/metrics", "client": ELSEWHERE}, 403),
    ],
)
def test_paths_methods_and_clients_without_a_token(request_, expected):
    assert status(endpoint(), **request_) == expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [("Bearer secr\xe9t", 200), ("bearer secr\xe9t", 200), ("Bearer secret", 401), ("Basic secr\xe9t", 401), ("", 401)],
)
@pytest.mark.parametrize("client", [HERE, ELSEWHERE])
def test_with_a_token_every_client_must_send_it(client, header, expected):
    code, headers, _ = asyncio.run(ask(endpoint("secr\xe9t"), client=client, authorization=header))
    assert code == expected
    assert expected == 200 or headers["www-authenticate"] == "Bearer"


def test_who_may_not_ask_is_told_before_the_body_is_read():
    assert status(endpoint("secret"), ends=False) == 401


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"parts": [b"12345", b"67890"]}, 200),
        ({"parts": [b"12345", b"678901"], "ends": False}, 413),
        ({"parts": [], "ends": False, "content_length": "11"}, 413),
        ({"parts": [b"1"], "content_length": "10"}, 200),
        ({"parts": [b"1"], "ends": False}, 408),
        ({"parts": [], "ends": False}, 408),
    ],
)
def test_a_body_is_limited_in_size_and_time(request_, expected):
    code, headers, _ = asyncio.run(ask(endpoint(image_bytes=10, body_seconds=0.01), **request_))
    assert code == expected
    assert expected == 200 or headers["connection"] == "close"


def test_slow_bodies_stop_nobody_but_count_as_held():
    served = endpoint(queue=1, held_bytes=10)

    async def run():
        slow = [asyncio.create_task(ask(served, parts=[b"1234"], ends=False)) for _ in range(2)]
        await asyncio.sleep(0)
        quick = [(await ask(served, parts=[content]))[0] for content in (b"12", b"12", b"123", b"12")]
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return quick, (await ask(served, parts=[b"1234567890"]))[0]

    assert asyncio.run(run()) == ([200, 200, 503, 200], 200)


def test_what_waits_becomes_the_next_batch_and_what_exceeds_the_queue_is_refused():
    go, batches = threading.Event(), []

    def wait_then_embed(contents):
        batches.append(list(contents))
        go.wait()
        return embed(contents)

    served = endpoint(embed=wait_then_embed, batch=2, queue=3)

    async def run():
        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(ask(served, parts=[b"%d" % number])))
            while number == 0 and not batches:  # the first is taken at once
                await asyncio.sleep(0)
        gone = tasks.pop(2)
        while len(served._queue) < 3:
            await asyncio.sleep(0)
        gone.cancel()
        last = asyncio.create_task(ask(served, parts=[b"6"]))
        refused = [await task for task in tasks[3:]]
        while len(served._queue) < 3:
            await asyncio.sleep(0)
        go.set()
        answers = await asyncio.gather(*tasks[:3], last)
        return refused, answers, (await ask(served, "GET", "/metrics"))[2]

    refused, answers, metrics = asyncio.run(run())
    assert [(code, headers["retry-after"]) for code, headers, _ in refused] == [(503, "1"), (503, "1")]
    assert [code for code, _, _ in answers] == [200] * 4
    assert batches == [[b"0"], [b"1", b"3"], [b"6"]]
    lines = {'requests_total{status="503"} 2.0', "queue_images 0.0", "held_bytes 0.0", "batch_images_count 3.0"}
    assert {f"grainmill_{line}" for line in lines} <= set(metrics.splitlines())


def test_a_late_answer_is_refused_and_a_failing_model_stops_nothing():
    go = threading.Event()

    def fail_once(contents):
        if contents == (b"late",):
            go.wait()
        if contents == (b"broken",):
            raise RuntimeError("no memory")
        return embed(contents)

    async def run():
        served = endpoint(embed=fail_once, answer_seconds=0.02)
        late = await ask(served, parts=[b"late"])
        go.set()
        return late[0], (await ask(served, parts=[b"broken"]))[0], (await ask(served))[0]

    assert asyncio.run(run()) == (503, 500, 200)
