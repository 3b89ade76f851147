"""Decode a folder of tokens to one audio file for each utterance."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import soundfile

from nemo_lfr.codec.arrays import to_numpy
from nemo_lfr.codec.codec import Codec
from nemo_lfr.corpus.ids import UniqueIds, path_inside
from nemo_lfr.corpus.token_folder import TokenFolder, TokenizedUtterance
from nemo_lfr.errors import NemoLfrError, OutputExistsError, shorten
from nemo_lfr.io.atomic import Sweeper
from nemo_lfr.io.audio import AudioWriter
from nemo_lfr.io.locate import expand_home
from nemo_lfr.pretrained import load


def decode_folder(
    tokens: Path,
    out: Path,
    kind: str = "wav",
    *,
    model: str | None = None,
    device: str | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    precision: str = "fp32",
    on_start: Callable[[int], None] = lambda count: None,
    on_kept: Callable[[Path], None] = lambda path: None,
) -> Iterator[Path | NemoLfrError]:
    """Decode a folder of tokens, written by `tokenize`, to audio files.

    Args:
        tokens: the folder of tokens.
        out: output folder. Each file is named after the id of its utterance. Ids are changed if they are not unique or
            cannot be used as paths inside this folder.
        kind: format of the audio files, "wav" or "flac".
        model: checkpoint or Hub id of the codec that produced the tokens; None for the bundled codec.
        device: "cpu" or "cuda"; None for a GPU if one is available, else the CPU.
        limit: maximum number of utterances, including those that fail; None for all.
        overwrite: whether to replace existing audio files. Otherwise, an existing file is kept, and OutputExistsError
            is yielded if the file does not have the sample rate and number of samples of its utterance.
        verify: whether to compare the hash of each token file with the record of the run. Otherwise, only the size is
            compared.
        precision: precision of the codec; see `nemo_lfr.load`.
        on_start: callback that receives the number of utterances to decode, after the folder and codec were checked.
        on_kept: callback that receives the path of each existing file that is kept, before the path is yielded.

    Yields:
        The path of each audio file, or the error that prevented its creation.

    Raises:
        NemoLfrError: if `tokens` cannot be read or has no utterances, if its tokens were produced by another codec, or
            if `out` is the same folder as `tokens`.
        OSError: if audio cannot be written.
    """
    folder, out = TokenFolder(tokens, verify=verify), expand_home(out)
    if out.exists() and out.samefile(folder.path):
        raise NemoLfrError(f"{out}: this is the folder of the tokens; choose another --out.")
    total = sum(folder.counts)
    if not total:
        raise NemoLfrError(f"{tokens}: this folder has no utterances; failures.jsonl lists the clips that failed.")
    codec = _codec_of(folder, load(model, device, precision))
    out.mkdir(parents=True, exist_ok=True)
    ids, leftovers = UniqueIds(), Sweeper()
    on_start(total if limit is None else min(total, limit))
    count = 0
    for shard in range(len(folder.counts)):
        for utterance in folder.read(shard):
            if count == limit:
                return
            count += 1
            if not isinstance(utterance, TokenizedUtterance):
                yield utterance
                continue
            try:
                path = out / f"{ids.add(utterance.id)}.{kind}"
                if path_inside(out, str(path.parent.relative_to(out))) is None:
                    raise NemoLfrError(f"{path}: this path leads out of {out} through a link; remove the link.")
                if path.exists() and not path.is_file():
                    raise NemoLfrError(f"{path}: not a regular file; remove it, or choose another --out.")
                leftovers.sweep(path)
                if overwrite or not path.exists():
                    _decode(utterance, codec, path, overwrite)
                else:
                    _check_existing(path, codec.sample_rate, utterance.num_samples)
                    on_kept(path)
                yield path
                continue
            except NemoLfrError as error:
                failed = error
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                failed = NemoLfrError(f"{error.filename}: {error.strerror}.")
            failed.source = f"{tokens}, utterance {utterance.id}"
            yield failed


def _check_existing(path: Path, sample_rate: int, num_samples: int) -> None:
    """Raise NemoLfrError if an existing audio file cannot be the decoded audio of an utterance.

    Args:
        path: the file.
        sample_rate: sample rate of the codec in Hz.
        num_samples: number of samples of the utterance.
    """
    try:
        with open(path, "rb") as file:  # `info` may refuse a path that is not UTF-8
            found = soundfile.info(file)
    except soundfile.SoundFileError:
        problem = "is not an audio file"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    else:
        if (found.frames, found.samplerate) == (num_samples, sample_rate):
            return
        problem = f"has {found.frames} samples at {found.samplerate} Hz instead of {num_samples} at {sample_rate} Hz"
    raise OutputExistsError(
        f"{path}: this file exists, but {problem}; choose another --out, or pass --overwrite (overwrite=True)."
    )


def _codec_of(folder: TokenFolder, codec: Codec[Any]) -> Codec[Any]:
    """Return a codec after checking that it can decode, and that it made the tokens of a folder."""
    codec.backend.load("decode")  # refuses a folder of ONNX files without decoder.onnx
    if not codec.made(folder.codec.fingerprint):
        made = shorten(folder.metadata["codec"].get("model"))
        raise NemoLfrError(
            f"{folder.path}: the tokens were made by the codec {made} (fingerprint {folder.codec.fingerprint}), not "
            f"by {codec.name} (fingerprint {codec.fingerprint}); pass the codec that made the tokens as --model."
        )
    return codec


def _decode(utterance: TokenizedUtterance, codec: Codec[Any], path: Path, overwrite: bool) -> None:
    """Decode an utterance to a file, unless another process has written the file and `overwrite` is not set."""
    audio, _ = codec.decode(utterance.tokens)
    # A link to a missing file does not count as existing. The audio file replaces the link.
    replace = overwrite or path.is_symlink()
    with suppress(OutputExistsError), AudioWriter(path, codec.sample_rate, overwrite=replace) as writer:
        writer.write(to_numpy(audio[0, : utterance.num_samples]))
