"""List the utterances of a corpus with one of Lhotse's recipes, for `nemo-lfr prepare lhotse:NAME`."""

import difflib
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.cut_audio import forbid_programs
from nemo_lfr.io.layouts import CorpusUtterance
from nemo_lfr.io.shortage import require
from nemo_lfr.io.splits import split_of_name

logger = logging.getLogger(__name__)

PREFIX = "lhotse:"


def lhotse_recipe(name: str) -> Callable[[Path], Iterator[CorpusUtterance]]:
    """Return a function that lists the utterances of a corpus with a Lhotse recipe.

    The function has the same signature as those in `nemo_lfr.io.layouts.LAYOUTS`. Each recording becomes one
    utterance. Its text joins the texts of all supervisions of the recording, and its speaker and language are those of
    the first supervision. Unlike the functions in `LAYOUTS`, recipes stop at the first file that they cannot read.

    Args:
        name: name of the recipe, such as "ljspeech" for `lhotse.recipes.prepare_ljspeech`.

    Raises:
        NemoLfrError: if Lhotse has no such recipe, if the recipe needs other arguments besides the folder of the
            corpus, or if it starts other programs.
        MissingExtraError: if Lhotse is not installed.
    """
    recipes = require("lhotse.recipes")
    names = [key.removeprefix("prepare_") for key in dir(recipes) if key.startswith("prepare_")]
    if name not in names:
        similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "`lhotse prepare --help` lists the recipes."
        raise NemoLfrError(f"Lhotse has no recipe {shorten(name)!r}; {hint}")
    function = getattr(recipes, f"prepare_{name}")
    if "subprocess" in inspect.getsource(inspect.getmodule(function)):  # type: ignore[arg-type]  # never None
        raise NemoLfrError(
            f"Lhotse's recipe {name} starts other programs, which is not allowed; run it yourself with `lhotse "
            f"prepare`, and pass the manifests that it writes to `nemo-lfr tokenize`."
        )
    first, *others = inspect.signature(function).parameters.values()
    missing = [other.name for other in others if other.default is other.empty and other.name != "output_dir"]
    if missing:
        raise NemoLfrError(
            f"Lhotse's recipe {name} needs other arguments besides {first.name}: {', '.join(missing)}; run it "
            f"yourself with `lhotse prepare`, and pass the manifests that it writes to `nemo-lfr tokenize`."
        )

    def read(corpus: Path) -> Iterator[CorpusUtterance]:
        forbid_programs()
        with tempfile.TemporaryDirectory() as folder:
            output = {"output_dir": folder} if any(other.name == "output_dir" for other in others) else {}
            try:
                manifests = function(corpus, **output)
            except Exception as error:  # a recipe may raise anything
                reason = shorten(" ".join(str(error).split()) or "no reason given", 300)
                remedy = (
                    "install the package that the recipe needs"
                    if isinstance(error, ImportError)
                    else "check that this is the folder that the recipe expects"
                )
                raise NemoLfrError(
                    f"{corpus}: Lhotse's recipe {name} failed ({type(error).__name__}: {reason}); {remedy}."
                ) from error
            utterances = list(_utterances(manifests, corpus, name))  # before the temporary output folder is removed
        yield from utterances

    return read


def _utterances(manifests: Any, corpus: Path, name: str, split: str | None = None) -> Iterator[CorpusUtterance]:
    """Yield the utterances in `manifests`, the return value of a recipe.

    `manifests` is a dictionary with "recordings" and "supervisions", or a dictionary of such dictionaries, for example
    one for each split or language.
    """
    if not isinstance(manifests, Mapping):
        kind = type(manifests).__name__
        raise NemoLfrError(
            f"Lhotse's recipe {name} returns {kind}, not recordings and supervisions; run it yourself with `lhotse "
            "prepare`, and pass the manifests that it writes to `nemo-lfr tokenize`."
        )
    if "recordings" not in manifests:
        for key, part in manifests.items():
            yield from _utterances(part, corpus, name, split or split_of_name(str(key)))
        return
    supervisions: dict[str, list[Any]] = {}
    for supervision in manifests.get("supervisions") or ():
        supervisions.setdefault(supervision.recording_id, []).append(supervision)
    is_joined = False
    for recording in manifests["recordings"]:
        own = sorted(supervisions.get(recording.id, ()), key=lambda supervision: supervision.start)
        is_joined = is_joined or len(own) > 1
        yield _utterance(recording, own, corpus, split)
    if is_joined:
        logger.warning(
            "a recording with several supervisions becomes one utterance, with all texts joined in order and the "
            "speaker of the first supervision"
        )


def _utterance(recording: Any, supervisions: list[Any], corpus: Path, split: str | None) -> CorpusUtterance:
    labels: dict[str, str] = {}
    if text := " ".join(supervision.text for supervision in supervisions if supervision.text):
        labels["text"] = text
    language = supervisions[0].language if supervisions else None
    if language:
        labels = {"lang": language} | labels
    speaker = str(supervisions[0].speaker or "") if supervisions else ""
    path, problem = _path(recording, corpus)
    return CorpusUtterance(path, speaker, split, labels, problem)


def _path(recording: Any, corpus: Path) -> tuple[Path, str | None]:
    """Return the path of a recording relative to the corpus, and an error message or None.

    If the recording is not one file in the corpus, the path is its id.
    """
    sources = recording.sources
    if len(sources) != 1 or sources[0].type != "file":
        kinds = shorten([source.type for source in sources])
        return Path(recording.id), f"the recording has sources of type {kinds}; expected one file"
    path = Path(os.path.abspath(sources[0].source))
    if not path.is_relative_to(corpus):
        return Path(recording.id), f"the file {shorten(path)} is not in the folder of the corpus"
    problem = "the recipe modifies the audio of this recording, so its file cannot be used"
    return path.relative_to(corpus), problem if recording.transforms else None
