"""Alias of `nemo_lfr.io.manifests`, kept for backward compatibility."""

from nemo_lfr.io.manifests import read_manifest

__all__ = ["read_manifest"]
