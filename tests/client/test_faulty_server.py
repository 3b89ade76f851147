"""Tests of both clients against WebSocket servers that break the protocol, stop reading or never finish."""

import asyncio
import functools
import json
import math
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from tests.tiers import slow_after

pytest.importorskip("websockets", reason="the clients: pip install websockets")

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from nemo_lfr.client import AsyncClient, Client
from nemo_lfr.errors import (
    NemoLfrError,
    ServerError,
    ServerFullError,
    ServerLostError,
    ServerRefusedError,
    ServerShutdownError,
)

READY = {
    "type": "ready", "sample_rate": 100, "samples_per_frame": 4, "num_codebooks": 2, "codebook_size": 16,
    "lookahead_frames": 1,
}  # fmt: skip
TOKENS = np.zeros((2, 3), int)  # 3 frames, 12 samples
INPUT = {"decode": TOKENS, "encode": np.zeros(12, np.float32)}
AUDIO = np.arange(12, dtype="<f4").tobytes()
FRAMES = {"tokens": [[1, 2], [3, 4], [5, 6]]}
DONE = {"decode": {"type": "done", "num_samples": 12}, "encode": {"type": "done", "num_frames": 3}}


def text(message):
    return json.dumps(message) if isinstance(message, dict | list) else message


def repeated(message):
    while True:
        yield message


ANSWERS = []  # of the server below: the path of a URL selects one


@functools.cache
def server_url():
    """Start a server for all tests, and return its URL. Stopping a server takes 0.1 s."""

    def handle(connection):
        with suppress(ConnectionClosed):
            ANSWERS[int(connection.request.path.split("/")[1])](connection)

    server = serve(handle, "127.0.0.1", 0, compression=None, close_timeout=1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.socket.getsockname()[1]}"


@contextmanager
def serving(answer):
    """Call `answer` in a thread with each connection to the URL, and close the connection afterwards."""
    ANSWERS.append(answer)
    yield f"{server_url()}/{len(ANSWERS) - 1}"


def scripted(messages, first=READY):
    """Return a function for `serving` that sends `first`, waits for the end of the input, and sends all messages."""

    def answer(connection):
        connection.send(text(first))
        for message in connection:
            if isinstance(message, str) and json.loads(message).get("type") == "end":
                break
        for message in messages:
            connection.send(text(message))

    return answer


def blocking(url, kind, size=3, options=None, **settings):
    """Return the whole result of a stream of `Client`, which gets input of `size` frames or four times the samples."""
    items = INPUT[kind][..., : size if kind == "decode" else 4 * size]
    with getattr(Client(url, **settings), f"{kind}_stream")(**(options or {})) as stream:
        results = [stream.push(items[..., :5]), stream.push(items[..., 5:])]
        return np.concatenate([*results, stream.flush()], axis=-1)


def for_asyncio(url, kind, size=3, options=None, **settings):
    """Return the same result with `AsyncClient`."""
    items = INPUT[kind][..., : size if kind == "decode" else 4 * size]

    async def source():
        yield items[..., :5]
        yield items[..., 5:]

    async def work():
        async with getattr(AsyncClient(url, **settings), f"{kind}_stream")(**(options or {})) as stream:
            results = [result async for result in stream.through(source())]
            return np.concatenate(results, axis=-1) if results else np.zeros(0)

    return asyncio.run(asyncio.wait_for(work(), 20))


CLIENTS = pytest.mark.parametrize("exchange", [blocking, for_asyncio])


@CLIENTS
@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_a_server_that_follows_the_protocol_is_accepted(exchange, kind):
    messages = {
        "decode": [AUDIO[:20], b"", AUDIO[20:], DONE["decode"] | {"later": "version"}],
        "encode": [{"tokens": FRAMES["tokens"][:1]}, {"tokens": []}, {"tokens": FRAMES["tokens"][1:]}, DONE["encode"]],
    }
    expected = {"decode": np.arange(12, dtype="<f4"), "encode": np.array(FRAMES["tokens"]).T}
    with serving(scripted(messages[kind], READY | {"later": "version"})) as url:
        np.testing.assert_array_equal(exchange(url, kind), expected[kind])


