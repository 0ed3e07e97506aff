"""The application on real Ray Serve: answers, bad images, a change of champion."""

import io
import json
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import psutil
import pytest
import shades
from mlflow_tables import database
from PIL import Image
from servers import free_port

from grainmill.tracking.mlflow_runs import Tracker


def picture(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(url, content=None):
    """Send a request, a GET without content; return status and answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def service(ray_cluster, tmp_path, limits):
    """The tracker of a registered champion, and the URL of the application that serves it."""
    from ray import serve

    from grainmill.serve import app

    tracker = Tracker(database(tmp_path), "shades", tmp_path)
    shades.register(tracker, tmp_path / "1", 1)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"model": "models:/shades@champion", "tracking_uri": tracker.uri, "poll_seconds": 0.2, **limits}
    built = app.Service.options(max_ongoing_requests=100).bind(app.Settings.model_validate(arguments))
    serve.run(built, name="champion", route_prefix="/")
    yield tracker, f"http://127.0.0.1:{port}/"
    serve.shutdown()


@pytest.fixture
def limits():
    return {}


def test_images_are_answered_bad_ones_refused_and_a_new_champion_takes_over(service, tmp_path):
    tracker, url = service
    contents = [picture(seed) if seed % 4 else b"<html>" for seed in range(16)]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda content: ask(url, content), contents))
    (tmp_path / "1" / "state.json").write_text(json.dumps({"bias": 1}))
    expected = shades.load(tmp_path / "1")(pd.DataFrame({"image": contents}))
    for (status, answer), (_, row) in zip(answers, expected.iterrows(), strict=True):
        assert answer["model"] == "models:/shades/1"
        if row["error"]:
            assert (status, answer["error"]) == (400, "is not an image")
        else:
            assert (status, answer["class_name"], answer["class_id"], answer["score"]) == (200, "shade", 0, 0.5)
            assert answer["embedding"] == pytest.approx(row["embedding"], abs=1e-6)

    # A champion that is no model leaves the one that is there; the next good one takes over, and nobody waits.
    empty = tracker.client.create_model_version("shades", str(tmp_path / "nowhere")).version
    tracker.client.set_registered_model_alias("shades", "champion", empty)
    seen, failed, stop = set(), [], threading.Event()

    def keep_asking():
        while not stop.is_set():
            status, answer = ask(url, contents[1])
            seen.add(answer["model"])
            if status != 200:
                failed.append(answer)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    second = shades.register(tracker, tmp_path / "2", 2)
    while ask(url)[1]["model"] != second:
        assert not failed
    stop.set()
    asking.join()
    assert seen <= {"models:/shades/1", second}
    assert not failed
    status, answer = ask(url, contents[1])
    expected = shades.load(tmp_path / "2")(pd.DataFrame({"image": contents[1:2]}))
    assert (status, answer["model"]) == (200, second)
    assert answer["embedding"] == pytest.approx(expected["embedding"][0], abs=1e-6)


def begin(url, *lines):
    """Open a connection, and send the beginning of a request."""
    host, port = urlsplit(url).netloc.split(":")
    connection = socket.create_connection((host, int(port)), 60)
    connection.sendall("\r\n".join(["POST / HTTP/1.1", "Host: here", *lines, "", ""]).encode())
    return connection


def resident(name):
    """Memory in bytes of the processes of Ray with this name."""
    processes = [one.info for one in psutil.process_iter(["name", "cmdline", "memory_info"])]
    return sum(one["memory_info"].rss for one in processes if one["cmdline"] and name in one["cmdline"][0])


@pytest.mark.parametrize("limits", [{"body_seconds": 3, "image_bytes": 2**20}])
def test_slow_clients_stop_nobody_and_bodies_without_end_are_refused_unread(service):
    _, url = service
    slow = [begin(url, "Content-Length: 100") for _ in range(20)]
    assert [ask(url, picture(seed))[0] for seed in range(5)] == [200] * 5  # 100 slots, 20 of them taken
    before = resident("ray::")
    part = b"x" * 2**20
    chunk = b"100000\r\n%s\r\n" % part
    for line, body in (("Content-Length: 1000000000", part), ("Transfer-Encoding: chunked", chunk)):
        with begin(url, line) as connection, suppress(OSError):  # the server closes the connection
            for _ in range(1000):
                connection.sendall(body)
            pytest.fail("a gigabyte was read")
    with begin(url, "Content-Length: 1000000000") as connection:
        assert connection.recv(12) == b"HTTP/1.1 413"
    assert resident("ray::") - before < 2**28
    for connection in slow:
        with connection:
            assert connection.recv(12) == b"HTTP/1.1 408"


@pytest.mark.parametrize("limits", [{"queue": 1, "batch": 1}])
def test_more_than_the_queue_holds_is_told_to_come_again(service):
    _, url = service
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda seed: ask(url, picture(seed)), range(200)))
    assert {status for status, _ in answers} == {200, 503}
    assert {answer["error"] for status, answer in answers if status == 503} == {
        "1 images wait already; try again later"
    }
    assert ask(url, picture(0))[0] == 200
    with urllib.request.urlopen(f"{url}healthz", timeout=60) as response:
        assert response.read() == b"ok"
