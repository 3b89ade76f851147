"""The command line: `nemo-lfr demo | encode | decode | info | prepare | tokenize | detokenize | evaluate | export`.

A thin layer: paths are checked before a model is loaded, results go to stdout, everything else to stderr, and a user's
mistake is one line and exit code 2. Heavy imports wait until a command needs them, so that `--help` is instant.
"""

import errno
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_lfr._version import __version__
from nemo_lfr.cli.entropy import entropy
from nemo_lfr.cli.evaluate import evaluate
from nemo_lfr.cli.identify import AUDIO, CHECKPOINT, ENTROPY_MODEL, TOKEN_SUFFIX, TOKENS, identify
from nemo_lfr.cli.options import Number, UserPath
from nemo_lfr.cli.terminal import lead_nowhere, note, progress, show
from nemo_lfr.cli.tokenize import detokenize, tokenize
from nemo_lfr.codec.cpu.malloc import configure_malloc
from nemo_lfr.errors import NemoLfrError, printable
from nemo_lfr.io.atomic import naming, sweep
from nemo_lfr.io.folders import AUDIO_SUFFIXES, find_files, find_matches
from nemo_lfr.io.layouts import LAYOUTS
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.shortage import shortage_of

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec
    from nemo_lfr.io.entropy.model import EntropyModel

OUTPUT_KINDS = ("wav", "flac")
# Files up to this long may be encoded together; longer ones stream through bounded memory.
BATCH_SECONDS = 60
# Hz of a reader that is only asked what its file's header says.
INFO_RATE = 22050
DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class Job:
    """One input file and where its result goes."""

    source: Path
    target: Path


def plan_jobs(
    inputs: Sequence[str],
    out: Path | None,
    suffixes: Collection[str],
    new_suffix: str,
    report: Callable[[str], None] = note,
) -> list[Job]:
    """Expand files, folders and globs into jobs; a folder's sub-folders are mirrored under `out`.

    An `out` that ends in `new_suffix` is the result of a single file, unless there is a folder of that name.

    Args:
        inputs: as typed.
        out: folder for the results, or the result of one file.
        suffixes: of the files to take from folders, in lower case.
        new_suffix: of the results.
        report: called for each folder with the files that were passed over, after all else has been checked.

    Raises:
        NemoLfrError: if an input is missing or empty, or two inputs would write one file.
    """
    passed_over: list[str] = []
    single = names_a_file(out, new_suffix)
    jobs: list[Job] = []
    for text in inputs:
        text = str(expand_home(text)) if text.startswith("~") and not os.path.lexists(text) else text
        exists = text and os.path.lexists(text)  # "" would be the current folder
        matches = [Path(text)] if exists else [Path(match) for match in find_matches(text)]
        if not matches:
            raise NemoLfrError(f"{text or repr(text)}: no such file or folder.")
        if single and (len(inputs) > 1 or len(matches) > 1 or matches[0].is_dir()):
            raise NemoLfrError(
                f"--out {out} names one {new_suffix} file, but the input is not one file; give a folder as --out."
            )
        for path in sorted(matches):
            if path.is_dir():
                files = find_files(path, suffixes, report=passed_over.append)
                if not files and len(matches) == 1:
                    reason = f" ({passed_over[-1].partition('found; ')[2]})" if passed_over else ""
                    raise NemoLfrError(f"{path}: no {_kinds(suffixes)} file in this folder{reason}.")
                jobs += [Job(file, _renamed((out or path) / file.relative_to(path), new_suffix)) for file in files]
                continue
            check_input(path, suffixes)
            if single and out is not None:
                jobs.append(Job(path, out))
            else:
                jobs.append(Job(path, _renamed((out or path.parent) / path.name, new_suffix)))
    targets: dict[Path, Path] = {}
    for job in dict.fromkeys(jobs):
        if job.target in targets:
            raise NemoLfrError(f"{targets[job.target]} and {job.source} would both be written to {job.target}.")
        if job.target == job.source:
            raise NemoLfrError(f"{job.source} would be replaced by its own result; give --out.")
        targets[job.target] = job.source
    for line in passed_over:
        report(f"nemo-lfr: {line}")
    return list(dict.fromkeys(jobs))