# Messages after the end of the input that both kinds of streams refuse
BOTH = {
    "list": ([[1]], "not a JSON object"),
    "number": (["5"], "not a JSON object"),
    "not JSON": (["hello"], "not a JSON object"),
    "empty text": ([""], "not a JSON object"),
    "cut JSON": (['{"type": "do'], "not a JSON object"),
    "deep JSON": (["[" * 100_000], "not a JSON object"),
    "deep value": (['{"type": ' + "[" * 500 + "]" * 500 + "}"], "unexpected type"),
    "huge integer": (['{"type": "error", "error": "x", "code": ' + "9" * 5000 + "}"], "not a JSON object"),
    "repeated key": (['{"type": "done", "num_samples": 12, "num_samples": 12, "num_frames": 3}'], "not a JSON object"),
    "no type": ([{}], "unexpected type|tokens is missing"),
    "unknown type": ([{"type": "pong"}], "unexpected type pong|unexpected type 'pong'"),
    "tokens as a type": ([{"type": "tokens", "tokens": [[1, 2]]}], "unexpected type"),
    "second ready": ([READY], "unexpected type"),
    **{f"type {value}": ([{"type": value}], "unexpected type") for value in ({}, [], 5, None, True, math.nan)},
    **{
        f"code {value}": ([{"type": "error", "error": "x", "code": value}], "code is .*, not a non-negative integer")
        for value in ({}, {"a": 1}, [1], None, "1011", -1, 1011.0, True, math.nan, 1 << 70)
    },
    "no code": ([{"type": "error", "error": "x"}], "code is missing"),
    "no reason": ([{"type": "error", "code": 1011}], "error is missing"),
    **{
        f"reason {value}": ([{"type": "error", "code": 1011, "error": value}], "error is .*, not text")
        for value in ({}, ["x"], None, 5)
    },
}
BAD_COUNTS = ("12", [12], {}, None, True, 12.0, math.nan, math.inf, -1, 1 << 70)
DECODE = {
    "text": ([FRAMES], "unexpected type"),
    "odd length": ([AUDIO[:7]], "7 bytes, not a multiple of 4"),
    "NaN": ([struct.pack("<3f", 0, math.nan, 0)], "NaN or infinite"),
    "infinity": ([struct.pack("<3f", 0, -math.inf, 0)], "NaN or infinite"),
    "too much audio": ([AUDIO + b"0123"], "sent 13 samples for an input of 3 frames, which gives only 12"),
    "endless audio": (repeated(AUDIO), "sent 24 samples for an input of 3 frames"),
    "too little audio": ([AUDIO[:4], DONE["decode"]], "reports 12 samples in its last message, but 1 samples arrived"),
    "no audio": ([DONE["decode"]], "reports 12 samples in its last message, but 0 samples arrived"),
    "a smaller number": ([AUDIO, DONE["decode"] | {"num_samples": 11}], "reports 11 samples .*, but 12 samples arriv"),
    "a larger number": (
        [AUDIO, DONE["decode"] | {"num_samples": 13}],
        "reports 13 samples .*, but 12 samples arrived",
    ),
    "a part": ([AUDIO[:8], {"type": "done", "num_samples": 2}], "sent 2 samples instead of 12 for an input of 3"),
    "no number": ([AUDIO, DONE["encode"]], "num_samples is missing"),
    **{f"number {value}": ([AUDIO, {"type": "done", "num_samples": value}], "num_samples is") for value in BAD_COUNTS},
    "text after done": ([AUDIO, DONE["decode"], {"type": "error", "code": 1011, "error": "x"}], "after the message"),
    "audio after done": ([AUDIO, DONE["decode"], AUDIO], "after the message"),
    "second done": ([AUDIO, DONE["decode"], DONE["decode"]], "after the message"),
}
ENCODE = {
    "binary": ([b"\0" * 12], "binary message instead of tokens as text"),
    "too many frames": ([FRAMES, {"tokens": [[1, 2]]}], "sent 4 frames for an input of 12 samples, which gives"),
    "no frames": ([DONE["encode"]], "reports 3 frames in its last message, but 0 frames arrived"),
    "a part": ([{"tokens": [[1, 2]]}, {"type": "done", "num_frames": 1}], "sent 1 frames instead of 3 for an input"),
    "no number": ([FRAMES, DONE["decode"]], "num_frames is missing"),
    **{f"number {value}": ([FRAMES, {"type": "done", "num_frames": value}], "num_frames is") for value in BAD_COUNTS},
    **{
        f"tokens {value}": ([{"tokens": value}], "tokens is .*, not a list")
        for value in ({}, "ab", 5, None, True, math.nan)
    },
    **{
        f"frames {value}": ([{"tokens": value}], "tokens that are not frames of 2 integers from 0 to 15")
        for value in (
            [1, 2], [[1]], [[1, 2, 3]], [[1, 2], [3]], [[]], [[[1, 2]]], [[1, 16]], [[-1, 0]], [[1, 2.0]], [[1, True]],
            [[1, None]], [[1, "2"]], [[1, math.nan]], [[1, 1 << 70]], [{"0": 1, "1": 2}], ["ab"],
        )
    },
    "frames after done": ([FRAMES, DONE["encode"], FRAMES], "after the message"),
}  # fmt: skip
ROWS = [(kind, name) for kind, table in (("decode", BOTH | DECODE), ("encode", BOTH | ENCODE)) for name in table]
# Rows with another invalid value of the same key
SIMILAR = re.compile(r"(type|code|reason|number|tokens|frames) (?!\{\}$|after|as)")


