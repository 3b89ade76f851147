"""Token files under their earlier path; see `nemo_lfr.io.token_file`."""

from nemo_lfr.io.token_file import Metadata, TokenReader, TokenWriter

__all__ = ["Metadata", "TokenReader", "TokenWriter"]
