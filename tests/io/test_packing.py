import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lfr.errors import TokensError
from nemo_lfr.frames import bytes_per_frame
from nemo_lfr.io.packing import pack, unpack

layouts = st.tuples(
    st.lists(st.integers(2, 12), min_size=1, max_size=5), st.integers(1, 16), st.integers(0, 30), st.integers(0, 2**32)
)


@settings(deadline=None)
@given(layouts)
def test_tokens_of_any_layout_survive_packing(layout):
    levels, codebooks, frames, seed = layout
    size, num_bytes = int(np.prod(levels)), bytes_per_frame(levels, codebooks)
    tokens = np.random.default_rng(seed).integers(0, size, (codebooks, frames), dtype=np.int32)
    packed = pack(tokens, size, num_bytes)
    assert len(packed) == frames * num_bytes
    assert np.array_equal(unpack(packed, size, codebooks, num_bytes), tokens)


def test_a_frame_is_a_little_endian_number_with_the_first_codebook_as_lowest_digit():
    tokens = np.random.default_rng(0).integers(0, 2016, (8, 5))
    packed = pack(tokens, 2016, 11)
    for frame, column in enumerate(tokens.T):
        number = int.from_bytes(packed[11 * frame : 11 * frame + 11], "little")  # Python's own big integers
        assert number == sum(int(token) * 2016**place for place, token in enumerate(column))


def test_the_largest_frame_fits():
    tokens = np.full((8, 2), 2015)
    assert np.array_equal(unpack(pack(tokens, 2016, 11), 2016, 8, 11), tokens)


@pytest.mark.parametrize("bad", [-1, 2016])
def test_a_token_outside_the_codebook_is_refused(bad):
    with pytest.raises(TokensError, match=f"{bad}.*2016"):
        pack(np.full((8, 1), bad), 2016, 11)


def test_frame_value_out_of_range_is_refused():
    with pytest.raises(TokensError, match=r"2016\^8"):
        unpack((2016**8).to_bytes(11, "little"), 2016, 8, 11)


def test_bytes_that_are_not_whole_frames_are_refused():
    with pytest.raises(TokensError, match="12 bytes"):
        unpack(b"\0" * 12, 2016, 8, 11)
