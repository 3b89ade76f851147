"""Lookup of entropy models: in the package, by path, or next to the token file."""

import os
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from nemo_lfr.errors import EntropyModelError
from nemo_lfr.io.entropy.model import SUFFIX, EntropyModel
from nemo_lfr.spec import KnownCodec

BUNDLED = "default.lfrm"


def bundled_model_path() -> Path:
    """Return the path of the entropy model of the bundled codec."""
    return Path(str(files("nemo_lfr") / "weights" / BUNDLED))


@lru_cache(maxsize=1)
def bundled_model() -> EntropyModel:
    """Load the entropy model of the bundled codec."""
    return EntropyModel.read(bundled_model_path())


def model_to_write(
    codec: KnownCodec, compress: bool, model: EntropyModel | str | os.PathLike[str] | None
) -> EntropyModel | None:
    """Return the model for a new token file; None for packed frames.

    Args:
        codec: the codec of the tokens.
        compress: whether to compress; otherwise the result is None.
        model: a model or its path; None for the bundled one.

    Raises:
        EntropyModelError: if there is no suitable model, see `model_for`.
    """
    return model_for(codec, model) if compress or model is not None else None


def as_model(model: EntropyModel | str | os.PathLike[str] | None) -> EntropyModel | None:
    """Return a model, reading it if its path is passed.

    Raises:
        EntropyModelError: if the file cannot be read.
    """
    return model if model is None or isinstance(model, EntropyModel) else EntropyModel.read(model)


def model_for(codec: KnownCodec, model: EntropyModel | str | os.PathLike[str] | None = None) -> EntropyModel:
    """Return the entropy model for a codec's tokens: `model` or the bundled one.

    Args:
        codec: the codec of the tokens.
        model: a model or its path; None for the bundled one.

    Raises:
        EntropyModelError: if the model is for other levels, or `model` is None and the package has none for `codec`.
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
    """Return the bundled model if it is for this codec, else None."""
    try:
        return model_for(codec)
    except EntropyModelError:
        return None


def check_layout(model: EntropyModel, levels: tuple[int, ...], num_codebooks: int, name: object) -> None:
    """Raise EntropyModelError unless a model has these levels and codebooks."""
    spec = model.spec
    if (spec.levels, spec.num_codebooks) != (tuple(levels), num_codebooks):
        raise EntropyModelError(
            f"{name}: has {num_codebooks} codebooks with levels {list(levels)}, but the entropy model {model.hash} is "
            f"for {spec.num_codebooks} with levels {list(spec.levels)}; pass another model as --entropy-model."
        )


def find_model(
    wanted: str, beside: Path, written_by: str, passed: EntropyModel | str | os.PathLike[str] | None = None
) -> EntropyModel:
    """Find the entropy model that a token file was compressed with.

    Args:
        wanted: hash of the model, from the token file.
        beside: path of the token file; its folder and the parent folder may contain `HASH.lfrm`.
        written_by: name of the writer in the token file, for messages.
        passed: a model or its path; if not None, no other place is searched.

    Raises:
        EntropyModelError: if no model is found, or the model is damaged or has another hash.
    """
    if passed is not None:
        model = as_model(passed)
        assert model is not None
        if model.hash != wanted:
            raise EntropyModelError(
                f"{beside}: compressed with the entropy model {wanted}, but the one passed is {model.hash}; pass "
                f"{wanted}{SUFFIX}."
            )
        return model
    if bundled_model_path().is_file() and bundled_model().hash == wanted:
        return bundled_model()
    folder = beside.absolute().parent
    for path in (folder / f"{wanted}{SUFFIX}", folder.parent / f"{wanted}{SUFFIX}"):
        if path.is_file():
            model = EntropyModel.read(path)
            if model.hash != wanted:
                raise EntropyModelError(f"{path}: is the entropy model {model.hash}, not {wanted}; replace it.")
            return model
    raise EntropyModelError(
        f"{beside}: compressed with the entropy model {wanted}, which was not found. Get {wanted}{SUFFIX} from the "
        "author of the file and pass it as --entropy-model, or put it beside the file. The model of a bundled codec "
        f"is weights/{BUNDLED} in the nemo_lfr that wrote the file ({written_by})."
    )
