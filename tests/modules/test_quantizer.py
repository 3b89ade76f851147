import math

import numpy as np
import pytest
import torch

from nemo_lfr.errors import TokensError
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from tests.reference import TIE

LEVELS = [[8, 7, 6, 6], [9, 8, 8, 7], [2, 3], [5]]


@pytest.mark.parametrize("levels", LEVELS)
def test_every_token_survives_tokens_to_codes_to_tokens(levels):
    quantizer = FiniteScalarQuantizer(levels)
    tokens = torch.arange(math.prod(levels), dtype=torch.int32).reshape(1, 1, -1)
    codes = quantizer.decode(tokens)
    assert codes.shape == (1, len(levels), math.prod(levels))
    assert codes.min() >= -1 and codes.max() <= 1
    # Codes are the squashed values; undo the squashing, with `eps` of the range to spare at its ends.
    middle = (quantizer.num_levels // 2).double()
    half_range = (quantizer.num_levels.double() - 1) / 2 * (1 - quantizer.eps)
    offset = torch.where(quantizer.num_levels % 2 == 0, 0.5, 0.0).double()
    encoded = ((codes.double() * middle + offset) / half_range).clamp(-0.9999, 0.9999).atanh()
    encoded = encoded - (offset / half_range).tan()
    assert torch.equal(quantizer.encode(encoded.float()), tokens)
    again, same = quantizer(encoded.float())
    assert torch.equal(same, tokens)
    torch.testing.assert_close(again, codes, rtol=0, atol=1e-6)  # float32 rounding of at most 4 / 4


@pytest.mark.parametrize("levels", LEVELS)
def test_all_codes_are_different_and_in_the_order_of_the_tokens(levels):
    codes = FiniteScalarQuantizer(levels).codes
    assert len({tuple(row) for row in codes.tolist()}) == math.prod(levels)
    # The first dimension is the lowest digit.
    step = 1 / (levels[0] // 2)
    torch.testing.assert_close(codes[1] - codes[0], torch.tensor([step] + [0.0] * (len(levels) - 1)))


@pytest.mark.parametrize("levels", [[8, 7, 6, 6], [9, 8, 8, 7]])
def test_tokens_are_those_of_the_published_formula(levels):
    encoded = torch.randn(3, len(levels), 500, generator=torch.Generator().manual_seed(0)) * 1.5
    tokens = FiniteScalarQuantizer(levels).encode(encoded)[0].numpy()
    # Mentzer et al. (2309.15505), appendix, in float64, with NeMo's tan in place of atanh.
    bounds = np.array(levels)[None, :, None]
    half = (bounds - 1) * (1 - 1e-3) / 2
    offset = np.where(bounds % 2 == 0, 0.5, 0.0)
    squashed = np.tanh(encoded.double().numpy() + np.tan(offset / half)) * half - offset
    digits = np.round(squashed) + bounds // 2
    weights = np.cumprod([1, *levels[:-1]])[None, :, None]
    expected = (digits * weights).sum(axis=1)
    tied = (np.abs(squashed % 1 - 0.5) < TIE).any(axis=1)
    assert tied.mean() < 0.01
    assert (tokens == expected)[~tied].all()


def test_the_gradient_passes_the_rounding_unchanged():
    quantizer = GroupFiniteScalarQuantizer(2, [8, 7, 6, 6])
    encoded = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    quantizer(encoded)[0].sum().backward()
    got, encoded.grad = encoded.grad, None
    # The derivative of the squashing function, as if there were no rounding.
    levels = quantizer.fsqs[0]
    squashed = levels.compress(encoded.reshape(-1, 4, 5)) / (levels.num_levels // 2)
    squashed.sum().backward()
    torch.testing.assert_close(got, encoded.grad, rtol=1e-5, atol=1e-7)
    assert got.abs().min() > 0


def test_a_group_quantizer_is_its_quantizers_side_by_side():
    group = GroupFiniteScalarQuantizer(3, [8, 7, 6, 6])
    encoded = torch.randn(2, 12, 9)
    codes, tokens = group(encoded)
    assert tokens.shape == (3, 2, 9) and tokens.dtype == torch.int32
    for index, fsq in enumerate(group.fsqs):
        part_codes, part_tokens = fsq(encoded[:, 4 * index : 4 * index + 4])
        assert torch.equal(codes[:, 4 * index : 4 * index + 4], part_codes)
        assert torch.equal(tokens[index], part_tokens[0])
    torch.testing.assert_close(group.decode(tokens), codes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantizer", [FiniteScalarQuantizer([8, 7, 6, 6]), GroupFiniteScalarQuantizer(2, [8, 7])])
def test_results_after_a_length_are_zero_and_before_it_unchanged(quantizer):
    encoded = torch.randn(3, 4, 6)
    length = torch.tensor([6, 2, 0])
    codes, tokens = quantizer(encoded, length)
    all_codes, all_tokens = quantizer(encoded)
    decoded, all_decoded = quantizer.decode(all_tokens, length), quantizer.decode(all_tokens)
    for row, n in enumerate(length.tolist()):
        assert torch.equal(codes[row, :, :n], all_codes[row, :, :n]) and not codes[row, :, n:].any()
        assert torch.equal(tokens[:, row, :n], all_tokens[:, row, :n]) and not tokens[:, row, n:].any()
        assert torch.equal(decoded[row, :, :n], all_decoded[row, :, :n]) and not decoded[row, :, n:].any()


def test_quantization_is_fp32_inside_autocast():
    quantizer = GroupFiniteScalarQuantizer(8, [8, 7, 6, 6])
    encoded = torch.randn(1, 32, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = quantizer.encode(encoded)
    assert torch.equal(tokens, quantizer.encode(encoded))


def test_dropped_codebooks_are_zero_and_the_others_unchanged():
    torch.manual_seed(0)
    quantizer = GroupFiniteScalarQuantizer(4, [8, 7, 6, 6])
    encoded = torch.randn(5, 16, 3)
    encoded[0, 8] = math.nan  # dimension 8 belongs to a dropped codebook
    kept = torch.tensor([1, 2, 3, 4, 1])
    dropped = quantizer.dropout_codebooks(encoded, kept)
    for row, number in enumerate(kept.tolist()):
        assert torch.equal(dropped[row, : 4 * number], encoded[row, : 4 * number])
        assert not dropped[row, 4 * number :].any()
    assert torch.equal(quantizer.dropout_codebooks(dropped, torch.full((5,), 4)), dropped)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_dropout_keeps_each_smaller_number_of_codebooks_equally_often(rate):
    torch.manual_seed(0)
    quantizer = GroupFiniteScalarQuantizer(4, [5, 5])
    dropped = quantizer.dropout_random_codebooks(torch.ones(20_000, 8, 1), rate)
    counts = torch.bincount(dropped[:, ::2, 0].sum(1).long(), minlength=5) / 20_000
    # The standard deviation of a share of 20,000 examples is at most 0.0036.
    expected = torch.tensor([0, rate / 3, rate / 3, rate / 3, 1 - rate])
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.015)


DOORS = {
    "encode": lambda quantizer, values, length: quantizer.encode(values, length),
    "codes_to_indices": lambda quantizer, values, length: quantizer.codes_to_indices(values, length),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dimension", [0, 3, 5])
@pytest.mark.parametrize("door", DOORS)
def test_values_that_are_not_finite_have_no_tokens(door, dimension, bad):
    """NaN in a dimension with an even base would otherwise give a token inside the codebook."""
    quantizer = GroupFiniteScalarQuantizer(2, [8, 7, 6, 6])
    values = torch.linspace(-0.9, 0.7, 2 * 8 * 5).reshape(2, 8, 5)
    expected = DOORS[door](quantizer, values, None)
    values[1, dimension, 4] = bad
    with pytest.raises(TokensError, match="are NaN, infinite or out of range"):
        DOORS[door](quantizer, values, None)
    tokens = DOORS[door](quantizer, values, torch.tensor([5, 4]))  # the padding of a clip may be anything
    valid = torch.arange(5) < torch.tensor([5, 4])[:, None]
    rows = (tokens, expected) if door == "codes_to_indices" else (tokens.transpose(0, 1), expected.transpose(0, 1))
    assert torch.equal(rows[0], rows[1] * valid[:, None])


# With 8 levels, the largest code is 0.75. A single code out of range can give the token of another code vector.
@pytest.mark.parametrize("code", [math.nan, math.inf, 30.0, 2.0, 1.0, -1.25])
@pytest.mark.parametrize("num_groups", [None, 2])
def test_codes_outside_the_levels_are_refused(num_groups, code):
    levels = [8, 7, 6, 6]
    quantizer = GroupFiniteScalarQuantizer(num_groups, levels) if num_groups else FiniteScalarQuantizer(levels)
    codes = torch.zeros(1, quantizer.codebook_dim, 3)
    codes[0, -4, 1] = code  # a dimension with 8 levels
    with pytest.raises(TokensError, match="codebook of 2016 entries; pass codes that this quantizer returned"):
        quantizer.codes_to_indices(codes)


def patched(name, change):
    """Return a function that patches a method of the second group."""

    def patch(quantizer, monkeypatch):
        method = getattr(quantizer.fsqs[1], name)
        monkeypatch.setattr(quantizer.fsqs[1], name, lambda *args, **named: change(method(*args, **named)))

    return patch


def hooked(quantizer, monkeypatch):
    quantizer.fsqs[1].register_forward_hook(lambda module, args, output: (output[0] / 2, output[1] + 1))


def patched_class(quantizer, monkeypatch):
    method = FiniteScalarQuantizer.inputs_to_codes
    monkeypatch.setattr(FiniteScalarQuantizer, "inputs_to_codes", lambda *args, **named: 0.8 * method(*args, **named))


CHANGES = {
    "nothing": lambda quantizer, monkeypatch: None,
    "inputs_to_codes": patched("inputs_to_codes", lambda codes: 0.8 * codes),
    "codes_to_indices": patched("codes_to_indices", lambda tokens: (tokens + 1) % 2016),
    "hook": hooked,
    "class": patched_class,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_compiled_quantizers_follow_changes_without_breaking_the_graph(change, monkeypatch):
    torch._dynamo.reset()
    quantizer, values = GroupFiniteScalarQuantizer(2, [8, 7, 6, 6]), torch.randn(2, 8, 5)
    plain = quantizer(values)
    CHANGES[change](quantizer, monkeypatch)

    def results(values):
        tokens = quantizer.encode(inputs=values)
        return (*quantizer(inputs=values), tokens, quantizer.decode(indices=tokens))

    expected = results(values)
    compiled = torch.compile(results, backend="eager", fullgraph=True)(values)
    assert all(map(torch.equal, compiled, expected))
    assert all(map(torch.equal, plain, expected)) == (change == "nothing")


@pytest.mark.slow
def test_token_checks_do_not_break_a_graph():
    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = GroupFiniteScalarQuantizer(2, [8, 7, 6, 6])

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.quantizer.encode(values) + self.quantizer.codes_to_indices(values).transpose(0, 1)

    module, values = Tokens(), torch.rand(2, 8, 5) / 2
    program = torch.export.export(module, (values,))
    assert torch.equal(program.module()(values), module(values))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (2016, "token 2016 is outside"),
        (-1, "token -1 is outside"),
        (2**31, "token 2147483648 is outside"),
        (math.nan, "token nan is outside"),
        ("rows", r"tokens have shape \[\d, 2, 5\]; this quantizer takes"),
        ("dimensions", "tokens have shape"),
    ],
)
@pytest.mark.parametrize("num_groups", [None, 2])
def test_tokens_that_are_not_of_the_codebook_are_not_decoded(num_groups, token, message):
    levels = [8, 7, 6, 6]
    quantizer = GroupFiniteScalarQuantizer(num_groups, levels) if num_groups else FiniteScalarQuantizer(levels)
    tokens = torch.arange(10 * quantizer.num_codebooks).reshape(-1, 2, 5)
    expected = quantizer.decode(tokens)
    length = torch.tensor([5, 4])
    if token == "rows":
        tokens = torch.cat([tokens, tokens])
    elif token == "dimensions":
        tokens = tokens[0]
    else:
        tokens = tokens.to(torch.float32 if token != token else torch.int64)
        tokens[-1, 1, 4] = token
        padded = quantizer.decode(tokens, length)  # tokens after the end of a clip may be anything
        assert torch.equal(padded[..., :4], expected[..., :4])
    with pytest.raises(TokensError, match=message):
        quantizer.decode(tokens)


@pytest.mark.parametrize("door", ["forward", "encode", "decode", "decode_unchecked"])
@pytest.mark.parametrize("size", [2, 5])
def test_a_hook_does_not_turn_off_the_check_of_shapes(door, size):
    quantizer = GroupFiniteScalarQuantizer(num_groups=3, num_levels_per_group=[4, 4])
    quantizer.fsqs[1].register_forward_hook(lambda *_: None)
    values = torch.zeros(1, size, 2) if door in ("forward", "encode") else torch.zeros(size, 1, 2, dtype=torch.int64)
    with pytest.raises(TokensError, match=r"this quantizer takes \[(3, B|B, 6), T\]"):
        getattr(quantizer, door)(values)
