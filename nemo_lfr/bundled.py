"""The bundled codec's file and measured quality, and the name of NVIDIA's codec on the Hub.

This module imports only from the standard library, so command-line help can import it quickly.
"""

from importlib.resources import files
from pathlib import Path

LFR = "nvidia/low-frame-rate-speech-codec-22khz"
# Means over the test set that docs/model-card.md describes. Messages and help texts take the quality from here.
BUNDLED_QUALITY = {"PESQ-WB": "2.13", "ESTOI": "0.832"}


def bundled_checkpoint() -> Path:
    """Return the path of the bundled codec's `.nemo` file."""
    return Path(str(files("nemo_lfr") / "weights" / "default.nemo"))


def bundled_quality() -> str:
    """Return the bundled codec's measured quality as text, such as "PESQ-WB 2.13, ESTOI 0.832"."""
    return ", ".join(f"{metric} {value}" for metric, value in BUNDLED_QUALITY.items())
