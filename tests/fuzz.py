"""Coverage-guided fuzzing of the file readers with atheris (libFuzzer).

    python -m tests.fuzz lfr    -max_total_time=1800
    python -m tests.fuzz lfrm   -max_total_time=1800
    python -m tests.fuzz nemo   -max_total_time=1800

For any input, a reader may only raise its documented exception. The fuzzer cannot guess checksums, so `lfr` and `lfrm`
also read the input with corrected checksums, and `pickle` and `config` put the input into a valid `.nemo`. Findings
are written to `tests/findings/`, which `test_fuzz.py` replays. Options are those of libFuzzer; if the first argument
is a folder, it keeps the fuzzer's corpus.
"""

import io
import math
import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_lfr.io.entropy.model import EntropyModel

FINDINGS = Path(__file__).resolve().parent / "findings"
# Temporary file in memory that is overwritten for each input.
SCRATCH = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir(), f"nemo-lfr-fuzz-{os.getpid()}")


def with_right_checksums(data: bytes) -> bytes:
    """Return a `.lfr` file of any version and coding with corrected CRCs in all sections that can be located."""
    from nemo_lfr.io.token_file import Metadata

    def seal(begin: int, end: int) -> bytes:
        """Write the CRC of [begin, end) at `end` and return it; return b"" if the file is too short."""
        if end + 4 > len(fixed):
            return b""
        fixed[end : end + 4] = struct.pack("<I", zlib.crc32(fixed[begin:end]))
        return bytes(fixed[end : end + 4])

    fixed = bytearray(data)
    if len(data) < 9:
        return data
    chained = data[4] != 1
    compressed = chained and data[8] == 1
    begin = 9
    position = begin + (struct.unpack_from("<I", data, 5)[0] & (0xFFFFFF if chained else 0xFFFFFFFF))
    try:
        frame = Metadata.from_json(data[begin:position]).bytes_per_frame
    except Exception:
        frame = 1
    checksum = seal(0, position)
    outline = zlib.crc32(checksum)
    position += 4
    while checksum and position + 4 <= len(fixed):
        (count,) = struct.unpack_from("<I", fixed, position)
        if not count:
            if chained:
                fixed[position + 12 : position + 16] = struct.pack("<I", outline)
            seal(position, position + (16 if chained else 12))
            break
        end = position + 4 + count * frame
        if compressed:
            if position + 8 > len(fixed):
                break
            end = position + 8 + struct.unpack_from("<I", fixed, position + 4)[0]
        checksum = seal(position - 4 if chained else position, end)
        outline = zlib.crc32(bytes(fixed[position : position + 4]) + checksum, outline)
        position = end + 4
    return bytes(fixed)


def read_lfr(data: bytes) -> None:
    """Read a `.lfr` file strictly, with recovery and as a pipe.

    An intact file must give the same tokens by all three methods.
    """
    import numpy as np

    from nemo_lfr.errors import TokenFileError
    from nemo_lfr.io.token_file import TokenReader, TokenStreamReader

    for model in small_models():  # the reader finds them beside a compressed file
        path = SCRATCH.with_name(f"{model.hash}.lfrm")
        if not path.exists():
            path.write_bytes(model.to_bytes())
    for contents in {data, with_right_checksums(data)}:
        SCRATCH.write_bytes(contents)
        results = []
        for recover in (False, True):
            try:
                with TokenReader(SCRATCH, recover) as reader:
                    tokens = reader.read()
                    assert tokens.shape == (reader.metadata.num_codebooks, reader.num_frames)
                    assert not tokens.size or 0 <= tokens.min() <= tokens.max() < reader.metadata.codebook_size
                    if reader.complete:
                        results.append((reader.num_samples, tokens))
            except TokenFileError as error:
                assert str(SCRATCH) in str(error)
        try:
            stream = TokenStreamReader(io.BytesIO(contents), SCRATCH)
            blocks = [np.zeros((stream.metadata.num_codebooks, 0)), *stream.blocks()]
            results.append((stream.num_samples, np.concatenate(blocks, axis=1)))
        except TokenFileError as error:
            assert str(SCRATCH) in str(error)
        assert len(results) in (0, 3)
        assert all(samples == results[0][0] and np.array_equal(got, results[0][1]) for samples, got in results)


def read_nemo(data: bytes) -> None:
    """Read a `.nemo` with the standalone API; the weights of an accepted file must be finite."""
    from nemo_lfr.checkpoint import read_checkpoint
    from nemo_lfr.errors import CheckpointError

    SCRATCH.write_bytes(data)
    try:
        parts, _ = read_checkpoint(SCRATCH)
        for part in parts.named().values():
            assert all(parameter.isfinite().all() for parameter in part.parameters())
    except CheckpointError as error:
        assert str(error).startswith(str(SCRATCH))


def read_pickle(data: bytes) -> None:
    """Read a valid `.nemo` whose pickle of weights is the input."""
    from tests.checkpoint.test_checkpoint import pickled_in_zip, with_weights

    read_nemo(with_weights(pickled_in_zip(data, {"0": bytes(64)})))


