"""Usage reports of the libraries that this package uses: off, unless the user's environment says otherwise.

ONNX Runtime for Linux reports to its maker from the first import on, Ray when a cluster starts, and the Hub's client
adds details about the machine to its requests. Each reads an environment variable when it is imported, so these are
set when `nemo_lfr` is imported: before any of our modules imports a library, and for every process that is started. A
variable that is already set keeps its value.
"""

import os

VARIABLES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def disable() -> None:
    """Set the variables that are not set."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
