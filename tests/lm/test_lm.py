"""Tests of layouts and codes against their definitions, transformers and NeMo."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lfr.errors import ConfigError, TokensError
from nemo_lfr.lm import DelayLayout, FlatLayout, StackLayout, fold, regroup, unfold

C, K = 3, 10
LEVELS = (8, 7, 6, 6)
LAYOUTS = {
    "interleaved": FlatLayout(C, K),
    "shared ids": FlatLayout(C, K, offsets=False),
    "after text": FlatLayout(C, K, first_id=1000, bos=False),
    "coarse to fine": FlatLayout(C, K, order="codebook"),
    "delay": DelayLayout(C, K),
    "odd delays": DelayLayout(C, K, delays=(2, 0, 5), eos=False),
    "parallel": DelayLayout(C, K, delays=(0, 0, 0)),
    "stacked": StackLayout(C, K, frames_per_step=2),
    "bare": StackLayout(C, K, frames_per_step=4, bos=False, eos=False),
}
EXPECTED = {  # for tokens [[0, 1, 2], [3, 4, 5], [6, 7, 8]]; BOS is <, EOS is > and padding is _
    "interleaved": "< 0 13 26 1 14 27 2 15 28 >",
    "shared ids": "< 0 3 6 1 4 7 2 5 8 >",
    "after text": "1000 1013 1026 1001 1014 1027 1002 1015 1028 >",
    "coarse to fine": "< 0 1 2 13 14 15 26 27 28 >",
    "delay": "< 0 1 2 > _ _ / < < 3 4 5 > _ / < < < 6 7 8 >",
    "odd delays": "< < < 0 1 2 _ _ _ / < 3 4 5 _ _ _ _ _ / < < < < < < 6 7 8",
    "parallel": "< 0 1 2 > / < 3 4 5 > / < 6 7 8 >",
    "stacked": "< 0 2 > / < 3 5 > / < 6 8 > / < 1 _ > / < 4 _ > / < 7 _ >",
    "bare": "0 / 3 / 6 / 1 / 4 / 7 / 2 / 5 / 8 / _ / _ / _",
}


def drawn(ids, layout):
    names = {layout.bos_id: "<", layout.eos_id: ">", layout.pad_id: "_"}
    rows = ids if ids.ndim == 2 else ids[None]
    return " / ".join(" ".join(names.get(int(value), str(int(value))) for value in row) for row in rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_puts_every_token_where_its_definition_says(name):
    ids, ids_len = LAYOUTS[name].arrange(np.arange(9).reshape(3, 3))
    assert drawn(ids, LAYOUTS[name]) == EXPECTED[name]
    assert int(ids_len) == ids.shape[-1]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(LAYOUTS)))
def test_restoring_inverts_arranging_for_any_lengths(data, name):
    layout = LAYOUTS[name]
    lengths = np.array(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    tokens = np.random.default_rng(sum(lengths)).integers(0, K, (len(lengths), C, max(lengths)))
    ids, ids_len = layout.arrange(tokens, lengths)
    assert ids.max(initial=0) < layout.vocab_size
    for row in range(len(lengths)):  # equals the utterance alone, followed by padding
        alone, alone_len = layout.arrange(tokens[row, :, : lengths[row]])
        assert int(alone_len) == ids_len[row] == alone.shape[-1]
        assert (ids[row, ..., : ids_len[row]] == alone).all()
        assert (ids[row, ..., ids_len[row] :] == layout.pad_id).all()
    restored, restored_len = layout.restore(ids)
    assert (restored_len == lengths).all()
    for row, length in enumerate(lengths):
        assert (restored[row, :, :length] == tokens[row, :, :length]).all()
        assert not restored[row, :, length:].any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_torch_and_numpy_agree(name):
    layout = LAYOUTS[name]
    tokens, lengths = np.random.default_rng(0).integers(0, K, (3, C, 7)), np.array([7, 0, 4])
    ids, ids_len = layout.arrange(tokens, lengths)
    tensor, tensor_len = layout.arrange(torch.from_numpy(tokens).to(torch.int32), torch.from_numpy(lengths))
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64
    assert (tensor.numpy() == ids).all() and (tensor_len.numpy() == ids_len).all()
    for ours, theirs in zip(layout.restore(ids), layout.restore(tensor), strict=True):
        assert (theirs.numpy() == ours).all()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "coarse to fine"])
def test_a_sequence_cut_anywhere_gives_the_whole_frames_before_the_cut(name):
    layout = LAYOUTS[name]
    tokens = np.random.default_rng(1).integers(0, K, (C, 6))
    ids, _ = layout.arrange(tokens)
    counts = []
    for stop in range(ids.shape[-1] + 1):
        restored, length = layout.restore(ids[..., :stop])
        assert (restored == tokens[:, : int(length)]).all()
        counts.append(int(length))
    assert counts[0] == 0 and counts[-1] == 6 and counts == sorted(counts)


def test_sizes_may_be_integers_of_numpy():
    layout = DelayLayout(np.int64(C), np.int64(K), delays=np.arange(C), first_id=np.int32(4))
    assert layout.delays == DelayLayout(C, K).delays and type(layout.vocab_size) is int
    assert StackLayout(C, K, frames_per_step=np.uint8(2)).num_streams == 2 * C


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("garbage", ["pad_id", "mask_id", "bos_id", "eos_id"])
def test_a_special_id_among_the_tokens_ends_the_recording(name, garbage):
    layout = LAYOUTS[name]
    tokens = np.random.default_rng(2).integers(0, K, (C, 6))
    ids, _ = layout.arrange(tokens)
    places = np.argwhere(ids < layout.pad_id)
    place = tuple(places[len(places) // 2])
    ids[place] = getattr(layout, garbage)
    restored, length = layout.restore(ids)
    assert int(length) < 6
    assert (restored == tokens[:, : int(length)]).all()


def test_an_id_of_another_codebook_ends_the_recording():
    layout = LAYOUTS["interleaved"]
    ids, _ = layout.arrange(np.zeros((C, 5), int))
    ids[1 + 3 * C] += K  # first token of the fourth frame
    assert int(layout.restore(ids)[1]) == 3


@pytest.mark.slow
def test_the_delay_layout_equals_that_of_transformers():
    musicgen = pytest.importorskip("transformers.models.musicgen.modeling_musicgen")
    tokens = torch.randint(0, K, (2, C, 8), generator=torch.Generator().manual_seed(0))

    class Host:  # the only attributes of the model that the method reads
        num_codebooks = C
        config = type("config", (), {"audio_channels": 1})

    # The prompt of MusicGen begins with BOS, and its pattern has no EOS.
    prompt = torch.cat([torch.full((2, C, 1), -2), tokens], dim=2).reshape(2 * C, 9)
    _, pattern = musicgen.MusicgenForCausalLM.build_delay_pattern_mask(
        Host(), prompt, pad_token_id=K, max_length=9 + C - 1
    )
    ids, _ = DelayLayout(C, K, eos=False).arrange(tokens)
    assert torch.equal(torch.where(ids >= K, K, ids).reshape(2 * C, -1), pattern)


def test_ids_never_overlap():
    for layout in LAYOUTS.values():
        special = [layout.pad_id, layout.bos_id, layout.eos_id, layout.mask_id]
        assert len(set(special)) == 4 and min(special) == layout.first_id + layout.num_token_ids
        assert max(special) == layout.vocab_size - 1


BAD = [
    (lambda: FlatLayout(0, K), ConfigError, "num_codebooks is 0"),
    (lambda: FlatLayout(C, K, order="codebook", offsets=False), ConfigError, "needs offsets"),
    (lambda: FlatLayout(C, K, order="rows"), ConfigError, "use 'frame' or 'codebook'"),
    (lambda: DelayLayout(C, K, delays=[0, 1]), ConfigError, "2 delays; pass 3, one per codebook"),
    (lambda: DelayLayout(C, K, delays=[0, 1, -1]), ConfigError, "delay is -1"),
    (lambda: DelayLayout(C, K, delays=[0, 1, 1.0]), ConfigError, "delay is 1.0"),
    (lambda: FlatLayout(C, 2**62), ConfigError, "codebook_size is 4611686018427387904; pass an integer from 1 to"),
    (lambda: FlatLayout(C, K, first_id=2**62), ConfigError, "first_id is 4611686018427387904"),
    (lambda: FlatLayout(True, K), ConfigError, "num_codebooks is True"),
    (lambda: LAYOUTS["delay"].arrange(np.zeros((2, C, 4), int), [[1, 2], [3]]), TokensError, "pass 2 whole numbers"),
    *(
        (lambda ids=ids: FlatLayout(C, K).restore(ids), TokensError, "begins with an id other than BOS")
        for ids in (np.arange(6), np.full((1, 6), FlatLayout(C, K).pad_id))
    ),
    (lambda: StackLayout(C, K).restore(torch.zeros((2, C, 4), dtype=torch.int64)), TokensError, "other than BOS"),
    (lambda: StackLayout(C, K, frames_per_step=0), ConfigError, "frames_per_step is 0"),
    (lambda: LAYOUTS["delay"].arrange(np.zeros((2, 4), int)), TokensError, r"shape \[2, 4\]"),
    (lambda: LAYOUTS["delay"].arrange(np.full((C, 4), K)), TokensError, r"outside \[0, 10\)"),
    (lambda: LAYOUTS["delay"].arrange(np.zeros((C, 4))), TokensError, "float64; pass integers"),
    (lambda: LAYOUTS["delay"].arrange([[0]] * C), TokensError, "list; pass a NumPy array"),
    (lambda: LAYOUTS["delay"].arrange(np.zeros((1, C, 4), int), [5]), TokensError, "numbers from 0 to 4"),
    (lambda: LAYOUTS["delay"].arrange(np.zeros((1, C, 4), int), [np.nan]), TokensError, "numbers from 0 to 4"),
    (lambda: LAYOUTS["delay"].arrange(np.zeros((1, C, 4), int), [3.5]), TokensError, "numbers from 0 to 4"),
    (
        lambda: LAYOUTS["delay"].arrange(np.zeros((1, C, 4), int), torch.tensor([3.5])),
        TokensError,
        "numbers from 0 to 4",
    ),
    (lambda: LAYOUTS["delay"].arrange(np.zeros((1, C, 4), int), ["3"]), TokensError, "numbers from 0 to 4"),
    (lambda: LAYOUTS["delay"].restore(np.zeros((2, 4), int)), TokensError, r"shape \[2, 4\]"),
    (lambda: LAYOUTS["interleaved"].restore(np.zeros((1, 1, 4), int)), TokensError, "to this layout"),
    (lambda: unfold(np.zeros((4,), int), LEVELS), TokensError, r"pass \[..., C, T\]"),
    (lambda: unfold(np.full((1, 2), 2016), LEVELS), TokensError, "codebooks have 2016 entries"),
    (lambda: unfold(np.zeros((2, 2), int), [LEVELS] * 3), TokensError, "2 codebooks"),
    (lambda: unfold(np.zeros((2, 2), int), (1, 7)), TokensError, "at least 2"),
    *(
        (
            lambda call=call, levels=levels: call(np.zeros((4, 2), int), levels),
            TokensError,
            "pass a sequence of integers",
        )
        for levels in (8, None, {8: 1}, [8.5, 7], "87", [[8, 7.5]], np.array(8))
        for call in (unfold, fold)
    ),
    (lambda: regroup(np.zeros((2, 2), int), LEVELS, 8), TokensError, "pass a sequence of integers"),
    (lambda: fold(np.full((4, 2), 7), LEVELS), TokensError, "outside the levels"),
    (lambda: fold(np.zeros((6, 2), int), LEVELS), TokensError, "size 6"),
    (lambda: regroup(np.zeros((8, 2), int), LEVELS, (7, 8, 6, 6)), TokensError, "same order"),
    (lambda: regroup(np.zeros((3, 2), int), LEVELS, LEVELS * 2), TokensError, "cannot be regrouped"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_every_token_survives_unfolding(library):
    tokens = library(np.arange(2016).reshape(1, 1, -1).repeat(2, 1))
    codes = unfold(tokens, LEVELS)
    assert tuple(codes.shape) == (1, 8, 2016)
    assert [int(code) for code in codes[0, :4, 8 * 7 + 3]] == [3, 0, 1, 0]  # least significant digit first
    assert bool((fold(codes, LEVELS) == tokens).all())
    assert bool((fold(codes, library(np.array(LEVELS))) == tokens).all())


@pytest.mark.parametrize(
    "new_levels", [LEVELS * 2, [LEVELS * 4] * 2, [(8, 7), (6, 6)] * 8, [(level,) for level in LEVELS] * 8]
)
def test_regrouping_is_undone_by_regrouping_back(new_levels):
    tokens = np.random.default_rng(0).integers(0, 2016, (2, 8, 50))
    regrouped = regroup(tokens, LEVELS, new_levels)
    assert (regroup(regrouped, new_levels, LEVELS) == tokens).all()


def test_regrouping_is_exact_for_codebooks_of_unequal_levels():
    tokens = np.random.default_rng(0).integers(0, 2016, (8, 20))
    uneven = [LEVELS * 3, LEVELS * 5]
    assert (regroup(regroup(tokens, LEVELS, uneven), uneven, LEVELS) == tokens).all()


@pytest.mark.nemo
@pytest.mark.parametrize(("groups", "levels"), [(4, LEVELS * 2), (16, None)])
def test_regrouping_and_unfolding_equal_nemos(groups, levels):
    modules = pytest.importorskip("nemo.collections.tts.modules.audio_codec_modules")
    original = modules.GroupFiniteScalarQuantizer(num_groups=8, num_levels_per_group=list(LEVELS))
    tokens = torch.randint(0, 2016, (5, 8, 20_000), generator=torch.Generator().manual_seed(0))
    length = torch.full((5,), 20_000)
    if levels is None:  # NeMo does not support groups of unequal levels, so compare with its codes
        codes = original.decode(indices=tokens.permute(1, 0, 2).int(), input_len=length)
        middle = torch.tensor(LEVELS * 8)[:, None] // 2
        unfolded = unfold(tokens, LEVELS)
        assert torch.equal(unfolded, (codes * middle + middle).round().long())
        assert torch.equal(fold(unfolded, LEVELS), tokens)
        return
    new = modules.GroupFiniteScalarQuantizer(num_groups=groups, num_levels_per_group=list(levels))
    converter = modules.VectorQuantizerIndexConverter(original, new)
    expected = converter.convert_original_to_new(audio_tokens=tokens.int(), audio_lens=length)
    assert torch.equal(regroup(tokens, LEVELS, levels), expected.long())
    assert torch.equal(regroup(expected, levels, LEVELS), tokens)
    assert torch.equal(converter.convert_new_to_original(audio_tokens=expected, audio_lens=length).long(), tokens)


def test_numpy_needs_no_torch():
    code = (
        "import sys, numpy as np; from nemo_lfr.lm import *; "
        "DelayLayout(2, 9).arrange(np.zeros((2, 3), int)); unfold(np.zeros((2, 3), int), (8, 7)); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
