import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lfr.frames import Context, bits_per_frame, bytes_per_frame, duration_text, num_frames, plan_windows
from tests.models import KINDS, cached_codec
from tests.tiers import ALL_KINDS


@given(st.integers(0, 10**12), st.integers(1, 5000))
def test_frames_cover_the_samples_and_no_more(num_samples, samples_per_frame):
    count = num_frames(num_samples, samples_per_frame)
    assert (count - 1) * samples_per_frame < num_samples <= count * samples_per_frame


def test_eight_codebooks_of_2016_take_11_bytes_a_frame():
    # 8 * log2(2016) = 87.8 bits, and 88 bits are 11 bytes.
    assert bytes_per_frame([8, 7, 6, 6], 8) == 11
    assert bits_per_frame([8, 7, 6, 6], 8) == pytest.approx(87.818, abs=1e-3)


def test_thirteen_codebooks_of_2016_take_18_bytes_a_frame():
    # 13 * log2(2016) = 142.7 bits; 17 bytes are 136.
    assert bytes_per_frame([8, 7, 6, 6], 13) == 18


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0.0 seconds"), (17.42, "17.4 seconds"), (60, "1.0 minutes"), (3599, "60.0 minutes"), (9000, "2.50 hours")],
)
def test_a_duration_has_the_largest_fitting_unit(seconds, expected):
    assert duration_text(seconds) == expected


@pytest.mark.parametrize(("levels", "codebooks", "expected"), [([2], 8, 1), ([2], 9, 2), ([4, 4], 2, 1), ([17], 2, 2)])
def test_bytes_per_frame_is_exact_for_powers_of_two(levels, codebooks, expected):
    assert bytes_per_frame(levels, codebooks) == expected


def test_the_bit_rate_of_the_released_layout_is_1_89_kbps():
    # 22050 / 1024 frames/s * 8 * log2(8 * 7 * 6 * 6), by hand.
    assert cached_codec("symmetric").bit_rate == pytest.approx(21.533203 * 87.81824, abs=0.01)


@given(st.integers(0, 400), st.integers(1, 50), st.integers(0, 30), st.integers(0, 30))
def test_windows_cover_every_frame_exactly_once_with_its_context(total, chunk, past, future):
    windows = list(plan_windows(total, chunk, Context(past, future)))
    covered = [frame for window in windows for frame in range(window.keep_start, window.keep_stop)]
    assert covered == list(range(total))
    for window in windows:
        assert window.start == max(0, window.keep_start - past)
        assert window.stop == min(total, window.keep_stop + future)
        assert list(range(window.start, window.stop))[window.kept] == list(range(window.keep_start, window.keep_stop))
        # Memory is bounded; the last chunk may include its own future context.
        assert window.num_frames <= chunk + past + 2 * future or total <= chunk + future


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_properties_agree_with_the_definition_of_each(kind):
    codec = cached_codec(kind)
    assert codec.samples_per_frame == codec.decoder.samples_per_frame
    assert codec.frame_rate == 22050 / codec.samples_per_frame
    assert codec.codebook_size == math.prod(codec.levels) == 2016
    assert codec.bit_rate == pytest.approx(codec.frame_rate * codec.num_codebooks * math.log2(2016))
    assert kind in KINDS
    assert str(codec.num_codebooks) in repr(codec)