def names_a_file(out: Path | None, suffix: str) -> bool:
    """Whether --out is the name of one result rather than a folder.

    Raises:
        NemoLfrError: if it is a file of another kind.
    """
    if out is None or out.is_dir():
        return False
    if out.suffix.lower() == suffix:
        return True
    if out.suffix.lower() in AUDIO_SUFFIXES | {TOKEN_SUFFIX}:
        raise NemoLfrError(f"--out {out}: the result is a {suffix} file; give a folder, or a name that ends so.")
    if out.exists():
        raise NemoLfrError(f"--out {out} is a file; give a folder, or a name that ends in {suffix} for one input.")
    return False


def output_kind(kind: str | None, out: Path | None) -> str:
    """Return the audio format that --format or the suffix of --out asks for; WAV by default.

    Raises:
        NemoLfrError: if they differ.
    """
    suffix = "" if out is None or out.is_dir() else out.suffix[1:].lower()
    if suffix not in OUTPUT_KINDS:
        return kind or OUTPUT_KINDS[0]
    if kind not in (None, suffix):
        raise NemoLfrError(f"--out {out} does not agree with --format {kind}; leave one of them out.")
    return suffix


def check_input(path: Path, suffixes: Collection[str]) -> None:
    """Refuse a file that is plainly what another command takes, rather than call it damaged.

    Raises:
        NemoLfrError: naming that command.
    """
    if not path.is_file():
        return
    wanted = TOKENS if TOKEN_SUFFIX in suffixes else AUDIO
    identity = identify(path)
    if identity.kind in {AUDIO.kind, TOKENS.kind, CHECKPOINT.kind} - {wanted.kind}:
        raise NemoLfrError(f"{path}: is {identity.text}, not {wanted.text}; {identity.advice}.")


def _renamed(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix)


def _kinds(suffixes: Collection[str]) -> str:
    return "audio" if len(suffixes) > 1 else next(iter(suffixes))


def pending(jobs: Sequence[Job], overwrite: bool, skip_existing: bool) -> list[Job]:
    """Return the jobs that are to be done.

    Raises:
        NemoLfrError: before any work, if a result exists that is neither to be replaced nor to be kept.
    """
    from nemo_lfr.io.atomic import check_overwrite

    if overwrite and skip_existing:
        raise NemoLfrError("--overwrite and --skip-existing exclude each other; give one of them.")
    kept = {job for job in jobs if skip_existing and os.path.isfile(job.target)}
    if kept:
        note(f"nemo-lfr: {len(kept)} of {len(jobs)} results exist and are kept.")
    left = [job for job in jobs if job not in kept]
    names: dict[Path, list[str]] = {}
    for job in left:
        names.setdefault(job.target.parent, []).append(job.target.name)
    for folder, own in names.items():
        sweep(folder, own)
    for job in left:
        check_overwrite(job.target, overwrite)
        _refuse_file_as_folder(job.target)
    return left


def jobs_to_do(
    inputs: Sequence[str], out: Path | None, suffixes: Collection[str], suffix: str, overwrite: bool, skip: bool
) -> list[Job]:
    """Plan the jobs, keep those that are to be done, and say which files are not among them.

    Raises:
        NemoLfrError: as `plan_jobs` and `pending` do.
    """
    passed_over: list[str] = []
    jobs = pending(plan_jobs(inputs, out, suffixes, suffix, passed_over.append), overwrite, skip)
    for line in passed_over:
        note(line)
    return jobs


def _refuse_file_as_folder(target: Path) -> None:
    """Raise if a file lies where a folder of a result is to be."""
    for folder in target.parents:
        if os.path.isdir(folder):
            return
        if os.path.lexists(folder):
            raise NemoLfrError(f"{target} cannot be written: {folder} is not a folder; choose another --out.")


def check_pipe(inputs: Sequence[str], out: Path | None) -> None:
    """Raise for a use of "-" that is no pipe: anything but from stdin or a file to stdout, or a terminal at an end."""
    if "" in inputs:
        raise NemoLfrError("'': no such file or folder.")
    if out is not None or len(inputs) > 2 or inputs[-1] != "-":
        raise NemoLfrError(f"{' '.join(inputs)}: with pipes give `-`, `- -` or `FILE -`, and no --out.")
    if sys.stdout is None or (inputs[0] == "-" and sys.stdin is None):
        raise NemoLfrError("-: stdin or stdout is closed; give it a pipe or a file.")
    if sys.stdout.isatty() or (inputs[0] == "-" and sys.stdin.isatty()):
        raise NemoLfrError("-: stdin and stdout must be pipes or files, not a terminal.")