def read_config(data: bytes) -> None:
    """Read a valid `.nemo` whose `model_config.yaml` is the input."""
    from tests.checkpoint.test_checkpoint import with_config

    read_nemo(with_config(data))


def read_lfrm(data: bytes) -> None:
    """Read an entropy model; an accepted model must encode and decode tokens."""
    import zlib

    import numpy as np

    from nemo_lfr.errors import EntropyModelError
    from nemo_lfr.io.entropy.blocks import decode_block, encode_block
    from nemo_lfr.io.entropy.model import EntropyModel

    for contents in {data, data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))}:
        try:
            model = EntropyModel.from_bytes(contents, SCRATCH)
        except EntropyModelError as error:
            assert str(SCRATCH) in str(error)
            continue
        tokens = np.zeros((model.spec.num_codebooks, 3), np.int32)
        tokens[:, 1] = math.prod(model.spec.levels) - 1
        assert np.array_equal(decode_block(model, encode_block(model, tokens), 3), tokens)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "lfr": read_lfr,
    "lfrm": read_lfrm,
    "nemo": read_nemo,
    "pickle": read_pickle,
    "config": read_config,
}


def seeds(name: str) -> list[bytes]:
    """Return small files to start from: valid ones, and for `.nemo` also the malicious ones of the tests."""
    if name == "lfr":
        return lfr_seeds() + compressed_seeds()
    if name == "lfrm":
        return lfrm_seeds()
    from tests.checkpoint import test_checkpoint as table

    if name == "pickle":
        return [table.tensor_pickle((2, 3), (3, 1)), table.data_pickle(table.WEIGHTS_BYTES)]
    if name == "config":
        return [table.CONFIG_BYTES, b"a: &x [1, 2]\nb: *x\n", b"target: ${oc.env:HOME}\n"]
    made = [table.GOOD_TAR, *(make() for make in table.SPELLINGS.values())]
    made += [make() for make, _ in table.HOSTILE.values()]
    return [contents for contents in made if len(contents) < 200_000]


def lfr_seeds() -> list[bytes]:
    """Return files of both versions, some of them with their blocks in another order."""
    import numpy as np

    from nemo_lfr.io.token_file import Metadata
    from tests.io.test_format import WRITERS, sections

    made = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.lfr")
        for samples_per_frame, levels, num_codebooks in ((1024, (8, 7, 6, 6), 8), (1, (2,), 1), (16, (4, 3), 13)):
            for write in WRITERS.values():
                blocks = [np.ones((num_codebooks, 3), np.int64), np.zeros((num_codebooks, 1), np.int64)]
                write(path, Metadata(22050, samples_per_frame, levels, num_codebooks), blocks, 4 * samples_per_frame)
                made.append(path.read_bytes())
                if num_codebooks == 8:
                    head, found, end = sections(path)
                    made.append(head + found[1] + found[0] + end)
    return made


def compressed_seeds() -> list[bytes]:
    """Return files of coding 1, compressed with the models of `small_models`."""
    import numpy as np

    from nemo_lfr.io.token_file import Metadata, TokenStreamWriter

    made = []
    for model in small_models():
        spec = model.spec
        file = io.BytesIO()
        stream = TokenStreamWriter(file, Metadata(22050, 16, spec.levels, spec.num_codebooks), model)
        for frames in (3, 1, 40):
            stream.write(np.zeros((spec.num_codebooks, frames), np.int64))
        stream.write(np.full((spec.num_codebooks, 2), math.prod(spec.levels) - 1))
        stream.finish(46 * 16)
        made.append(file.getvalue())
    return made


@lru_cache(maxsize=1)
def small_models() -> tuple["EntropyModel", ...]:
    """Return two small entropy models with random weights."""
    from tests.io.test_entropy import random_model

    layouts = (((2,), 1), ((4, 3), 5))
    return tuple(random_model(*layout, hidden=(2, 3), past=1, averages=(2,)) for layout in layouts)


def lfrm_seeds() -> list[bytes]:
    """Return the files of the models of `small_models`."""
    return [model.to_bytes() for model in small_models()]


def main() -> None:
    """Run the fuzzer on the target that the first command-line argument names."""
    import atheris

    name, options = sys.argv[1], sys.argv[2:]
    with atheris.instrument_imports(
        include=["nemo_lfr.checkpoint", "nemo_lfr.io.entropy", "nemo_lfr.io.token_file", "tarfile", "zipfile"]
    ):
        import nemo_lfr.checkpoint
        import nemo_lfr.io.entropy.blocks
        import nemo_lfr.io.token_file  # noqa: F401
    FINDINGS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if not (options and not options[0].startswith("-")):
            options.insert(0, folder)
        Path(options[0]).mkdir(exist_ok=True)
        for number, contents in enumerate(seeds(name)):
            Path(options[0], f"seed-{number}").write_bytes(contents)
        limits = ["-max_len=200000", "-timeout=20", "-rss_limit_mb=6000", f"-artifact_prefix={FINDINGS}/{name}-"]
        atheris.Setup([sys.argv[0], options[0], *limits, *options[1:]], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
