"""Environment variables that turn off the usage reports of other libraries.

ONNX Runtime for Linux reports usage when it is imported, Ray reports usage when a cluster starts, and the Hub's client
adds details about the machine to its requests. Each library reads an environment variable when it is imported.
`nemo_lfr` sets these variables before any of its modules imports such a library, and child processes inherit them. A
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
