"""Tests that streams give the results of the whole recording, for any division into pieces."""

import copy
import os
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from nemo_lfr.codec import stream_batches
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.streaming import flush_decoders, flush_encoders, push_decoders, push_encoders
from nemo_lfr.errors import AudioError, NemoLfrError, TokensError
from nemo_lfr.pretrained import load
from tests.models import KINDS, build_codec, cached_codec, synthesize
from tests.reference import assert_same_tokens
from tests.tiers import ALL_KINDS, slow_after, slow_except

CHUNKINGS = int(os.environ.get("NEMO_LFR_CHUNKINGS", "3"))


@pytest.fixture(scope="module")
def bundled() -> Codec:
    return load(None, "cpu")


def pieces(rng: np.random.Generator, total: int, longest: int) -> list[int]:
    """Return random lengths that add up to `total`: zero, one, one frame, a prime number, long."""
    lengths: list[int] = []
    while sum(lengths) < total:
        kind = rng.integers(6)
        fixed = (0, 1, 1024, 997)[kind] if kind < 4 else int(rng.integers(1, longest))
        lengths.append(min(fixed, total - sum(lengths)))
    return lengths


def encode(codec: Codec, wave: np.ndarray, lengths: list[int], lookahead: int | None = None) -> torch.Tensor:
    stream = codec.stream_encoder(lookahead)
    edges = np.cumsum([0, *lengths])
    found = [stream.push(wave[start:stop]) for start, stop in pairwise(edges)]
    return torch.from_numpy(np.concatenate([*found, stream.flush()], axis=1))


def decode(codec: Codec, tokens: np.ndarray, lengths: list[int], num_samples: int | None = None) -> np.ndarray:
    stream = codec.stream_decoder()
    edges = np.cumsum([0, *lengths])
    found = [stream.push(tokens[:, start:stop]) for start, stop in pairwise(edges)]
    return np.concatenate([*found, stream.flush(num_samples)])


def assert_streams_as_whole(codec: Codec, wave: np.ndarray, rng: np.random.Generator) -> int:
    """Check one random division of a recording in both directions; return the number of rounding ties."""
    tokens = codec.encode(wave)[0][0]
    ties = assert_same_tokens(codec, wave, encode(codec, wave, pieces(rng, len(wave), 9000)), tokens)
    audio = codec.decode(tokens, audio_len=[len(wave)])[0][0].numpy()
    got = decode(codec, tokens.numpy(), pieces(rng, tokens.shape[1], 9), len(wave))
    if codec.decoder.causal:  # the samples of the last frame are returned before the length is known
        got = got[: len(wave)]
    assert got.shape == audio.shape and got.dtype == np.float32
    assert np.abs(got - audio).max(initial=0) < 1e-5
    return ties


@pytest.mark.parametrize("kind", slow_except(KINDS, "two_stages"))
def test_streams_equal_the_whole_recording_for_any_pieces(kind):
    codec = cached_codec(kind)
    rng = np.random.default_rng(0)
    for number in range(CHUNKINGS):
        num_samples = int(rng.integers(30_000, 80_000)) // (20 if codec.samples_per_frame == 15 else 1)
        assert_streams_as_whole(codec, synthesize(4, seed=number)[:num_samples], rng)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(
    "length", slow_after(5, [0, 1, 1023, 1024, 1025, 2048, 3072, 4096, 4097, 6 * 1024, 13 * 1024 + 5, 20 * 1024])
)
def test_short_recordings_stream_as_whole(kind, length):
    codec = cached_codec(kind)
    rng = np.random.default_rng(length)
    assert_streams_as_whole(codec, synthesize(1, seed=length)[:length], rng)