@contextmanager
def spooled(source: str, suffix: str, new_suffix: str) -> Iterator[Job]:
    """A job between stdin or a file and stdout, through temporary files: for what needs to be there as a whole."""
    with tempfile.TemporaryDirectory(prefix="nemo-lfr-") as folder:
        path = Path(source)
        if source == "-":
            path = Path(folder, f"stdin{suffix}")
            with naming(path), open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        job = Job(path, Path(folder, f"stdout{new_suffix}"))
        try:
            yield job
        except NemoLfrError as error:
            raise NemoLfrError(str(error).replace(str(path), "stdin") if source == "-" else str(error)) from error
        with open(job.target, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def open_codec(model: str | None, device: str | None, precision: str) -> "Codec":
    from nemo_lfr.pretrained import LFR, load

    configure_malloc()
    if model is None:
        note(f"using the small codec inside nemo_lfr; for NVIDIA's weights (non-commercial) pass --model {LFR}")
    return load(model, device, precision)


def run_jobs(
    jobs: Sequence[Job], work: Callable[[list[Job]], Iterator[dict[str, Any]]], batch_size: int, as_json: bool
) -> None:
    """Do all jobs; a bad file is reported at the end and does not stop the others.

    `work` takes some jobs and yields a result for each, in order, as soon as it is written. When a batch fails, what
    is left of it is tried again job by job.
    """
    results: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    with progress(len(jobs)) as advance:
        for start in range(0, len(jobs), batch_size):
            batch = list(jobs[start : start + batch_size])
            for result in _attempts(batch, work, failures):
                results.append(result)
                advance(_line(result))
    if as_json:
        click.echo(json.dumps({"files": results, "failures": failures}, indent=2))
    else:
        for result in results:
            show(result["output"])
    if failures and len(jobs) == 1:
        _fail(failures[0]["error"])
    for failure in failures:
        note(f"nemo-lfr: failed: {failure['error']}")
    if failures:
        note(f"nemo-lfr: {len(failures)} of {len(jobs)} files failed.")
        sys.exit(1)


def _attempts(
    batch: list[Job], work: Callable[[list[Job]], Iterator[dict[str, Any]]], failures: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    done = 0
    try:
        for result in work(batch):
            done += 1
            yield result
    except (NemoLfrError, OSError) as error:
        if len(batch) > 1:
            for job in batch[done:]:
                yield from _attempts([job], work, failures)
        else:
            text = str(error)
            if not isinstance(error, NemoLfrError):
                text = f"{error.filename or batch[0].target}: {error.strerror or error}."
            failures.append({"input": str(batch[0].source), "error": text})
    except (MemoryError, RuntimeError) as error:
        if (shortage := shortage_of(error)) is None:
            raise
        if len(batch) == 1:
            failures.append({"input": str(batch[0].source), "error": f"{batch[0].source}: {shortage}"})
            return
        error.__traceback__ = None  # holds the arrays of this attempt
        for job in batch[done:]:
            yield from _attempts([job], work, failures)


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['input']} -> {result['output']}  {result['duration']:.2f} s  {result['bytes']} bytes  "
        f"{result['bit_rate'] / 1000:.2f} kbit/s  {result['real_time_factor']:.1f}x real time"
    )


def _result(job: Job, codec: "Codec", num_samples: int, token_file: Path, seconds: float) -> dict[str, Any]:
    if not num_samples:
        note(f"{job.source}: holds no samples")
    duration = num_samples / codec.sample_rate
    size = token_file.stat().st_size
    return {
        "input": str(job.source),
        "output": str(job.target),
        "duration": round(duration, 4),
        "samples": num_samples,
        "bytes": size,
        "bit_rate": round(8 * size / duration, 1) if duration else 0.0,
        "real_time_factor": round(duration / max(seconds, 1e-9), 2),
    }