@CLIENTS
@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*row, marks=[pytest.mark.slow] if SIMILAR.match(row[1]) else []) for row in ROWS],
)
def test_a_message_that_breaks_the_protocol_is_an_error(exchange, kind, name):
    messages, match = (BOTH | (DECODE if kind == "decode" else ENCODE))[name]
    with serving(scripted(messages)) as url, pytest.raises(ServerError, match=match) as caught:
        exchange(url, kind)
    assert type(caught.value) is ServerError and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@CLIENTS
@pytest.mark.parametrize(
    ("first", "match"),
    slow_after(
        16,
        [
            (AUDIO, "binary message"),
            (DONE["decode"], "unexpected type"),
            (FRAMES, "unexpected type"),
            ({}, "unexpected type"),
            *(
                ({name: value for name, value in READY.items() if name != left_out}, f"{left_out} is missing")
                for left_out in READY
                if left_out != "type"
            ),
            *(
                (READY | {name: value}, f"{name} is .*, not an? ")
                for name in READY
                if name != "type"
                for value in ("4", {}, [4], None, True, 4.0, math.nan, -1, 1 << 70)
            ),
            *((READY | {name: 0}, f"{name} is 0") for name in READY if name not in ("type", "lookahead_frames")),
            (READY | {"codebook_size": 1 << 31}, "codebook_size is 2147483648"),
        ],
    ),
    ids=str,
)
def test_a_first_message_that_breaks_the_protocol_is_an_error(exchange, first, match):
    with serving(scripted([], first)) as url, pytest.raises(ServerError, match=match) as caught:
        exchange(url, "encode")
    assert type(caught.value) is ServerError and "\n" not in str(caught.value)


@CLIENTS
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (1007, ServerRefusedError),
        (1011, ServerError),
        (1012, ServerShutdownError),
        (1013, ServerFullError),
        (7, ServerError),
    ],
)
def test_an_error_message_becomes_an_exception_of_its_code(exchange, code, error):
    message = {"type": "error", "code": code, "error": "the \n reason", "later": "version"}
    with serving(scripted([AUDIO, message])) as url, pytest.raises(ServerError, match=r"the \? reason") as caught:
        exchange(url, "decode")
    assert type(caught.value) is error


