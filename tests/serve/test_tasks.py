"""Tests of stopping asyncio tasks."""

import asyncio

from nemo_lfr.serve import tasks


def test_a_task_that_ignores_a_cancellation_is_stopped(monkeypatch):
    monkeypatch.setattr(tasks, "_AGAIN_S", 0.01)

    async def stubborn():
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(100)

    async def work():
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await tasks.stop_tasks([task])
        assert task.done()

    asyncio.run(asyncio.wait_for(work(), 10))
