"""Tests of the example for Ray Serve: streams survive scaling, and the end of another stream's replica."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress

import numpy as np
import pytest

pytest.importorskip("websockets")
pytest.importorskip("psutil")

import psutil

from nemo_lfr.client import Client
from nemo_lfr.errors import ServerError, ServerLostError
from nemo_lfr.pretrained import load
from tests.crash import ROOT
from tests.models import write_nemo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _ray_serve():
    """Import Ray Serve for the first test: the import takes 1 s, which collecting other tests should not."""
    pytest.importorskip("ray.serve", reason='needs Ray Serve: pip install "ray[serve]"', exc_type=ImportError)


SCRIPT = ROOT / "examples/serve_ray.py"
TOKENS = np.random.default_rng(0).integers(0, 2016, (8, 24))
STREAMS = 8
WATCH = """
import sys, time, ray
from ray import serve
ray.init(sys.argv[1], namespace="nemo-lfr", logging_level="error", log_to_driver=False)
while "STOPPING" not in serve.status().applications["nemo-lfr"].deployments["nemo-lfr"].replica_states:
    time.sleep(0.2)
"""


def replicas(process):
    """Return the processes of replicas; Ray sets their titles."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            found += [child] if "ServeReplica" in " ".join(child.cmdline()) else []
    return found


def read_until(process, word):
    for line in process.stdout:
        if line.startswith(word):
            return line.split()[-1]
    raise AssertionError(f"no {word}")


@pytest.fixture
def codec_path(tmp_path):
    path = tmp_path / "tiny.nemo"
    write_nemo(path)
    return path


@contextmanager
def cluster(codec_path, *options):
    """Start a cluster, and yield its process, its address and the URL."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    common = ["--model", str(codec_path), "--cpus", "0.5", "--port", str(port), "--drain", "120"]
    command = [sys.executable, str(SCRIPT), *common, *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    family = []
    try:
        yield process, read_until(process, "cluster"), read_until(process, "serving")
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            for child in family:
                if child.is_running():
                    child.kill()
            process.kill()
            process.wait()


def finish(stream, parts):
    """Send the rest of the tokens, and return all audio."""
    return np.concatenate([*parts, stream.push(TOKENS[:, 12:]), stream.flush()])


def open_streams(client, count=STREAMS):
    streams = [client.decode_stream() for _ in range(count)]
    return [(stream, [stream.push(TOKENS[:, :12])]) for stream in streams]


def test_streams_of_a_killed_replica_end_clearly_and_new_ones_are_placed(codec_path):
    expected = np.asarray(load(codec_path, "cpu").decode(TOKENS[None])[0][0])
    with cluster(codec_path) as (process, _, url):
        client = Client(url, retry_s=60)
        assert client.info().num_codebooks == 8
        streams = open_streams(client)
        time.sleep(1)
        replicas(process)[0].kill()
        lost = 0
        for stream, parts in streams:
            try:
                np.testing.assert_allclose(finish(stream, parts), expected, atol=1e-5)
            except ServerError as error:
                assert isinstance(error, ServerLostError), error
                lost += 1
        assert 0 < lost < STREAMS
        for stream, parts in open_streams(client):
            np.testing.assert_allclose(finish(stream, parts), expected, atol=1e-5)


def push_until(condition, streams, seconds):
    """Push a frame to all streams every 0.2 s, until a condition is true or the time is over; return whether it is."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        for stream, parts in streams:
            parts.append(stream.push(TOKENS[:, :1]))
        time.sleep(0.2)
    return True


def check_end(streams, codec):
    """End the streams, and compare the audio of each with that of all its frames."""
    for stream, parts in streams:
        tokens = np.concatenate([TOKENS[:, :12], *[TOKENS[:, :1]] * (len(parts) - 1), TOKENS[:, 12:]], axis=1)
        expected = np.asarray(codec.decode(tokens[None])[0][0])
        np.testing.assert_allclose(finish(stream, parts), expected, atol=1e-5)


def open_on_a_new_replica(client, url, streams, codec):
    """Open two streams, and append them to `streams` if a replica without other streams serves one of them."""
    probes = open_streams(client, 2)
    with urllib.request.urlopen(f"{url}/health") as response:  # Ray asks the replica with fewer streams
        is_spread = json.load(response)["streams"] in (1, 2)
    if is_spread:
        streams += probes
    else:
        check_end(probes, codec)
    return is_spread


def test_no_stream_is_cut_when_replicas_are_added_and_removed(codec_path):
    codec = load(codec_path, "cpu")
    options = ["--max-replicas", "2", "--replicas", "1", "--max-streams", "16", "--scale-delay", "1"]
    with cluster(codec_path, *options) as (process, address, url):
        client = Client(url, retry_s=60)
        streams = open_streams(client, 12)
        assert push_until(lambda: open_on_a_new_replica(client, url, streams, codec), streams, 150)
        check_end(streams[1:-2], codec)
        streams[1:-2] = []

        environment = os.environ | {"RAY_AUTH_MODE": "token"}
        watch = subprocess.Popen([sys.executable, "-c", WATCH, address], env=environment)
        try:
            assert push_until(lambda: watch.poll() is not None, streams, 150) and watch.returncode == 0
        finally:
            watch.kill()
            watch.wait()
        assert len(replicas(process)) == 2  # the streams of one of them are still open
        streams += open_streams(client, 2)
        check_end(streams, codec)
        assert push_until(lambda: len(replicas(process)) == 1, [], 60)
