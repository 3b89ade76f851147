"""Tests of the engine without a server: how streams end, take turns and limit what they hold, even if tasks fail."""

import asyncio
import copy
import time

import numpy as np
import pytest

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.serve.engine import Engine, OverloadedError
from nemo_lfr.serve.session import EngineLimits
from tests.models import cached_codec

TIMEOUT = 20  # seconds; what should not wait takes milliseconds


def with_engine(work, limits=None, on_step=None):
    """Run `work(engine)`, a coroutine, on a new engine."""
    engine = Engine(cached_codec("symmetric"), limits, on_step)
    try:
        return asyncio.run(asyncio.wait_for(work(engine), TIMEOUT))
    finally:
        engine.close()


def tokens(frames):
    return np.zeros((8, frames), np.int64)


async def collect_all(session):
    results = []
    while (result := await session.collect()) is not None:
        results.append(result)
    return np.concatenate(results, axis=-1)


async def decode(engine, frames=3):
    with engine.decoder() as session:
        await session.feed(tokens(frames))
        session.end()
        return await collect_all(session)


def test_a_codec_whose_streams_cannot_be_batched_is_refused():
    codec = copy.copy(cached_codec("symmetric"))
    codec.stream_decoder = lambda: object()
    with pytest.raises(NemoLfrError, match="needs a backend that can batch streams"):
        Engine(codec)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["push_decoders", "flush_decoders", "Engine._advance"])
def test_a_step_that_fails_ends_its_streams_only(monkeypatch, function):
    async def work(engine):
        monkeypatch.setattr(f"nemo_lfr.serve.engine.{function}", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await decode(engine)
        monkeypatch.undo()
        return await decode(engine)

    assert len(with_engine(work)) == 3 * 1024


@pytest.mark.slow
def test_an_error_of_on_step_does_not_stop_the_engine():
    async def work(engine):
        await decode(engine)
        return await decode(engine)

    assert len(with_engine(work, on_step=lambda step: 1 / 0)) == 3 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "trims"), [(0.0, True), (1e9, False)])
def test_the_heap_is_trimmed_while_streams_are_open(monkeypatch, interval, trims):
    calls = []
    monkeypatch.setattr("nemo_lfr.serve.engine.TRIM_INTERVAL_S", interval)
    monkeypatch.setattr("nemo_lfr.serve.engine.trim_malloc", lambda: calls.append(None))

    async def work(engine):
        with engine.decoder():
            await decode(engine)
            await decode(engine)
            return len(calls)

    assert (with_engine(work) > 0) == trims
    assert len(calls) < 20  # an idle engine does not trim again and again


@pytest.mark.slow
def test_closing_the_engine_ends_open_streams_and_refuses_new_ones():
    async def work(engine):
        with engine.decoder() as session:
            waiting = asyncio.create_task(session.collect())
            await asyncio.sleep(0)
            engine.close()
            with pytest.raises(OverloadedError, match="shutting down"):
                await waiting
            await session.feed(tokens(1000))  # more than the limit of pending input, but it must not wait
        with pytest.raises(OverloadedError), engine.decoder():
            pass

    with_engine(work)


@pytest.mark.slow
def test_input_after_an_error_does_not_wait():
    async def work(engine):
        with engine.decoder() as session:
            await session.feed(tokens(3))
            session.end(num_samples=99999)
            with pytest.raises(NemoLfrError):
                await session.collect()
            for _ in range(2):
                await session.feed(tokens(1000))

    with_engine(work)


def test_empty_chunks_are_not_queued():
    async def work(engine):
        with engine.decoder() as session:
            for _ in range(100):
                await session.feed(tokens(0))
            assert not session._pending

    with_engine(work)


@pytest.mark.slow
def test_first_lookahead_gives_the_first_audio_before_the_full_lookahead():
    async def work(engine):
        with engine.decoder(first_lookahead=1) as session:
            await session.feed(tokens(2))
            first = await asyncio.wait_for(session.collect(), 30)
            await session.feed(tokens(10))
            session.end()
            return len(first), len(await collect_all(session))

    assert with_engine(work) == (1024, 11 * 1024)


@pytest.mark.slow
def test_a_ramp_longer_than_the_input_that_may_wait_does_not_block():
    async def work(engine):
        with engine.decoder(ramp=[64]) as session:
            await session.feed(tokens(30))
            await session.feed(tokens(1))
            session.end()
            return await collect_all(session)

    assert len(with_engine(work, EngineLimits(max_pending_s=1.0))) == 31 * 1024


@pytest.mark.slow
def test_files_take_turns():
    steps = []

    async def work(engine):
        with engine.encoder(live=False) as encoder, engine.decoder(live=False) as decoder:
            await encoder.feed(np.zeros(1024 * 200, np.float32))
            encoder.end()
            await decoder.feed(tokens(12))
            decoder.end()
            await collect_all(decoder)
            return len(steps)

    # One step may be running when the file arrives; then the engine alternates between files and streams.
    assert with_engine(work, EngineLimits(), lambda step: (steps.append(step.kind), time.sleep(0.01))) <= 10
