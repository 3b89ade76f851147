"""Tests that every way to encode and decode gives the tokens and audio of the installed stock NeMo.

The reference is stock NeMo, restored by its own reader, on one utterance alone. Tokens must be equal except for
rounding ties, where stock NeMo's value before rounding is within 1e-4 of a rounding edge.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nemo", reason="stock NeMo is the reference here: pip install '.[nemo]'")

import nemo_lfr
from nemo_lfr.checkpoint import read_config
from nemo_lfr.pretrained import bundled_checkpoint
from tests.models import KINDS, codec_config, same_parts, speech_like, stock_model, write_nemo
from tests.reference import TIE

# Relative to full scale. Sums in another order change a few float32 digits through 100 layers.
AUDIO_TOLERANCE = 1e-5
LENGTHS = (29.3, 12, 4.4)  # in frames


class Reference:
    """A checkpoint, stock NeMo restored from it, the results of stock NeMo for some utterances, and our models.

    Args:
        path: the checkpoint.
        lengths: lengths of the utterances in frames.
        short_chunks: two lengths in frames of the chunks into which our codec divides an utterance.
    """

    def __init__(self, path: Path, lengths: tuple[float, ...], short_chunks: tuple[int, int]) -> None:
        self.path, self.short_chunks = path, short_chunks
        self.stock = stock_model(path)
        samples = [int(length * self.stock.samples_per_frame) for length in lengths]
        self.clips = [speech_like(max(samples), seed)[-number:] for seed, number in enumerate(samples)]
        assert [len(clip) for clip in self.clips] == samples
        self.expected = [stock_round_trip(self.stock, clip) for clip in self.clips]

    @functools.cached_property
    def codec(self):
        """Codec of the standalone API, which divides none of the utterances into chunks."""
        codec = nemo_lfr.load(self.path, device="cpu")
        assert codec.chunk_frames * codec.samples_per_frame > max(map(len, self.clips))
        return codec

    def chunked(self, short: int):
        """Return `codec` with other chunks."""
        return same_parts(self.codec, chunk_frames=self.short_chunks[short])

    @functools.cached_property
    def model(self):
        """Our model for NeMo."""
        return nemo_lfr.AudioCodecModel.restore_from(self.path, map_location="cpu")


@pytest.fixture(scope="module", params=[*KINDS, "bundled", pytest.param("full size", marks=pytest.mark.slow)])
def reference(request, tmp_path_factory):
    """Return a `Reference` for a kind of codec."""
    if request.param == "full size":
        # The decoder needs 13 frames on each side, so chunks of 15 frames are decoded from frames 0 to 27 and 2 to 29.
        return Reference(request.getfixturevalue("full_size"), (LENGTHS[0], LENGTHS[-1]), (15, 16))
    if request.param == "bundled":
        return Reference(bundled_checkpoint(), LENGTHS, (5, 7))
    path = write_nemo(tmp_path_factory.mktemp("parity") / "model.nemo", codec_config(request.param))
    return Reference(path, LENGTHS, (5, 7))


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory):
    """Return the path of the file that our model saves, which is alone in its folder."""
    path = tmp_path_factory.mktemp("saved") / "saved.nemo"
    reference.model.save_to(path)
    return path


@torch.no_grad()
def stock_round_trip(stock, clip):
    """Return tokens, the smallest distance to a rounding edge per codebook, and audio of one utterance alone."""
    length = torch.tensor([len(clip)])
    encoded, frames = stock.encode_audio(audio=clip[None], audio_len=length)
    tokens = stock.quantize(encoded=encoded, encoded_len=frames)
    audio, _ = stock.decode(tokens=tokens, tokens_len=frames)
    groups = encoded.chunk(stock.num_codebooks, dim=1)
    quantizers = getattr(stock.vector_quantizer, "fsqs", [stock.vector_quantizer])
    margins = [
        ((fsq.compress(group, frames) - 0.5).round() + 0.5 - fsq.compress(group, frames)).abs().amin(dim=1)
        for group, fsq in zip(groups, quantizers, strict=True)
    ]
    return SimpleNamespace(tokens=tokens[0], margins=torch.stack(margins, dim=1)[0], audio=audio[0])


# Each path takes the reference, and gives (tokens [C, T], audio [T_audio]) of each clip.


def light_alone(reference):
    yield from one_by_one(reference.codec, reference.clips)


def light_batch(reference):
    tokens, tokens_len = reference.codec.encode(*noise_padded(reference.clips))
    audio, audio_len = reference.codec.decode(tokens, tokens_len)
    yield from split(tokens, tokens_len, audio, audio_len)


def light_chunks(reference):
    yield from one_by_one(reference.chunked(0), reference.clips)


def light_blocks(reference):
    codec = reference.chunked(1)
    for clip in reference.clips:
        tokens = np.concatenate(list(codec.encode_blocks(np.array_split(clip.numpy(), 5))), axis=1)
        audio = np.concatenate(list(codec.decode_blocks(np.array_split(tokens, 3, axis=1))))
        yield torch.from_numpy(tokens), torch.from_numpy(audio)


def one_by_one(codec, clips):
    for clip in clips:
        tokens, _ = codec.encode(clip)
        yield tokens[0], codec.decode(tokens)[0][0]


def nemo_alone(reference):
    for clip in reference.clips:
        tokens, tokens_len = reference.model.encode(audio=clip[None], audio_len=torch.tensor([len(clip)]))
        audio, _ = reference.model.decode(tokens=tokens, tokens_len=tokens_len)
        yield tokens[0], audio[0]


def nemo_batch(reference):
    audio, audio_len = noise_padded(reference.clips)
    tokens, tokens_len = reference.model.encode(audio, audio_len)
    audio, audio_len = reference.model.decode(tokens, tokens_len)
    yield from split(tokens, tokens_len, audio, audio_len)


def nemo_in_steps(reference):
    """Run the four steps of NeMo's inference tutorial on a ragged batch."""
    model = reference.model
    audio, audio_len = noise_padded(reference.clips)
    with torch.no_grad():
        encoded, encoded_len = model.encode_audio(audio=audio, audio_len=audio_len)
        tokens = model.quantize(encoded=encoded, encoded_len=encoded_len)
        dequantized = model.dequantize(tokens=tokens, tokens_len=encoded_len)
        audio, audio_len = model.decode_audio(inputs=dequantized, input_len=encoded_len)
    yield from split(tokens, encoded_len, audio, audio_len)


