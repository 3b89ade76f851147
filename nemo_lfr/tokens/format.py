"""Alias of `nemo_lfr.io.token_file`, kept for backward compatibility."""

from nemo_lfr.io.token_file import Metadata, TokenReader, TokenWriter

__all__ = ["Metadata", "TokenReader", "TokenWriter"]
