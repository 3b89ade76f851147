"""Output format `lfr`: a `.lfr` token file for each clip, and a manifest with relative paths."""

from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.corpus.formats import register_format
from nemo_lfr.corpus.formats.base import REPAIR, ShardFiles, parse_json
from nemo_lfr.corpus.formats.manifest import ManifestFormat, ManifestReader, ManifestWriter, own_labels
from nemo_lfr.corpus.records import METADATA
from nemo_lfr.corpus.sources.base import Clip
from nemo_lfr.errors import TokenFileError, shorten
from nemo_lfr.io.token_file import TokenReader, TokenWriter
from nemo_lfr.spec import same_fingerprint


class LfrWriter(ManifestWriter):
    """Writer for the token file of each clip, and for the manifest lines of the shard."""

    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        """Write a clip's token file and append its manifest line."""
        path = f"tokens/{clip.id}.lfr"
        with self._writing(path) as file, TokenWriter(file, self.codec, model=self.model) as writer:
            writer.write(tokens)
            writer.finish(num_samples)
        duration = self._duration(num_samples)
        self._lines.append({**own_labels(clip), "id": clip.id, "tokens_filepath": path, "duration": duration})


class LfrReader(ManifestReader):
    """Reader for a manifest that lists `.lfr` files."""

    def _load(self, files: ShardFiles, line: bytes) -> dict[str, Any]:
        labels = parse_json(line)
        name = labels["tokens_filepath"]
        if not isinstance(name, str):
            raise TokenFileError(
                f"{self.folder}: a path in the manifest is {shorten(repr(name))}, not a string; {REPAIR}."
            )
        with TokenReader(files.path(name)) as reader:
            expected, stored = self.codec, reader.metadata
            for key in ("sample_rate", "samples_per_frame", "levels", "num_codebooks", "fingerprint"):
                values = getattr(expected, key), getattr(stored, key)
                if values[0] != values[1] and not (key == "fingerprint" and same_fingerprint(*values)):
                    raise TokenFileError(
                        f"{reader.path}: the tokens were made by a codec with {key} {getattr(stored, key)}, but "
                        f"{METADATA} lists {getattr(expected, key)}; tokenize the corpus again to another --out."
                    )
            duration, rate = labels.get("duration"), stored.sample_rate
            if isinstance(duration, int | float) and abs(duration * rate - reader.num_samples) >= 1:
                raise TokenFileError(
                    f"{reader.path}: the file lasts {reader.num_samples / rate:g} s, but the manifest lists "
                    f"{shorten(duration)} s, so the file is probably that of another clip; {REPAIR}."
                )
            tokens = reader.read()
            return {"id": labels["id"], "tokens": tokens, "num_samples": reader.num_samples, "labels": labels}


@register_format
class LfrFormat(ManifestFormat):
    """Output format `lfr`."""

    name = "lfr"
    writer = LfrWriter
    reader = LfrReader
    supports_context = False
    supports_compression = True

    @classmethod
    def current_lines(cls, lines: bytes, out: Path) -> bytes:
        """Return the manifest lines of a shard unchanged, since their paths are relative."""
        return lines
