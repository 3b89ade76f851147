"""Serve the codec with several replicas of the server in Ray Serve.

    pip install "ray[serve]" starlette "uvicorn[standard]" prometheus_client
    python examples/serve_ray.py --replicas 4 --cpus 2                           # a new cluster on this machine
    python examples/serve_ray.py --replicas 8 --gpus 1 --address auto --detach   # deploy to a cluster
    python examples/serve_ray.py --replicas 2 --max-replicas 8 --gpus 1 --address auto --detach   # scale with the load

Each replica is a process that runs the application of `nemo-lfr serve`, on a GPU or on a few cores. Ray's proxy
assigns each stream to one replica. With `--max-replicas`, Ray adds replicas when the average number of open streams in
a replica exceeds half of `--max-streams`, and removes replicas when fewer are enough. A removed replica gets no new
streams, and its open streams have `--drain` seconds to end. If you deploy again, Ray replaces all replicas in the same
way, even if only their number has changed. A deployment with a single replica is then down until the new replica has
started.

If a replica dies, its clients get an error (`ServerLostError` in `nemo_lfr.errors`) and have to open another stream,
which another replica serves. Ray starts a new replica.

A cluster that was started by a Python program, such as this one without --address, may reject connections without
Ray's authentication token. To deploy to such a cluster, set the environment variable RAY_AUTH_MODE=token first.
"""

import argparse
import os
import signal
import threading
from typing import Any

import ray
from ray import serve
from starlette.applications import Starlette

from nemo_lfr import load
from nemo_lfr.serve.app import Settings, create_app
from nemo_lfr.serve.engine import Engine
from nemo_lfr.serve.health import find_fault
from nemo_lfr.serve.session import EngineLimits

NAME = "nemo-lfr"


def application(args: argparse.Namespace) -> Any:
    """Return the Ray Serve application.

    Args:
        args: options of the command line.
    """
    engines: list[Engine] = []  # the engine of this replica, once it is created
    settings = Settings(EngineLimits(max_streams=args.max_streams), token=os.environ.get("NEMO_LFR_TOKEN"))
    model, device, threads = args.model, "cuda" if args.gpus else "cpu", max(1, int(args.cpus))

    def create() -> Starlette:
        import torch

        torch.set_num_threads(threads)
        app = create_app(load(model, device), settings)
        engines.append(app.state.engine)
        return app

    class Replica:
        """Process that Ray restarts if the codec fails, for example after a CUDA error."""

        async def check_health(self) -> None:
            fault = await find_fault(engines[0]) if engines else None
            if fault:
                raise RuntimeError(fault)

    size: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas is not None:
        scaling = {
            "min_replicas": args.replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": max(1, args.max_streams // 2),
            "upscale_delay_s": args.scale_delay,
            "downscale_delay_s": args.scale_delay,
        }
        size = {"autoscaling_config": scaling}
    deployment = serve.deployment(
        name=NAME,
        **size,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=args.max_streams + 16,  # 16 more, for files and to refuse streams with a clear error
        graceful_shutdown_timeout_s=args.drain,
        health_check_period_s=5,
    )
    return deployment(serve.ingress(create)(Replica)).bind()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="local", help="address of a cluster, or auto (default: start one here)")
    parser.add_argument("--detach", action="store_true", help="deploy to a running cluster and exit")
    parser.add_argument("--replicas", type=int, default=2, help="number of replicas")
    parser.add_argument("--max-replicas", type=int, help="scale from --replicas up to this number with the load")
    parser.add_argument(
        "--scale-delay",
        type=float,
        default=30,
        help="seconds of high or low load before Ray adds or removes a replica",
    )
    parser.add_argument("--cpus", type=float, default=1, help="cores per replica")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per replica")
    parser.add_argument("--max-streams", type=int, default=64, help="maximum number of open streams per replica")
    parser.add_argument(
        "--drain", type=float, default=600, help="seconds in which the open streams of a removed replica must end"
    )
    parser.add_argument("--model", help="checkpoint or Hub id (default: the bundled codec)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind")
    parser.add_argument("--port", type=int, default=8000, help="TCP port")
    args = parser.parse_args()
    if args.max_replicas is not None and args.max_replicas < args.replicas:
        parser.error(f"--max-replicas {args.max_replicas} is less than --replicas {args.replicas}")
    stop = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: stop.set())
    ray.init(address=args.address, namespace=NAME, logging_level="warning", include_dashboard=False)
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(application(args), name=NAME, route_prefix="/")
    print(f"cluster {ray.get_runtime_context().gcs_address}")
    print(f"serving at http://{args.host}:{args.port}", flush=True)
    if not args.detach:
        stop.wait()
        serve.shutdown()  # waits for open streams, for at most --drain seconds
        ray.shutdown()


if __name__ == "__main__":
    main()
