"""Tests that the codec gives the reference tokens in fp32 whatever PyTorch's global settings are."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from nemo_lfr import testing
from nemo_lfr.codec.ambient import ProcessSetting, convolutions, reference_state
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.cpu.packed import has_bf16
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.pretrained import load
from tests.models import ONE_STAGE, build_codec, cached_codec, codec_config, same_parts, synthesize, write_nemo
from tests.tiers import slow_after

WAVE = synthesize(0.7)[: 14 * 1024 + 5]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use PyTorch's deterministic algorithms; with this setting, PyTorch also fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def onednn_in_bf16() -> Iterator[None]:
    backend = torch.backends.mkldnn
    if not hasattr(backend, "conv"):
        pytest.skip("torch 2.9 introduced it")
    backend.conv.fp32_precision = backend.matmul.fp32_precision = "bf16"
    try:
        yield
        assert (backend.conv.fp32_precision, backend.matmul.fp32_precision) == ("bf16", "bf16")
    finally:
        backend.conv.fp32_precision = backend.matmul.fp32_precision = "ieee"


@contextlib.contextmanager
def lightning(plugin: str, precision: str, context: str) -> Iterator[None]:
    precisions = pytest.importorskip("lightning.pytorch.plugins.precision")
    arguments = {"MixedPrecision": (precision, "cpu"), "HalfPrecision": (precision,)}.get(plugin, ())
    with getattr(getattr(precisions, plugin)(*arguments), context)():
        yield


STATES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "nothing": contextlib.nullcontext,
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype fp16": lambda: default_dtype(torch.float16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: default_device("meta"),
    "device context meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "anomaly detection": torch.autograd.detect_anomaly,
    "deterministic": deterministic,
    "matmul precision medium": lambda: matmul_precision("medium"),
    "oneDNN in bf16": onednn_in_bf16,
    "Lightning bf16-mixed": lambda: lightning("MixedPrecision", "bf16-mixed", "forward_context"),
    "Lightning bf16-true": lambda: lightning("HalfPrecision", "bf16-true", "forward_context"),
    "Lightning 16-true, construction": lambda: lightning("HalfPrecision", "16-true", "module_init_context"),
    "Lightning 64-true": lambda: lightning("DoublePrecision", "64-true", "forward_context"),
}
# Anomaly detection warns when it is entered.
# Lightning takes as long to import as NeMo.
states = pytest.mark.parametrize(
    "state", [pytest.param(name, marks=pytest.mark.nemo) if "Lightning" in name else name for name in STATES]
)
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection")


def config_of(state: str) -> dict[str, Any]:
    """Return a config with snake and a grouped layer, or with leaky ReLU and reflection.

    They have one stage, except for one config with the released stages.
    """
    kind = "nano" if "default" in state else "symmetric"
    return codec_config(kind, **({} if state == "autocast bf16" else ONE_STAGE))


def wave_of(codec: Any) -> np.ndarray:
    return WAVE[: 14 * codec.samples_per_frame + 5]


def pieces(codec: Codec) -> list[np.ndarray]:
    return np.array_split(wave_of(codec), 3)


def stream_encode(codec: Codec) -> torch.Tensor:
    stream = codec.stream_encoder()
    return torch.from_numpy(np.concatenate([*map(stream.push, pieces(codec)), stream.flush()], axis=1))


def stream_decode(codec: Codec, tokens: torch.Tensor) -> torch.Tensor:
    stream = codec.stream_decoder()
    parts = [stream.push(part) for part in np.array_split(tokens.numpy(), 5, axis=1)]
    return torch.from_numpy(np.concatenate([*parts, stream.flush()]))


def blocks_encode(codec: Codec) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(codec.encode_blocks(pieces(codec))), axis=1))


def blocks_decode(codec: Codec, tokens: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(codec.decode_blocks([tokens.numpy()]))))


ENCODERS: dict[str, Callable[[Codec], torch.Tensor]] = {
    "encode": lambda codec: codec.encode(wave_of(codec))[0][0],
    "encode a list": lambda codec: codec.encode(wave_of(codec).tolist())[0][0],
    "blocks": blocks_encode,
    "stream": stream_encode,
}
DECODERS: dict[str, Callable[[Codec, torch.Tensor], torch.Tensor]] = {
    "decode": lambda codec, tokens: codec.decode(tokens)[0][0],
    "blocks": blocks_decode,
    "stream": stream_decode,
}


def assert_uses_right(codec: Codec, state: str, expected: Codec) -> None:
    """Assert that every use of `codec` in a state gives the results of `expected` outside of it."""
    tokens = expected.encode(wave_of(expected))[0][0]
    for name, encode in ENCODERS.items():
        with STATES[state]():
            found = encode(codec)
        assert found.dtype == torch.int32 and torch.equal(found, encode(expected)), (state, name)
    for name, decode in DECODERS.items():
        with STATES[state]():
            audio = decode(codec, tokens)
        assert audio.dtype == torch.float32 and torch.equal(audio, decode(expected, tokens)), (state, name)
    with STATES[state]():
        results = [*codec.encode(wave_of(codec)), *codec.decode(tokens)]
    assert not any(value.is_inference() or value.requires_grad for value in results)


@pytest.mark.slow
@states
def test_every_use_gives_reference_tokens_in_any_state(state):
    codec = testing.build_codec(config_of(state))
    assert_uses_right(codec, state, copy.deepcopy(codec))


@pytest.mark.slow
@states
def test_a_codec_loaded_in_any_state_works_there_and_elsewhere(state, tmp_path):
    path = write_nemo(tmp_path / "a.nemo", config_of(state))
    expected = load(path, "cpu")
    with STATES[state]():
        codec, filled = load(path, "cpu"), load(path, "cpu")
        filled.encode(wave_of(filled)[::2])
        assert filled.fingerprint == expected.fingerprint
    assert_uses_right(codec, state, expected)
    for used in (codec, filled):
        assert_uses_right(used, "nothing", expected)
        parameters = [*used.encoder.parameters(), *used.decoder.parameters()]
        assert {value.dtype for value in parameters} == {torch.float32}
        assert not any(value.is_inference() or value.is_meta for value in parameters)


@pytest.mark.slow
@states
def test_a_codec_built_in_any_state_has_fp32_weights(state):
    if "meta" in state:
        pytest.skip("a codec that is built on the meta device has no weights")
    with STATES[state]():
        codec = testing.build_codec(codec_config(**ONE_STAGE))
    assert {value.dtype for part in (codec.encoder, codec.decoder) for value in part.parameters()} == {torch.float32}


@states
def test_codec_restores_caller_settings(state):
    def settings() -> tuple:
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision() if state != "oneDNN in bf16" else None,
        )

    codec = cached_codec("two_stages")
    with STATES[state]():
        before = settings()
        codec.encode(WAVE[:3000])
        for _ in codec.encode_blocks([WAVE[:3000]]):
            assert settings() == before
        stream = codec.stream_encoder()
        stream.push(WAVE[:3000])
        with pytest.raises(NemoLfrError):
            codec.encode(np.full(5000, np.nan))
        assert settings() == before


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")
@pytest.mark.parametrize("state", ["autocast bf16", "autocast fp16", "inference mode", "default dtype fp64"])
def test_bf16_stays_bf16_in_any_state(state):
    codec = same_parts(cached_codec("symmetric"), precision="bf16")
    expected = codec.encode(WAVE)[0]
    with STATES[state]():
        assert torch.equal(codec.encode(WAVE)[0], expected)
    assert not torch.equal(expected, cached_codec("symmetric").encode(WAVE)[0])


CONVERSIONS: dict[str, Callable[[torch.nn.Module], object]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "one layer": lambda module: module.conv.half(),
}
USES = {
    "encode": lambda codec: codec.encode(WAVE),
    "decode": lambda codec: codec.decode(torch.zeros(1, 8, 9, dtype=torch.int64)),
    "encoding stream": lambda codec: codec.stream_encoder().push(WAVE),
    "decoding stream": lambda codec: codec.stream_decoder().push(np.zeros((8, 9), int)),
    "encode blocks": lambda codec: list(codec.encode_blocks([WAVE])),
}


@pytest.mark.parametrize("conversion", slow_after(3, [*CONVERSIONS]))
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_converted_weights_raise_with_advice(conversion, precision):
    codec = same_parts(build_codec("symmetric"), precision=precision)
    around = torch.nn.ModuleList([codec.encoder, codec.quantizer, codec.decoder])
    for part in (codec.encoder, codec.decoder):
        CONVERSIONS[conversion](part.post_conv if conversion == "one layer" else part)
    for use in USES.values():
        with pytest.raises(NemoLfrError, match="weights were converted to") as caught:
            use(codec)
        advice = ".float\\(\\)" if conversion == "double" else "load the checkpoint again"
        caught.match(advice)
    around.float()
    if conversion == "double" and precision == "fp32":
        assert_uses_right(codec, "nothing", cached_codec("symmetric"))


@pytest.mark.slow
def test_threads_in_different_states_do_not_disturb_each_other():
    codec, wave = build_codec("two_stages"), WAVE[:4000]
    expected = cached_codec("two_stages").encode(wave)[0]
    wrong: list[str] = []

    def work(state: str) -> None:
        with STATES[state]():
            wrong.extend(state for _ in range(5) if not torch.equal(codec.encode(wave)[0], expected))

    names = ["autocast bf16", "inference mode", "device context meta", "nothing", "grad"]
    with onednn_in_bf16():
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_process_setting_is_restored_by_the_last_of_its_threads():
    values = ["caller's"]
    setting = ProcessSetting(lambda: values[-1], values.append)
    with contextlib.ExitStack() as first:
        first.enter_context(setting.at("ours"))
        with setting.at("ours"):  # what another thread would do
            first.close()
            assert values[-1] == "ours" and setting.differs("ours")
    assert values == ["caller's", "ours", "caller's"]
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with setting.at("theirs"):
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=other)
    with setting.at("ours"):
        thread.start()
        assert not entered.wait(0.05) and values[-1] == "ours"  # it waits for its turn
    assert entered.wait(60) and values[-1] == "theirs"
    left.set()
    thread.join()
    assert values[-1] == "caller's"


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has no such setting")
@pytest.mark.parametrize("owner", [torch.backends, torch.backends.mkldnn], ids=["all backends", "oneDNN"])
@pytest.mark.parametrize("after", ["none", "ieee", "tf32"])
def test_layer_precisions_still_inherit_the_global_setting_after_use(owner, after):
    codec = cached_codec("symmetric")
    layers = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    before = [layer.fp32_precision for layer in layers]
    try:
        for layer in layers:
            layer.fp32_precision = "none"
        owner.fp32_precision = "bf16"
        codec.encode(WAVE)
        assert [layer.fp32_precision for layer in layers] == ["bf16", "bf16"]
        owner.fp32_precision = after
        assert [layer.fp32_precision for layer in layers] == [after, after]
    finally:
        owner.fp32_precision = "none"
        for layer, precision in zip(layers, before, strict=True):
            layer.fp32_precision = precision


@pytest.mark.parametrize("interface", ["allow_tf32", "conv.fp32_precision"])
def test_tf32_is_set_by_the_interface_that_the_caller_uses(interface):
    cudnn = torch.backends.cudnn
    if interface != "allow_tf32":
        if not hasattr(cudnn, "conv"):
            pytest.skip("torch 2.9 introduced it")
        cudnn.conv.fp32_precision = "ieee"
    get = (lambda: cudnn.allow_tf32) if interface == "allow_tf32" else (lambda: cudnn.conv.fp32_precision)
    try:
        before = get()
        for tf32 in (True, False, True):
            with convolutions(tf32):
                assert get() in (tf32, "tf32" if tf32 else "ieee")
            assert get() == before
    finally:
        if interface != "allow_tf32":
            cudnn.conv.fp32_precision = "tf32"


def test_the_reference_state_is_entered_for_any_device_type():
    for name in ("cpu", "cuda", "mps"):
        with torch.autocast("cpu", torch.bfloat16), reference_state(torch.device(name)):
            assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        assert torch.is_grad_enabled()


@states
def test_a_copied_codec_works_in_any_state(state):
    if "meta" in state or "inference" in state:
        pytest.skip("PyTorch copies onto the default device, and into tensors of inference mode")
    with STATES[state]():
        codec = copy.deepcopy(cached_codec("two_stages"))
    wave = WAVE[:3000]
    assert torch.equal(codec.encode(wave)[0], cached_codec("two_stages").encode(wave)[0])


# --- NeMo's model


@pytest.fixture(scope="module")
def nemo_model(tmp_path_factory):
    model_module = pytest.importorskip("nemo_lfr.nemo.model")
    path = write_nemo(tmp_path_factory.mktemp("ambient") / "a.nemo", codec_config(**ONE_STAGE))
    return model_module.LFRCodecModel.restore_from(path, map_location="cpu"), path


def audio_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wave = wave_of(model)
    return torch.from_numpy(wave)[None], torch.tensor([len(wave)])


@pytest.mark.nemo
@states
def test_nemos_model_gives_reference_tokens_in_any_state(state, nemo_model):
    model, _ = nemo_model
    audio, length = audio_of(model)
    tokens, tokens_len = model.encode(audio=audio, audio_len=length)
    expected = [tokens, model.decode(tokens=tokens, tokens_len=tokens_len)[0], model(audio, length)[0]]
    with STATES[state]():
        found = [
            model.encode(audio=audio, audio_len=length)[0],
            model.decode(tokens=tokens, tokens_len=tokens_len)[0],
            model(audio, length)[0],
        ]
    for result, value in zip(found, expected, strict=True):
        assert torch.equal(result, value), state


@pytest.mark.nemo
@states
def test_nemos_model_restored_in_any_state_works_and_trains_in_fp32(state, nemo_model):
    model, path = nemo_model
    with STATES[state]():
        other = type(model).restore_from(path, map_location="cpu")
    audio, length = audio_of(model)
    assert torch.equal(other.encode(audio, length)[0], model.encode(audio, length)[0])
    mine, theirs = model.state_dict(), other.state_dict()
    assert {key: value.dtype for key, value in theirs.items()} == {key: value.dtype for key, value in mine.items()}
    assert not any(value.is_inference() or value.is_meta for value in theirs.values())
    encoded, _ = other.encode_audio(audio=audio, audio_len=length)
    encoded.sum().backward()


@pytest.mark.nemo
def test_nemo_model_with_converted_weights_raises_with_advice(nemo_model):
    model, _ = nemo_model
    around = torch.nn.ModuleDict({"codec": copy.deepcopy(model)}).to(torch.bfloat16)
    with pytest.raises(NemoLfrError, match=r"converted to bfloat16.*do not call .half"):
        around["codec"].encode(*audio_of(model))