@CLIENTS
def test_results_before_their_input_are_an_error(exchange):
    def answer(connection):
        connection.send(text(READY))
        connection.send(AUDIO)
        for _ in connection:
            pass

    with serving(answer) as url, pytest.raises(ServerError, match="12 samples for an input of 0 frames"):
        exchange(url, "decode", 0)


@CLIENTS
def test_the_last_message_before_the_end_of_the_input_is_an_error(exchange):
    def answer(connection):
        connection.send(text(READY))
        connection.recv()
        connection.send(AUDIO)
        connection.send(text(DONE["decode"]))
        connection.recv()  # until the client closes the connection

    async def unfinished():
        async with AsyncClient(url).decode_stream() as stream:
            await stream.send(TOKENS)
            return [result async for result in stream]

    with serving(answer) as url, pytest.raises(ServerError, match="before the end of the input"):
        if exchange is blocking:
            with Client(url).decode_stream() as stream:
                stream.push(TOKENS)
                until = time.monotonic() + 20
                while time.monotonic() < until:
                    stream.push(TOKENS[:, :0])  # sends nothing
        asyncio.run(asyncio.wait_for(unfinished(), 20))


@pytest.mark.parametrize(
    ("sent", "is_valid"),
    [(10, True), (12, True), (9, False), (11, False), (0, False), (13, False)],  # 12: a lookahead of 0
)
def test_trimmed_audio_has_the_requested_length_or_whole_frames(sent, is_valid):
    messages = [bytes(4 * sent), {"type": "done", "num_samples": sent}]
    with serving(scripted(messages)) as url, Client(url).decode_stream() as stream:
        stream.push(TOKENS)
        if is_valid:
            assert stream.flush(10).shape == (sent,)
        else:
            with pytest.raises(ServerError, match=r"which gives only 12|instead of 10 for"):
                stream.flush(10)


@pytest.mark.parametrize(("rate", "frames"), [(100, 3), (50, 6), (99, 4), (1, 300), (1_000_000, 1)])
def test_the_number_of_frames_follows_from_the_sample_rate(rate, frames):
    for sent in (frames, frames + 1, frames - 1):
        messages = [{"tokens": [[1, 2]] * sent}, {"type": "done", "num_frames": sent}]
        with serving(scripted(messages)) as url, Client(url).encode_stream(sample_rate=rate) as stream:
            stream.push(INPUT["encode"])
            if sent == frames:
                assert stream.flush().shape == (2, frames)
            else:
                with pytest.raises(ServerError, match=f"which gives only {frames}|instead of {frames} for"):
                    stream.flush()


@contextmanager
def deaf():
    """Run a server that accepts one stream with small buffers, and then reads nothing."""
    release = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

        def work():
            from websockets.server import ServerProtocol

            connection, _ = listener.accept()
            with connection:
                protocol = ServerProtocol()
                protocol.receive_data(connection.recv(1 << 16))
                protocol.send_response(protocol.accept(protocol.events_received()[0]))
                protocol.send_text(text(READY).encode())
                for data in protocol.data_to_send():
                    connection.sendall(data)
                release.wait(60)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            release.set()
            thread.join()


def test_a_server_that_does_not_read_raises_server_lost_error():
    samples = np.zeros(1 << 23, np.float32)  # more than all buffers hold

    async def send(url):
        async with AsyncClient(url, timeout=0.3).encode_stream() as stream:
            await stream.send(samples)

    with deaf() as url, pytest.raises(ServerLostError, match=r"no answer for 0\.3 s"):
        Client(url, timeout=0.3).encode_stream().push(samples)
    with deaf() as url, pytest.raises(ServerLostError, match=r"no answer for 0\.3 s"):
        asyncio.run(asyncio.wait_for(send(url), 20))


