"""Alias package of `nemo_lfr.io.token_file`, kept for backward compatibility."""
