"""Read and write files: audio, token files, manifests and tables."""
