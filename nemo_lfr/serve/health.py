"""Health of an engine, for load balancers and supervisors."""

import asyncio
from contextlib import suppress

import numpy as np

from nemo_lfr.serve.engine import Engine

STALLED_S = 60.0  # a step takes well below a second, and a few seconds where it compiles kernels
_PROBE_S = 5.0


async def find_fault(engine: Engine) -> str | None:
    """Return why an engine cannot advance streams; None if it can.

    A fault such as a CUDA error ends the streams of its step, and most often affects all later steps. After one, a
    frame is decoded to find out whether the fault persists.

    Args:
        engine: engine that is neither draining nor closed.
    """
    if not engine.is_alive:
        return "the engine's thread has ended."
    if engine.step_s > STALLED_S:
        return f"a step has not returned for {engine.step_s:.0f} s."
    if engine.fault is not None:
        # The engine may be full, or the network may fail, with any error: it is then the engine's fault.
        with suppress(Exception):
            await asyncio.wait_for(_decode_frame(engine), _PROBE_S)
    return engine.fault


async def _decode_frame(engine: Engine) -> None:
    with engine.decoder(live=False) as session:
        await session.feed(np.zeros((engine.codec.num_codebooks, 1), np.int64))
        session.end()
        while await session.collect() is not None:
            pass