@CLIENTS
@pytest.mark.parametrize(("kind", "empty"), [("decode", b""), ("encode", {"tokens": []})])
def test_endless_empty_results_do_not_extend_the_time_limit(exchange, kind, empty):
    with serving(scripted(repeated(empty))) as url, pytest.raises(ServerLostError, match=r"no answer for 0\.3 s"):
        exchange(url, kind, timeout=0.3)


@pytest.mark.slow
@CLIENTS
def test_results_extend_the_time_limit(exchange):
    pause = threading.Event()

    def slow():
        for start in range(0, 48, 4):
            pause.wait(0.25)
            yield AUDIO[start : start + 4]
        yield DONE["decode"]

    with serving(scripted(slow())) as url:
        assert exchange(url, "decode", timeout=2).size == 12  # all results together take longer


@CLIENTS
def test_a_server_that_sends_no_first_message_raises_server_lost_error(exchange):
    closed = threading.Event()
    with serving(lambda connection: closed.wait(20)) as url:
        with pytest.raises(ServerLostError, match=r"no answer for 0\.2 s"):
            exchange(url, "decode", timeout=0.2)
        closed.set()


@CLIENTS
def test_a_message_that_is_too_large_is_an_error(exchange, monkeypatch):
    monkeypatch.setattr("nemo_lfr.client.sockets._MAX_MESSAGE", 1000)
    with serving(scripted([bytes(1001)])) as url, pytest.raises(ServerError, match="sent a message of more than"):
        exchange(url, "decode")


@CLIENTS
def test_a_redirected_stream_is_refused_and_the_token_stays(exchange):
    requests = []

    def respond(connection, request):
        requests.append(request)
        response = connection.respond(307, "")
        response.headers["Location"] = "ws://other/stream"
        return response

    with serve(lambda _: None, "127.0.0.1", 0, process_request=respond) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        with pytest.raises(ServerRefusedError, match="redirects to ws://other/stream; pass that"):
            exchange(url, "decode", token="secret")
        server.shutdown()
    assert len(requests) == 1


def test_a_failed_stream_raises_its_error_again():
    with serving(scripted([AUDIO[:7]])) as url, Client(url).decode_stream() as stream:
        stream.push(TOKENS)
        for call in (stream.flush, stream.flush, lambda: stream.push(TOKENS)):
            with pytest.raises(ServerError, match="7 bytes"):
                call()

    async def work(url):
        async with AsyncClient(url).decode_stream() as stream:
            await stream.send(TOKENS)
            await stream.end()
            for call in (anext(aiter(stream)), anext(aiter(stream)), stream.end(), stream.send(TOKENS)):
                with pytest.raises(ServerError, match="7 bytes"):
                    await call

    with serving(scripted([AUDIO[:7]])) as url:
        asyncio.run(work(url))


def test_a_closed_stream_raises_an_error_and_may_be_closed_again():
    with serving(scripted([AUDIO, DONE["decode"]])) as url:
        stream = Client(url).decode_stream()
        stream.push(TOKENS)
        stream.close()
        for call in (stream.flush, lambda: stream.push(TOKENS)):
            with pytest.raises(NemoLfrError, match="is closed; open another"):
                call()
        stream.close()

        async def work():
            stream = AsyncClient(url).decode_stream()
            uses = [
                lambda: stream.send(TOKENS),
                stream.end,
                lambda: anext(aiter(stream)),
                lambda: anext(stream.through(aiter(stream))),
            ]
            for use in uses:
                with pytest.raises(NemoLfrError, match="is not open; open it with"):
                    await use()
            with pytest.raises(NemoLfrError, match="is not open"):
                print(stream.sample_rate)
            async with stream:
                assert stream.sample_rate == 100 and stream.delay_frames == 1 and stream.codebook_size == 16
                await stream.close()
                for use in uses:
                    with pytest.raises(NemoLfrError, match="is closed; open another"):
                        await use()
            with pytest.raises(NemoLfrError, match="was already opened"):
                async with stream:
                    pass

        asyncio.run(work())


