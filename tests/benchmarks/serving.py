"""Requests per second of the HTTP server against FastAPI with ONNX Runtime, and against an empty application.

    python -m tests.benchmarks.serving [--rounds 3] [--seconds 5]

The demo's network, JPEGs of 32 x 32 and of 500 x 375 pixels, 1, 8 and 32 clients that each wait for an answer before
the next request. The servers share the cores with the process of all clients. Ray Serve runs with
its own proxy and with HAProxy, each with `grainmill.serve` and with an application that only reads the body.
"""

import argparse
import asyncio
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import yaml
from PIL import Image
from starlette.responses import Response

from tests.benchmarks.loader import photo
from tests.benchmarks.table import Goal, machine, report

TOKEN, PORT = "benchmark", 18000
CLIENTS = (1, 8, 32)
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SERVERS = {
    "bare": ("bare", {}),
    "ours, HAProxy": ("ours", HAPROXY),
    "empty, HAProxy": ("empty", HAPROXY),
    "ours, proxy": ("ours", {}),
    "empty, proxy": ("empty", {}),
}


def register(folder):
    """Register a network with random weights as models:/demo@champion; returns the tracking URI."""
    from grainmill.registry import models
    from grainmill.registry.model_card import ModelCard
    from grainmill.tracking.mlflow_runs import Tracker, local_uri
    from multigrain.models.multigrain import MultiGrain
    from tests.support.networks import SETTINGS, save

    save(folder / "run", 1, {**SETTINGS, "model": {"trunk": "narrow"}}, network=MultiGrain("narrow", 3).eval())
    tracker = Tracker(local_uri(folder), "demo", folder)
    run, card = tracker.start("demo", {}), ModelCard("multigrain.trainable", "", {}, [], {}, {}, {}, {})
    models.register(tracker, run, "demo", folder / "run", {"image": [small()]}, {}, card)
    return tracker.uri


def small():
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def serve_bare(uri):
    """Serve as in FastAPI's manual: one process, a thread for each request."""
    import onnxruntime
    import uvicorn
    from fastapi import FastAPI, Request
    from starlette.concurrency import run_in_threadpool

    from grainmill.registry import models

    with models.fetched(uri, "models:/demo@champion") as stored:
        network = onnxruntime.InferenceSession(stored.portable / "model.onnx")
        size = json.loads((stored.portable / "model.json").read_text())["size"]

    def embed(content):
        with Image.open(io.BytesIO(content)) as image:
            side, shorter = int(size * 256 / 224), min(image.size)
            scaled = image.convert("RGB").resize((side * image.width // shorter, side * image.height // shorter))
        left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
        pixels = np.asarray(scaled.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
        embedding, probabilities = network.run(None, {"images": pixels[None]})
        best = int(probabilities[0].argmax())
        return {"embedding": embedding[0].tolist(), "class_id": best, "score": float(probabilities[0, best])}

    app = FastAPI()

    @app.post("/")
    async def answer(request: Request):
        return await run_in_threadpool(embed, await request.body())

    uvicorn.run(app, port=PORT, log_level="error")


class Empty:
    async def __call__(self, request):
        await request.body()
        return Response(b"{}")


def empty(_):
    """Return an application that only reads the body, for `serve run`."""
    from ray import serve

    return serve.deployment(Empty, name="Service").bind()


def ray_file(kind, uri, folder):
    """Write the file that `serve run` takes: the project's own, with the server's address and another application."""
    content = yaml.safe_load(Path("infra/serve/champion.yaml").read_text())
    content["http_options"]["port"] = PORT
    (application,) = content["applications"]
    if kind == "ours":
        application["args"]["tracking_uri"] = uri
    else:
        application |= {"import_path": "tests.benchmarks.serving:empty", "args": {"": ""}}
    file = Path(folder, f"{kind}.yaml")
    file.write_text(yaml.safe_dump(content))
    return file


@contextmanager
def running(kind, uri, environment, folder):
    """Start a server in processes of its own, and wait until it answers; yields the first of them."""
    if kind == "bare":
        command = [sys.executable, "-m", "tests.benchmarks.serving", "--bare", uri]
    else:
        command = [Path(sys.executable).with_name("serve"), "run", ray_file(kind, uri, folder)]
    variables = {**os.environ, "GRAINMILL_SERVE_TOKEN": TOKEN, **environment}
    with Path(folder, "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}/", small(), {"Authorization": f"Bearer {TOKEN}"})
        while True:
            try:
                urllib.request.urlopen(request, timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, f"{kind} does not start: {Path(folder, 'log').read_text()[-2000:]}"
                time.sleep(0.5)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


async def load(content, clients, seconds):
    """Send requests for some seconds; returns the times of all answers in seconds, and how many were no success."""
    times, failed, stop = [], 0, time.perf_counter() + seconds
    headers = {"Authorization": f"Bearer {TOKEN}"}

    async def client(session):
        nonlocal failed
        while (began := time.perf_counter()) < stop:
            async with session.post(f"http://127.0.0.1:{PORT}/", data=content) as response:
                await response.read()
                failed += response.status != 200
            times.append(time.perf_counter() - began)

    async with aiohttp.ClientSession(headers=headers) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return times, failed


def memory(process):
    """Resident memory in MB of a process and all below it."""
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--bare", metavar="URI", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        return serve_bare(options.bare)
    before, rates, delays = machine(), defaultdict(list), defaultdict(list)
    contents = {"32 x 32": small(), "500 x 375": photo(np.random.default_rng(0))}
    with tempfile.TemporaryDirectory() as folder:
        uri = register(Path(folder))
        for _ in range(options.rounds):
            for name, (kind, environment) in SERVERS.items():
                with running(kind, uri, environment, folder) as process:
                    asyncio.run(load(contents["32 x 32"], 8, 2))  # to warm up
                    size = memory(process)
                    for shape, content in contents.items():
                        for clients in CLIENTS:
                            times, failed = asyncio.run(load(content, clients, options.seconds))
                            row = f"{shape}, {clients} clients: {name}"
                            rates[row].append(len(times) / options.seconds)
                            delays[row].append(np.quantile(times, [0.5, 0.99]) * 1000)
                            assert not failed, f"{row}: {failed} of {len(times)} requests failed"
                    print(f"{name}: {size:.0f} MB before, {memory(process):.0f} MB after")
    goals = []
    for row in rates:
        if ": ours" in row:
            peer, clients = f"{row.partition(': ')[0]}: bare", int(row.split()[3])
            goals.append(Goal(row, peer, 0.6 if clients == 1 else 0.9))
    report("serving", rates, goals, before, "requests per second")
    for row, values in delays.items():
        half, most = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{row:<48}p50 {half:8.1f} ms   p99 {most:8.1f} ms")
    return None


if __name__ == "__main__":
    main()
