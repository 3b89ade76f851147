import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook

from nemo_lfr.errors import ConfigError
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d, channels_last
from nemo_lfr.training.discriminators import Conv2d

# Sums of at most a few hundred products of about 1 in float64, in another order: 1e-12 leaves a factor of 50.
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", range(1, 9))
def test_polyphase_upsampling_equals_conv_transpose1d(stride, causal):
    torch.manual_seed(stride)
    layer = ConvTranspose1d(6, 4, stride=stride, causal=causal, weight_norm=False).double()
    hidden = torch.randn(2, 6, 9, dtype=torch.float64)
    full = F.conv_transpose1d(hidden, layer.conv.weight, layer.conv.bias, stride=stride)
    # NeMo pads (stride + 1) // 2, with output_padding for odd strides; causal: cut `stride` samples at the end.
    cut = 0 if causal else (stride + 1) // 2
    expected = full[..., cut : cut + 9 * stride]
    torch.testing.assert_close(layer(hidden), expected, **EXACT)
    with register_module_forward_hook(lambda *_: None):  # calls `conv`
        torch.testing.assert_close(layer(hidden), expected, **EXACT)
    if not causal and stride > 1:  # torch wants output_padding < stride
        builtin = F.conv_transpose1d(
            hidden, layer.conv.weight, layer.conv.bias, stride, padding=cut, output_padding=stride % 2
        )
        torch.testing.assert_close(layer(hidden), builtin, **EXACT)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [2, 3, 8])
def test_grouped_upsampling_equals_conv_transpose1d(stride, groups):
    torch.manual_seed(groups)
    layer = ConvTranspose1d(8, 4, stride=stride, groups=groups, causal=True, weight_norm=False).double()
    hidden = torch.randn(2, 8, 5, dtype=torch.float64)
    expected = F.conv_transpose1d(hidden, layer.conv.weight, layer.conv.bias, stride, groups=groups)[..., : 5 * stride]
    torch.testing.assert_close(layer(hidden), expected, **EXACT)


@pytest.mark.parametrize("pad_mode", ["reflect", "zeros", "replicate"])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(7, 1, 1), (11, 1, 5), (3, 1, 3), (4, 2, 1), (6, 3, 1), (16, 8, 1)]
)
def test_symmetric_convolution_equals_conv1d_on_padded_input(kernel, stride, dilation, pad_mode):
    torch.manual_seed(kernel)
    layer = Conv1d(3, 5, kernel, stride=stride, dilation=dilation, pad_mode=pad_mode, weight_norm=False).double()
    hidden = torch.randn(2, 3, 72, dtype=torch.float64)
    # Half of the padding that gives length / stride outputs, rounded up, as in NeMo's get_padding functions.
    pad = (kernel - stride + 1) // 2 if stride > 1 else (kernel * dilation - dilation) // 2
    padded = F.pad(hidden, (pad, pad), mode={"zeros": "constant"}.get(pad_mode, pad_mode))
    expected = F.conv1d(padded, layer.conv.weight, layer.conv.bias, stride, dilation=dilation)
    assert expected.shape[-1] == 72 // stride
    torch.testing.assert_close(layer(hidden), expected, **EXACT)


@pytest.mark.parametrize("items", [2, 200])
def test_zero_padding_is_equal_for_matrix_product_and_convolution(items):
    torch.manual_seed(items)
    layer = Conv1d(24, 40, 7, pad_mode="zeros", weight_norm=False).double()
    hidden = torch.randn(1, 24, items, dtype=torch.float64)
    expected = F.conv1d(F.pad(hidden, (3, 3)), layer.conv.weight, layer.conv.bias)
    torch.testing.assert_close(layer(hidden), expected, **EXACT)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 1, 1), (11, 1, 5), (4, 2, 1), (6, 3, 1)])
