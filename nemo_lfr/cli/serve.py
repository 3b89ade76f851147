"""Command `nemo-lfr serve`."""

import os
from typing import Any

import click

from nemo_lfr.cli.command import Command
from nemo_lfr.cli.options import (
    count_option,
    device_option,
    model_option,
    open_codec,
    precision_option,
    seconds_option,
)
from nemo_lfr.cli.results import ServeResult
from nemo_lfr.cli.session import begin_work, note
from nemo_lfr.errors import NemoLfrError, install_command
from nemo_lfr.io.shortage import missing_extra

LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command(cls=Command, result=ServeResult, short_help="Run a server that encodes and decodes.")
@click.option("--host", default=LOCAL[0], show_default=True, help="Address to bind to; 0.0.0.0 for all interfaces.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    default=8000,
    show_default=True,
    help="TCP port; 0 for a free one.",
)
@count_option("--max-streams", "Maximum number of live streams and posted files at the same time.", 64)
@count_option(
    "--chunk", "Maximum number of frames per stream in one step; the first chunks of a stream may be larger.", 4
)
@seconds_option("--idle", "Time after which a client that sends nothing is disconnected, in seconds.", 60.0, low=1)
@seconds_option("--drain", "Timeout for open streams at shutdown, in seconds.", 30.0)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="URL",
    help="Web site whose pages may use the server, such as https://example.org; repeatable (default: none).",
)
@model_option("checkpoint (.nemo or .ckpt), folder of safetensors, or Hub id")
@device_option()
@precision_option
def serve(
    host: str, port: int, max_streams: int, chunk: int, idle: float, drain: float, allow_origin: tuple[str, ...],
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Run a server that encodes and decodes files and live streams, with a page for browsers at /.

    Live streams are processed together in batches. If the environment variable NEMO_LFR_TOKEN is set, clients must
    send its value as the access token. After SIGTERM or Ctrl-C, the server lets open streams finish, for up to
    --drain seconds, and then stops.
    """
    try:
        from nemo_lfr.serve.app import Settings, create_app
        from nemo_lfr.serve.server import run
    except ImportError as error:
        packages = install_command("starlette", "uvicorn[standard]", "prometheus_client")
        package = (error.name or "a package of the server").partition(".")[0]
        raise missing_extra(error, package, f"nemo-lfr serve needs {error.name}: {packages}") from error
    from nemo_lfr.serve.session import EngineLimits
    from nemo_lfr.serve.streams import StreamLimits

    token = os.environ.get("NEMO_LFR_TOKEN")
    if token is not None:
        token = token.strip()  # a token from a file usually ends with a newline
        if not token or not token.isascii() or not token.isprintable():
            raise NemoLfrError("NEMO_LFR_TOKEN is empty or not printable ASCII; unset it, or set it to a secret.")
    settings = Settings(
        EngineLimits(max_streams=max_streams, chunk_frames=chunk),
        StreamLimits(idle_s=idle),
        token=token,
        origins=allow_origin,
    )
    app = create_app(open_codec(**options), settings)
    begin_work()
    if host not in LOCAL and token is None:
        note("the server has no access token, so everyone who can reach it can use it; set one in NEMO_LFR_TOKEN.")
    url = run(app, host, port, settings, drain, lambda address: note(f"serving at {address}"))
    return {"url": url, "num_streams": app.state.engine.num_opened}
