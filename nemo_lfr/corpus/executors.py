"""Run the tokenization of shards in this process, in local worker processes, or on a Ray cluster.

An executor is a function that receives the shards to tokenize, and yields a record for each completed shard. If a
worker dies, its shards are assigned to another worker. If workers die repeatedly, the run stops.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from typing import TYPE_CHECKING, Any

from nemo_lfr.codec.devices import choose_device
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.main_program import begin_worker, check_is_file, check_starts, new_children, safe_imports
from nemo_lfr.corpus.part import Part
from nemo_lfr.corpus.plan import Plan
from nemo_lfr.corpus.ray_executor import run_ray
from nemo_lfr.corpus.records import ShardRecord
from nemo_lfr.corpus.shard import QUEUED, Task, Worker
from nemo_lfr.corpus.sources.base import ShardSpec
from nemo_lfr.corpus.worker_failures import WorkerFailures, last_line
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.shortage import sharing

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

Executor = Callable[[Plan, Sequence[Task]], Iterator[ShardRecord]]


def choose_executor(
    config: TokenizeConfig, num_tasks: int, workers: int | None, device: str | None, ray: str | None
) -> Executor:
    """Choose the executor that tokenizes shards.

    Args:
        config: options of the run.
        num_tasks: number of shards to tokenize, which is also the maximum number of workers.
        workers: number of processes or Ray actors, at most `num_tasks`; by default one for each GPU, or for every
            `config.threads` CPU cores. If several processes tokenize parts of the corpus on this machine (see
            `config.part`), each of them uses an equal share of the cores or GPUs.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        ray: address of Ray; by default local processes are used.

    Returns:
        A function that tokenizes the shards of a plan and yields their records.
    """
    if ray is not None:
        address = ray
        return lambda plan, tasks: run_ray(plan.config, tasks, address, workers, device, _plugins(plan))
    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        import torch

        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    else:
        devices = [str(chosen)]
    part = config.part or Part(0, 1)
    devices = devices[part.local_index :: part.local_count] or [devices[part.local_index % len(devices)]]
    cores = _num_cores() // part.local_count
    count = workers or (len(devices) if chosen.type == "cuda" else max(1, cores // config.threads))
    count = min(count, num_tasks)
    if count <= 1:
        return lambda plan, tasks: run_in_process(plan.config, tasks, devices[0], plan.codec)

    def run(plan: Plan, tasks: Sequence[Task]) -> Iterator[ShardRecord]:
        plan.codec = None  # free the memory: each worker loads its own codec
        return run_processes(plan.config, tasks, count, devices, _plugins(plan))

    return run


def _plugins(plan: Plan) -> tuple[type, ...]:
    return plan.output, type(plan.corpus)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_process(
    config: TokenizeConfig, tasks: Sequence[Task], device: str, codec: "Codec[Any] | None" = None
) -> Iterator[ShardRecord]:
    """Tokenize shards in this process, one after the other.

    Args:
        config: options of the run.
        tasks: shards to tokenize.
        device: device of the codec.
        codec: a loaded codec; None to load the one in `config`.

    Yields:
        The record of each shard.
    """
    worker = Worker(config, device, codec=codec)
    for index, shard in tasks:
        yield ShardRecord(**worker.run(index, shard))


_worker: Worker | NemoLfrError


def _start_worker(
    config: TokenizeConfig, devices: "SimpleQueue[str]", driver: int, plugins: tuple[type, ...] = ()
) -> None:
    """Initialize a worker process.

    An error here would look like a crash of the process, so it is stored, and raised for the first shard.
    """
    global _worker
    begin_worker(driver)
    try:
        _worker = Worker(config, devices.get(), plugins)
    except Exception as error:  # loading a codec or a corpus may raise anything
        _worker = NemoLfrError(f"a worker cannot start: {last_line(error)}")


def _run_shard(index: int, shard: ShardSpec) -> dict[str, Any]:
    if isinstance(_worker, NemoLfrError):
        raise _worker
    return _worker.run(index, shard)


def run_processes(
    config: TokenizeConfig,
    tasks: Sequence[Task],
    workers: int,
    devices: Sequence[str],
    plugins: tuple[type, ...] = (),
) -> Iterator[ShardRecord]:
    """Tokenize shards in local worker processes.

    Args:
        config: options of the run.
        tasks: shards to tokenize.
        workers: number of processes.
        devices: devices, which are assigned to the processes in turn.
        plugins: registered classes that the workers need; see `Worker`.

    Yields:
        The record of each shard, in the order of completion.

    Raises:
        NemoLfrError: if workers die repeatedly, or a worker cannot start or cannot import the main program.
    """
    check_is_file()
    remaining = dict(tasks)
    failures = WorkerFailures(config)
    context = get_context("spawn")
    other_processes = multiprocessing.active_children()
    while remaining:
        with sharing("several --workers"), safe_imports():
            assignments: SimpleQueue[str] = context.SimpleQueue()
            arguments = (config, assignments, os.getpid(), plugins)
            pool = ProcessPoolExecutor(workers, context, _start_worker, arguments)
        for number in range(workers):
            assignments.put(devices[number % len(devices)])
        running: dict[Future[dict[str, Any]], int] = {}
        waiting = deque(remaining)
        started: set[BaseProcess] = set()
        try:
            while running or waiting:
                while waiting and len(running) < QUEUED * workers:
                    index = waiting.popleft()
                    with safe_imports():  # starts the workers
                        running[pool.submit(_run_shard, index, remaining[index])] = index
                    started |= new_children(other_processes)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running[future]
                    record = ShardRecord(**future.result())
                    del running[future], remaining[index]
                    failures.since_record = 0
                    yield record
        except BrokenProcessPool as error:
            pool.shutdown(wait=True, cancel_futures=True)
            check_starts(started)
            failures.count(running.values(), error)
        except BaseException:  # an interrupt, or an error of a shard: do not wait for the shards in progress
            for process in new_children(other_processes):
                process.kill()  # a suspended process would not react to SIGTERM
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
