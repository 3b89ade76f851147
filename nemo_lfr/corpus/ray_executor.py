"""Executor that tokenizes shards on a Ray cluster."""

import contextlib
import logging
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.orphans import family
from nemo_lfr.corpus.records import ShardRecord
from nemo_lfr.corpus.shard import QUEUED, Task, Worker
from nemo_lfr.corpus.sources.base import ShardSpec
from nemo_lfr.corpus.worker_failures import WorkerFailures, last_line
from nemo_lfr.errors import NemoLfrError, counted, first_line
from nemo_lfr.io.shortage import require

logger = logging.getLogger(__name__)

_NODE_CHECK_S = 5.0  # how often to check that a node is alive while no result arrives


def run_ray(
    config: TokenizeConfig,
    tasks: Sequence[Task],
    address: str,
    workers: int | None,
    device: str | None,
    plugins: tuple[type, ...] = (),
) -> Iterator[ShardRecord]:
    """Tokenize shards on a Ray cluster.

    Args:
        config: options of the run. Its paths must refer to the same files on every node.
        tasks: shards to tokenize.
        address: "local" to start Ray on this machine; "auto" to connect to the Ray cluster of this machine, or start
            Ray if there is none; or the "HOST:PORT" of a cluster.
        workers: number of actors, at most one for each shard; by default as many as the cluster has resources for.
            An actor uses `config.threads` CPU cores; with a GPU, it uses `config.readers` more cores to read audio.
        device: "cuda" to run each actor on a GPU, "cpu" to run actors on CPU cores; None to use GPUs if the cluster
            has any.
        plugins: registered classes that the workers need; see `Worker`.

    Yields:
        The record of each shard, in the order of completion.

    Raises:
        NemoLfrError: if the cluster cannot be reached or is lost, or workers cannot start or die repeatedly.
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
        cores = config.threads + (config.readers if gpu else 0)
        room = _room(ray, cores, gpu, address)
        # Ray must not restart dead workers. A restarted worker rejects shards until it is ready, and a rejected shard
        # looks like another death. `_Actors` replaces dead workers instead.
        make = ray.remote(num_cpus=cores, num_gpus=int(gpu), max_restarts=0, max_task_retries=0)(Worker)
        pool = _Actors(ray, lambda: make.remote(config, "cuda" if gpu else "cpu", plugins))
        for _ in range(min(workers or max(1, room), len(tasks))):
            pool.start()
        yield from _collect(ray, pool, tasks, WorkerFailures(config))
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise NemoLfrError(
            f"the connection to the Ray cluster was lost ({first_line(error)}); run the same command again to resume."
        ) from error
    finally:
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
            if pool is not None:
                pool.kill()
        if started:
            ray.shutdown()
        processes.close()


def _collect(ray: Any, pool: "_Actors", tasks: Sequence[Task], failures: WorkerFailures) -> Iterator[ShardRecord]:
    """Assign all shards to the actors, and yield the record of each completed shard."""
    remaining, waiting = dict(tasks), deque(dict(tasks))
    while remaining:
        done = _wait(ray, [*pool.running, *pool.starting])
        is_start = done in pool.starting
        index, number = (None, pool.starting.pop(done)) if is_start else pool.running.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except _lost_worker_errors(ray) as error:
            if getattr(error, "actor_init_failed", False):
                raise NemoLfrError(f"a worker cannot start: {last_line(error)}") from error
            is_first = pool.replace(number)
            if index is not None:
                waiting.append(index)
            failures.count([] if index is None else [index], error, is_death=is_first)
        else:
            if is_start:
                pool.ready.add(number)
            if index is not None:
                del remaining[index]
                failures.since_record = 0
                yield ShardRecord(**result)
        # Assign one shard to every actor before any actor gets a second one.
        for depth in range(1 if pool.starting else QUEUED):
            for number in pool.with_room(depth):
                if waiting:
                    index = waiting.popleft()
                    pool.run(number, index, remaining[index])


def _wait(ray: Any, pending: list[Any]) -> Any:
    """Wait for pending results, and return the first one that is available.

    If the last node dies before an actor has started, Ray reports no error. So the nodes are checked while waiting.

    Raises:
        ConnectionError: if no node of the cluster is alive.
    """
    while True:
        done, _ = ray.wait(pending, num_returns=1, timeout=_NODE_CHECK_S)
        if done:
            return done[0]
        if not any(node["Alive"] for node in ray.nodes()):
            raise ConnectionError("no node is alive")


class _Actors:
    """Pool of numbered Ray actors. A lost actor is replaced by an actor with a new number.

    Attributes:
        starting: numbers of the actors that are starting, by the pending result of their method `ready`. Shards are
            assigned only to ready actors, because an actor for which the cluster has no resources may never start.
        ready: numbers of the actors that are ready.
        running: dictionary from pending results to pairs (index of the shard, number of the actor).
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
        """Replace a lost actor. Return False if it was replaced before.

        Shards that are still assigned to the lost actor stay in `running`. For each of them, `ray.get` returns a
        result that arrived before the loss, or raises an error.
        """
        actor = self._actors.pop(number, None)
        if actor is None:
            return False
        self.ready.discard(number)
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor)  # the actor may be alive if only the connection was lost
        self.start()
        return True

    def with_room(self, depth: int) -> list[int]:
        """Return the numbers of the ready actors to which at most `depth` shards are assigned."""
        loads = Counter(number for _, number in self.running.values())
        return [number for number in sorted(self.ready) if loads[number] <= depth]

    def run(self, number: int, index: int, shard: ShardSpec) -> None:
        """Assign the shard `index` to the actor `number`."""
        self.running[self._actors[number].run.remote(index, shard)] = index, number

    def kill(self) -> None:
        """End all actors."""
        for actor in self._actors.values():
            self._ray.kill(actor)