def test_an_ended_stream_refuses_input():
    async def work():
        async with AsyncClient(url).decode_stream() as stream:
            await stream.send(TOKENS)
            await stream.end()
            uses = [lambda: stream.send(TOKENS), stream.end, lambda: anext(stream.through(aiter(stream)))]
            for _ in range(2):
                for use in uses:
                    with pytest.raises(NemoLfrError, match="the input of this stream has ended"):
                        await use()
                results = [result async for result in stream]  # none in the second round
            assert results == []

    with serving(scripted([AUDIO, DONE["decode"]])) as url:
        asyncio.run(work())


def test_two_tasks_cannot_receive_the_results_of_one_stream():
    async def work():
        async with AsyncClient(url).decode_stream() as stream:
            first = asyncio.create_task(anext(aiter(stream)))
            await asyncio.sleep(0)
            with pytest.raises(NemoLfrError, match="two tasks receive"):
                await anext(aiter(stream))
            await stream.send(TOKENS)
            await stream.end()
            assert (await first).size == 12

    with serving(scripted([AUDIO, DONE["decode"]])) as url:
        asyncio.run(work())


def test_two_threads_cannot_use_one_stream():
    received, flushed = threading.Event(), threading.Event()

    def answer(connection):
        connection.send(text(READY))
        while "end" not in str(connection.recv()):
            pass
        received.set()
        flushed.wait(20)
        for message in (AUDIO, DONE["decode"]):
            connection.send(text(message))

    with serving(answer) as url, Client(url).decode_stream() as stream, ThreadPoolExecutor() as pool:
        stream.push(TOKENS)
        first = pool.submit(stream.flush)
        assert received.wait(20)
        for call in (stream.flush, lambda: stream.push(TOKENS)):
            with pytest.raises(NemoLfrError, match="another thread is using this stream"):
                call()
        flushed.set()
        assert first.result().size == 12


@pytest.mark.parametrize(
    "arguments",
    [
        {"lookahead": "2"},
        {"lookahead": -1},
        {"lookahead": 1 << 64},
        {"lookahead": 10**5000},
        {"first_lookahead": 1.5},
        {"first_lookahead": 4, "lookahead": 3},
        {"ramp": (1, 10**5000)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_bad_argument_of_a_stream_is_an_error(arguments):
    for client in (Client("http://127.0.0.1:1"), AsyncClient("http://127.0.0.1:1")):
        with pytest.raises(NemoLfrError, match=next(iter(arguments))):
            client.decode_stream(**arguments)
    for rate in (0, -1, 1.5, "16000"):
        with pytest.raises(NemoLfrError, match="sample_rate"):
            Client("http://127.0.0.1:1").encode_stream(sample_rate=rate)


@pytest.mark.slow
def test_a_program_may_end_without_closing_its_stream():
    code = (
        "import sys, numpy as np\n"
        "from nemo_lfr.client import Client\n"
        "stream = Client(sys.argv[1]).decode_stream()\n"
        "stream.push(np.zeros((2, 3), int))\n"
    )
    with serving(scripted([])) as url:
        done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dropped_stream_leaves_no_thread():
    with serving(scripted([])) as url:
        before = set(threading.enumerate())
        stream = Client(url).decode_stream()
        (thread,) = (new for new in set(threading.enumerate()) - before if new.name.startswith("nemo_lfr"))
        del stream
        thread.join(10)
        assert not thread.is_alive()


def test_too_many_open_files_are_an_error(monkeypatch):
    def fail():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asyncio.events, "new_event_loop", fail)
    with pytest.raises(ServerLostError, match="Too many open files"):
        Client("http://127.0.0.1:1").decode_stream()
