"""Tests of the example for Ray Serve: streams stay on their replica, and other streams survive a killed replica."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("ray.serve", reason='needs Ray Serve: pip install "ray[serve]"', exc_type=ImportError)
pytest.importorskip("websockets")
pytest.importorskip("psutil")

import psutil

from nemo_lfr.client import Client
from nemo_lfr.errors import ServerError, ServerLostError
from nemo_lfr.pretrained import load
from tests.crash import ROOT
from tests.models import write_nemo

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "examples/serve_ray.py"
TOKENS = np.random.default_rng(0).integers(0, 2016, (8, 24))
STREAMS = 8


def replicas(process):
    """Return the processes of replicas; Ray sets their titles."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica" in " ".join(child.cmdline())]


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


@pytest.fixture
def cluster(codec_path):
    """Start a cluster with two replicas, and yield its process and the URL."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    options = ["--model", str(codec_path), "--cpus", "0.5", "--port", str(port), "--drain", "60"]
    command = [sys.executable, str(SCRIPT), *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    family = []
    try:
        yield process, read_until(process, "serving")
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


def open_streams(client):
    streams = [client.decode_stream() for _ in range(STREAMS)]
    return [(stream, [stream.push(TOKENS[:, :12])]) for stream in streams]


def test_streams_of_a_killed_replica_end_clearly_and_new_ones_are_placed(cluster, codec_path):
    process, url = cluster
    expected = np.asarray(load(codec_path, "cpu").decode(TOKENS[None])[0][0])
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
