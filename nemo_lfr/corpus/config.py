"""Options of a tokenization run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_lfr.corpus.formats import format_names, get_format
from nemo_lfr.corpus.part import FOLDER as PARTS
from nemo_lfr.corpus.part import Part
from nemo_lfr.corpus.records import STATE
from nemo_lfr.corpus.sources import open_corpus
from nemo_lfr.corpus.sources.base import CorpusReader
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.locate import expand_home, resolve_folder

PADS = ("encode", "magpie")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class TokenizeConfig:
    """Options of a run: the corpus, the output, and everything else that workers need.

    Attributes:
        source: path of the corpus; see `open_corpus`.
        out: output folder. If several machines tokenize the corpus, all of them must have access to this folder.
        kind: name of the output format; see `nemo_lfr.corpus.formats`.
        model: checkpoint or Hub id; None for the bundled codec.
        precision: precision of the codec.
        pad: "encode" pads a clip with silence to a whole number of frames, as `AudioCodecModel.encode` does. "magpie"
            also appends a frame of silence to a clip whose length is a whole number of frames, as NeMo's Magpie
            datasets do when they encode audio.
        context: whether to also tokenize context audio (audio on which a TTS model is conditioned).
        shard_size: number of clips per shard.
        max_duration: maximum duration of a clip in seconds. Longer clips are reported as failures.
        audio_dir: folder that relative paths in a manifest or table start from; None for the folder of the manifest
            or table.
        allow_url: whether to download audio from http(s) URLs in Lhotse manifests.
        dataset: name of the corpus.
        strict: whether to stop at the first clip that fails.
        threads: number of threads per worker that run the codec on a CPU.
        readers: number of threads per worker that decode and resample audio.
        claim: random ID of the run that owns the output folder, set by `tokenize`; see `nemo_lfr.corpus.claim`.
        compress: whether to compress `.lfr` files losslessly.
        entropy_model: path of the entropy model for compression, which implies `compress`; None for the bundled
            model.
        part: the shards that this process tokenizes, if several independent processes tokenize the corpus (see
            `nemo_lfr.corpus.part`); None for all shards.
    """

    source: str
    out: str
    kind: str
    model: str | None = None
    precision: str = "fp32"
    pad: str = "encode"
    context: bool = False
    shard_size: int = 256
    max_duration: float = 3600.0
    audio_dir: str | None = None
    dataset: str = "corpus"
    strict: bool = False
    threads: int = 1
    readers: int = 1
    allow_url: bool = False
    claim: str = ""
    compress: bool = False
    entropy_model: str | None = None
    part: Part | None = None

    @property
    def state(self) -> Path:
        """Return the folder in `out` that contains the state of the run."""
        return Path(self.out, STATE)

    @property
    def listing(self) -> Path:
        """Return the path of the file in which a run lists the clips of an audio folder or a text table.

        Each part of a run writes its own list, because the corpus may change between the starts of two parts.
        """
        return self.state / ("folder.json" if self.part is None else f"{PARTS}/{self.part.name}.json")

    def open(self, relist: bool = False) -> CorpusReader:
        """Open the corpus.

        Args:
            relist: whether to write the list of clips again (see `listing`).
        """
        audio_dir = None if self.audio_dir is None else Path(self.audio_dir)
        return open_corpus(Path(self.source), audio_dir, self.listing, relist, self.allow_url)

    def validate(self) -> None:
        """Raise NemoLfrError for unknown values and incompatible options."""
        choices = (
            ("format", self.kind, list(format_names())),
            ("pad", self.pad, list(PADS)),
            ("precision", self.precision, list(PRECISIONS)),
        )
        for name, value, known in choices:
            if value not in known:
                raise NemoLfrError(f"{name} {value!r} is unknown; use one of {known}.")
        output = get_format(self.kind)
        if self.context and not output.supports_context:
            raise NemoLfrError(
                f'format "{self.kind}" cannot store the tokens of context audio; use another format, or remove '
                "--context."
            )
        if (self.compress or self.entropy_model is not None) and not output.supports_compression:
            raise NemoLfrError(
                f'format "{self.kind}" cannot be compressed, because trainers read its files directly; use the format '
                '"lfr".'
            )

    def absolute(self) -> "TokenizeConfig":
        """Return a copy with absolute paths, for workers in other working directories.

        Links to folders are resolved. A link to a file is not resolved; see `resolve_folder`.
        """
        paths = {
            "source": self.source,
            "out": self.out,
            "audio_dir": self.audio_dir,
            "model": self.model,
            "entropy_model": self.entropy_model,
        }
        resolved: dict[str, Any] = {
            name: str(resolve_folder(expand_home(path)))
            for name, path in paths.items()
            if path is not None and (name != "model" or expand_home(path).exists())  # else a Hub id
        }
        return replace(self, **resolved)
