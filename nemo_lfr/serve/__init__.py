"""Server that encodes and decodes many live streams in batches; install the extra `serve` to use it."""
