"""Check whether an engine works, for the endpoint `/health` that load balancers and supervisors call."""

import asyncio
from contextlib import suppress

import numpy as np

from nemo_lfr.serve.engine import Engine

STALLED_S = 60.0  # a step normally takes well below a second, or a few seconds if kernels are compiled
_PROBE_S = 5.0


async def find_fault(engine: Engine) -> str | None:
    """Return why an engine cannot process streams; None if it can.

    After a fault in a step of the engine, such as a CUDA error, later steps usually fail too. This function then
    decodes one frame to find out whether they do.

    Args:
        engine: engine that is neither draining nor closed.
    """
    if not engine.is_alive:
        return "the engine's thread has ended; restart the server."
    if engine.step_s > STALLED_S:
        return f"a step of the engine has been running for {engine.step_s:.0f} s; restart the server."
    if engine.fault is not None:
        # If the frame is decoded, `engine.fault` becomes None. Otherwise, even if the engine is only full, the earlier
        # fault is returned.
        with suppress(Exception):
            await asyncio.wait_for(_decode_frame(engine), _PROBE_S)
    return engine.fault


async def _decode_frame(engine: Engine) -> None:
    with engine.decoder(live=False) as session:
        await session.feed(np.zeros((engine.codec.num_codebooks, 1), np.int64))
        session.end()
        while await session.collect() is not None:
            pass