def encode_jobs(
    jobs: list[Job], codec: "Codec", overwrite: bool, model: "EntropyModel | None" = None
) -> Iterator[dict[str, Any]]:
    """Short files as one batch, long ones as streams; `model` compresses their tokens."""
    import numpy as np

    from nemo_lfr.codec.arrays import to_numpy
    from nemo_lfr.io.audio import AudioReader
    from nemo_lfr.io.token_file import TokenWriter

    started = time.perf_counter()
    clips: dict[Job, Any] = {}
    for job in jobs:
        with AudioReader(job.source, codec.sample_rate) as reader:
            if reader.channels > 1:
                note(f"{job.source}: {reader.channels} channels mixed to mono")
            if len(jobs) > 1 and reader.duration <= BATCH_SECONDS:
                clips[job] = np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
    tokens: dict[Job, Any] = {}
    if clips:
        audio = np.zeros((len(clips), max(map(len, clips.values()))), np.float32)
        for row, clip in zip(audio, clips.values(), strict=True):
            row[: len(clip)] = clip
        batch, lengths = codec.encode(audio, [len(clip) for clip in clips.values()])
        for job, row, length in zip(clips, to_numpy(batch), lengths.tolist(), strict=True):
            tokens[job] = row[:, :length]
    for job in jobs:
        if job in tokens:
            with TokenWriter.for_codec(job.target, codec, overwrite, model) as writer:
                writer.write(tokens[job])
                writer.finish(len(clips[job]))
            num_samples = len(clips[job])
        else:
            num_samples = codec.encode_file(job.source, job.target, overwrite=overwrite, entropy_model=model)
        yield _result(job, codec, num_samples, job.target, (time.perf_counter() - started) / len(jobs))


def decode_job(job: Job, codec: "Codec", **options: Any) -> dict[str, Any]:
    started = time.perf_counter()
    num_samples = codec.decode_file(job.source, job.target, **options)
    return _result(job, codec, num_samples, job.source, time.perf_counter() - started)


def describe(text: str | None) -> dict[str, Any]:
    """Describe a file, a folder or a Hub id, and name the command that takes it; None is the bundled codec.

    Raises:
        NemoLfrError: if it is nothing that this package reads.
    """
    path = None if text is None else expand_home(text)
    if path is None or not os.path.lexists(path):
        if path is not None and path.suffix.lower() in AUDIO_SUFFIXES | {TOKEN_SUFFIX}:
            raise NemoLfrError(f"{path}: no such file.")
        return _describe_codec(text)
    identity = identify(path)
    if identity.kind == TOKENS.kind:
        return _describe_tokens(path)
    if identity.kind == AUDIO.kind:
        return _describe_audio(path)
    if identity.kind == ENTROPY_MODEL.kind:
        return _describe_entropy_model(path)
    if identity.kind in (CHECKPOINT.kind, "onnx"):
        return _describe_codec(str(path))
    if identity.kind == "unknown":
        raise NemoLfrError(f"{path}: {identity.text}; {identity.advice}.")
    return {"path": str(path), "kind": identity.text, "use": identity.advice}


def _describe_tokens(path: Path) -> dict[str, Any]:
    from nemo_lfr.io.token_file import TokenReader

    with TokenReader(path) as reader:
        meta = reader.metadata
        duration, size = reader.num_samples / meta.sample_rate, path.stat().st_size
        return {
            "file": str(path),
            "duration": round(duration, 4),
            "samples": reader.num_samples,
            "frames": reader.num_frames,
            "bytes": size,
            "bit rate": round(8 * size / duration, 1) if duration else 0.0,
            "payload bit rate": round(8 * reader.payload_bytes / duration, 1) if duration else 0.0,
            "payload bits a frame": round(8 * reader.payload_bytes / max(reader.num_frames, 1), 2),
            "entropy model": reader.entropy_hash or "none (packed frames)",
            "sample rate": meta.sample_rate,
            "samples per frame": meta.samples_per_frame,
            "codebooks": meta.num_codebooks,
            "levels": list(meta.levels),
            "codec fingerprint": meta.fingerprint,
            "precision": meta.precision,
            "written by": meta.written_by,
        }


def _describe_entropy_model(path: Path) -> dict[str, Any]:
    from nemo_lfr.io.entropy.model import EntropyModel

    model = EntropyModel.read(path)
    spec = model.spec
    return {
        "file": str(path),
        "kind": ENTROPY_MODEL.text,
        "entropy model": model.hash,
        "bytes": path.stat().st_size,
        "codebooks": spec.num_codebooks,
        "levels": list(spec.levels),
        "codec fingerprint": spec.fingerprint,
        "past frames": spec.past,
        "averages": list(spec.averages),
        "spreads": list(spec.spreads),
        "hidden units": list(spec.hidden),
        "written by": spec.written_by,
        "use": ENTROPY_MODEL.advice,
    }


