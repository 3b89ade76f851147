"""Find entropy models: a file that the user passes, the bundled model, or a file in a folder above the token file."""

import os
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from nemo_lfr.errors import EntropyModelError
from nemo_lfr.io.entropy.model import SUFFIX, EntropyModel
from nemo_lfr.spec import KnownCodec

BUNDLED = "default.lfrm"


def bundled_model_path() -> Path:
    """Return the path of the entropy model for the bundled codec."""
    return Path(str(files("nemo_lfr") / "weights" / BUNDLED))


@lru_cache(maxsize=1)
def bundled_model() -> EntropyModel:
    """Load the entropy model for the bundled codec."""
    return EntropyModel.read(bundled_model_path())


def model_to_write(
    codec: KnownCodec, compress: bool, model: EntropyModel | str | os.PathLike[str] | None
) -> EntropyModel | None:
    """Return the entropy model for a new token file, or None if the file is not compressed.

    Args:
        codec: codec of the tokens.
        compress: whether to compress the file. A file is also compressed if `model` is not None.
        model: entropy model or its path; None for the bundled model.

    Raises:
        EntropyModelError: if no suitable model exists, see `model_for`.
    """
    return model_for(codec, model) if compress or model is not None else None


def as_model(model: EntropyModel | str | os.PathLike[str] | None) -> EntropyModel | None:
    """Return an entropy model. If `model` is a path, read the model from this file. None is returned unchanged.

    Raises:
        EntropyModelError: if the file cannot be read.
    """
    return model if model is None or isinstance(model, EntropyModel) else EntropyModel.read(model)


def model_for(codec: KnownCodec, model: EntropyModel | str | os.PathLike[str] | None = None) -> EntropyModel:
    """Return the entropy model for a codec's tokens, and check that the model fits the codec.

    Args:
        codec: codec of the tokens.
        model: entropy model or its path; None for the bundled model.

    Raises:
        EntropyModelError: if the file of the model cannot be read, or if the model and the codec differ in levels or
            number of codebooks. Also if `model` is None and the bundled model was fitted to another codec.
    """
    found = as_model(model)
    if found is None:
        found = bundled_model()
        if not codec.made(found.spec.fingerprint):
            raise EntropyModelError(
                f"{codec.name}: nemo_lfr has no entropy model for this codec; fit one with `nemo-lfr entropy fit "
                f"TOKENS --out NAME{SUFFIX}` and pass it as --entropy-model NAME{SUFFIX}."
            )
    check_layout(found, codec.spec.levels, codec.spec.num_codebooks, codec.name)
    return found


def model_if_any(codec: KnownCodec) -> EntropyModel | None:
    """Return the bundled entropy model if it was fitted to this codec; otherwise None."""
    try:
        return model_for(codec)
    except EntropyModelError:
        return None


def check_layout(model: EntropyModel, levels: tuple[int, ...], num_codebooks: int, name: object) -> None:
    """Check that an entropy model has the levels and the number of codebooks of the tokens.

    Args:
        model: the entropy model.
        levels: number of levels in each FSQ dimension of one codebook of the tokens.
        num_codebooks: number of codebooks of the tokens.
        name: name of the tokens for the message, such as the path of their file.

    Raises:
        EntropyModelError: if the model and the tokens differ in levels or number of codebooks.
    """
    spec = model.spec
    if (spec.levels, spec.num_codebooks) != (tuple(levels), num_codebooks):
        raise EntropyModelError(
            f"{name}: the tokens have {num_codebooks} codebooks with levels {list(levels)}, but the entropy model "
            f"{model.hash} has {spec.num_codebooks} codebooks with levels {list(spec.levels)}; pass another model as "
            "--entropy-model."
        )


def find_model(
    wanted: str, beside: Path, written_by: str, passed: EntropyModel | str | os.PathLike[str] | None = None
) -> EntropyModel:
    """Find the entropy model that a token file was compressed with.

    Args:
        wanted: hash of the model, as stored in the token file.
        beside: path of the token file. `HASH.lfrm` is searched for in the folder of this file and in all folders
            above it, the nearest first. If the path leads through links, the target's folders are searched too.
        written_by: program that wrote the token file, for messages.
        passed: entropy model or its path, which is tried first; None if the user passed none.

    Raises:
        EntropyModelError: if no model is found, or the model is damaged or has another hash.
    """
    first = as_model(passed)
    if first is not None and first.hash == wanted:
        return first
    if bundled_model_path().is_file() and bundled_model().hash == wanted:
        return bundled_model()
    for folder in dict.fromkeys([*beside.absolute().parents, *Path(os.path.realpath(beside)).parents]):
        path = folder / f"{wanted}{SUFFIX}"
        if os.path.isfile(path):  # unlike Path.is_file, False in folders without permission
            model = EntropyModel.read(path)
            if model.hash != wanted:
                raise EntropyModelError(
                    f"{path}: the file contains the entropy model {model.hash}, not {wanted}; replace it."
                )
            return model
    if first is not None:
        raise EntropyModelError(
            f"{beside}: the file was compressed with the entropy model {wanted}, but the passed model is "
            f"{first.hash}; pass {wanted}{SUFFIX}."
        )
    raise EntropyModelError(
        f"{beside}: the file was compressed with the entropy model {wanted}, which was not found. Get "
        f"{wanted}{SUFFIX} from the author of the file and put it beside the file or into a folder above it. If "
        f"the file was written with the bundled codec of {written_by}, that version contains the model as "
        f"weights/{BUNDLED}."
    )
