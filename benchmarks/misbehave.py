"""Effects of misbehaving connections on the server: wrong audio in a well-behaved stream, and leaked resources.

    python benchmarks/misbehave.py 1000

The script starts `nemo-lfr serve` with the bundled codec and opens 1000 connections, which misbehave as listed in
`KINDS`. Meanwhile, a well-behaved client decodes tokens, and its audio must agree with that of an idle server. The
script prints the file descriptors, threads and memory of the server before and after the 1000 connections, and the
time from SIGTERM to the end of the process. The exit code is 1 if a check fails.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from nemo_lfr.client import AsyncClient
from nemo_lfr.serve.engine import TRIM_INTERVAL_S

STREAM = "/v1/decode/stream"
END = b'{"type": "end"}'
FRAME = bytes(16)  # 8 tokens
TEXT, BINARY, PING = 1, 2, 9
IDLE_S, DRAIN_S = 5.0, 10.0
MEMORY_RATIO = 1.25  # maximum memory of the idle server after all connections, divided by its memory before them
TOLERANCE = 1e-5  # the sums of a batch may be computed in another order


@dataclass(frozen=True)
class Target:
    """Server to test, which requires an access token.

    Attributes:
        patience_s: time limit in seconds for the server to close a connection that it should close.
    """

    port: int
    token: str
    patience_s: float = 60.0

    def request(self, method: str, path: str, *headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self.token}", *headers]
        return "\r\n".join([*lines, "", ""]).encode()

    def handshake(self, path: str = STREAM, *headers: str) -> bytes:
        upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
        return self.request("GET", path, *upgrade, "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", *headers)


class Connection:
    """TCP connection to the server, for requests of arbitrary bytes."""

    def __init__(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.target, self.reader, self.writer = target, reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def frame(self, payload: bytes, opcode: int = BINARY, claimed: int | None = None) -> None:
        """Send a WebSocket frame with a mask of zeros; `claimed` overrides the length in its header."""
        await self.send(struct.pack(">BBQ4x", 0x80 | opcode, 0x80 | 127, claimed or len(payload)) + payload)

    async def open(self, path: str = STREAM, *headers: str) -> None:
        """Start a stream, and wait for the end of the handshake."""
        await self.send(self.target.handshake(path, *headers))
        await self.reader.readuntil(b"\r\n\r\n")

    async def closed(self) -> None:
        """Read until the server closes the connection or sends a close frame, which is not answered."""
        while (data := await self.reader.read(1 << 16)) and b"\x88" not in data:
            pass


@asynccontextmanager
async def connection(target: Target, reset: bool = False, small: bool = False) -> AsyncIterator[Connection]:
    """Open a connection, and cut it when the context ends.

    Args:
        target: the server.
        reset: whether to cut it with a TCP reset.
        small: whether the client has a small receive buffer, which soon fills if the client does not read.
    """
    with socket.socket() as raw:
        raw.setblocking(False)
        if small:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        if reset:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", target.port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=4096 if small else 1 << 16)
        try:
            yield Connection(target, reader, writer)
        finally:
            writer.transport.abort()


async def cut(target: Target, number: int) -> None:
    """Cut the connection at one of five moments, such as during the handshake or within a frame."""
    async with connection(target, reset=number % 2 == 0) as peer:
        moment = number % 5
        if moment == 0:
            return
        if moment == 1:
            await peer.send(target.handshake()[:60])
            return
        await peer.open()
        if moment == 3:
            await peer.frame(FRAME, claimed=160)
        elif moment == 4:
            await peer.frame(FRAME * 20)
            await peer.frame(END, TEXT)


async def slow(target: Target, number: int) -> None:
    """Send a request byte by byte, or send frames without reading the results."""
    if number % 3 == 0:
        async with connection(target, small=True) as peer:
            await peer.open()
            while True:  # until the server cuts it off
                await peer.frame(FRAME * 300)
                await asyncio.sleep(0.05)
    data = target.handshake() if number % 3 == 1 else target.request("POST", "/v1/encode", "Content-Length: 1000")
    async with connection(target) as peer:
        for byte in data[:200]:
            await peer.send(bytes([byte]))
            await asyncio.sleep(0.005)


async def silent(target: Target, number: int) -> None:
    """Send nothing, or only the start of a request or stream, and wait until the server closes the connection."""
    async with connection(target) as peer:
        if number % 4 == 1:
            await peer.send(target.request("POST", "/v1/encode", "Content-Length: 1000"))
        elif number % 4 > 1:
            await peer.open()
            await peer.frame(FRAME * (number % 4 - 2) * 5)
        await peer.closed()


MALFORMED = (
    (BINARY, b"123"),
    (BINARY, struct.pack("<8h", *[32767] * 8)),
    (TEXT, b"not json"),
    (TEXT, b"\xff\xfe"),
    (TEXT, b"[" * 50_000),
    (TEXT, b'{"tokens": [[1e999]]}'),
    (TEXT, b'{"type": "end", "num_samples": -1}'),
    (3, b"reserved opcode"),
    (PING, bytes(1000)),  # control frames have at most 125 bytes
)


async def malformed(target: Target, number: int) -> None:
    """Send invalid HTTP, invalid URL parameters, an invalid WebSocket frame, or an invalid message."""
    async with connection(target) as peer:
        choice = number % (len(MALFORMED) + 4)
        if choice < len(MALFORMED):
            await peer.open()
            await peer.frame(MALFORMED[choice][1], MALFORMED[choice][0])
        elif choice == len(MALFORMED):
            await peer.send(b"\x16\x03\x01\x02\x00 TLS on a port without TLS\r\n\r\n")
        elif choice == len(MALFORMED) + 1:
            await peer.open()
            await peer.send(b"\x82\x05hello")  # without a mask
        elif choice == len(MALFORMED) + 2:
            await peer.open(STREAM + "?lookahead=-1&ramp=x")
        else:
            await peer.send(target.request("POST", "/v1/decode", "Content-Length: 5") + b"bytes")
            await asyncio.sleep(0.1)
            return
        await peer.closed()


async def too_fast(target: Target, number: int) -> None:
    """Send 30 s of tokens at once, read at most 80 KiB, and disconnect. Every fourth client sends 1000 pings first."""
    async with connection(target) as peer:
        await peer.open()
        if number % 4 == 0:
            for _ in range(1000):
                await peer.frame(b"", PING)
        await peer.frame(FRAME * 650)
        for _ in range(20):
            await peer.reader.read(1 << 12)


async def too_large(target: Target, number: int) -> None:
    """Send messages, bodies and headers above the limits."""
    async with connection(target) as peer:
        choice = number % 5
        if choice == 0:
            await peer.send(target.request("POST", "/v1/encode", f"X-Large: {'x' * 200_000}"))
        elif choice == 1:
            await peer.send(target.request("POST", "/v1/encode", "Transfer-Encoding: chunked"))
            piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
            for _ in range(120):  # 120 MB
                await peer.send(piece)
        else:
            await peer.open()
            size = (1_100_000, 3_000_000, 10_000)[choice - 2]
            await peer.frame(bytes(size), claimed=1 << 40 if choice == 4 else None)
        await peer.closed()


async def wrong_auth(target: Target, number: int) -> None:
    """Connect with a wrong access token, or from another origin."""
    wrong = Target(target.port, "wrong")
    async with connection(target) as peer:
        if number % 4 == 0:
            await peer.send(wrong.request("POST", "/v1/encode", "Content-Length: 3", "Connection: close") + b"abc")
        elif number % 4 == 1:
            await peer.send(wrong.request("GET", "/metrics", "Connection: close"))
        elif number % 4 == 2:
            await peer.open(STREAM, "Origin: https://evil.example")
        else:
            await peer.send(wrong.handshake(STREAM + "?token=also-wrong"))
            await peer.frame(FRAME * 100)
        await peer.closed()


KINDS: dict[str, Callable[[Target, int], Awaitable[None]]] = {
    function.__name__: function for function in (cut, slow, silent, malformed, too_fast, too_large, wrong_auth)
}


async def misbehave(target: Target, kinds: list[str], count: int, at_once: int = 100) -> Counter[str]:
    """Open `count` connections, at most `at_once` at a time, and cycle through `kinds` of misbehavior.

    Returns:
        The number of connections of each kind that the server did not end in time.
    """
    room, late = asyncio.Semaphore(at_once), Counter[str]()

    async def one(number: int) -> None:
        kind = kinds[number % len(kinds)]
        async with room:
            try:
                with suppress(OSError, asyncio.IncompleteReadError):
                    await asyncio.wait_for(KINDS[kind](target, number // len(kinds)), target.patience_s)
            except asyncio.TimeoutError:
                late[kind] += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return late


async def decode(target: Target, tokens: np.ndarray, pause_s: float) -> np.ndarray:
    """Decode tokens [C, T] on the server, two frames at a time."""

    async def pieces() -> AsyncIterator[np.ndarray]:
        for start in range(0, tokens.shape[1], 2):
            yield tokens[:, start : start + 2]
            await asyncio.sleep(pause_s)

    client = AsyncClient(f"http://127.0.0.1:{target.port}", token=target.token)
    async with client.decode_stream() as stream:
        return np.concatenate([part async for part in stream.through(pieces())])


async def beside(
    target: Target, kinds: list[str], count: int, tokens: np.ndarray, pause_s: float
) -> tuple[Counter[str], list[np.ndarray]]:
    """Run `misbehave`, and decode the tokens again and again while it runs.

    Returns:
        The result of `misbehave`, and the decoded audio of each repetition.
    """
    bad = asyncio.create_task(misbehave(target, kinds, count))
    await asyncio.sleep(0)
    results = []
    while not results or not bad.done():
        results.append(await decode(target, tokens, pause_s))
    return await bad, results


def state_of(pid: int) -> dict[str, int]:
    """Return a dict with the numbers of open "descriptors" and "threads" of a process, and its "memory_mb"."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1]) for name in ("Threads", "VmRSS")}  # type: ignore[index]
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": fields["Threads"],
        "memory_mb": fields["VmRSS"] >> 10,
    }


