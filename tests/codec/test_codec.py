import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nemo_lfr
from nemo_lfr.checkpoint import build_part, build_parts
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.cpu.packed import has_bf16
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import AudioError, NemoLfrError, TokensError
from nemo_lfr.frames import Context
from tests.models import ALL_LAYERS, KINDS, MODULES, build_codec, cached_codec, codec_config, same_parts, synthesize
from tests.reference import assert_same_tokens, changed_frames, reference_decode, reference_encode
from tests.tiers import ALL_KINDS, slow_after, slow_except, slow_if

# Lengths and tokens of the longest comparisons with single clips; the nightly run has more.
LENGTHS = int(os.environ.get("NEMO_LFR_LENGTHS", "200"))
TOKENS = int(os.environ.get("NEMO_LFR_TOKENS", "20000"))

# The order of float32 sums changes with the batch and the window; audio is in [-1, 1], so 1e-5 is -100 dB.
AUDIO = {"rtol": 0, "atol": 1e-5}


def padded(clips: list[np.ndarray], fill: str = "noise", seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Return clips as one batch, with noise or NaN after the end of each clip."""
    lengths = [len(clip) for clip in clips]
    batch = np.random.default_rng(seed).standard_normal((len(clips), max(lengths) + 100)).astype(np.float32)
    if fill == "nan":
        batch[:] = np.nan
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    return batch, lengths


# --- context of a frame


def released(**changes):
    """Return the released layout (rates, kernels and dilations) with few channels, in float64."""
    encoder = {"resblock_kernel_sizes": [3, 7, 11]} | changes.get("encoder", {})
    decoder = ALL_LAYERS | changes.get("decoder", {})
    codec = build_codec(changes.get("kind", "symmetric"), audio_encoder=encoder, audio_decoder=decoder)
    return codec.encoder.double(), codec.decoder.double()


@pytest.mark.slow
def test_released_layout_needs_6_frames_of_context_to_encode_and_13_to_decode():
    encoder, decoder = released()
    assert encoder.context == Context(6, 6)
    assert decoder.context == Context(13, 13)
    assert (encoder.min_frames, decoder.min_frames) == (4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_if(["symmetric", "causal", "two_stages", "zeros", "nano"], ["zeros", "nano"]))
def test_encoded_frames_depend_only_on_their_context(kind):
    torch.manual_seed(0)
    encoder = build_codec(kind).encoder.double()
    context, frame = encoder.context, encoder.samples_per_frame
    at, total = 2 * context.future + 8, 3 * (context.past + context.future) + 20
    audio = torch.randn(1, total * frame, dtype=torch.float64)
    changed = changed_frames(lambda x: encoder.encode_frames(x)[0], audio, at, frame, total)
    # A change at `at` reaches the frames whose context contains it. The context is in whole frames and may be one
    # frame too wide, because a frame that is only partly in the context is counted as a whole.
    assert at - context.future <= changed[0] <= at - context.future + 1
    assert at + context.past - 1 <= changed[-1] <= at + context.past


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_if(["symmetric", "causal", "two_stages", "clamp", "nano"], ["clamp", "nano"]))
def test_decoded_frames_depend_only_on_their_context(kind):
    torch.manual_seed(0)
    decoder = build_codec(kind).decoder.double()
    context = decoder.context
    at, total = 2 * context.future + 8, 3 * (context.past + context.future) + 20
    codes = torch.rand(1, decoder.pre_conv.conv.in_channels, total, dtype=torch.float64) * 2 - 1
    changed = changed_frames(lambda x: decoder.decode_frames(x), codes, at, 1, total)
    assert at - context.future <= changed[0] <= at - context.future + 1
    assert at + context.past - 1 <= changed[-1] <= at + context.past


def test_a_causal_codec_has_no_lookahead():
    codec = cached_codec("causal")
    assert codec.encoder.context.future == codec.decoder.context.future == 0


def test_min_frames_is_the_shortest_input_that_the_network_can_pad(codec):
    encoder, decoder = codec.encoder, codec.decoder
    dim, frame = encoder.encoded_dim, encoder.samples_per_frame
    with torch.no_grad():
        assert encoder.encode_frames(torch.zeros(1, encoder.min_frames * frame)).shape[-1] == encoder.min_frames
        assert decoder.decode_frames(torch.zeros(1, dim, decoder.min_frames)).shape[-1] == decoder.min_frames * frame
        if encoder.min_frames > 1:
            with pytest.raises(RuntimeError, match=r"[Pp]adding"):
                encoder.encode_frames(torch.zeros(1, (encoder.min_frames - 1) * frame))
        if decoder.min_frames > 1:
            with pytest.raises(RuntimeError, match=r"[Pp]adding"):
                decoder.decode_frames(torch.zeros(1, dim, decoder.min_frames - 1))


# --- batches


@pytest.mark.parametrize("fill", slow_if(["noise", "nan"], ["noise"]))
def test_a_clip_has_the_same_tokens_in_a_ragged_batch_with_any_padding_as_alone(codec, fill):
    rng = np.random.default_rng(3)
    frame = codec.samples_per_frame
    lengths = [0, 1, frame - 1, frame, frame + 1, 24 * frame, *rng.integers(2, 24 * frame, size=6).tolist()]
    clips = [synthesize(2, seed)[:n] for seed, n in enumerate(lengths)]
    tokens, tokens_len = codec.encode(*padded(clips, fill))
    assert tokens.dtype == torch.int32 and tokens_len.dtype == torch.int64
    assert tokens_len.tolist() == [-(-n // frame) for n in lengths]
    for row, (clip, count) in enumerate(zip(clips, tokens_len.tolist(), strict=True)):
        if count:
            assert_same_tokens(codec, clip, tokens[row, :, :count])
        assert not tokens[row, :, count:].any()


@pytest.mark.slow
def test_tokens_decode_alike_in_a_ragged_batch_with_any_padding_and_alone(codec):
    rng = np.random.default_rng(4)
    lengths = [0, 4, 5, 30, *rng.integers(4, 30, size=5).tolist()]
    # The padding is deliberately out of range, because it must not be read.
    tokens = np.full((len(lengths), codec.num_codebooks, max(lengths) + 2), -7)
    for row, n in enumerate(lengths):
        tokens[row, :, :n] = rng.integers(0, codec.codebook_size, size=(codec.num_codebooks, n))
    audio, audio_len = codec.decode(tokens, lengths)
    assert audio_len.tolist() == [n * codec.samples_per_frame for n in lengths]
    for row, (n, samples) in enumerate(zip(lengths, audio_len.tolist(), strict=True)):
        if n:
            expected = reference_decode(codec, torch.from_numpy(tokens[row, :, :n]))
            torch.testing.assert_close(audio[row, :samples], expected, **AUDIO)
        assert not audio[row, samples:].any()
    assert audio.abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["symmetric", "two_stages", "single"])
def test_utterances_shorter_than_the_decoder_can_reflect_end_in_zero_codes_on_every_path(kind):
    codec = cached_codec(kind)
    assert codec.decoder.min_frames > 1
    tokens = torch.randint(0, codec.codebook_size, (1, codec.num_codebooks, 1))
    with torch.no_grad():
        expected, _ = codec.decoder(
            codec.quantizer.decode(tokens.transpose(0, 1)), torch.tensor([1])
        )  # as the NeMo integration does
    torch.testing.assert_close(expected[0], reference_decode(codec, tokens[0]), **AUDIO)
    torch.testing.assert_close(torch.from_numpy(next(codec.decode_blocks([tokens[0].numpy()]))), expected[0], **AUDIO)
    torch.testing.assert_close(codec.decode(tokens)[0], expected, **AUDIO)


@pytest.mark.slow
def test_every_length_gives_the_frames_that_cover_it_and_decodes_to_that_length():
    codec = cached_codec("symmetric")
    wave = synthesize(0.1, 5)
    lengths = [*range(1, 2101, 61), 1023, 1024, 1025, 2047, 2048, 2049]
    tokens, tokens_len = codec.encode(np.stack([wave] * len(lengths)), lengths)
    audio, audio_len = codec.decode(tokens, tokens_len, lengths)
    assert audio_len.tolist() == lengths
    for row, n in enumerate(lengths):
        assert tokens_len[row] == -(-n // 1024)
        assert_same_tokens(codec, wave[:n], tokens[row, :, : int(tokens_len[row])])
        assert not audio[row, n:].any()


@pytest.mark.slow
def test_every_length_of_a_two_stage_codec_equals_its_definition():
    codec = cached_codec("two_stages")
    wave = synthesize(0.02, 5)
    for n in range(1, 200):
        tokens, tokens_len = codec.encode(wave[:n])
        assert tokens_len.tolist() == [-(-n // 15)]
        assert_same_tokens(codec, wave[:n], tokens[0])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["symmetric", "two_stages"])
def test_every_length_up_to_four_frames_has_the_same_tokens_in_ragged_batches_and_alone(kind):
    """Test all lengths with short frames, and random lengths and lengths near frame ends with 1,024-sample frames."""
    codec = cached_codec(kind)
    frame = codec.samples_per_frame
    rng = np.random.default_rng(6)
    wave = synthesize(0.5, 6)
    ends = [
        frame * count + extra for count in range(5) for extra in (-1, 0, 1) if 0 < frame * count + extra <= 4 * frame
    ]
    others = rng.permutation(np.setdiff1d(np.arange(1, 4 * frame + 1), ends))[:LENGTHS]
    chosen = rng.permutation(np.concatenate([ends, others]))
    for lengths in np.array_split(chosen, -(-len(chosen) // 64)):
        clips = [wave[:n] for n in lengths]
        tokens, tokens_len = codec.encode(*padded(clips, seed=int(lengths[0])))
        audio, audio_len = codec.decode(tokens, tokens_len, lengths)
        assert audio_len.tolist() == lengths.tolist()
        for row, (clip, count) in enumerate(zip(clips, tokens_len.tolist(), strict=True)):
            assert count == -(-len(clip) // frame)
            assert_same_tokens(codec, clip, tokens[row, :, :count])
            assert not audio[row, len(clip) :].any()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_tokens_in_ragged_batches_equal_single_clips_except_for_rounding_ties():
    codec = cached_codec("symmetric")
    rng = np.random.default_rng(8)
    compared = ties = 0
    while compared < TOKENS:
        clips = [synthesize(12, compared + row)[: rng.integers(1, 12 * 22050)] for row in range(12)]
        tokens, tokens_len = codec.encode(*padded(clips, seed=compared))
        for row, (clip, count) in enumerate(zip(clips, tokens_len.tolist(), strict=True)):
            ties += assert_same_tokens(codec, clip, tokens[row, :, :count])
            compared += count * codec.num_codebooks
    # About two of 2e4 values are within TIE of a rounding edge, and sums differ by far less than TIE.
    assert ties <= compared // 10_000


@pytest.mark.slow
def test_a_batch_of_more_clips_than_run_at_once_keeps_their_order(small):
    wave = synthesize(2)
    clips = [wave[at : at + 6000] for at in range(0, 60 * 600, 600)]
    tokens, _ = small.encode(np.stack(clips))
    for row in (0, 17, 59):
        assert_same_tokens(small, clips[row], tokens[row])


# --- chunks and streams


@pytest.mark.slow
@pytest.mark.parametrize("chunk", slow_if([1, 7, 20, 128], [1, 20, 128]))
@pytest.mark.parametrize("kind", slow_if(["symmetric", "nano", "causal", "two_stages"], ["nano", "causal"]))
def test_any_chunk_size_gives_the_same_result(kind, chunk):
    codec = cached_codec(kind)
    num_frames = 140 if chunk == 128 else 45
    wave = synthesize(7, 9)[: num_frames * codec.samples_per_frame - 77 % codec.samples_per_frame]
    chunked = same_parts(codec, chunk_frames=chunk)
    tokens, tokens_len = chunked.encode(wave)
    assert tokens_len.tolist() == [num_frames]
    assert_same_tokens(codec, wave, tokens[0])
    audio, _ = chunked.decode(tokens)
    torch.testing.assert_close(audio[0], reference_decode(codec, tokens[0]), **AUDIO)


def cut(items: np.ndarray, edges: list[int]) -> list[np.ndarray]:
    """Return consecutive pieces, some of them empty."""
    return np.split(items, sorted(edge % (items.shape[-1] + 1) for edge in edges), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["symmetric", "causal"])
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(length=st.integers(0, 40 * 1024), edges=st.lists(st.integers(0, 10**6), max_size=12), chunk=st.integers(1, 25))
def test_blocks_of_any_size_equal_the_whole_recording(kind, length, edges, chunk):
    codec = same_parts(cached_codec(kind), chunk_frames=chunk)
    wave = synthesize(2, 10)[:length]
    pieces = [np.zeros((codec.num_codebooks, 0), np.int32), *codec.encode_blocks(cut(wave, edges))]
    tokens = np.concatenate(pieces, axis=1)
    if not length:
        assert tokens.shape[1] == 0
        assert list(codec.decode_blocks(cut(tokens, edges))) == []
        return
    assert_same_tokens(codec, wave, torch.from_numpy(tokens))
    audio = np.concatenate(list(codec.decode_blocks(cut(tokens, edges))))
    assert len(audio) == tokens.shape[1] * codec.samples_per_frame
    if tokens.shape[1] < codec.decoder.min_frames:
        return  # see the test of short utterances
    torch.testing.assert_close(torch.from_numpy(audio), reference_decode(codec, torch.from_numpy(tokens)), **AUDIO)


@pytest.mark.slow
def test_stream_yields_early_with_bounded_state(small):
    seen = -1
    block = synthesize(0.25)

    def blocks():
        nonlocal seen
        for _ in range(100):
            seen += 1
            yield block

    codec = same_parts(small, chunk_frames=16)
    stream = codec.encode_blocks(blocks())
    next(stream)
    # 16 frames and 6 of context are 22528 samples; the next block shows that the recording continues.
    assert seen == 22528 // len(block)
    assert sum(piece.shape[1] for piece in stream) == -(-100 * len(block) // 1024) - 16


@pytest.mark.slow
def test_files_round_trip_at_another_rate_and_length(small, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "in.wav", synthesize(1.3, 2), 22050, subtype="FLOAT")
    samples = small.encode_file(tmp_path / "in.wav", tmp_path / "a.lfr")
    assert small.decode_file(tmp_path / "a.lfr", tmp_path / "out.wav") == samples == round(1.3 * 22050)
    audio, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    expected, _ = small.decode(*small.encode(synthesize(1.3, 2)), audio_len=[samples])
    assert rate == 22050
    np.testing.assert_allclose(audio, expected[0].numpy(), rtol=0, atol=0.501 / 32768)  # half a step of 16 bits
    with pytest.raises(NemoLfrError, match=r"out\.wav exists"):
        small.decode_file(tmp_path / "a.lfr", tmp_path / "out.wav")
    with pytest.raises(NemoLfrError, match=r"a\.lfr exists"):
        small.encode_file(tmp_path / "in.wav", tmp_path / "a.lfr")
    assert small.encode_file(tmp_path / "in.wav", tmp_path / "a.lfr", overwrite=True) == samples


def test_negative_length_error_names_no_limit_without_one(small):
    with pytest.raises(TokensError, match=r"audio_len\[0\] is -1; pass a value of at least 0\."):
        small.decode(torch.zeros(1, small.num_codebooks, 2, dtype=torch.int64), audio_len=[-1])


def test_a_file_is_not_replaced_by_its_own_result_even_if_asked(small, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.wav", synthesize(0.1, 2), 22050)
    before = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "link.lfr").symlink_to("a.wav")
    for target in (tmp_path / "a.wav", tmp_path / "link.lfr"):
        with pytest.raises(NemoLfrError, match=r"is the same file as the input .*a\.wav"):
            small.encode_file(tmp_path / "a.wav", target, overwrite=True)
        with pytest.raises(NemoLfrError, match="is the same file as the input"):
            small.decode_file(target, tmp_path / "a.wav", overwrite=True)
    assert (tmp_path / "a.wav").read_bytes() == before


@pytest.mark.slow
def test_a_bad_recording_leaves_no_token_file(small, tmp_path):
    import soundfile

    wave = synthesize(12)
    wave[-5] = np.nan
    soundfile.write(tmp_path / "in.wav", wave, 22050, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"in\.wav.*NaN"):
        small.encode_file(tmp_path / "in.wav", tmp_path / "a.lfr")
    assert [path.name for path in tmp_path.iterdir()] == ["in.wav"]


# --- accepted input


@pytest.mark.slow
def test_every_form_of_the_same_audio_gives_the_same_tokens(small):
    wave = synthesize(0.5, 1)
    pcm = np.round(wave * 32768).clip(-32768, 32767).astype(np.int16)
    wave = (pcm / 32768).astype(np.float32)
    expected, _ = small.encode(wave)
    for form in (
        wave[None],
        torch.from_numpy(wave),
        wave.astype(np.float64),
        torch.from_numpy(wave).double()[None],
        pcm,
        torch.from_numpy(pcm),
        wave.tolist(),
        torch.from_numpy(wave).requires_grad_(),
    ):
        tokens, _ = small.encode(form)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32), tuple])
def test_lengths_may_be_lists_arrays_or_tensors(small, form):
    wave = np.stack([synthesize(0.3, seed) for seed in range(2)])
    tokens, tokens_len = small.encode(wave, form([6615, 2000]))
    assert tokens_len.tolist() == [7, 2]
    audio, audio_len = small.decode(tokens, form([7, 2]), form([6615, 2000]))
    assert audio.shape == (2, 6615) and audio_len.tolist() == [6615, 2000]
    audio, audio_len = small.decode(tokens.numpy().astype(np.int64), tokens_len)
    assert audio.shape == (2, 7168) and audio_len.tolist() == [7168, 2048]


@pytest.mark.slow
def test_results_carry_no_gradient_and_the_global_mode_stays(small):
    tokens, _ = small.encode(torch.from_numpy(synthesize(0.2)).requires_grad_())
    audio, _ = small.decode(tokens)
    assert not audio.requires_grad and torch.is_grad_enabled()
    for _ in small.encode_blocks([synthesize(0.2)]):
        assert torch.is_grad_enabled()


def test_inputs_are_left_as_they_were(small):
    wave, lengths = np.stack([synthesize(0.2)] * 2), np.array([4000, 3])
    before = wave.copy()
    tokens, tokens_len = small.encode(wave, lengths)
    kept = tokens.clone()
    small.decode(tokens, tokens_len)
    assert np.array_equal(wave, before) and torch.equal(tokens, kept) and lengths.tolist() == [4000, 3]


def test_empty_audio_has_no_frames_and_decodes_to_no_samples(codec):
    tokens, tokens_len = codec.encode(np.zeros(0, np.float32))
    assert tokens.shape == (1, codec.num_codebooks, 0) and tokens_len.tolist() == [0]
    audio, audio_len = codec.decode(tokens, tokens_len, [0])
    assert audio.shape == (1, 0) and audio_len.tolist() == [0]


def test_empty_audio_of_another_rate_has_no_frames(small):
    tokens, tokens_len = small.encode(np.zeros((2, 0), np.float32), sample_rate=16000)
    assert tokens.shape == (2, 8, 0) and tokens_len.tolist() == [0, 0]


@pytest.mark.slow
def test_audio_of_another_rate_is_resampled_clip_by_clip(small):
    librosa = pytest.importorskip("librosa")
    clips = [synthesize(0.7, 1)[:11111], synthesize(0.7, 2)[:3000]]
    tokens, tokens_len = small.encode(*padded(clips), sample_rate=16000)
    for row, clip in enumerate(clips):
        resampled = librosa.resample(clip, orig_sr=16000, target_sr=22050)
        assert tokens_len[row] == -(-len(resampled) // 1024)
        assert_same_tokens(small, resampled, tokens[row, :, : int(tokens_len[row])])
    same, _ = small.encode(clips[0], sample_rate=22050)
    assert torch.equal(same, small.encode(clips[0])[0])


@pytest.mark.parametrize("streams", [False, True], ids=["blocks", "stream"])
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((1, 700), np.float32), r"shape \[1, 700\]; pass chunks of one recording"),
        (np.float32(0.5), r"shape \[\]; pass chunks"),
        (np.full(700, np.nan, np.float32), "NaN"),
        (np.full(700, 9000.0), "reaches 9000"),
        (np.zeros(700, np.int32), "int32"),
        (["a"], "type list"),
    ],
    ids=str,
)
def test_bad_chunks_of_samples_are_refused(small, samples, message, streams):
    with pytest.raises(AudioError, match=message):
        small.stream_encoder().push(samples) if streams else list(small.encode_blocks([samples]))


@pytest.mark.parametrize("streams", [False, True], ids=["blocks", "stream"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.full((8, 3), 2016), "token 2016"),
        (np.zeros((8, 3), np.float32), "float32"),
        (np.zeros((1, 8, 3), np.int64), r"shape \[1, 8, 3\]; pass chunks of one recording"),
        (np.zeros(8, np.int64), r"shape \[8\]; pass chunks"),
        (np.zeros((7, 3), np.int64), r"shape \[7, 3\]; pass chunks of one recording, each of shape \[8, k\]"),
        (np.zeros((3, 8), np.int64), r"shape \[3, 8\]; pass chunks of one recording, each of shape \[8, k\]"),
    ],
    ids=["codebook", "dtype", "batch", "frame", "layers", "transposed"],
)
def test_bad_chunks_of_tokens_are_refused(small, tokens, message, streams):
    with pytest.raises(TokensError, match=message):
        small.stream_decoder().push(tokens) if streams else list(small.decode_blocks([tokens]))


@pytest.mark.parametrize("blocks", [np.zeros(700, np.float32), "a.wav", None, 3], ids=str)
def test_blocks_that_are_no_iterable_of_arrays_are_refused(small, blocks):
    with pytest.raises(AudioError, match="pass an iterable of arrays, such as \\[samples\\]"):
        list(small.encode_blocks(blocks))
    with pytest.raises(TokensError, match="pass an iterable of arrays, such as \\[tokens\\]"):
        list(small.decode_blocks(blocks))


def test_int16_blocks_have_the_tokens_of_the_clip(small):
    wave = (20000 * synthesize(0.5)).astype(np.int16)
    expected = small.encode(wave)[0][0]
    blocks = list(small.encode_blocks([wave[:3000], wave[3000:3000], wave[3000:]]))
    assert np.array_equal(np.concatenate(blocks, axis=1), expected)


@pytest.mark.parametrize("frames", [0, -1, 1.5, "5", True, None])
def test_invalid_chunk_frames_are_refused(small, frames):
    message = "chunk_frames is .*; pass an integer of 1 or more"
    if frames is not None:
        with pytest.raises(NemoLfrError, match=message):
            same_parts(small, chunk_frames=frames)
    codec = same_parts(small, chunk_frames=np.int64(7))
    with pytest.raises(NemoLfrError, match=message):
        codec.chunk_frames = frames
    assert codec.chunk_frames == 7


# --- precision and fingerprints


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")
def test_bf16_gives_nearly_the_same_audio_and_most_of_the_tokens(small):
    wave = synthesize(3, 1)
    half = same_parts(small, precision="bf16")
    tokens, _ = half.encode(wave)
    expected, _ = small.encode(wave)
    # Random weights amplify rounding more than trained ones; by chance 1 of 2016 tokens would be equal.
    assert (tokens == expected).float().mean() > 0.5
    audio, _ = half.decode(expected)
    assert audio.dtype == torch.float32
    reference, _ = small.decode(expected)
    # The error of an 8-bit mantissa through 40 layers is a few percent.
    assert (audio - reference).std() < 0.2 * reference.std()
    assert "bf16" in repr(half)


def test_an_unknown_precision_is_refused(small):
    with pytest.raises(NemoLfrError, match=r"int8.*fp32"):
        same_parts(small, precision="int8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(KINDS, "symmetric"))
def test_a_codec_has_one_fingerprint_with_weight_norm_or_without(kind):
    torch.manual_seed(0)
    config = codec_config(kind)
    normed = build_parts(config, weight_norm=True)
    plain = build_parts(config, weight_norm=False)
    for part, other in zip(normed.named().values(), plain.named().values(), strict=True):
        state = {key: value for key, value in part.state_dict().items() if ".parametrizations." not in key}
        for name, module in part.named_modules():
            if f"{name}.weight" in other.state_dict():
                state[f"{name}.weight"] = module.weight
        other.load_state_dict(state)
    first, second = (Codec(TorchBackend(p.encoder, p.quantizer, p.decoder, 22050)) for p in (normed, plain))
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 16 and int(first.fingerprint, 16) >= 0
    wave = synthesize(0.4)[: 7 * 1024]
    assert_same_tokens(second, wave, first.encode(wave)[0][0])


@pytest.mark.slow
def test_fingerprint_does_not_load_weights_into_memory():
    whole, encoding, fresh = (nemo_lfr.load(device="cpu") for _ in range(3))
    expected = whole.encoder and whole.decoder and whole.fingerprint
    assert encoding.encoder and encoding.fingerprint == fresh.fingerprint == expected
    sides = [encoding.backend._decoder, fresh.backend._encoder, fresh.backend._decoder]
    assert not any(side.is_read for side in sides)
    assert all(parameter.is_meta for side in sides for parameter in side.module.parameters())


@pytest.mark.slow
def test_a_codec_works_after_the_main_thread_has_ended():
    script = """
import threading, time, numpy, nemo_lfr
codec = nemo_lfr.load(device="cpu")
def work():
    threading.main_thread().join()
    print(codec.encode(numpy.zeros(22050, "float32"))[0].shape[2])
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "22\n", done.stderr


@pytest.mark.slow
def test_fingerprints_of_different_weights_differ():
    codec, other = build_codec("two_stages"), build_codec("two_stages")
    assert codec.fingerprint == other.fingerprint
    changed = build_codec("two_stages")
    changed.decoder.post_conv.conv.bias.add_(1e-6)
    assert changed.fingerprint != codec.fingerprint


SETTINGS: dict[str, tuple[str, dict]] = {
    "activation": ("symmetric", {"audio_encoder": {"activation": "elu"}}),
    "decoder's activation": ("symmetric", {"audio_decoder": {"activation": "elu"}}),
    "output": ("symmetric", {"audio_decoder": {"output_activation": "clamp"}}),
    "padding": ("symmetric", {"audio_encoder": {"pad_mode": "replicate"}}),
    "decoder's padding": ("symmetric", {"audio_decoder": {"pad_mode": "zeros"}}),
    "causal": ("symmetric", {"audio_encoder": {"_target_": MODULES + "CausalHiFiGANEncoder"}}),
    "sample rate": ("symmetric", {"sample_rate": 24000}),
    "eps": ("symmetric", {"vector_quantizer": {"eps": 1e-4}}),
    "levels": ("symmetric", {"vector_quantizer": {"num_levels_per_group": [8, 6, 7, 6]}}),
    "dilation": ("two_stages", {"audio_encoder": {"resblock_dilation_sizes": [1, 5]}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", slow_after(3, [*SETTINGS]))
def test_a_setting_that_changes_tokens_or_audio_changes_the_fingerprint(setting):
    kind, changes = SETTINGS[setting]
    config = codec_config(kind)
    quantizer = changes.get("vector_quantizer")
    if quantizer is not None:
        changes = {"vector_quantizer": config["vector_quantizer"] | quantizer}
    codecs = []
    for other in (config, codec_config(kind, **changes)):
        parts = build_parts(other, weight_norm=False)
        codecs.append(Codec(TorchBackend(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate)))
    for side in ("encoder", "decoder"):
        getattr(codecs[1], side).load_state_dict(getattr(codecs[0], side).state_dict())
    older = [list(codec.backend.fingerprints())[1] for codec in codecs]
    assert older[0] == older[1]
    assert codecs[0].fingerprint != codecs[1].fingerprint
    assert not codecs[0].made(codecs[1].fingerprint)
    for codec in codecs:
        assert codec.made(codec.fingerprint) and codec.made(older[0])


def test_a_setting_that_is_changed_on_the_module_changes_the_fingerprint():
    codec = build_codec("two_stages")
    before = codec.fingerprint
    codec.encoder.post_activation.activation.negative_slope = 0.2
    assert codec.fingerprint != before


@pytest.mark.slow
def test_fingerprint_does_not_depend_on_class_names():
    ours = codec_config("causal")
    for section, name in (("audio_encoder", "encoder.HiFiGANEncoder"), ("audio_decoder", "decoder.HiFiGANDecoder")):
        ours[section] = ours[section] | {"_target_": f"nemo_lfr.codec.{name}", "causal": True, "pad_mode": "zeros"}
    codecs = []
    for config in (codec_config("causal"), ours):
        torch.manual_seed(0)
        parts = build_parts(config, weight_norm=False)
        codecs.append(Codec(TorchBackend(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate)))
    assert codecs[0].fingerprint == codecs[1].fingerprint


# --- networks that overflow


def overflow(part: torch.nn.Module, where: str, value: float) -> None:
    layer = {"first": part.pre_conv, "last": part.post_conv}.get(where)
    if layer is None:
        layer = part.res_layers[0].res_blocks[0].res_blocks[0].skip_conv
    layer.conv.weight.fill_(value)
    layer.conv.bias.fill_(value)


VALUES = (1e38, -1e38, 3e30, float("inf"), float("nan"))
OVERFLOWS = [
    *(("symmetric", where, value) for where in ("first", "middle", "last") for value in VALUES),
    *(
        ("nano", where, value)
        for where, value in zip(("first", "middle", "last", "last", "middle"), VALUES, strict=True)
    ),
    *(
        ("single", where, value)
        for where, value in zip(("last", "last", "middle", "first", "middle"), VALUES, strict=True)
    ),
]
FAST_OVERFLOWS = [
    ("symmetric", where, value)
    for where, value in zip(("first", "middle", "last", "first", "middle"), VALUES, strict=True)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "where", "value"),
    [pytest.param(*case, marks=() if case in FAST_OVERFLOWS else pytest.mark.slow) for case in OVERFLOWS],
)
def test_network_overflow_raises(kind, where, value):
    codec = build_codec(kind)
    for part in (codec.encoder, codec.decoder):
        overflow(part, where, value)
        if value == 3e30:  # these values are finite, but the last layer overflows
            overflow(part, "last", 3e30 if where != "last" else 1e38)
    wave = synthesize(0.5)
    for encode in (lambda: codec.encode(np.stack([wave, wave])), lambda: list(codec.encode_blocks([wave]))):
        with pytest.raises(NemoLfrError, match=r"encoder gives NaN or infinite values for clip 0\. .* fp32;"):
            encode()
    tokens = np.full((codec.num_codebooks, 9), 5)
    for decode in (lambda: codec.decode(tokens), lambda: list(codec.decode_blocks([tokens]))):
        with pytest.raises(NemoLfrError, match="decoder gives NaN or infinite values for utterance 0"):
            decode()


def test_no_token_file_is_written_if_the_network_overflows(tmp_path):
    codec = build_codec("symmetric")
    overflow(codec.encoder, "last", 1e38)
    soundfile.write(tmp_path / "a.wav", synthesize(0.5), 22050)
    with pytest.raises(NemoLfrError, match="NaN or infinite"):
        codec.encode_file(tmp_path / "a.wav", tmp_path / "a.lfr")
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_random_codecs_of_these_tests_fill_the_range_of_fsq(kind):
    """If all tokens were the same, the tests for equal tokens would prove nothing."""
    codec = cached_codec(kind)
    tokens, _ = codec.encode(synthesize(10, 20)[: 216 * codec.samples_per_frame])
    # A collapsed FSQ gives one token.
    assert min(len(codebook.unique()) for codebook in tokens[0]) >= 30
    wave = synthesize(1, 21)
    assert not torch.equal(reference_encode(codec, wave), reference_encode(codec, synthesize(1, 22)))
    audio, _ = codec.decode(tokens)
    assert audio.std() > 0.02 and (audio.abs() > 0.999).float().mean() < 0.01


def test_using_a_codec_gives_no_warnings(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wave = synthesize(0.2)
        wave.flags.writeable = False  # like arrays of np.memmap and np.frombuffer
        small.decode(*small.encode(wave))


@pytest.mark.slow
def test_modules_are_built_from_our_target_names_and_from_nemos():
    sizes = {"encoded_dim": 4, "causal": True, "base_channels": 2}
    for folder in ("modules", "codec"):  # the current name, and that of older versions
        ours = sizes | {"_target_": f"nemo_lfr.{folder}.encoder.HiFiGANEncoder"}
        assert build_part(ours).context.future == 0


FORKS = """
import os, signal, sys
import numpy as np, torch
from tests.models import cached_codec, synthesize

torch.set_num_threads(2)
codec, audio = cached_codec("symmetric"), synthesize(3.0)
stream = sys.argv[1] == "stream"
encode = (lambda: codec.stream_encoder().push(audio)) if stream else (lambda: codec.encode(audio)[0].numpy())
expected = encode()
if (child := os.fork()) == 0:
    signal.alarm(60)
    equal = np.array_equal(encode(), expected)
    os._exit(0 if equal and torch.get_num_threads() == 1 else 1)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", ["whole", "stream"])
def test_forked_process_does_not_hang(way):
    command = [sys.executable, "-c", FORKS, way]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("limited to one thread") == 1


# --- fewer codebooks


@pytest.mark.slow
@pytest.mark.parametrize("number", slow_after(1, [1, 5, 8, np.int64(2)]))
def test_the_first_codebooks_are_encoded_and_decoded(number):
    codec = cached_codec()
    clips, lengths = padded([synthesize(0.4), synthesize(0.23)])
    everything, tokens_len = codec.encode(clips, lengths)
    tokens, fewer_len = codec.encode(clips, lengths, num_codebooks=number)
    assert torch.equal(tokens, everything[:, :number]) and torch.equal(fewer_len, tokens_len)
    assert tokens.is_contiguous() and tokens.dtype == torch.int32
    # The encoded frame is zero in the dimensions of the other codebooks.
    zero = int(codec.quantizer.codes_to_indices(torch.zeros(1, codec.quantizer.codebook_dim, 1))[0, 0, 0])
    assert zero == codec.spec.zero_token
    expected, expected_len = codec.decode(
        torch.cat([tokens, torch.full_like(everything[:, number:], zero)], 1), tokens_len
    )
    for passed in (tokens, everything, tokens.numpy().astype(np.int16)):
        audio, audio_len = codec.decode(passed, tokens_len, num_codebooks=number)
        assert torch.equal(audio, expected) and torch.equal(audio_len, expected_len)
    if number < 8:
        assert not torch.equal(expected, codec.decode(everything, tokens_len)[0])


@pytest.mark.parametrize("number", [0, -1, 9, True, 1.0, "2"])
def test_an_impossible_number_of_codebooks_is_refused(number):
    codec = cached_codec()
    for call in (
        lambda: codec.encode(synthesize(0.2), num_codebooks=number),
        lambda: codec.decode(np.zeros((8, 5), int), num_codebooks=number),
    ):
        with pytest.raises(TokensError, match="from 1 to 8"):
            call()


def test_tokens_of_fewer_codebooks_are_only_decoded_on_request():
    codec = cached_codec()
    with pytest.raises(TokensError, match=r"expected \[B, 8, T\]"):
        codec.decode(np.zeros((4, 5), int))
    with pytest.raises(TokensError, match=r"expected \[B, 4, T\]"):
        codec.decode(np.zeros((3, 5), int), num_codebooks=4)
    with pytest.raises(TokensError, match="2016"):
        codec.decode(np.full((4, 5), 2016), num_codebooks=4)
