"""Ending asyncio tasks reliably."""

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 0.5


async def stop_tasks(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait until all have ended; their results and errors are discarded.

    `asyncio.wait_for` of Python 3.10 and 3.11 ignores a cancellation that arrives together with its result, so tasks
    that go on are canceled again.
    """
    stopped = pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
    await asyncio.gather(*stopped, return_exceptions=True)
