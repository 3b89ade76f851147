"""Helpers for asyncio: wait for a client with a time limit, and stop tasks reliably."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

from nemo_lfr.serve.protocol import CloseCode, ProtocolError

T = TypeVar("T")

_AGAIN_S = 0.5


async def within(seconds: float, step: Awaitable[T], problem: str) -> T:
    """Await `step` with a time limit, and return its result.

    Args:
        seconds: time limit, in seconds.
        step: awaitable that ends when the client has sent or received a message.
        problem: start of the error message, such as "no message received".

    Raises:
        ProtocolError: if `step` takes longer than the time limit.
    """
    try:
        return await asyncio.wait_for(step, seconds)
    except asyncio.TimeoutError:
        raise ProtocolError(f"{problem} for {seconds:g} s.", CloseCode.POLICY) from None


async def stop_tasks(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait until all of them have ended; their results and errors are discarded.

    A task that has not ended after a while is canceled again, because `asyncio.wait_for` in Python 3.10 and 3.11 may
    ignore a cancellation.
    """
    stopped = pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
    await asyncio.gather(*stopped, return_exceptions=True)
