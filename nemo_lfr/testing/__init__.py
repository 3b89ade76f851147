"""Helpers for tests of code that uses this package: synthetic speech, small codecs and checks of backends.

    codec = nemo_lfr.testing.build_codec()
    tokens, tokens_len = codec.encode(nemo_lfr.testing.synthesize(2.0), sample_rate=codec.sample_rate)

To test a backend of another package, run each check of `BACKEND_CHECKS` on a codec with this backend:

    @pytest.mark.parametrize("check", BACKEND_CHECKS, ids=lambda check: check.__name__)
    def test_backend(check):
        check(nemo_lfr.load("model.tflite", backend="tflite"))

The codecs that this module builds have random weights, so they decode to noise. The module requires neither pytest nor
NeMo.
"""

from nemo_lfr.testing.backend_checks import (
    BACKEND_CHECKS,
    assert_audio_close,
    assert_tokens_equal,
    check_batches,
    check_copies,
    check_files,
    check_invalid_arguments,
    check_lengths,
    check_spec,
    check_streams,
    check_windows,
)
from nemo_lfr.testing.codecs import (
    LOSSES,
    MODULES,
    SAMPLE_RATE,
    TWO_STAGES,
    build_codec,
    codec_config,
    random_parts,
    synthesize,
    write_checkpoint,
)

__all__ = [
    "BACKEND_CHECKS",
    "LOSSES",
    "MODULES",
    "SAMPLE_RATE",
    "TWO_STAGES",
    "assert_audio_close",
    "assert_tokens_equal",
    "build_codec",
    "check_batches",
    "check_copies",
    "check_files",
    "check_invalid_arguments",
    "check_lengths",
    "check_spec",
    "check_streams",
    "check_windows",
    "codec_config",
    "random_parts",
    "synthesize",
    "write_checkpoint",
]