@pytest.mark.slow
def test_bundled_codec_streams_equal_offline(bundled):
    rng = np.random.default_rng(1)
    for number in range(3):
        assert_streams_as_whole(bundled, synthesize(3, seed=number), rng)


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(KINDS, "two_stages"))
def test_frame_is_returned_when_its_lookahead_is_complete(kind):
    codec = cached_codec(kind)
    wave = synthesize(1.3)
    encoder = codec.stream_encoder()
    assert encoder.delay_frames == codec.encoder.context.future
    frame = codec.samples_per_frame
    assert encoder.latency_ms == pytest.approx(1000 * encoder.delay_frames * frame / 22050)
    given = 0
    for number in range(1, 26):
        given += encoder.push(wave[(number - 1) * frame : number * frame]).shape[1]
        assert given == max(0, number - encoder.delay_frames), number
    decoder = codec.stream_decoder()
    tokens = codec.encode(wave)[0][0].numpy()
    samples = 0
    for number in range(1, 26):
        samples += len(decoder.push(tokens[:, number - 1 : number]))
        assert samples >= frame * (number - codec.decoder.context.future)
        assert samples <= frame * number


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_after(1, ["symmetric", "causal"]))
@pytest.mark.parametrize("first", slow_after(1, [0, 2, 100]))
def test_first_lookahead_gives_the_first_audio_sooner_and_the_rest_exactly(kind, first):
    codec = cached_codec(kind)
    tokens = codec.encode(synthesize(1))[0][0].numpy()
    expected = codec.decode(tokens)[0][0].numpy()
    decoder = codec.stream_decoder(first_lookahead=first)
    frame, delay = codec.samples_per_frame, codec.decoder.context.future
    early = max(0, delay - first)
    pieces = []
    for number in range(1, tokens.shape[1] + 1):
        pieces.append(decoder.push(tokens[:, number - 1 : number]))
        frames = sum(map(len, pieces)) // frame
        assert frames >= max(number - delay, min(early, number - first))
        assert decoder.exact is (early == 0)
    audio = np.concatenate([*pieces, decoder.flush()])
    assert audio.shape == expected.shape
    assert np.abs(audio - expected)[early * frame :].max() < 1e-5
    assert bool(np.abs(audio - expected)[: early * frame].max(initial=0) > 1e-5) is (early > 0)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        *(
            ((None, value), r"first_lookahead is .*; pass an integer \(frames\) of 0 or more")
            for value in (-1, True, 1.0, "2")
        ),
        ((3, 4), "first_lookahead is 4, but lookahead is only 3; pass a first_lookahead of at most 3"),
        ((100, 101), "first_lookahead is 101, but lookahead is only 100"),
    ],
)
def test_invalid_first_lookahead_raises(values, match):
    with pytest.raises(NemoLfrError, match=match):
        cached_codec("symmetric").stream_decoder(*values)


