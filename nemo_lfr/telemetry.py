"""Turn off the usage reports of other libraries, through environment variables.

ONNX Runtime for Linux reports usage when it is imported, Ray reports usage when a cluster starts, and the Hub's client
adds details about the machine to its requests. `nemo_lfr` sets their environment variables before any of its modules
imports such a library. A variable that is already set keeps its value.
"""

import os

VARIABLES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def disable() -> None:
    """Set the variables that disable usage reports, except those that are already set."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