def _lost_worker_errors(ray: Any) -> tuple[type[Exception], ...]:
    """Return the exceptions that Ray raises if an actor died or is unreachable, or if a result was lost."""
    errors = ray.exceptions
    return errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError, errors.OutOfMemoryError


def _room(ray: Any, cores: int, gpu: bool, address: str) -> int:
    """Return the number of workers with `cores` CPU cores (and a GPU if `gpu`) for which the cluster has resources.

    If a cluster has no room for a worker, this is only logged as a warning, because nodes may join later.

    Raises:
        NemoLfrError: if Ray runs only on this machine, and the machine lacks the resources for a worker.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get("CPU", 0) // cores, node.get("GPU", 0) if gpu else math.inf)) for node in nodes)
    if not room:
        needed = counted(cores, "core") + (" and a GPU" if gpu else "")
        if address == "local":
            less = "--device cpu, or fewer --threads" if gpu else "fewer --threads"
            raise NemoLfrError(f"--ray: this machine does not have the {needed} that a worker needs; use {less}.")
        logger.warning("no node of the Ray cluster has the %s that a worker needs; waiting for one.", needed)
    return room


class _ImportFolders(list[str]):
    """List of the folders from which Ray's workers import modules.

    The driver's current folder, which Ray tries to add, is left out unless it is in `sys.path`. The folder may
    contain a corpus with a file such as `types.py`.
    """

    def extend(self, folders: Iterable[str]) -> None:
        """Add only the folders that are in the driver's `sys.path`."""
        own = {os.path.abspath(folder) for folder in sys.path}
        super().extend(folder for folder in folders if os.path.abspath(folder) in own)


def _connect(ray: Any, address: str) -> str:
    """Connect to Ray and return the address.

    If the address is "auto" and no cluster is found, Ray is started on this machine, and the result is "local".
    """
    from ray.job_config import JobConfig

    requested = address
    job = JobConfig()
    job._py_driver_sys_path = _ImportFolders()
    options: dict[str, Any] = {"job_config": job, "logging_level": "error", "log_to_driver": False}
    try:
        if address == "auto":
            try:
                ray.init("auto", **options)
                return address
            except ConnectionError:
                address = "local"
        if address == "local":
            ray.init("local", include_dashboard=False, **options)
        else:
            ray.init(address, **options)
    except Exception as error:  # each Ray transport raises its own exceptions
        problem, remedy = (
            ("Ray cannot be started on this machine", "pass the address of a cluster, or remove --ray")
            if address == "local"
            else ("no Ray cluster is reachable", "start Ray, or pass the address of a cluster")
        )
        raise NemoLfrError(f"--ray {requested}: {problem} ({first_line(error)}); {remedy}.") from error
    return address