@pytest.mark.slow
def test_stream_state_does_not_grow(bundled):
    encoder, decoder = bundled.stream_encoder(), bundled.stream_decoder()
    sizes = []
    wave = synthesize(2)
    for _ in range(5):
        decoder.push(encoder.push(wave))
        sizes.append([stream._state.values.numel() for stream in (encoder, decoder)])
    assert sizes[2] == sizes[-1]
    assert encoder._state.values.untyped_storage().nbytes() == 4 * sizes[-1][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_less_lookahead_gives_frames_sooner_and_full_lookahead_gives_exact_tokens(kind):
    codec = cached_codec(kind)
    wave = synthesize(1)[: 20 * codec.samples_per_frame]
    whole = codec.encode(wave)[0][0]
    context, frame = codec.encoder.context.future, codec.samples_per_frame
    assert torch.equal(encode(codec, wave, [3 * frame - 1] * 7, context), encode(codec, wave, [3 * frame - 1] * 7))
    for lookahead in sorted({0, 1, context // 2, context - 1} & set(range(context))):
        stream = codec.stream_encoder(lookahead)
        found = []
        for number in range(1, 20):
            found.append(stream.push(wave[(number - 1) * frame : number * frame]))
            assert sum(part.shape[1] for part in found) == max(0, number - lookahead)
        found.append(stream.push(wave[19 * frame :]))
        found.append(stream.flush())
        tokens = np.concatenate(found, axis=1)
        assert tokens.shape == whole.shape
        # With lookahead, the last frame is computed when the end of the recording is known.
        assert np.array_equal(tokens[:, -1], whole[:, -1].numpy()) or lookahead < 1
    decoder = codec.stream_decoder(0)
    audio = [decoder.push(whole[:, number : number + 1].numpy()) for number in range(whole.shape[1])]
    assert all(len(part) == frame for part in audio) and len(decoder.flush()) == 0


@pytest.mark.slow
def test_streams_pushed_together_equal_each_alone():
    codec = cached_codec("symmetric")
    rng = np.random.default_rng(3)
    waves = [synthesize(2, seed=number) for number in range(4)]
    streams = [codec.stream_encoder() for _ in waves]
    decoders = [codec.stream_decoder(0 if number % 2 else None) for number in range(4)]
    places = [0] * 4
    tokens: list[list[np.ndarray]] = [[] for _ in waves]
    audio: list[list[np.ndarray]] = [[] for _ in waves]
    while min(places) < 25_000:
        sizes = [int(rng.choice([441, 1024, 2048, 0])) for _ in waves]
        new = push_encoders(streams, [wave[at : at + n] for wave, at, n in zip(waves, places, sizes, strict=True)])
        places = [min(at + size, len(waves[0])) for at, size in zip(places, sizes, strict=True)]
        for held, part in zip(tokens, new, strict=True):
            held.append(part)
        for held, part in zip(audio, push_decoders(decoders, new), strict=True):
            held.append(part)
    for number, (wave, at) in enumerate(zip(waves, places, strict=True)):
        found = np.concatenate([*tokens[number], streams[number].flush()], axis=1)
        alone = codec.encode(wave[:at])[0][0]
        assert_same_tokens(codec, wave[:at], torch.from_numpy(found), alone)
        if decoders[number].delay_frames:
            heard = np.concatenate(audio[number])
            before = np.concatenate(tokens[number], axis=1)
            assert np.abs(heard - decode(codec, before, [before.shape[1]])[: len(heard)]).max() < 1e-5


def test_streams_flushed_together_equal_each_alone():
    codec = cached_codec("symmetric")
    waves = [synthesize(0.5, seed=number)[:size] for number, size in enumerate((9000, 0, 5000, 700, 9000))]
    encoders, decoders = [codec.stream_encoder() for _ in waves], [codec.stream_decoder() for _ in waves]
    tokens = push_encoders(encoders, waves)
    tokens = [np.concatenate(both, axis=1) for both in zip(tokens, flush_encoders(encoders), strict=True)]
    for wave, found in zip(waves, tokens, strict=True):
        alone = codec.stream_encoder()
        expected = np.concatenate([alone.push(wave), alone.flush()], axis=1)
        assert found.shape == expected.shape
        assert (found == expected).all()
    audio = push_decoders(decoders, tokens)
    lengths = [len(waves[0]), None, None, len(waves[3]), None]
    rests = flush_decoders(decoders, lengths)
    for found, rest, part, length in zip(tokens, rests, audio, lengths, strict=True):
        expected = decode(codec, found, [found.shape[1]], length)
        assert np.concatenate([part, rest]).shape == expected.shape
        assert np.allclose(np.concatenate([part, rest]), expected, atol=1e-5)
    assert flush_encoders([]) == flush_decoders([]) == []


def test_invalid_length_of_one_stream_leaves_all_streams_open():
    codec = cached_codec("symmetric")
    decoders = [codec.stream_decoder() for _ in range(2)]
    first = push_decoders(decoders, [np.zeros((8, 3), int)] * 2)[0]
    with pytest.raises(TokensError, match=r"stream 1: .*3 frames were pushed"):
        flush_decoders(decoders, [None, 5000])
    with pytest.raises(NemoLfrError, match="got 1 lengths for 2 streams"):
        flush_decoders(decoders, [3000])
    with pytest.raises(NemoLfrError, match="passed twice; pass each stream only once"):
        flush_decoders([decoders[0], decoders[0]])
    for wrong in (3, [codec.stream_encoder()]):
        with pytest.raises(NemoLfrError, match="pass"):
            flush_decoders(wrong)
    assert [len(first) + len(rest) for rest in flush_decoders(decoders, [3000, None])] == [3000, 3072]
    with pytest.raises(NemoLfrError, match="flushed"):
        flush_decoders(decoders)


def test_foreign_input_raises():
    codec = cached_codec("symmetric")
    encoder, decoder = codec.stream_encoder(), codec.stream_decoder()
    for bad in (np.zeros((2, 5), np.float32), np.array(1.0), np.array(["a"]), np.full(5, np.nan), np.full(5, 1e4)):
        with pytest.raises(AudioError):
            encoder.push(bad)
    for wrong in (
        np.zeros(8, int),
        np.zeros((7, 2), int),
        np.zeros((8, 2)),
        np.full((8, 2), 2016),
        np.full((8, 1), -1),
    ):
        with pytest.raises(TokensError):
            decoder.push(wrong)
    assert encoder.flush().shape == (8, 0) and len(decoder.flush()) == 0
    with pytest.raises(NemoLfrError, match="flushed"):
        encoder.push(np.zeros(5, np.float32))
    with pytest.raises(NemoLfrError, match="flushed"):
        decoder.flush()
    with pytest.raises(TokensError, match="1 frames were pushed"):
        other = codec.stream_decoder()
        other.push(np.zeros((8, 1), int))
        other.flush(5000)
    for lookahead in (-1, 1.5, True, "2"):
        with pytest.raises(NemoLfrError, match="lookahead"):
            codec.stream_encoder(lookahead)


@pytest.mark.slow
def test_invalid_input_of_one_stream_does_not_affect_the_others():
    codec, wave = cached_codec("symmetric"), synthesize(1.5)
    good, bad = codec.stream_encoder(), codec.stream_encoder()
    found = [good.push(wave[:5000])]
    for _ in range(2):
        with pytest.raises(AudioError):
            push_encoders([good, bad], [wave[5000:9100], np.full(9, np.nan)])
    found += [push_encoders([good, bad], [wave[5000:9100], wave[:9]])[0], good.push(wave[9100:]), good.flush()]
    assert_same_tokens(codec, wave, torch.from_numpy(np.concatenate(found, axis=1)))
    tokens = np.concatenate(found, axis=1)
    first, second = codec.stream_decoder(), codec.stream_decoder()
    with pytest.raises(TokensError):
        push_decoders([first, second], [tokens, np.full((8, 1), 2016)])
    heard = np.concatenate([push_decoders([first, second], [tokens, tokens[:, :1]])[0], first.flush(len(wave))])
    assert np.abs(heard - decode(codec, tokens, [tokens.shape[1]], len(wave))).max() < 1e-5
    assert push_encoders([], []) == push_decoders([], []) == []
    with pytest.raises(NemoLfrError, match="several codecs"):
        push_encoders([good, cached_codec("causal").stream_encoder()], [wave, wave])


@pytest.mark.slow
def test_long_chunk_is_processed_in_short_ones(monkeypatch):
    codec, wave = cached_codec("symmetric"), synthesize(6)
    sizes = []
    together = stream_batches.run_batched

    def watched(states, inputs, *rest):
        sizes.append(inputs[0].shape)
        return together(states, inputs, *rest)

    monkeypatch.setattr(stream_batches, "run_batched", watched)
    encoder, decoder = codec.stream_encoder(), codec.stream_decoder()
    tokens = np.concatenate([encoder.push(wave), encoder.flush()], axis=1)
    assert_same_tokens(codec, wave, torch.from_numpy(tokens))
    assert max(shape[1] for shape in sizes) <= 66 * 1024
    sizes.clear()
    heard = np.concatenate([decoder.push(tokens), decoder.flush(len(wave))])
    assert max(shape[2] for shape in sizes) <= 66
    assert np.abs(heard - codec.decode(tokens, audio_len=[len(wave)])[0][0].numpy()).max() < 1e-5
    # Without lookahead, only the end of a long push lacks context, not the end of each piece that it is split into.
    encoder, decoder = codec.stream_encoder(0), codec.stream_decoder(0)
    assert_same_tokens(codec, wave[: 120 * 1024], torch.from_numpy(encoder.push(wave[: 120 * 1024])))
    heard = decoder.push(tokens[:, :120])
    assert np.abs(heard - codec.decode(tokens[:, :120])[0][0].numpy()).max() < 1e-5


def test_a_push_that_completes_no_frame_runs_no_network(monkeypatch):
    codec = cached_codec("two_stages")
    encoder, decoder = codec.stream_encoder(), codec.stream_decoder()
    monkeypatch.setattr(stream_batches, "run_batched", lambda *_: pytest.fail("the network runs"))
    assert encoder.push(np.zeros(codec.samples_per_frame - 1, np.float32)).shape == (codec.num_codebooks, 0)
    assert decoder.push(np.zeros((codec.num_codebooks, 0), np.int32)).shape == (0,)


@pytest.mark.slow
def test_integers_and_lists_of_samples_are_audio_too():
    codec = cached_codec("symmetric")
    wave = (synthesize(1) * 32767).astype(np.int16)
    stream = codec.stream_encoder()
    found = np.concatenate([stream.push(wave), stream.flush()], axis=1)
    assert np.array_equal(found, codec.encode(wave)[0][0].numpy())


# --- streams that are misused do not change


MISUSES = {
    "the same stream twice": lambda push, stream, piece: push([stream, stream], [piece, piece]),
    "too few pieces": lambda push, stream, piece: push([stream], []),
    "too many pieces": lambda push, stream, piece: push([stream], [piece, piece]),
    "no list of streams": lambda push, stream, piece: push(stream, [piece]),
    "no list of pieces": lambda push, stream, piece: push([stream], None),
    "no stream": lambda push, stream, piece: push([stream, object()], [piece, piece]),
    "None as piece": lambda push, stream, piece: push([stream], [None]),
    "text as piece": lambda push, stream, piece: push([stream], ["speech"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("misuse", slow_after(2, [*MISUSES]))
def test_misused_stream_raises_and_stays_unchanged(misuse):
    codec, wave = cached_codec("symmetric"), synthesize(0.7)
    tokens = codec.encode(wave)[0][0].numpy()
    encoder, decoder = codec.stream_encoder(), codec.stream_decoder()
    found, heard = [encoder.push(wave[:9000])], [decoder.push(tokens[:, :5])]
    for push, stream, piece in ((push_encoders, encoder, wave[:3000]), (push_decoders, decoder, tokens[:, :2])):
        with pytest.raises(NemoLfrError) as caught:
            MISUSES[misuse](push, stream, piece)
        assert "\n" not in str(caught.value)
    found += [encoder.push(wave[9000:]), encoder.flush()]
    heard += [decoder.push(tokens[:, 5:]), decoder.flush(len(wave))]
    assert_same_tokens(codec, wave, torch.from_numpy(np.concatenate(found, axis=1)))
    expected = codec.decode(tokens, audio_len=[len(wave)])[0][0].numpy()
    assert np.abs(np.concatenate(heard) - expected).max() < 1e-5


def test_streams_of_the_other_direction_are_refused():
    codec = cached_codec("symmetric")
    with pytest.raises(NemoLfrError, match="StreamDecoder; pass only StreamEncoder"):
        push_encoders([codec.stream_decoder()], [synthesize(0.1)])
    with pytest.raises(NemoLfrError, match="StreamEncoder; pass only StreamDecoder"):
        push_decoders([codec.stream_encoder()], [np.zeros((8, 2), int)])


@pytest.mark.slow
@pytest.mark.parametrize("use", ["push", "flush", "push_encoders"])
def test_stream_in_use_by_another_thread_raises_and_stays_unchanged(use, monkeypatch):
    codec, wave = cached_codec("symmetric"), synthesize(0.7)
    stream, other = codec.stream_encoder(), codec.stream_encoder()
    computing, done = threading.Event(), threading.Event()
    together = stream_batches.run_batched

    def slow(*arguments):
        computing.set()
        assert done.wait(60)
        return together(*arguments)

    found: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: found.append(stream.push(wave[:9000])))
    with monkeypatch.context() as patch:
        patch.setattr(stream_batches, "run_batched", slow)
        thread.start()
        assert computing.wait(60)
        uses = {
            "push": lambda: stream.push(wave[9000:]),
            "flush": stream.flush,
            "push_encoders": lambda: push_encoders([other, stream], [wave, wave]),
        }
        try:
            with pytest.raises(NemoLfrError, match="another thread"):
                uses[use]()
        finally:
            done.set()
            thread.join()
    found += [stream.push(wave[9000:]), stream.flush()]
    assert_same_tokens(codec, wave, torch.from_numpy(np.concatenate(found, axis=1)))
    # The other stream of that batch must not have consumed any input.
    assert_same_tokens(codec, wave, torch.from_numpy(np.concatenate([other.push(wave), other.flush()], axis=1)))


@pytest.mark.slow
def test_a_push_that_fails_halfway_is_undone(monkeypatch):
    codec, wave = cached_codec("symmetric"), synthesize(4)
    stream = codec.stream_encoder()
    together, calls = stream_batches.run_batched, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return together(*arguments)

    found = [stream.push(wave[:5000])]
    with monkeypatch.context() as patch:
        patch.setattr(stream_batches, "run_batched", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.push(wave[5000:])
    found += [stream.push(wave[5000:]), stream.flush()]
    assert len(calls) == 2
    assert_same_tokens(codec, wave, torch.from_numpy(np.concatenate(found, axis=1)))


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_names_the_stream_with_the_invalid_chunk(count):
    codec = cached_codec("symmetric")
    stream = "" if count == 1 else f"stream {count - 1}: "
    encoders = [codec.stream_encoder() for _ in range(count)]
    chunks = [synthesize(0.1)] * (count - 1) + [np.full(2000, np.nan, np.float32)]
    with pytest.raises(AudioError, match=f"^{stream}the chunk contains NaN"):
        push_encoders(encoders, chunks)
    decoders = [codec.stream_decoder() for _ in range(count)]
    tokens = [np.zeros((8, 3), int)] * (count - 1) + [np.full((8, 3), 9999)]
    with pytest.raises(TokensError, match=f"^{stream}the chunk contains the token 9999, which is outside"):
        push_decoders(decoders, tokens)


@pytest.mark.slow
def test_an_error_of_a_flush_names_the_stream():
    codec = build_codec("symmetric")
    streams = [codec.stream_encoder() for _ in range(3)]
    push_encoders(streams, [synthesize(0.1)[:0], synthesize(0.1), synthesize(0.1)])
    codec.encoder.post_conv.conv.weight.fill_(1e38)
    with pytest.raises(NemoLfrError, match=r"^stream 1: .*encoder gives NaN or infinite"):
        flush_encoders(streams)


@pytest.mark.slow
def test_copied_stream_is_independent():
    codec, wave = cached_codec("symmetric"), synthesize(0.7)
    stream = codec.stream_encoder()
    first = stream.push(wave[:9000])
    for copied in (copy.copy(stream), copy.deepcopy(stream)):
        copied.push(synthesize(0.3, 9))
    rest = [stream.push(wave[9000:]), stream.flush()]
    assert_same_tokens(codec, wave, torch.from_numpy(np.concatenate([first, *rest], axis=1)))


@pytest.mark.slow
def test_stream_raises_if_its_network_overflows():
    codec = build_codec("symmetric")
    for part in (codec.encoder, codec.decoder):
        part.post_conv.conv.weight.fill_(1e38)
    with pytest.raises(NemoLfrError, match="encoder gives NaN or infinite"):
        codec.stream_encoder().push(synthesize(1.0))
    with pytest.raises(NemoLfrError, match="decoder gives NaN or infinite"):
        codec.stream_decoder().push(np.ones((8, 30), int))


@pytest.mark.parametrize("num_samples", [1999.5, 2000.0, "2000", True, -1, [2000], np.ones(2, int)])
def test_flush_refuses_lengths_that_are_not_whole(num_samples):
    codec = cached_codec("two_stages")
    stream = codec.stream_decoder()
    first = stream.push(np.zeros((codec.num_codebooks, 9), np.int32))
    with pytest.raises(TokensError, match=r"num_samples is .*; pass an integer of 0 or more"):
        stream.flush(num_samples)
    length = 9 * codec.samples_per_frame - 3
    assert len(first) + len(stream.flush(np.int64(length))) == length  # the stream is unchanged


def test_streams_refuse_nested_tensors():
    codec = cached_codec("two_stages")
    with pytest.raises(AudioError, match="nested tensor"):
        codec.stream_encoder().push(torch.nested.nested_tensor([torch.zeros(9)]))
    with pytest.raises(TokensError, match="nested tensor"):
        codec.stream_decoder().push(torch.nested.nested_tensor([torch.zeros(8, 3, dtype=torch.int64)]))
