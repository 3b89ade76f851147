"""Server that encodes and decodes many live streams as one batch (extra `serve`)."""
