"""Where shards are computed: in this process, in processes of this machine, or on a Ray cluster.

Each engine takes the shards to do and yields their marks as they come. A worker that dies takes its shard with it,
which is handed to another one; a shard that keeps killing its workers stops the run.
"""

import contextlib
import logging
import math
import multiprocessing
import os
import shutil
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any

from nemo_lfr.corpus.inputs import Part, require
from nemo_lfr.corpus.orphans import die_with, family
from nemo_lfr.corpus.shard import Job, Mark, Worker
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.shortage import sharing

logger = logging.getLogger(__name__)

# How often a shard may lose its worker before it is taken for the cause, and workers may die before any shard is done.
MAX_DEATHS = 20
# Shards that wait in a worker's queue, so that it never waits for the driver.
QUEUED = 2
Task = tuple[int, Part]


def run_here(job: Job, tasks: Sequence[Task], device: str) -> Iterator[Mark]:
    """In this process, one after the other."""
    worker = Worker(job, device)
    for index, part in tasks:
        yield Mark(**worker.run(index, part))


_worker: Worker | NemoLfrError


def _start(job: Job, devices: "SimpleQueue[str]", driver: int) -> None:
    """What a process does first. An interrupt of the whole group of processes is the driver's to answer.

    A worker that cannot start says so in the place of its first shard: an error here would end the process, and look
    like a death.
    """
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(driver)
    try:
        _worker = Worker(job, devices.get())
    except Exception as error:  # of whatever is loaded
        _worker = NemoLfrError(f"a worker cannot start: {_last_line(error)}")


def _run(index: int, part: Part) -> dict[str, Any]:
    if isinstance(_worker, NemoLfrError):
        raise _worker
    return _worker.run(index, part)