def accelerated(reference):
    model = nemo_lfr.accelerate(stock_model(reference.path))
    audio, audio_len = noise_padded(reference.clips)
    tokens, tokens_len = model.encode(audio=audio, audio_len=audio_len)
    audio, audio_len = model.decode(tokens=tokens, tokens_len=tokens_len)
    yield from split(tokens, tokens_len, audio, audio_len)


PATHS = [light_alone, light_batch, light_chunks, light_blocks, nemo_alone, nemo_batch, nemo_in_steps, accelerated]


def noise_padded(clips):
    audio = torch.randn(len(clips), max(map(len, clips)), generator=torch.Generator().manual_seed(0))
    for row, clip in zip(audio, clips, strict=True):
        row[: len(clip)] = clip
    return audio, torch.tensor([len(clip) for clip in clips])


def split(tokens, tokens_len, audio, audio_len):
    for row in range(len(tokens)):
        yield tokens[row, :, : tokens_len[row]], audio[row, : audio_len[row]]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_every_path_gives_stock_tokens_and_audio(reference, path):
    for (tokens, audio), expected in zip(path(reference), reference.expected, strict=True):
        assert tokens.shape == expected.tokens.shape
        different = tokens != expected.tokens
        not_ties = different & (expected.margins > TIE)
        assert not not_ties.any(), f"{int(different.sum())} of {different.numel()} tokens differ"
        if not different.any():
            assert audio.shape == expected.audio.shape
            assert (audio - expected.audio).abs().max() < AUDIO_TOLERANCE


def test_the_reference_uses_the_whole_range_of_tokens(reference):
    # Equal tokens prove little if there are few different ones, so every codebook must use many of its entries. A
    # trained codec repeats tokens in the steady parts of a synthetic voice; random weights rarely do.
    tokens = torch.cat([expected.tokens for expected in reference.expected], dim=1)
    most = min(tokens.shape[1], reference.stock.codebook_size)
    assert min(codebook.unique().numel() for codebook in tokens) > 0.3 * most


# Reads paths of a checkpoint and a clip from stdin, one pair a line, and prints the tokens.
STOCK = """
import json, sys, numpy, torch
from nemo.collections.tts.models import AudioCodecModel
for line in sys.stdin:
    model_path, clip_path = json.loads(line)
    model = AudioCodecModel.restore_from(model_path, map_location="cpu").eval()
    clip = torch.from_numpy(numpy.load(clip_path))
    with torch.no_grad():
        tokens, _ = model.encode(audio=clip[None], audio_len=torch.tensor([len(clip)]))
    assert "nemo_lfr" not in sys.modules
    print("tokens", json.dumps(tokens[0].tolist()), flush=True)
"""


@pytest.fixture(scope="module")
def stock_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, Path], torch.Tensor]]:
    """Encode a clip with a checkpoint in a process that does not import this package.

    One process serves all checkpoints, because importing NeMo takes much longer than opening a checkpoint.
    """
    folder = tmp_path_factory.mktemp("stock")
    errors = folder / "stderr.txt"
    pipe = subprocess.PIPE
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", STOCK], stdin=pipe, stdout=pipe, stderr=stderr, text=True, cwd=folder
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def encode(model: Path, clip: Path) -> torch.Tensor:
            process.stdin.write(json.dumps([str(model), str(clip)]) + "\n")
            process.stdin.flush()
            answer = next((line for line in process.stdout if line.startswith("tokens ")), None)
            assert answer is not None, errors.read_text()[-2000:]
            return torch.tensor(json.loads(answer.removeprefix("tokens ")))

        yield encode


def test_saved_file_opens_in_nemo_without_this_package(reference, saved, stock_tokens, tmp_path):
    np.save(tmp_path / "clip.npy", reference.clips[0].numpy())
    assert torch.equal(stock_tokens(saved, tmp_path / "clip.npy"), reference.expected[0].tokens.long())


def test_the_cards_snippet_runs_as_printed(reference):
    """The example ends with `.cpu().numpy()`, which fails in stock NeMo because the output requires gradients."""
    model = reference.model
    audio_tensor = reference.clips[-1].unsqueeze(dim=0)
    audio_len = torch.tensor([audio_tensor[0].shape[0]])
    encoded_tokens, encoded_len = model.encode(audio=audio_tensor, audio_len=audio_len)
    reconstructed_audio, _ = model.decode(tokens=encoded_tokens, tokens_len=encoded_len)
    output_audio = reconstructed_audio.cpu().numpy()
    assert output_audio.shape == (1, encoded_tokens.shape[2] * model.samples_per_frame)


def test_written_files_name_only_nemo_classes(saved):
    assert "nemo_lfr" not in str(read_config(saved))
    assert [entry.name for entry in saved.parent.iterdir()] == ["saved.nemo"]
