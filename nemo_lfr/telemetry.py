"""Switch for usage reports of other libraries: off, unless environment variables enable them.

ONNX Runtime for Linux reports usage from its first import on, Ray when a cluster starts, and the Hub's client adds
details about the machine to its requests. Each library reads an environment variable when it is imported. These are
set when `nemo_lfr` is imported, before any of its modules imports a library, and child processes inherit them. A
variable that is already set keeps its value.
"""

import os

VARIABLES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def disable() -> None:
    """Disable usage reports, unless a variable is already set."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