def run_processes(job: Job, tasks: Sequence[Task], workers: int, devices: Sequence[str]) -> Iterator[Mark]:
    """In processes of this machine, which take the devices in turn.

    Raises:
        NemoLfrError: if a shard's workers die again and again.
    """
    left = dict(tasks)
    deaths = Deaths(job)
    context = get_context("spawn")
    others = multiprocessing.active_children()
    while left:
        with sharing("several --workers"):
            turns: SimpleQueue[str] = context.SimpleQueue()
            pool = ProcessPoolExecutor(workers, context, _start, (job, turns, os.getpid()))
        for number in range(workers):
            turns.put(devices[number % len(devices)])
        running: dict[Future[dict[str, Any]], int] = {}
        waiting = deque(left)
        try:
            while running or waiting:
                while waiting and len(running) < QUEUED * workers:
                    index = waiting.popleft()
                    running[pool.submit(_run, index, left[index])] = index
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running[future]
                    mark = Mark(**future.result())
                    del running[future], left[index]
                    deaths.since_mark = 0
                    yield mark
        except BrokenProcessPool as error:
            pool.shutdown(wait=True, cancel_futures=True)
            deaths.count(running.values(), error)
        except BaseException:  # an interrupt, or a shard's error: nobody waits for the others in work
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()  # a stopped one would not end otherwise
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Deaths:
    """How often workers died, and over which shards."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.since_mark = 0
        self._of_shard: Counter[int] = Counter()

    def count(self, indices: Iterable[int], error: Exception, *, is_death: bool = True) -> None:
        """Remove what dead workers had begun of their shards.

        Args:
            indices: the shards that the workers had.
            error: what showed that they died.
            is_death: whether no other shard has shown this death before.

        Raises:
            NemoLfrError: if that happens again and again.
        """
        self.since_mark += is_death
        for index in indices:
            for folder in self.job.state.glob(f"staging/{index:06d}.*"):
                shutil.rmtree(folder, ignore_errors=True)
                self._of_shard[index] += 1
            if self._of_shard[index] > MAX_DEATHS:
                raise NemoLfrError(
                    f"shard {index}: its worker died {MAX_DEATHS + 1} times; a file in it may crash the audio "
                    "library. A smaller --shard-size helps to find out which."
                ) from error
        if self.since_mark > MAX_DEATHS:
            raise NemoLfrError(
                f"workers died {self.since_mark} times and finished no shard ({_first_line(error)}); the machine may "
                "lack memory: try fewer --workers."
            ) from error


def run_ray(job: Job, tasks: Sequence[Task], address: str, workers: int | None, device: str | None) -> Iterator[Mark]:
    """On a Ray cluster, with one actor for each GPU, or for each `job.threads` cores.

    Args:
        job: what to do; its paths must lead to the same files on every node.
        tasks: shards to compute.
        address: "local" starts a Ray here; "auto" takes the one that runs here, or starts one; else "HOST:PORT".
        workers: actors; as many as the cluster has room for if not given.
        device: "cuda" takes a GPU for each actor, "cpu" none; None takes GPUs where the cluster has some.

    Raises:
        NemoLfrError: if the cluster cannot be reached, or a shard's workers die again and again.
    """
    ray = require("ray")
    started = not ray.is_initialized()
    processes = contextlib.ExitStack()
    pool: _Actors | None = None
    try:
        if started:
            processes.enter_context(family())
            address = _connect(ray, address)
        gpu = bool(ray.cluster_resources().get("GPU")) if device is None else device.startswith("cuda")
        cores = job.threads + (job.readers if gpu else 0)
        room = _room(ray, cores, gpu, address)
        # A worker that dies is replaced by us. One that Ray restarted would refuse shards until it is up again, and
        # a refused shard would look like another death.
        make = ray.remote(num_cpus=cores, num_gpus=int(gpu), max_restarts=0, max_task_retries=0)(Worker)
        pool = _Actors(ray, lambda: make.remote(job, "cuda" if gpu else "cpu"))
        for _ in range(min(workers or max(1, room), len(tasks))):
            pool.start()
        left, waiting = dict(tasks), deque(dict(tasks))
        deaths = Deaths(job)
        while left:
            (done, *_), _ = ray.wait([*pool.running, *pool.starting], num_returns=1)
            is_start = done in pool.starting
            index, number = (None, pool.starting.pop(done)) if is_start else pool.running.pop(done)
            try:
                found = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except _lost_worker_errors(ray) as error:
                if getattr(error, "actor_init_failed", False):
                    raise NemoLfrError(f"a worker cannot start: {_last_line(error)}") from error
                is_first = pool.replace(number)
                if index is not None:
                    waiting.append(index)
                deaths.count([] if index is None else [index], error, is_death=is_first)
            else:
                if is_start:
                    pool.ready.add(number)
                if index is not None:
                    del left[index]
                    deaths.since_mark = 0
                    yield Mark(**found)
            # Everybody gets one before anybody gets two.
            for depth in range(1 if pool.starting else QUEUED):
                for number in pool.with_room(depth):
                    if waiting:
                        index = waiting.popleft()
                        pool.run(number, index, left[index])
    except (ray.exceptions.RayError, ConnectionError) as error:
        said = _first_line(error)
        raise NemoLfrError(f"the Ray cluster was lost ({said}); the same command goes on from here.") from error
    finally:
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
            if pool is not None:
                pool.kill()
        if started:
            ray.shutdown()
        processes.close()


class _Actors:
    """Ray's actors by number; one that is lost is replaced under a new number.

    Attributes:
        starting: answers of actors that are not up yet, and their numbers. Only an actor that is up gets shards: one
            that the cluster has no room for would keep them forever.
        ready: numbers of the actors that are up.
        running: answers of shards, and (shard, actor) of each.
    """

    def __init__(self, ray: Any, make: Callable[[], Any]) -> None:
        self._ray, self._make = ray, make
        self._actors: dict[int, Any] = {}
        self._next = 0
        self.starting: dict[Any, int] = {}
        self.ready: set[int] = set()
        self.running: dict[Any, tuple[int, int]] = {}

    def start(self) -> None:
        """Start an actor."""
        actor = self._make()
        self._actors[self._next] = actor
        self.starting[actor.ready.remote()] = self._next
        self._next += 1

    def replace(self, number: int) -> bool:
        """Replace an actor that is lost; returns False if that was done already.

        Other shards of it stay in `running`: their answers fail, or were there before it died.
        """
        actor = self._actors.pop(number, None)
        if actor is None:
            return False
        self.ready.discard(number)
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor)  # it may live, where only the connection to it is lost
        self.start()
        return True

    def with_room(self, depth: int) -> list[int]:
        """Actors that are up and have at most `depth` shards."""
        loads = Counter(number for _, number in self.running.values())
        return [number for number in sorted(self.ready) if loads[number] <= depth]

    def run(self, number: int, index: int, part: Part) -> None:
        """Hand a shard to an actor."""
        self.running[self._actors[number].run.remote(index, part)] = index, number

    def kill(self) -> None:
        """End all actors."""
        for actor in self._actors.values():
            self._ray.kill(actor)


def _lost_worker_errors(ray: Any) -> tuple[type[Exception], ...]:
    """Errors of a call to an actor that died, or cannot be reached, or whose answer was lost."""
    errors = ray.exceptions
    return errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError, errors.OutOfMemoryError


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shorten(lines[-1].strip(), 500) if lines else type(error).__name__


def _room(ray: Any, cores: int, gpu: bool, address: str) -> int:
    """Workers that the cluster has room for as it is now; a cluster may grow, but this machine does not.

    Raises:
        NemoLfrError: if this machine is all there is, and has no room.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get("CPU", 0) // cores, node.get("GPU", 0) if gpu else math.inf)) for node in nodes)
    if not room:
        needed = f"{cores} cores" + (" and a GPU" if gpu else "")
        if address == "local":
            less = "--device cpu, or fewer --threads" if gpu else "fewer --threads"
            raise NemoLfrError(f"--ray: this machine does not have the {needed} of a worker; ask for {less}.")
        logger.warning("no node of the Ray cluster has the %s of a worker; waiting for one that has.", needed)
    return room


def _connect(ray: Any, address: str) -> str:
    """Connect, and say to what: "local" if that is what "auto" became."""
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False, "include_dashboard": False}
    try:
        if address == "auto":
            try:
                ray.init("auto", logging_level="error", log_to_driver=False)
                return address
            except ConnectionError:
                address = "local"
        if address == "local":
            ray.init("local", **options)
        else:
            ray.init(address, logging_level="error", log_to_driver=False)
    except Exception as error:  # of whichever of Ray's transports
        raise NemoLfrError(f"--ray {address}: no Ray cluster can be reached there ({_first_line(error)}).") from error
    return address
