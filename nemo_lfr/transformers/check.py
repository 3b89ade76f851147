"""Check that `transformers` is installed, before other modules import it.

Raises:
    MissingExtraError: if `transformers` is not installed or cannot be imported.
"""

from nemo_lfr.io.shortage import require

AVAILABLE = require("transformers") is not None
