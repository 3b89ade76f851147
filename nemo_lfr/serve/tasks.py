"""Time limits, and ending asyncio tasks reliably."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

from nemo_lfr.serve.protocol import CloseCode, ProtocolError

T = TypeVar("T")

_AGAIN_S = 0.5


async def within(seconds: float, step: Awaitable[T], problem: str) -> T:
    """Return the result of a step that depends on the client.

    Args:
        seconds: time limit.
        step: the step.
        problem: what the client did not do, such as "no message".

    Raises:
        ProtocolError: if the step takes longer.
    """
    try:
        return await asyncio.wait_for(step, seconds)
    except asyncio.TimeoutError:
        raise ProtocolError(f"{problem} for {seconds:g} s.", CloseCode.POLICY) from None


async def stop_tasks(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait until all have ended; their results and errors are discarded.

    `asyncio.wait_for` of Python 3.10 and 3.11 ignores a cancellation that arrives together with its result, so tasks
    that continue are canceled again.
    """
    stopped = pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
    await asyncio.gather(*stopped, return_exceptions=True)
