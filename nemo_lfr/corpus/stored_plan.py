"""Compare the stored plan of an earlier run with the current corpus, codec and options."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nemo_lfr.corpus.audio_sample import sample_audio
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.sources import READER
from nemo_lfr.corpus.sources.base import CorpusReader
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.plugins import naming_extension
from nemo_lfr.spec import same_fingerprint

logger = logging.getLogger(__name__)

NAMED = 3  # maximum number of files in a warning


def check_stored_plan(
    stored: dict[str, Any],
    expected: dict[str, Any],
    config: TokenizeConfig,
    corpus: CorpusReader,
    made: Callable[[str], bool],
) -> None:
    """Check that a stored plan was made for this run's corpus, codec and options.

    If an older version of this package stored the plan, or if the corpus was moved, the plan is updated.

    Args:
        stored: the stored plan, which is updated in place.
        expected: values that the plan must have.
        config: options of the run.
        corpus: reader of the corpus.
        made: function that returns whether tokens with a certain fingerprint are from the current codec.

    Raises:
        NemoLfrError: if the plan was made for another corpus, codec or options.
    """
    _adopt_codec(stored, expected["codec"], config, made)
    _adopt_corpus(stored, expected, config, corpus)
    _check_same_run(stored, expected, config, corpus)


def _adopt_codec(
    stored: dict[str, Any], spec: dict[str, Any], config: TokenizeConfig, made: Callable[[str], bool]
) -> None:
    """Replace the codec in a stored plan by `spec` if the plan has an older fingerprint of the same codec.

    `made` returns whether a fingerprint belongs to this codec.

    Raises:
        NemoLfrError: if the run writes `.lfr` files, and `same_fingerprint` is false for the two fingerprints.
    """
    if (older := _older_fingerprint(stored.get("codec"), spec, made)) is None:
        return
    # Token files contain the fingerprint, and their reader accepts older fingerprints only for the bundled codec.
    if config.kind == "lfr" and not same_fingerprint(older, spec["fingerprint"]):
        raise NemoLfrError(
            f"{config.out}: an older version of nemo_lfr started this run, with the fingerprint {older} for this "
            f"codec; this version computes {spec['fingerprint']}. All .lfr files of a run must have the same "
            "fingerprint: resume the run with the older version, or choose another --out."
        )
    stored["codec"] = spec


def _adopt_corpus(
    stored: dict[str, Any], expected: dict[str, Any], config: TokenizeConfig, corpus: CorpusReader
) -> None:
    """Update a stored plan if its corpus is the same, but has another hash or folder.

    The hash differs if an older version of nemo_lfr computed it. The folder differs if the corpus was moved.
    """
    with naming_extension(corpus, READER):
        if stored.get("corpus") != expected["corpus"]:
            shards = corpus.older_shards(str(stored.get("corpus")), stored["parts"], config.shard_size)
            if shards is not None and len(shards) == len(stored["parts"]):
                stored |= {"corpus": expected["corpus"], "parts": shards}
        if _has_same_base(stored, expected["audio_dir"], config):
            if stored.get("corpus") == expected["corpus"]:
                _check_audio(stored, expected["audio_dir"], config, corpus)
            stored["audio_dir"] = expected["audio_dir"]


def _check_audio(stored: dict[str, Any], folder: str | None, config: TokenizeConfig, corpus: CorpusReader) -> None:
    """Check that a corpus that was moved has the audio of the first run.

    `folder` is the current path of the folder that relative paths start from; None if the corpus has no relative
    paths.

    Raises:
        NemoLfrError: if the audio folder of the first run no longer exists, and all compared files have other hashes
            than in the first run.
    """
    earlier = stored.get("audio_dir")
    if folder is None or not isinstance(earlier, str) or os.path.lexists(earlier):
        return
    hashes = stored.get("audio")
    hashes = hashes if isinstance(hashes, dict) else {}  # a plan of an older version has none
    sample = sample_audio(corpus, stored["parts"], corpus.base)
    sample = {key: pair for key, pair in sample.items() if key in hashes}
    different = [file for key, (file, file_hash) in sample.items() if file_hash != hashes[key]]
    if different and len(different) == len(sample):
        raise NemoLfrError(
            f"{config.out}: the folder contains the tokens of other audio. That audio was in {earlier}, which no "
            f"longer exists, and {different[0]} differs from the file that was there; choose another --out."
        )
    if different:  # files may have been repaired after the first run
        logger.warning(
            "%s: the corpus was moved from %s, which no longer exists, and %d of %d compared files differ from the "
            "earlier ones (%s). If this is other audio with the same file names, stop, and choose another --out.",
            config.out, earlier, len(different), len(sample), ", ".join(map(str, different[:NAMED])),
        )  # fmt: skip
    if not sample:
        logger.warning(
            "%s: the corpus was moved from %s, which no longer exists, to %s. If this is other audio with the same "
            "file names, stop, and choose another --out.",
            config.out, earlier, folder,
        )  # fmt: skip


def _check_same_run(
    stored: dict[str, Any], expected: dict[str, Any], config: TokenizeConfig, corpus: CorpusReader
) -> None:
    """Raise NemoLfrError if a value in a stored plan differs from the value in `expected`."""
    differ = sorted(key for key in expected if stored.get(key) != expected[key])
    if not differ:
        return
    sources = stored.get("source"), config.source
    reasons = "; ".join(_difference(key, stored.get(key), expected[key], *sources) for key in differ)
    remedy = "choose another --out"
    if "corpus" in differ and sources[0] in (None, config.source):
        remedy = "restore the corpus, or choose another --out"
    if differ == ["audio_dir"] and isinstance(stored["audio_dir"], str):
        remedy += f", or {corpus.base_advice.format(stored['audio_dir'])} if it is the same audio"
    raise NemoLfrError(f"{config.out}: the folder contains the tokens of another run ({reasons}); {remedy}.")


def _has_same_base(plan: dict[str, Any], folder: str | None, config: TokenizeConfig) -> bool:
    """Return whether relative paths still start from the folder in the stored plan.

    The result is also True if the folder in the plan no longer exists, because the corpus may have been moved.

    `folder` is the folder that relative paths start from now; None if the corpus has no relative paths.
    """
    stored = plan.get("audio_dir")
    # Older versions stored the value of --audio-dir for some corpora, even if it had no effect.
    if "source" not in plan and stored == config.audio_dir:
        return True
    if folder is None:  # if an absolute path is inside the stored folder, the clip's id is relative to this folder
        return isinstance(stored, str) and replace(config, audio_dir=stored).open().base is None
    if not isinstance(stored, str):
        return False
    try:
        return not os.path.lexists(stored) or os.path.samefile(stored, folder)
    except OSError:
        return False


def _difference(key: str, stored: Any, expected: Any, stored_source: Any, source: str) -> str:
    """Describe how a value in the stored plan differs from the current value, for an error message.

    Args:
        key: key of the plan.
        stored: value in the stored plan.
        expected: current value.
        stored_source: path of the corpus in the stored plan; None in the plan of an older version.
        source: path of the corpus.
    """
    if key == "corpus" and stored_source == source:
        return f"the corpus {source} was changed after the run was started"
    if key in ("corpus", "codec"):
        if key == "corpus" and stored_source:
            return f"the corpus was {stored_source}, but is now {source}"
        return f"the {key} differs"
    if key == "audio_dir":
        names = ["none" if folder is None else folder for folder in (stored, expected)]
        return f"the folder that relative paths start from was {names[0]}, but is now {names[1]}"
    option = {"kind": "--format", "entropy model": "the entropy model"}.get(key, f"--{key.replace('_', '-')}")
    return f"{option} was {stored!r}, but is now {expected!r}"


def _older_fingerprint(stored: Any, spec: dict[str, Any], made: Callable[[str], bool]) -> str | None:
    """Return the fingerprint in a stored plan if an older version of this package computed it for the current codec.

    The result is None if the fingerprint is current or belongs to another codec, or if `stored` and `spec` differ in
    anything except the fingerprint.

    Args:
        stored: value of the key "codec" in the stored plan.
        spec: the current codec, in the same form.
        made: function that returns whether tokens with a certain fingerprint are from the current codec.
    """
    if not isinstance(stored, dict) or stored == spec or stored | {"fingerprint": spec["fingerprint"]} != spec:
        return None
    fingerprint = stored.get("fingerprint")
    if not isinstance(fingerprint, str) or not (
        same_fingerprint(fingerprint, spec["fingerprint"]) or made(fingerprint)
    ):
        return None
    return fingerprint
