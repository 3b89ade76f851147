"""Command `nemo-lfr entropy fit`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from nemo_lfr.cli.identify import TOKEN_SUFFIX
from nemo_lfr.cli.options import UserPath
from nemo_lfr.cli.terminal import echo_stderr, echo_stdout
from nemo_lfr.errors import EntropyModelError, TokenFileError, shorten
from nemo_lfr.spec import same_fingerprint

KEYS = ("sample_rate", "samples_per_frame", "levels", "num_codebooks", "fingerprint")


@click.group(short_help="Fit entropy models that compress token files.")
def entropy() -> None:
    """Make entropy models, which compress token files without loss."""


@entropy.command(short_help="Fit an entropy model to tokens.")
@click.argument("tokens", nargs=-1, required=True, type=UserPath())
@click.option("--out", type=UserPath(dir_okay=False), required=True, help="Model file, NAME.lfrm.")
@click.option("--epochs", type=click.FloatRange(min=0.1, max=1000), default=16, show_default=True)
@click.option(
    "--max-frames",
    type=click.IntRange(min=1),
    default=250_000,
    show_default=True,
    help="Frames to fit; utterances are sampled if there are more.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def fit(
    tokens: Sequence[Path], out: Path, epochs: float, max_frames: int, seed: int, overwrite: bool, as_json: bool
) -> None:
    """Fit an entropy model to tokens of one codec: .lfr files, folders of them, or folders that `tokenize` wrote.

    About an hour of speech suffices. The fit takes some minutes on a CPU. 4 percent of the utterances are held out to
    measure the model.
    """
    from nemo_lfr.io.atomic import check_overwrite
    from nemo_lfr.io.entropy.fit import FitSettings
    from nemo_lfr.io.entropy.fit import fit as fit_model
    from nemo_lfr.io.entropy.model import SUFFIX, write_model

    if out.suffix != SUFFIX:
        raise EntropyModelError(f"--out {out}: an entropy model's name ends in {SUFFIX}.")
    check_overwrite(out, overwrite)
    utterances: list[Any] = []
    first: Any = None
    for path, metadata, values in _read(tokens):
        first = first or (path, metadata)
        for key in KEYS:
            stored, expected = getattr(metadata, key), getattr(first[1], key)
            if stored != expected and not (key == "fingerprint" and same_fingerprint(stored, expected)):
                raise TokenFileError(
                    f"{path}: made by a codec with {key} {stored}, but {first[0]} by one with "
                    f"{expected}; fit a model to the tokens of one codec."
                )
        utterances.append(values)
    if not utterances:
        raise EntropyModelError(f"{', '.join(map(str, tokens))}: no tokens found.")
    codec = first[1]
    settings = FitSettings(epochs=epochs * 0.8, rounded_epochs=epochs * 0.2, max_frames=max_frames, seed=seed)
    model, figures = fit_model(
        utterances,
        codec.levels,
        codec.num_codebooks,
        codec.fingerprint,
        settings,
        lambda line: echo_stderr(f"nemo-lfr: {line}"),
    )
    write_model(model, out, overwrite)
    saved = 1 - figures["bits a frame"] / figures["uniform bits a frame"]
    values = {
        "output": str(out),
        "model": model.hash,
        "bytes": len(model.to_bytes()),
        **{name: round(value, 3) for name, value in figures.items()},
        "saved": round(saved, 4),
    }
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    echo_stdout(out)
    echo_stderr(
        f"nemo-lfr: entropy model {model.hash}: {figures['bits a frame']:.2f} bits a frame on held-out utterances, "
        f"{100 * saved:.1f} % less than uniform tokens have"
    )


def _read(paths: Sequence[Path]) -> Iterator[tuple[Path, Any, Any]]:
    """Yield the path, metadata and tokens [C, T] of every utterance.

    Utterances that cannot be read are skipped; their count and the last error are printed on stderr.

    Raises:
        TokenFileError: if utterances were found but none could be read.
    """
    from nemo_lfr.corpus.records import METADATA
    from nemo_lfr.corpus.token_folder import TokenFolder
    from nemo_lfr.io.folders import find_files
    from nemo_lfr.io.token_file import TokenReader

    read = failed = 0
    error: Exception | None = None
    for path in paths:
        if (path / METADATA).is_file():
            folder = TokenFolder(path)
            for shard, _ in enumerate(folder.counts):
                for utterance in folder.read(shard):
                    if isinstance(utterance, TokenFileError):
                        failed, error = failed + 1, utterance
                    else:
                        read += 1
                        yield path, folder.codec, utterance.tokens.numpy()
            continue
        files = find_files(path, {TOKEN_SUFFIX}, report=echo_stderr) if path.is_dir() else [path]
        for file in files:
            try:
                with TokenReader(file) as reader:
                    values = reader.read()
                read += 1
                yield file, reader.metadata, values
            except TokenFileError as problem:
                failed, error = failed + 1, problem
    if error is not None:
        if not read:
            raise error
        echo_stderr(f"nemo-lfr: {failed} utterances could not be read; the last one: {shorten(error, 300)}")