def _describe_audio(path: Path) -> dict[str, Any]:
    from nemo_lfr.io.audio import AudioReader

    with AudioReader(path, INFO_RATE) as reader:
        return {
            "file": str(path),
            "kind": AUDIO.text,
            "duration": round(reader.duration, 4),
            "sample rate": reader.native_rate,
            "channels": reader.channels,
            "bytes": path.stat().st_size,
            "use": AUDIO.advice,
        }


def _describe_codec(text: str | None) -> dict[str, Any]:
    from nemo_lfr.codec.backends import is_exported
    from nemo_lfr.pretrained import find_checkpoint, load

    codec = load(text, "cpu")
    if text is not None and is_exported(text):
        return {"ONNX files": codec.name} | _layout(codec)
    path = find_checkpoint(text)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (codec.encoder, codec.decoder)]
    return {
        "checkpoint": codec.name,
        "file": str(path),
        "bytes": path.stat().st_size,
        "encoder parameters": sizes[0],
        "decoder parameters": sizes[1],
    } | _layout(codec)


def _layout(codec: "Codec[Any]") -> dict[str, Any]:
    spec = codec.spec
    contexts = {"encoder": codec.encoder.context, "decoder": codec.decoder.context}
    return {
        "sample rate": spec.sample_rate,
        "samples per frame": spec.samples_per_frame,
        "frame rate": round(spec.frame_rate, 3),
        "codebooks": spec.num_codebooks,
        "codebook size": spec.codebook_size,
        "levels": list(spec.levels),
        "bit rate": round(spec.bit_rate, 1),
        **{f"{name} context frames": [context.past, context.future] for name, context in contexts.items()},
        "fingerprint": spec.fingerprint,
    }


def print_table(values: dict[str, Any]) -> None:
    """Two columns on stdout."""
    width = max(len(key) for key in values)
    for key, value in values.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        click.echo(printable(f"{key:<{width}}  {shown}"))


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the results as JSON."),
        click.option(
            "--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", show_default=True
        ),
        click.option("--device", help="cpu, cuda, cuda:1 ...; a GPU if there is one.", default=None),
        click.option(
            "--model",
            help="A .nemo or .ckpt file, a folder of ONNX files, or a Hub id; the codec in the package if missing.",
        ),
    ):
        command = option(command)
    return command


def entropy_model_option(text: str) -> Callable[..., Any]:
    return click.option("--entropy-model", type=UserPath(dir_okay=False), help=text)


lookahead_option = click.option(
    "--lookahead",
    type=click.IntRange(min=0),
    help="Frames that a result from a pipe may wait for; all that it depends on if not given.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nemo-lfr")
def app() -> None:
    """Speech to 21.5 frames of tokens a second, and back."""


@app.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--out",
    type=UserPath(),
    help="Folder for the token files, or NAME.lfr for one input; beside the input by default.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Files encoded together.")
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--skip-existing", is_flag=True, help="Keep results that exist, and make the others.")
@click.option(
    "--block", type=click.IntRange(min=1), default=8, show_default=True, help="Frames at a time from a pipe."
)
@click.option("--compress", is_flag=True, help="Write files about a third smaller, without loss.")
@entropy_model_option("A .lfrm file to compress with; for the codec in the package its own by default.")
@lookahead_option
@model_options
def encode(
    inputs: tuple[str, ...],
    out: Path | None,
    batch_size: int,
    overwrite: bool,
    skip_existing: bool,
    block: int,
    compress: bool,
    entropy_model: Path | None,
    lookahead: int | None,
    **options: Any,
) -> None:
    """Encode audio files, folders or globs into .lfr token files.

    `encode - -` reads audio from stdin and writes a token file to stdout, of WAV while it comes in; `encode FILE -`
    writes that file's there.
    """
    if "-" in inputs:
        from nemo_lfr.cli.pipes import encode_pipe
        from nemo_lfr.io.entropy.find import model_to_write

        check_pipe(inputs, out)
        codec = open_codec(options["model"], options["device"], options["precision"])
        source = sys.stdin.buffer if inputs[0] == "-" else Path(inputs[0])
        model = model_to_write(codec, compress, entropy_model)
        reader = encode_pipe(codec, source, sys.stdout.buffer, block, lookahead, model)  # type: ignore[arg-type]
        if reader.channels > 1:
            note(f"{reader.name}: {reader.channels} channels mixed to mono")
        if not reader.samples_read:
            note(f"{reader.name}: holds no samples")
        return
    if lookahead is not None:
        raise NemoLfrError("--lookahead is for pipes; files are encoded with all that follows in them.")
    from nemo_lfr.io.entropy.find import model_to_write

    jobs = jobs_to_do(inputs, out, AUDIO_SUFFIXES, TOKEN_SUFFIX, overwrite, skip_existing)
    if not jobs:
        run_jobs([], lambda batch: iter(()), 1, options["as_json"])
        return
    codec = open_codec(options["model"], options["device"], options["precision"])
    model = model_to_write(codec, compress, entropy_model)
    run_jobs(jobs, lambda batch: encode_jobs(batch, codec, overwrite, model), batch_size, options["as_json"])