def test_causal_convolution_sees_zeros_before_the_start_and_nothing_of_the_future(kernel, stride, dilation):
    torch.manual_seed(kernel)
    layer = Conv1d(3, 5, kernel, stride=stride, dilation=dilation, causal=True, weight_norm=False).double()
    hidden = torch.randn(2, 3, 36, dtype=torch.float64)
    padded = F.pad(hidden, ((kernel - 1) * dilation + 1 - stride, 0))
    expected = F.conv1d(padded, layer.conv.weight, layer.conv.bias, stride, dilation=dilation)
    torch.testing.assert_close(layer(hidden), expected, **EXACT)
    torch.testing.assert_close(layer(hidden[..., :18]), expected[..., : 18 // stride], **EXACT)


@pytest.mark.parametrize("layer", [Conv1d(6, 4, 7), Conv1d(6, 4, 4, stride=2), ConvTranspose1d(6, 4, stride=3)])
def test_memory_layout_does_not_change_values(layer):
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 12, dtype=torch.float64)
    reordered = channels_last(hidden)
    assert torch.equal(reordered, hidden)
    assert reordered.stride()[1] == 1  # H innermost
    torch.testing.assert_close(layer.double()(reordered), layer(hidden), **EXACT)


@pytest.mark.parametrize("layer", [Conv1d(3, 4, 7), Conv1d(3, 4, 7, dilation=3), Conv1d(3, 4, 11)])
def test_min_length_is_the_shortest_input_that_can_be_reflected(layer):
    layer(torch.zeros(1, 3, layer.min_length))
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        layer(torch.zeros(1, 3, layer.min_length - 1))


def test_unknown_padding_and_activation_are_named():
    with pytest.raises(ConfigError, match="circular"):
        Conv1d(1, 1, 3, pad_mode="circular")
    with pytest.raises(ConfigError, match="gelu"):
        CodecActivation("gelu", 4)


def test_half_snake_with_an_odd_number_of_channels_gives_the_smaller_half_to_snake():
    hidden = torch.randn(1, 5, 3)
    out = CodecActivation("half_snake", 5)(hidden)
    # alpha starts at 1: x + sin(x)^2.
    torch.testing.assert_close(out[:, :2], hidden[:, :2] + hidden[:, :2].sin() ** 2)
    torch.testing.assert_close(out[:, 2:], F.leaky_relu(hidden[:, 2:]))


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    towards = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    return [output.detach(), *torch.autograd.grad((output * towards).sum(), inputs)]


@pytest.fixture
def products_only(monkeypatch):
    """Return a function that calls its argument, and fails if the argument uses a convolution of torch."""

    def refused(*args, **kwargs):
        raise AssertionError("a convolution was asked for")

    def within(function):
        with monkeypatch.context() as patch:
            for name in ("conv1d", "conv2d", "conv_transpose1d"):
                patch.setattr(F, name, refused)
            return function()

    return within


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 1), (4, 2), (16, 8)])
def test_a_deep_layer_trains_by_matrix_product_with_the_gradients_of_conv1d(products_only, kernel, stride):
    torch.manual_seed(kernel)
    layer = Conv1d(24, 64, kernel, stride=stride, weight_norm=False).double()
    hidden = channels_last(torch.randn(2, 24, 16, dtype=torch.float64)).requires_grad_()
    inputs = (hidden, layer.conv.weight, layer.conv.bias)
    own = gradients(products_only(lambda: layer(hidden)), *inputs)
    padded = F.pad(hidden, layer.pad, mode="reflect")
    expected = gradients(F.conv1d(padded, layer.conv.weight, layer.conv.bias, stride), *inputs)
    for mine, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("stride", [2, 3, 8])
def test_deep_upsampling_trains_by_matrix_product_with_the_gradients_of_the_convolution(products_only, stride):
    torch.manual_seed(stride)
    layer = ConvTranspose1d(48, 24, stride=stride, causal=True, weight_norm=False).double()
    hidden = torch.randn(2, 48, 5, dtype=torch.float64, requires_grad=True)
    inputs = (hidden, layer.conv.weight, layer.conv.bias)
    own = gradients(products_only(lambda: layer(hidden)), *inputs)
    full = F.conv_transpose1d(hidden, layer.conv.weight, layer.conv.bias, stride)[..., : 5 * stride]
    for mine, theirs in zip(own, gradients(full, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize(("kernel", "stride"), [(5, 3), (5, 1), (3, 1)])
def test_period_discriminators_train_by_matrix_product_with_the_gradients_of_conv2d(products_only, kernel, stride):
    torch.manual_seed(kernel)
    layer = Conv2d(6, 10, kernel_size=(kernel, 1), stride=(stride, 1)).double()
    hidden = torch.randn(2, 6, 17, 3, dtype=torch.float64, requires_grad=True)
    inputs = (hidden, *layer.parameters())
    own = gradients(products_only(lambda: layer(hidden)), *inputs)
    for mine, theirs in zip(own, gradients(layer.conv(hidden), *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


class Halved(torch.nn.Module):
    """Wrapper like those of LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, hidden):
        return self.base(hidden) / 2


def patched_forward(layer):
    forward = layer.conv.forward
    layer.conv.forward = lambda hidden: forward(hidden) / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: Conv1d(3, 4, 3), lambda: ConvTranspose1d(3, 4, stride=2)])
@pytest.mark.parametrize(
    "change",
    [
        patched_forward,
        lambda layer: setattr(layer, "conv", Halved(layer.conv)),
        lambda layer: layer.conv.register_forward_hook(lambda module, inputs, result: result / 2),
    ],
)
def test_compiled_layers_follow_changes_without_breaking_the_graph(make, change):
    torch._dynamo.reset()
    layer, hidden = make(), torch.randn(2, 3, 16)
    plain = layer(hidden)
    change(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(hidden)
    assert torch.equal(compiled, layer(hidden))
    assert not torch.equal(compiled, plain)
