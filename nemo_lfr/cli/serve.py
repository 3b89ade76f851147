"""Command `nemo-lfr serve`."""

import os
import sys

import click

from nemo_lfr.cli.options import Number, open_codec
from nemo_lfr.cli.terminal import echo_stderr
from nemo_lfr.errors import MissingExtraError, NemoLfrError, install_command


@click.command(short_help="Serve encoding and decoding over HTTP and WebSocket.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="TCP port.")
@click.option("--max-streams", type=click.IntRange(min=1), default=64, show_default=True, help="Limit of streams.")
@click.option(
    "--chunk", type=click.IntRange(1, 64), default=4, show_default=True, help="Frames of a stream in one step."
)
@click.option("--idle", type=Number(min=1), default=60.0, show_default=True, help="Seconds a client may be silent.")
@click.option("--drain", type=Number(min=0), default=30.0, show_default=True, help="Seconds for streams at shutdown.")
@click.option("--allow-origin", multiple=True, help="Origin of web pages that may connect; repeatable.")
@click.option("--model", help="Checkpoint (.nemo or .ckpt) or Hub id (default: the bundled codec).")
@click.option("--device", help="Device: cpu, cuda, cuda:1 ... (default: a GPU if there is one).", default=None)
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", show_default=True)
def serve(
    host: str,
    port: int,
    max_streams: int,
    chunk: int,
    idle: float,
    drain: float,
    allow_origin: tuple[str, ...],
    model: str | None,
    device: str | None,
    precision: str,
) -> None:
    """Serve encoding and decoding of files and live streams.

    All live streams advance together in batches. Clients must send the token in the environment variable
    NEMO_LFR_TOKEN, if it is set. SIGTERM lets open streams end before the server stops.
    """
    try:
        from nemo_lfr.serve.app import Settings, create_app
        from nemo_lfr.serve.server import run
    except ImportError as error:
        packages = install_command("starlette", "uvicorn[standard]", "prometheus_client")
        raise MissingExtraError(f"nemo-lfr serve needs {error.name}: {packages}") from error
    from nemo_lfr.serve.engine import EngineLimits
    from nemo_lfr.serve.streams import StreamLimits

    token = os.environ.get("NEMO_LFR_TOKEN")
    if token is not None and not token.strip():
        raise NemoLfrError("NEMO_LFR_TOKEN is empty; unset it, or set it to a secret.")
    codec = open_codec(model, device, precision)
    settings = Settings(
        EngineLimits(max_streams=max_streams, chunk_frames=chunk),
        StreamLimits(idle_s=idle),
        token=token,
        origins=allow_origin,
    )
    if host not in ("127.0.0.1", "localhost", "::1") and token is None:
        echo_stderr("nemo-lfr: everyone who reaches this address can use the server; NEMO_LFR_TOKEN limits it.")
    code = run(create_app(codec, settings), host, port, settings, drain)
    sys.exit(code)