@app.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--out",
    type=UserPath(),
    help="Folder for the audio, or NAME.wav for one input; beside the input by default.",
)
@click.option("--format", "kind", type=click.Choice(OUTPUT_KINDS), help="Format of the audio; wav, or that of --out.")
@click.option("--start", type=Number(min=0), default=0.0, help="Second to start at.")
@click.option("--duration", type=Number(min=0), help="Seconds to decode; up to the end if not given.")
@click.option("--recover", is_flag=True, help="Decode what is whole of damaged or unfinished files.")
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--skip-existing", is_flag=True, help="Keep results that exist, and make the others.")
@entropy_model_option("The .lfrm file of compressed files, where it is neither in the package nor beside them.")
@lookahead_option
@model_options
def decode(
    inputs: tuple[str, ...],
    out: Path | None,
    kind: str | None,
    start: float,
    duration: float | None,
    recover: bool,
    overwrite: bool,
    skip_existing: bool,
    entropy_model: Path | None,
    lookahead: int | None,
    **options: Any,
) -> None:
    """Decode .lfr token files, folders or globs into audio of the original length.

    `decode - -` reads a token file from stdin and writes audio to stdout, WAV while it comes in; `decode FILE -`
    writes that file's there.
    """
    wanted = {"start": start, "duration": duration, "recover": recover, "entropy_model": entropy_model}
    if "-" in inputs:
        check_pipe(inputs, out)
        kind = kind or "wav"
        streams = inputs[0] == "-" and kind == "wav" and not (start or duration is not None or recover)
        if lookahead is not None and not streams:
            raise NemoLfrError("--lookahead is for a whole token file from stdin to WAV on stdout.")
        if streams:
            from nemo_lfr.cli.pipes import decode_pipe

            codec = open_codec(options["model"], options["device"], options["precision"])
            decode_pipe(codec, sys.stdin.buffer, sys.stdout.buffer, lookahead, entropy_model)  # type: ignore[arg-type]
            return
        with spooled(inputs[0], TOKEN_SUFFIX, f".{kind}") as job:
            codec = open_codec(options["model"], options["device"], options["precision"])
            decode_job(job, codec, **wanted)
        return
    if lookahead is not None:
        raise NemoLfrError("--lookahead is for pipes; files are decoded with all that follows in them.")
    kind = output_kind(kind, out)
    jobs = jobs_to_do(inputs, out, {TOKEN_SUFFIX}, f".{kind}", overwrite, skip_existing)
    if not jobs:
        run_jobs([], lambda batch: iter(()), 1, options["as_json"])
        return
    codec = open_codec(options["model"], options["device"], options["precision"])
    run_jobs(
        jobs,
        lambda batch: iter([decode_job(job, codec, overwrite=overwrite, **wanted) for job in batch]),
        1,
        options["as_json"],
    )


