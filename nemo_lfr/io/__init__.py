"""Files in and out: audio, token files, manifests."""
