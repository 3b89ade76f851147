"""Where entropy models come from: the package, a file that the user names, or a folder beside the token file."""

import os
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from nemo_lfr.errors import EntropyModelError
from nemo_lfr.io.entropy.model import SUFFIX, EntropyModel
from nemo_lfr.spec import KnownCodec

BUNDLED = "default.lfrm"


def bundled_model_path() -> Path:
    """The entropy model of the bundled codec."""
    return Path(str(files("nemo_lfr") / "weights" / BUNDLED))


@lru_cache(maxsize=1)
def bundled_model() -> EntropyModel:
    return EntropyModel.read(bundled_model_path())


def model_to_write(
    codec: KnownCodec, compress: bool, model: EntropyModel | str | os.PathLike[str] | None
) -> EntropyModel | None:
    """Return the model for a new token file, None for packed frames.

    Raises:
        EntropyModelError: as `model_for` does.
    """
    return model_for(codec, model) if compress or model is not None else None


def as_model(model: EntropyModel | str | os.PathLike[str] | None) -> EntropyModel | None:
    """Read a model that is given as a path.

    Raises:
        EntropyModelError: if it cannot be read.
    """
    return model if model is None or isinstance(model, EntropyModel) else EntropyModel.read(model)


def model_for(codec: KnownCodec, model: EntropyModel | str | os.PathLike[str] | None = None) -> EntropyModel:
    """Return the model to compress a codec's tokens with: the one passed, or the one inside the package.

    Raises:
        EntropyModelError: if the model is for other levels, or none was passed and the package has none for `codec`.
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
    """Return the model inside the package if it is for this codec."""
    try:
        return model_for(codec)
    except EntropyModelError:
        return None


def check_layout(model: EntropyModel, levels: tuple[int, ...], num_codebooks: int, name: object) -> None:
    """Raise EntropyModelError unless a model's frames have these levels and codebooks."""
    spec = model.spec
    if (spec.levels, spec.num_codebooks) != (tuple(levels), num_codebooks):
        raise EntropyModelError(
            f"{name}: has {num_codebooks} codebooks with levels {list(levels)}, but the entropy model {model.hash} is "
            f"for {spec.num_codebooks} with levels {list(spec.levels)}; pass another one as --entropy-model."
        )


def find_model(
    wanted: str, beside: Path, written_by: str, passed: EntropyModel | str | os.PathLike[str] | None = None
) -> EntropyModel:
    """Find the model that a token file was compressed with.

    Args:
        wanted: its hash, from the token file.
        beside: the token file; its folder, and the one above, may hold `HASH.lfrm`.
        written_by: from the token file, for messages.
        passed: a model or its path; the only place to look if given.

    Raises:
        EntropyModelError: if it is not found, or the file that was found is damaged or another model.
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
        f"{beside}: compressed with the entropy model {wanted}, which is not here. Ask whoever wrote "
        f"the file for {wanted}{SUFFIX} and pass it as --entropy-model, or put it beside the file; the model of a "
        f"bundled codec is inside the nemo_lfr that wrote the file ({written_by}), as weights/{BUNDLED}."
    )