@app.command()
@click.argument("files", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(files: tuple[str, ...], as_json: bool) -> None:
    """Describe token files, checkpoints, audio, folders or Hub ids; the bundled codec by default."""
    described, problems = [], []
    for file in files or (None,):
        try:
            described.append(describe(file))
        except (NemoLfrError, OSError) as error:
            if len(files) < 2:
                raise
            problems.append(f"{file}: {error.strerror}." if isinstance(error, OSError) else str(error))
    if as_json and described:
        click.echo(json.dumps(described if len(files) > 1 else described[0], indent=2))
    for position, values in enumerate([] if as_json else described):
        if position:
            click.echo()
        print_table(values)
    for problem in problems:
        note(f"nemo-lfr: {problem}")
    if problems:
        sys.exit(1 if described else 2)


@app.command()
@click.option("--out", type=UserPath(file_okay=False), default=Path("demo_output"), show_default=True)
@model_options
def demo(out: Path, **options: Any) -> None:
    """Encode and decode a speech clip; write both, the tokens, and a picture of the spectrograms."""
    from nemo_lfr.cli.demo import run

    values = run(out, open_codec(options["model"], options["device"], options["precision"]))
    if options["as_json"]:
        click.echo(json.dumps(values, indent=2))
    else:
        print_table(values)


@app.command()
@click.argument("kind", type=click.Choice(list(LAYOUTS)))
@click.argument("corpus", type=UserPath())
@click.option("--out", type=UserPath(file_okay=False), required=True, help="Folder for the manifests.")
@click.option(
    "--valid-share",
    type=Number(0, 1),
    default=0.02,
    show_default=True,
    help="Of the speakers, held out where the corpus has no validation set.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Files opened at a time.")
@click.option("--no-check", is_flag=True, help="Trust headers; by default every file is decoded to its end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prepare(kind: str, corpus: Path, out: Path, valid_share: float, jobs: int, no_check: bool, as_json: bool) -> None:
    """Turn an unpacked corpus into the manifests that training reads; the audio stays where it is.

    An interrupted run resumes where it stopped. Files that cannot be used are listed in failures.jsonl; the
    exit code is then 1.
    """
    from nemo_lfr.training.prepare import prepare

    values = prepare(kind, corpus, out, valid_share=valid_share, jobs=jobs, check=not no_check, progress=progress)
    if as_json:
        click.echo(json.dumps(values, indent=2))
    else:
        print_table(values)
    if "failures" in values:
        sys.exit(1)


@app.group()
def export() -> None:
    """Write a codec for another runtime."""


@export.command("onnx")
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    required=True,
    help="Folder for encoder.onnx and decoder.onnx.",
)
@click.option("--model", help="A .nemo or .ckpt file, or a Hub id; the codec inside the package if not given.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
def export_to_onnx(out: Path, model: str | None, overwrite: bool) -> None:
    """Write encoder.onnx and decoder.onnx, for any length and batch; use the folder as --model of other commands."""
    from nemo_lfr.codec.onnx.export import export_onnx

    for path in export_onnx(open_codec(model, "cpu", "fp32"), out, overwrite=overwrite):
        show(path)


app.add_command(tokenize)
app.add_command(detokenize)
app.add_command(evaluate)
app.add_command(entropy)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP leave no half-written file behind, as an interrupt does; `nohup` is kept."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        sys.exit(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except SystemExit:
        if received:
            note(f"nemo-lfr: ended by {signal.Signals(received[0]).name}.")
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _prepare_streams() -> None:
    """Closed descriptors lead nowhere, rather than into the next file that is opened; any file name can be printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point: every user's mistake is one line on stderr."""
    _prepare_streams()
    with _stopped_by_signals():
        _run(arguments)


def _check_current_folder() -> None:
    """Refuse to start in a folder that was removed, which ends Python's and PyTorch's own code at many places."""
    try:
        os.getcwd()
    except OSError as error:
        _fail(f"the current folder cannot be used ({error.strerror}); go to another one.")


def _run(arguments: Sequence[str] | None) -> None:
    _check_current_folder()
    os.environ.setdefault("PATH", os.defpath)  # as in a bare environment; Lhotse cannot be imported without one
    try:
        app.main(args=arguments, prog_name="nemo-lfr", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        note(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort as error:
        # click turns both of these into Abort; only one of them is an interrupt.
        if isinstance(error.__cause__ or error.__context__, EOFError):
            _fail(f"a file ends too early ({error.__cause__ or error.__context__}).")
        note("nemo-lfr: interrupted.")
        sys.exit(130)
    except KeyboardInterrupt:
        note("nemo-lfr: interrupted.")
        sys.exit(130)
    except BrokenPipeError:
        lead_nowhere(sys.stdout)
        sys.exit(1)
    except NemoLfrError as error:
        _fail(str(error))
    except OSError as error:
        name = error.filename
        if name is None and error.errno in DISK_FULL:  # what writes files names them
            name = "stdout"
            lead_nowhere(sys.stdout)
        _fail(f"{name}: {error.strerror}." if name else f"{error.strerror or error}.")
    except (MemoryError, RuntimeError) as error:
        shortage = shortage_of(error)
        if shortage is None:
            raise
        _fail(shortage)


def _fail(text: str) -> None:
    note(f"nemo-lfr: error: {' '.join(text.split())}")
    sys.exit(2)


if __name__ == "__main__":
    main()
