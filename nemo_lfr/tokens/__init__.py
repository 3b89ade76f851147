"""Token files under their earlier path; see `nemo_lfr.io.token_file`."""
