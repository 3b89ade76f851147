"""Public import path of the streaming classes and functions in `nemo_lfr.codec.streaming`."""

from nemo_lfr.codec.streaming import (
    StreamDecoder,
    StreamEncoder,
    flush_decoders,
    flush_encoders,
    push_decoders,
    push_encoders,
)

__all__ = ["StreamDecoder", "StreamEncoder", "flush_decoders", "flush_encoders", "push_decoders", "push_encoders"]
