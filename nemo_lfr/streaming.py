"""Public names for streaming; see `nemo_lfr.codec.streaming`."""

from nemo_lfr.codec.streaming import StreamDecoder, StreamEncoder, push_decoders, push_encoders

__all__ = ["StreamDecoder", "StreamEncoder", "push_decoders", "push_encoders"]
