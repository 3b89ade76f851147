"""Reading of NeMo manifests under its earlier path; see `nemo_lfr.io.manifests`."""

from nemo_lfr.io.manifests import read_manifest

__all__ = ["read_manifest"]
