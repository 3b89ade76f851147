import json
import math
import re
import struct
import zlib
from dataclasses import asdict

import numpy as np
import pytest

from nemo_lfr.errors import EntropyModelError
from nemo_lfr.io.entropy import blocks
from nemo_lfr.io.entropy.blocks import decode_block, decode_blocks, encode_block
from nemo_lfr.io.entropy.coder import TOTAL, Decoder, encode_intervals
from nemo_lfr.io.entropy.find import bundled_model, bundled_model_path
from nemo_lfr.io.entropy.model import EntropyModel, ModelSpec
from nemo_lfr.io.entropy.predict import EXPONENTIALS, ROOTS, digits_to_tokens, frequencies, tokens_to_digits
from tests import entropy_reference

LAYOUTS = {
    "released": ((8, 7, 6, 6), 8),
    "one binary digit": ((2,), 1),
    "nano codec": ((9, 8, 8, 7), 13),
    "most levels": ((64, 2, 3), 2),
}


def random_model(
    levels=(8, 7, 6, 6), num_codebooks=8, *, seed=0, size=9, past=2, averages=(2, 5), spreads=(3,), hidden=(10, 12)
):
    """Return a model whose predictions are far from uniform and depend on all earlier values."""
    spec = ModelSpec(levels, num_codebooks, past, averages, spreads, hidden, (5, 6, 5))
    random = np.random.default_rng(seed)
    weights = {
        name: random.integers(-size, size + 1, shape).astype(dtype) * (8 if name == "digit_weight" else 1)
        for name, dtype, shape in spec.tensors()
    }
    return EntropyModel(spec, {name: weights[name].astype(dtype) for name, dtype, _ in spec.tensors()})


def random_tokens(model, frames, seed=0):
    shape = (model.spec.num_codebooks, frames)
    return np.random.default_rng(seed).integers(0, math.prod(model.spec.levels), shape, dtype=np.int32)


def by_reference(model, payload, frames):
    digits = entropy_reference.decode_payload(entropy_reference.Model(model.to_bytes()), payload, frames)
    return digits_to_tokens(np.array(digits), model.spec.levels)