def wait_until_idle(url: str) -> bool:
    """Wait until the server has no stream; return whether that happens within 30 s."""
    for _ in range(300):
        with urllib.request.urlopen(url + "/health") as response:
            if json.load(response)["streams"] == 0:
                time.sleep(1)  # connections close after their streams
                return True
        time.sleep(0.1)
    return False


async def terminate(process: subprocess.Popen[str], target: Target) -> float:
    """Hold 20 connections open, send SIGTERM, and return the seconds until the process ends."""
    async with asyncio.timeout(60) if sys.version_info >= (3, 11) else _forever():
        bad = [asyncio.create_task(_hold(target, number)) for number in range(20)]
        await asyncio.sleep(1)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            await asyncio.sleep(0.05)
        for task in bad:
            task.cancel()
        await asyncio.gather(*bad, return_exceptions=True)
    return time.monotonic() - started


@asynccontextmanager
async def _forever() -> AsyncIterator[None]:
    yield


async def _hold(target: Target, number: int) -> None:
    """Keep one connection open in one of three states, which `number` modulo 3 selects.

    For 0, no request is sent. For 1, a stream is opened and stays idle. For 2, a stream sends a frame every 0.5 s.
    """
    with suppress(OSError, asyncio.IncompleteReadError):
        async with connection(target, small=True) as peer:
            if number % 3:
                await peer.open()
            while number % 3 == 2:
                await peer.frame(FRAME)
                await asyncio.sleep(0.5)
            await asyncio.sleep(60)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=1000, help="number of connections")
    count = parser.parse_args(arguments).count
    tokens = np.random.default_rng(0).integers(0, 2016, (8, 60))
    command = [sys.executable, "-m", "nemo_lfr", "serve", "--port", "0", "--max-streams", "256"]
    command += ["--idle", str(IDLE_S), "--drain", str(DRAIN_S)]
    environment = os.environ | {"NEMO_LFR_TOKEN": "secret"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        url = next(line for line in process.stderr if "serving at" in line).split()[-1]
        target = Target(int(url.rpartition(":")[2]), "secret")
        expected = asyncio.run(decode(target, tokens, 0.09))
        asyncio.run(misbehave(target, list(KINDS), 40 * len(KINDS)))  # fills the allocator's pools and starts threads
        idle = wait_until_idle(url)
        time.sleep(TRIM_INTERVAL_S + 2)
        before = state_of(process.pid)
        started = time.monotonic()
        late, results = asyncio.run(beside(target, list(KINDS), count, tokens, 0.09))
        seconds = time.monotonic() - started
        idle &= wait_until_idle(url)
        time.sleep(TRIM_INTERVAL_S + 2)
        after = state_of(process.pid)
        error = max(abs(audio - expected).max() if audio.shape == expected.shape else np.inf for audio in results)
        drain = asyncio.run(terminate(process, target))
        out = process.stderr.read()
    finally:
        process.kill()
        process.wait()
    checks = {
        f"{count} connections in {seconds:.0f} s, {sum(late.values())} not closed in time {dict(late)}": not late,
        f"{len(results)} good streams, largest difference {error:.1e}": error <= TOLERANCE,
        f"streams left: {'none' if idle else 'some'}": idle,
        f"before {before}, after {after}": after["descriptors"] <= before["descriptors"]
        and after["memory_mb"] <= MEMORY_RATIO * before["memory_mb"],
        f"SIGTERM: exit code {process.returncode} after {drain:.1f} s (drain {DRAIN_S:g} s)": drain <= DRAIN_S + 1,
        f"tracebacks in the log: {out.count('Traceback')}": "Traceback" not in out,
    }
    for text, holds in checks.items():
        print(f"{'ok' if holds else 'FAILED'}: {text}")
    if "Traceback" in out:
        print(out[:5000], file=sys.stderr)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
