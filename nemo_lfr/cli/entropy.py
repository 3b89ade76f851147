"""Command `nemo-lfr entropy fit`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from nemo_lfr.cli.command import Command, Group
from nemo_lfr.cli.identify import TOKEN_SUFFIX
from nemo_lfr.cli.inputs import check_input
from nemo_lfr.cli.options import Number, UserPath, count_option, overwrite_option
from nemo_lfr.cli.results import EntropyFitResult
from nemo_lfr.cli.session import begin_work, fail, note, print_line
from nemo_lfr.errors import EntropyModelError, TokenFileError
from nemo_lfr.spec import same_fingerprint

KEYS = ("sample_rate", "samples_per_frame", "levels", "num_codebooks", "fingerprint")


@click.group(cls=Group, short_help="Fit entropy models that compress token files.")
def entropy() -> None:
    """Fit entropy models, which compress token files without loss."""


@entropy.command(cls=Command, result=EntropyFitResult, short_help="Fit an entropy model to tokens.")
@click.argument("tokens", nargs=-1, required=True, type=UserPath(exists=True))
@click.option("--out", type=UserPath(dir_okay=False), required=True, help="Model file to write, NAME.lfrm.")
@click.option(
    "--epochs",
    type=Number(0.1, 1000),
    metavar="NUMBER",
    default=16,
    show_default=True,
    help="Number of passes over the tokens.",
)
@count_option(
    "--max-frames",
    "Maximum number of frames to fit the model on. If there are more frames, utterances are chosen at random.",
    250_000,
)
@count_option("--seed", "Random seed.", 0, low=0)
@overwrite_option
def fit(
    tokens: Sequence[Path], out: Path, epochs: float, max_frames: int, seed: int, overwrite: bool
) -> dict[str, Any]:
    """Fit an entropy model to tokens of one codec.

    TOKENS are .lfr files, folders of .lfr files, or folders that `tokenize` wrote. About an hour of speech is enough.
    Fitting takes some minutes on a CPU. 4 % of the utterances are held out to evaluate the model. Tokens that cannot
    be read are skipped, and the exit code is then 1.
    """
    from nemo_lfr.io.atomic import check_overwrite
    from nemo_lfr.io.entropy.fit import FitSettings
    from nemo_lfr.io.entropy.fit import fit as fit_model
    from nemo_lfr.io.entropy.model import SUFFIX, write_model

    if out.suffix != SUFFIX:
        raise EntropyModelError(f"--out {out}: not a name for an entropy model; pass a name that ends in {SUFFIX}.")
    check_overwrite(out, overwrite)
    utterances: list[Any] = []
    first: Any = None
    for path in tokens:
        if not path.is_dir():
            check_input(path, {TOKEN_SUFFIX}, is_only=len(tokens) == 1)
    for path, metadata, values in _read(tokens):
        first = first or (path, metadata)
        for key in KEYS:
            stored, expected = getattr(metadata, key), getattr(first[1], key)
            if stored != expected and not (key == "fingerprint" and same_fingerprint(stored, expected)):
                raise TokenFileError(
                    f"{path}: these tokens were made by a codec with {key} {stored}, but those in {first[0]} by a "
                    f"codec with {key} {expected}; pass tokens of one codec only."
                )
        utterances.append(values)
    if not utterances:
        raise EntropyModelError(
            f"{', '.join(map(str, tokens))}: no tokens found; pass .lfr files or folders that contain them."
        )
    begin_work()
    codec = first[1]
    settings = FitSettings(epochs=epochs * 0.8, rounded_epochs=epochs * 0.2, max_frames=max_frames, seed=seed)
    model, figures = fit_model(
        utterances,
        codec.levels,
        codec.num_codebooks,
        codec.fingerprint,
        settings,
        lambda line: note(f"nemo-lfr: {line}"),
    )
    write_model(model, out, overwrite)
    saved = 1 - figures["bits_per_frame"] / figures["uniform_bits_per_frame"]
    print_line(out)
    note(
        f"nemo-lfr: entropy model {model.hash}: {figures['bits_per_frame']:.2f} bits per frame on held-out "
        f"utterances, {100 * saved:.1f} % less than without a model"
    )
    return {
        "output": str(out),
        "entropy_model": model.hash,
        "file_bytes": len(model.to_bytes()),
        **{name: round(value, 3) for name, value in figures.items()},
        "saved_share": round(saved, 4),
    }


def _read(paths: Sequence[Path]) -> Iterator[tuple[Path, Any, Any]]:
    """Yield the path, metadata and tokens [C, T] of every utterance.

    Utterances that cannot be read are recorded as failures.

    Raises:
        TokenFileError: if utterances were found but none could be read.
    """
    from nemo_lfr.corpus.records import METADATA
    from nemo_lfr.corpus.token_folder import TokenFolder
    from nemo_lfr.io.folders import find_files
    from nemo_lfr.io.token_file import TokenReader

    read = 0
    errors: list[tuple[Path, TokenFileError]] = []
    for path in paths:
        if (path / METADATA).is_file():
            folder = TokenFolder(path)
            for shard, _ in enumerate(folder.counts):
                for utterance in folder.read(shard):
                    if isinstance(utterance, TokenFileError):
                        errors.append((path, utterance))
                    else:
                        read += 1
                        yield path, folder.codec, utterance.tokens.numpy()
            continue
        unread: list[OSError] = []
        files = find_files(path, {TOKEN_SUFFIX}, report=note, unread=unread) if path.is_dir() else [path]
        for problem in unread:
            fail(problem.filename, problem)
        for file in files:
            try:
                with TokenReader(file) as reader:
                    values = reader.read()
                read += 1
                yield file, reader.metadata, values
            except TokenFileError as error:
                errors.append((file, error))
    if errors and not read:
        begin_work()
        raise errors[-1][1]
    for source, damage in errors:
        fail(source, damage)