@pytest.mark.parametrize(("levels", "num_codebooks"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "settings", [{}, {"past": 1, "averages": (), "spreads": ()}, {"past": 3, "averages": (1, 8, 3), "spreads": (1, 2)}]
)
def test_reference_decoder_reads_what_the_encoder_writes(levels, num_codebooks, settings):
    model = random_model(levels, num_codebooks, **settings)
    for frames in (1, 7):
        tokens = random_tokens(model, frames)
        payload = encode_block(model, tokens)
        assert np.array_equal(by_reference(model, payload, frames), tokens)
        assert np.array_equal(decode_block(model, payload, frames), tokens)


@pytest.mark.slow
def test_blocks_side_by_side_decode_as_each_alone():
    model = random_model()
    parts = [random_tokens(model, frames, frames) for frames in (5, 1, 40, 17, 40, 3)]
    coded = [(encode_block(model, part), part.shape[1]) for part in parts]
    for count in range(len(parts) + 1):
        for expected, decoded in zip(parts[:count], decode_blocks(model, coded[:count]), strict=True):
            assert np.array_equal(expected, decoded)
            assert decoded.dtype == np.int32


def test_likely_tokens_take_less_than_unlikely_ones():
    model = random_model()
    assert len(encode_block(model, likely_tokens(model, 60))) < 0.9 * len(
        encode_block(model, random_tokens(model, 60))
    )


def likely_tokens(model, frames, seed=0):
    """Draw tokens from the model's own distribution, by decoding random bytes."""
    noise = np.random.default_rng(seed).bytes(4 * model.spec.num_digits * frames)
    decoder = Decoder(struct.pack("<I", 1 << 24) + noise)
    history = blocks.History(model.spec, 1)
    digits = np.zeros((frames, model.spec.num_digits), np.int64)
    for row in digits:
        sums = blocks.hidden_sums(model, history.features)
        for digit in range(len(row)):
            row[digit] = decoder.take(frequencies(blocks.logits(model, sums, digit))[0].tolist())
            sums += model.layers.digits[digit][row[digit]]
        history.push(row[None])
    return digits_to_tokens(digits, model.spec.levels)


def test_a_batch_predicts_what_each_frame_alone_predicts():
    """BLAS computes matrices and vectors differently, but integers must be equal."""
    model = random_model(hidden=(100, 90), size=40, seed=3)
    digits = tokens_to_digits(random_tokens(model, 50), model.spec.levels)
    features = blocks.block_features(model.spec, digits)
    together = blocks.hidden_sums(model, features)
    alone = np.concatenate([blocks.hidden_sums(model, row[None]) for row in features])
    assert np.array_equal(together, alone)
    exact = features.astype(np.int64)
    weights = {name: tensor.astype(np.int64) for name, tensor in model.weights.items()}
    hidden = ((exact[:, :-1] @ weights["input_weight"].T + weights["input_bias"]) >> 5).clip(0, 255)
    sums = np.hstack([hidden, exact[:, :-1]]) @ weights["hidden_weight"].T + weights["hidden_bias"]
    assert np.array_equal(together, sums)


def test_frequencies_are_positive_and_add_up():
    random = np.random.default_rng(0)
    for levels in (2, 6, 64):
        steps = random.integers(-400, 400, (200, levels)).astype(np.float32)
        steps[0] = 0
        steps[1, 0] = -(2.0**23)
        table = frequencies(steps)
        assert table.min() >= 1
        assert (table.sum(axis=1) == TOTAL).all()
        likeliest_first = (-steps).argsort(axis=1, kind="stable")
        assert (np.diff(np.take_along_axis(table, likeliest_first, axis=1)) <= 0).all()


def test_the_table_of_roots_holds_powers_of_two():
    assert list(ROOTS) == [round(2**16 * 2 ** (-step / 16)) for step in range(16)]
    assert EXPONENTIALS[0] == 1 << 16
    assert EXPONENTIALS[-1] == 1


@pytest.mark.parametrize("seed", range(3))
def test_symbols_round_trip_through_the_coder(seed):
    random = np.random.default_rng(seed)
    cuts = np.sort(random.choice(np.arange(1, TOTAL), (500, 5)), axis=1)
    tables = np.diff(np.hstack([np.zeros((500, 1), int), cuts, np.full((500, 1), TOTAL)]), axis=1)
    tables[0] = [0, 0, TOTAL, 0, 0, 0]
    symbols = [int(random.choice(np.flatnonzero(table))) for table in tables]
    starts = [int(table[:symbol].sum()) for table, symbol in zip(tables, symbols, strict=True)]
    lengths = [int(table[symbol]) for table, symbol in zip(tables, symbols, strict=True)]
    data = encode_intervals(starts, lengths)
    decoder = Decoder(data)
    assert [decoder.take(table.tolist()) for table in tables] == symbols
    assert decoder.finish() == b""
    bits = -np.log2(np.array(lengths) / TOTAL).sum()
    assert 8 * len(data) <= bits * 1.001 + 32


@pytest.mark.slow
def test_a_damaged_payload_raises_or_gives_other_tokens():
    model = random_model()
    tokens = random_tokens(model, 5)
    payload = encode_block(model, tokens)
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        for decode in (
            lambda data: decode_block(model, data, 5),
            lambda data: decode_blocks(model, [(data, 5)] * 3)[2],
        ):
            try:
                assert not np.array_equal(decode(bytes(damaged)), tokens)
            except ValueError as error:
                assert re.search("compressed data|state of the coder", str(error))
    for wrong in (payload[:-1], payload + b"\0", payload[:3], b""):
        for count in (1, 3):
            with pytest.raises(ValueError, match=r"compressed data|state of the coder"):
                decode_blocks(model, [(wrong, 5)] * count)


@pytest.mark.slow
def test_short_payloads_are_padded_to_a_quarter_byte_per_frame():
    spec = ModelSpec((2,), 1, 1, (), (), (1, 1), (0, 0, 0))
    weights = {name: np.zeros(shape, dtype) for name, dtype, shape in spec.tensors()}
    weights["output_bias"] = np.array([4000, 0], "<i4")
    model = EntropyModel(spec, weights)
    tokens = np.zeros((1, 1000), np.int32)
    payload = encode_block(model, tokens)
    assert len(payload) == 250
    for count in (1, 3):
        assert np.array_equal(decode_blocks(model, [(payload, 1000)] * count)[-1], tokens)
        with pytest.raises(ValueError, match="follow"):
            decode_blocks(model, [(payload[:-1] + b"\1", 1000)] * count)
    assert np.array_equal(by_reference(model, payload, 1000), tokens)


# The model file.


def packed(spec, weights=None):
    """Return a model file with any metadata and a correct checksum."""
    text = json.dumps(spec).encode() if isinstance(spec, dict) else spec
    data = b"LFRM" + struct.pack("<I", len(text) << 8 | 1) + text + (weights or b"")
    return data + struct.pack("<I", zlib.crc32(data))


def altered(**changes):
    return packed(asdict(random_model().spec) | changes, b"\0" * 1000)


HOSTILE = {
    "empty": (b"", "not an entropy model"),
    "another magic": (b"LFRT" + bytes(40), "not an entropy model"),
    "magic alone": (b"LFRM\x01", "too early"),
    "newer": (b"LFRM\x02" + bytes(20), "version 2"),
    "long metadata": (b"LFRM\x01\xff\xff\xff" + bytes(20), "length is 16777215"),
    "cut": (random_model().to_bytes()[:-1], "checksum"),
    "longer": (random_model().to_bytes() + b"\0", "checksum"),
    "no JSON": (packed(b"{"), "metadata is invalid"),
    "a list": (packed(b"[1]"), "metadata is invalid"),
    "nested": (packed(b"[" * 60000), "metadata is invalid"),
    "missing key": (packed({"levels": [2]}), "metadata is invalid"),
    "no levels": (altered(levels=[]), "levels"),
    "one level": (altered(levels=[1, 2]), "levels"),
    "many levels": (altered(levels=[65]), "levels"),
    "levels are text": (altered(levels="88"), "levels"),
    "a true level": (altered(levels=[True, 2]), "levels"),
    "many digits": (altered(num_codebooks=256), "1024 FSQ dimensions"),
    "no past": (altered(past=0), "past"),
    "float past": (altered(past=2.0), "past"),
    "huge past": (altered(past=10**400), "past"),
    "wide": (altered(hidden=[1025, 2]), "hidden"),
    "one hidden layer": (altered(hidden=[5]), "hidden"),
    "many averages": (altered(averages=[1] * 5), "averages"),
    "average of nothing": (altered(averages=[0]), "averages"),
    "wide shift": (altered(shifts=[0, 0, 21]), "shifts"),
    "control characters": (altered(fingerprint="\x1b[2J"), "fingerprint"),
    "weights missing": (packed(asdict(random_model().spec)), "does not match its metadata"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_model_files_raise(tmp_path, data, message):
    path = tmp_path / "a.lfrm"
    path.write_bytes(data)
    with pytest.raises(EntropyModelError, match=message) as caught:
        EntropyModel.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_every_flipped_bit_of_a_model_is_found():
    data = random_model(hidden=(2, 2), past=1, levels=(3,), num_codebooks=2).to_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EntropyModelError):
            EntropyModel.from_bytes(bytes(damaged), "a")


LARGE = {"first": "input_bias", "second": "hidden_bias", "output": "output_bias"}


@pytest.mark.parametrize(("layer", "name"), LARGE.items(), ids=LARGE)
def test_weights_that_float32_could_not_add_exactly_are_refused(layer, name):
    model = random_model()
    for value in ((1 << 24), -(1 << 31)):
        weights = dict(model.weights)
        weights[name] = np.full_like(weights[name], value)
        with pytest.raises(ValueError, match=f"{layer} layer"):
            EntropyModel(model.spec, weights)


def test_model_files_survive_writing_and_reading():
    model = random_model()
    again = EntropyModel.from_bytes(model.to_bytes(), "a")
    assert (again.spec, again.hash, again.to_bytes()) == (model.spec, model.hash, model.to_bytes())
    assert random_model(seed=1).hash != model.hash


def test_tokens_round_trip_through_digits():
    model = random_model()
    tokens = random_tokens(model, 9)
    assert np.array_equal(digits_to_tokens(tokens_to_digits(tokens, (8, 7, 6, 6)), (8, 7, 6, 6)), tokens)


def test_the_bundled_model_is_of_the_bundled_codec():
    """If this test fails, the codec was retrained. Fit the model again, as described in recipes/bundled_codec."""
    import nemo_lfr

    codec = nemo_lfr.load(device="cpu")
    model = bundled_model()
    assert bundled_model_path().stat().st_size < 400_000
    assert model.spec.fingerprint == codec.fingerprint
    assert (model.spec.levels, model.spec.num_codebooks) == (codec.levels, codec.num_codebooks)
