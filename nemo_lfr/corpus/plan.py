"""Plan a tokenization run: check its options, and split the corpus into shards.

The plan is stored in the output folder when a run starts. If the same command runs again, it reads the stored plan and
resumes the run, provided that the corpus, the codec and the options that affect the tokens are unchanged.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lfr.corpus.audio_sample import sample_audio
from nemo_lfr.corpus.claim import NAME as CLAIM
from nemo_lfr.corpus.claim import claim, holds_claim
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.formats import get_format
from nemo_lfr.corpus.formats.base import OutputFormat
from nemo_lfr.corpus.inventory import Watch
from nemo_lfr.corpus.part import forget_count, reserve
from nemo_lfr.corpus.records import METADATA, PLAN, STATE, ShardRecord
from nemo_lfr.corpus.sources import READER
from nemo_lfr.corpus.sources.base import CorpusReader, ShardSpec
from nemo_lfr.corpus.stored_plan import check_stored_plan
from nemo_lfr.errors import ConfigError, NemoLfrError, shorten
from nemo_lfr.io.atomic import sweep, write_new
from nemo_lfr.io.entropy.find import model_to_write
from nemo_lfr.io.entropy.model import SUFFIX, EntropyModel, write_model
from nemo_lfr.io.locate import expand_home, resolve
from nemo_lfr.io.regular import open_regular
from nemo_lfr.plugins import naming_extension

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

# Options that must not change when a run is resumed. `load_or_create_plan` also compares the corpus, the folder that
# its relative paths start from, the codec and the entropy model.
FIXED = ("kind", "precision", "pad", "context", "shard_size", "max_duration", "dataset")


@dataclass
class Plan:
    """A planned run: everything that is needed to tokenize its shards.

    Attributes:
        config: the options, with absolute paths and the claim of the output (see `nemo_lfr.corpus.claim`).
        out: the output folder.
        output: the output format.
        corpus: reader of the corpus.
        inputs: watcher that detects whether files of the corpus have changed since the run was planned.
        spec: description of the codec for `tokens.json`.
        shards: specifications of all shards; see `CorpusReader.shards`.
        codec: the codec on the CPU, in the precision of the run, for a worker in this process; None if the codec does
            not run on this machine's CPU.
    """

    config: TokenizeConfig
    out: Path
    output: type[OutputFormat]
    corpus: CorpusReader
    inputs: Watch
    spec: dict[str, Any]
    shards: list[ShardSpec]
    codec: "Codec[Any] | None" = None

    @property
    def indices(self) -> list[int]:
        """Return the indices of the shards to tokenize: all shards, or the shards of `config.part`."""
        part = self.config.part
        return [index for index in range(len(self.shards)) if part is None or part.owns(index)]


@contextmanager
def open_plan(config: TokenizeConfig, on_cpu: bool) -> Iterator[Plan]:
    """Plan a run, and lock its output folder while the context is open.

    Args:
        config: the options.
        on_cpu: whether local processes will run the codec on the CPU.

    Raises:
        NemoLfrError: if the corpus or codec cannot be read, an option is invalid, or the output folder is in use or
            contains anything but a resumable run of the same corpus, codec and options.
    """
    config.validate()
    requested_out = config.out
    config, out = config.absolute(), resolve(expand_home(config.out))
    if out.exists() and not (out / STATE).exists() and (names := [path.name for path in out.iterdir()]):
        raise NemoLfrError(
            f"{requested_out}: the folder is not empty and contains no resumable run (found {names[0]}); choose "
            "another --out."
        )
    spec, model, codec, made = _load_codec(config, on_cpu)
    for path in (config.state, ShardRecord.folder(out)):
        if path.is_symlink():
            raise NemoLfrError(
                f"{path}: the folder is a link, which is not followed; remove the link, or choose another --out."
            )
    is_new = not out.exists()
    config.state.mkdir(parents=True, exist_ok=True)
    with reserve(out, config.state, config.part):
        output = get_format(config.kind)
        _remove_leftovers(config, out, output)
        _check_has_plan(config.state, out)
        config = replace(config, claim=claim(config.state))
        try:
            corpus = config.open(relist=True)
            with naming_extension(corpus, READER):
                files = corpus.files
            inputs = Watch(files)
            shards = load_or_create_plan(config, corpus, spec, None if model is None else model.hash, made)
        except BaseException:
            _withdraw(config, out, is_new)
            raise
        if model is not None:  # so that a copy of the folder can be decoded without other files
            write_model(model, out / f"{model.hash}{SUFFIX}", overwrite=True)
        yield Plan(config, out, output, corpus, inputs, spec, shards, codec)


def _check_has_plan(state: Path, out: Path) -> None:
    """Raise NemoLfrError if a folder contains results of a run, but no plan.

    The results may be those of another corpus, codec or options, so they are neither kept nor replaced.

    Args:
        state: the state folder of the output.
        out: the output folder.
    """
    if (state / PLAN).exists():
        return
    results = [*ShardRecord.folder(out).glob("*.json"), *(path for path in out.iterdir() if path.name[0] != ".")]
    if results and not (state / PLAN).exists():  # else another part of this run has started in the meantime
        raise NemoLfrError(
            f"{state / PLAN}: the file is missing, so the run whose results are in {out} (such as "
            f"{shorten(results[0].relative_to(out))}) cannot be resumed; restore the file, remove {out}, or choose "
            "another --out."
        )


def _withdraw(config: TokenizeConfig, out: Path, is_new: bool) -> None:
    """Remove the files of a run that ends before its plan is stored, so that its folder can be used again.

    Nothing is removed if the folder belongs to another run. If the run is one part of several, only the record of the
    number of parts is removed, because other parts may use the other files.

    Args:
        config: options of the run. The output folder belongs to the run if it contains the ID `config.claim`.
        out: the output folder.
        is_new: whether this run created the output folder.
    """
    if (config.state / PLAN).exists() or not holds_claim(config.state, config.claim):
        return
    if config.part is not None:
        forget_count(out, config.state, config.part)
        return
    with suppress(OSError):
        config.listing.unlink(missing_ok=True)
        (config.state / CLAIM).unlink(missing_ok=True)
        config.state.rmdir()
        if is_new:
            out.rmdir()


def load_or_create_plan(
    config: TokenizeConfig,
    corpus: CorpusReader,
    spec: dict[str, Any],
    entropy_model: str | None,
    made: Callable[[str], bool],
) -> list[ShardSpec]:
    """Return the shards of the plan that an earlier run stored, or create and store a plan.

    Args:
        config: options of the run.
        corpus: reader of the corpus.
        spec: description of the codec.
        entropy_model: hash of the entropy model; None without compression.
        made: the codec's method `made`, which returns whether tokens with a certain fingerprint are from this codec.

    Raises:
        NemoLfrError: if the corpus is empty, if the stored plan is damaged, or if it was made for another corpus,
            codec or options.
    """
    path = config.state / PLAN
    options = asdict(config)
    expected = {key: options[key] for key in FIXED}
    with naming_extension(corpus, READER):
        identity, base = corpus.identity, corpus.base
    expected |= {"corpus": identity, "codec": spec, "entropy model": entropy_model}
    expected["audio_dir"] = None if base is None else str(resolve(base))
    if not path.exists():
        with naming_extension(corpus, READER):
            shards = corpus.shards(config.shard_size)
        _check_not_empty(corpus, shards, config.source)
        audio = {key: found for key, (_, found) in sample_audio(corpus, shards, base).items()}
        details = {"source": config.source, "parts": shards, "parts_digest": _shards_digest(shards), "audio": audio}
        text = json.dumps(expected | details)
        if write_new(path, text.encode()):
            return shards  # otherwise another part of this run has stored its plan in the meantime
    stored = _read_plan(path, config)
    check_stored_plan(stored, expected, config, corpus, made)
    stored_shards: list[ShardSpec] = stored["parts"]
    return stored_shards


def _check_not_empty(corpus: CorpusReader, shards: list[ShardSpec], source: str) -> None:
    """Raise ConfigError if a corpus has no clips, without decoding audio."""
    for shard in shards:
        clips = corpus.read(shard)
        try:
            if any(True for _ in clips):
                return
        except Exception:  # raised again when the shard is tokenized
            return
    raise ConfigError(f"{source}: this corpus has no clips; pass one that has at least one clip.")


def _read_plan(path: Path, config: TokenizeConfig) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            stored = json.load(file)
        shards = stored["parts"]
        if not isinstance(stored, dict) or not isinstance(shards, list):
            raise TypeError("expected a JSON object with a list of shards")
        if stored.get("parts_digest") != _shards_digest(shards):
            raise ValueError("the list of shards was changed after it was written")
    except OSError as error:
        raise NemoLfrError(
            f"{path}: the file cannot be read ({error.strerror}), so the run cannot be resumed; check its permissions."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NemoLfrError(
            f"{path}: the file is damaged ({shorten(error, 200)}), so the run cannot be resumed; remove {config.out}, "
            "or choose another --out."
        ) from error
    return stored


def _shards_digest(shards: list[ShardSpec]) -> str:
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def _load_codec(
    config: TokenizeConfig, on_cpu: bool
) -> tuple[dict[str, Any], EntropyModel | None, "Codec[Any] | None", Callable[[str], bool]]:
    """Load the codec and the entropy model of a run.

    Args:
        config: options of the run.
        on_cpu: whether local processes will run the codec on the CPU.

    Returns:
        A description of the tokens as JSON values, the entropy model (None without compression), the codec (None
        unless `on_cpu` is set, since GPU and Ray workers load the codec themselves), and the codec's method `made`.
    """
    from nemo_lfr.io.token_file import Metadata
    from nemo_lfr.pretrained import load

    codec = load(config.model, "cpu", config.precision if on_cpu else "fp32")
    metadata = asdict(Metadata.of(codec))
    metadata.pop("written_by")
    codec.backend.load("encode")  # refuses a folder of ONNX files without encoder.onnx
    model = model_to_write(codec, config.compress, config.entropy_model)
    spec = metadata | {"levels": list(metadata["levels"]), "precision": config.precision}
    return spec, model, codec if on_cpu else None, codec.made


def _remove_leftovers(config: TokenizeConfig, out: Path, output: type[OutputFormat]) -> None:
    """Remove temporary files of killed runs, without following links.

    The caller must hold the lock of the output folder. If this run tokenizes only a part of the corpus, temporary
    files of other parts are kept.
    """
    staging = config.state / "staging"
    if staging.is_symlink():
        staging.unlink()
    if config.part is not None:
        for folder in staging.glob("*.*"):
            number = folder.name.partition(".")[0]
            if number.isdecimal() and config.part.owns(int(number)):
                shutil.rmtree(folder, ignore_errors=True)
        return
    shutil.rmtree(staging, ignore_errors=True)
    for folder in (config.state, ShardRecord.folder(out)):
        sweep(folder, None)
    sweep(out, (METADATA, "failures.jsonl", *output.summary_files))
