"""Tests of execution plans and CUDA graphs: what is cached, when it is freed, and the fallbacks."""

import copy
import gc
import pickle

import pytest
import torch

from nemo_lfr.codec import torch_backend
from nemo_lfr.codec.backend import Batching
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.cuda import graphs
from nemo_lfr.codec.cuda.autotuner import Autotuner
from nemo_lfr.codec.cuda.graphs import Captured, CudaModule, GraphCache, cuda_module
from nemo_lfr.codec.cuda.plan import PRECISIONS, Plan, find_kernels
from nemo_lfr.codec.torch_backend import BATCHING, TorchBackend
from nemo_lfr.codec.windows import group_widths
from nemo_lfr.modules.weights import weights_version
from tests.models import KINDS, build_codec, cached_codec, same_parts, speech_like
from tests.reference import assert_same_tokens, reference_decode, reference_encode
from tests.tiers import slow_except

CPU = torch.device("cpu")


class Recorder:
    """Fake capture that counts its calls; a replay calls the function with the tensors of the graph."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function, inputs) -> Captured:
        self.captures += 1
        held = tuple(value.clone() for value in inputs)
        output = function(*held)

        def replay() -> None:
            self.replays += 1
            output.copy_(function(*held))

        return Captured(held, output, replay)


def double(values: torch.Tensor) -> torch.Tensor:
    return 2 * values


def test_a_shape_is_run_then_captured_then_replayed():
    capture = Recorder()
    cache = GraphCache(capture)
    results = [cache.run("double", double, torch.full((3,), float(number))) for number in range(4)]
    assert (capture.captures, capture.replays, len(cache)) == (1, 3, 1)
    # Each result has its own memory, so a later replay does not change it.
    assert [result.tolist() for result in results] == [[2.0 * number] * 3 for number in range(4)]


def test_every_shape_dtype_and_name_has_its_own_graph():
    capture = Recorder()
    cache = GraphCache(capture)
    for _ in range(2):
        cache.run("double", double, torch.ones(3))
        cache.run("double", double, torch.ones(4))
        cache.run("double", double, torch.ones(3, dtype=torch.float64))
        cache.run("negative", torch.neg, torch.ones(3))
    assert (capture.captures, len(cache)) == (4, 4)
    assert cache.run("negative", torch.neg, torch.ones(3)).tolist() == [-1, -1, -1]


def test_the_least_recently_used_graph_goes_first():
    capture = Recorder()
    cache = GraphCache(capture, capacity=2)
    for size in (1, 1, 2, 2, 1, 3, 3):  # adding size 3 removes size 2
        cache.run("double", double, torch.ones(size))
    assert (capture.captures, len(cache)) == (3, 2)
    cache.run("double", double, torch.ones(1))
    assert capture.captures == 3
    for _ in range(2):
        cache.run("double", double, torch.ones(2))
    assert capture.captures == 4


def test_failed_capture_warns_once_and_runs_eagerly(caplog):
    def refuse(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    cache = GraphCache(refuse)
    for number in range(5):
        assert cache.run("double", double, torch.ones(2) * number).tolist() == [2 * number] * 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "not permitted" in messages[0]
    assert len(cache) == 0


def test_autotuner_chooses_the_fastest_valid_candidate_once(caplog):
    seconds = {"library": 3.0, "fast": 1.0, "wrong": 0.1, "broken": 0.0}
    runs: list[str] = []
    values, ends = torch.randn(2, 5, 3), torch.tensor([5, 3])

    def way(name):
        def run():
            runs.append(name)
            if name == "broken":
                raise OSError("no compiler")
            result = values * (1.2 if name == "wrong" else 1.0)
            if name == "fast":
                result[1, 3:] = float("nan")  # values after the valid length do not matter
            return result

        return run

    ways = {name: way(name) for name in seconds}
    autotuner = Autotuner(lambda run: (run(), seconds[runs[-1]])[1])
    for _ in range(2):
        assert torch.equal(autotuner.run("layer", ways, ends)[0], values[0])
    assert autotuner.chosen == {"layer": "fast"} and autotuner.measured["layer"] == {"library": 3.0, "fast": 1.0}
    assert runs[-2:] == ["fast", "fast"] and runs.count("wrong") == 1
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 2 and "'wrong' differs from the reference" in messages and "no compiler" in messages
    autotuner.run("layer", {"library": ways["library"]}, ends)
    assert runs[-1] == "library"


def test_autotuner_uses_the_first_candidate_if_the_chosen_is_missing():
    autotuner = Autotuner(lambda _: 0.0, force="fused")
    values, ends = torch.ones(1, 1, 1), torch.tensor([1])
    assert autotuner.run("a", {"library": lambda: values, "fused": lambda: values * 2}, ends) == 2
    assert autotuner.run("b", {"library": lambda: values, "other": lambda: values * 2}, ends) == 1
    autotuner = Autotuner(lambda _: 0.0)
    autotuner.chosen["c"] = "fused"
    assert autotuner.run("c", {"library": lambda: values, "other": lambda: values * 2}, ends) == 1


def fresh_codec() -> Codec:
    return copy.deepcopy(cached_codec("two_stages"))


@pytest.mark.slow
def test_changed_or_moved_weights_change_the_weights_version():
    encoder = fresh_codec().encoder
    numbers = weights_version(encoder)
    changes = {
        "in place": lambda: encoder.pre_conv.conv.weight.mul_(1.5),
        "loaded": lambda: encoder.load_state_dict(encoder.state_dict()),
        "assigned": lambda: encoder.load_state_dict(
            {key: value.clone() for key, value in encoder.state_dict().items()}, assign=True
        ),
        "cast": lambda: encoder.double(),
        "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(encoder.pre_conv.conv),
        "replaced": lambda: setattr(encoder.post_conv.conv, "bias", torch.nn.Parameter(torch.zeros(32))),
    }
    for name, change in changes.items():
        before = numbers()
        assert before == numbers(), name
        with torch.no_grad():
            change()
        assert numbers() != before, name


@pytest.mark.slow
def test_an_optimizer_step_changes_the_weights_version():
    encoder = fresh_codec().encoder.requires_grad_(True)
    numbers, optimizer = weights_version(encoder), torch.optim.SGD(encoder.parameters(), 0.1)
    before = numbers()
    encoder.encode_frames(torch.randn(1, 40 * encoder.samples_per_frame)).square().mean().backward()
    assert numbers() == before
    optimizer.step()
    assert numbers() != before


@pytest.mark.slow
def test_cuda_module_is_kept_until_the_weights_change():
    codec = fresh_codec()
    encoder = codec.encoder
    first = cuda_module(encoder, codec.quantizer, "fp32", CPU)
    assert cuda_module(encoder, codec.quantizer, "fp32", CPU) is first
    assert cuda_module(encoder, codec.quantizer, "bf16", CPU) is not first
    assert cuda_module(codec.decoder, codec.quantizer, "fp32", CPU) is not first
    other = copy.deepcopy(codec.quantizer)
    assert cuda_module(encoder, other, "fp32", CPU) is not first
    second = cuda_module(encoder, codec.quantizer, "fp32", CPU)
    with torch.no_grad():
        encoder.post_conv.conv.bias.add_(1.0)
    third = cuda_module(encoder, codec.quantizer, "fp32", CPU)
    assert third is not second
    audio = torch.randn(1, 40 * codec.samples_per_frame)
    assert not torch.equal(third(audio, [40], 40), second(audio, [40], 40))


@pytest.mark.slow
def test_cuda_modules_are_freed_with_their_networks():
    codec = fresh_codec()
    gc.collect()
    kept = len(graphs._MODULES)
    for part in (codec.encoder, codec.decoder):
        cuda_module(part, codec.quantizer, "fp32", CPU)
    assert len(graphs._MODULES) == kept + 2
    del codec, part
    gc.collect()
    assert len(graphs._MODULES) == kept


@pytest.mark.slow
def test_codec_with_cuda_modules_can_be_copied():
    codec = fresh_codec()
    cuda_module(codec.encoder, codec.quantizer, "fp32", CPU)
    audio = speech_like(600)
    expected = codec.encode(audio)[0]
    for copied in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        assert torch.equal(copied.encode(audio)[0], expected)


class GpuOnCpu(TorchBackend):
    """A backend that runs the GPU code on a CPU."""

    batching = Batching(pad_multiple=16)

    def __init__(self, codec: Codec, precision: str = "fp32") -> None:
        super().__init__(codec.encoder, codec.quantizer, codec.decoder, codec.sample_rate, precision=precision)
        self.capture = Recorder()
        self.engines = {
            part: CudaModule(part, codec.quantizer, precision, CPU, self.capture)
            for part in (codec.encoder, codec.decoder)
        }

    def encode_frames(self, audio, num_frames):
        return self.engines[self.encoder](audio, num_frames, audio.shape[1] // self.spec.samples_per_frame)

    def decode_frames(self, tokens, num_frames):
        return self.engines[self.decoder](tokens, num_frames, tokens.shape[2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(KINDS, "two_stages"))
def test_clips_of_all_lengths_equal_single_clips_and_share_few_graphs(kind):
    codec = cached_codec(kind)
    fast, rate = Codec(GpuOnCpu(codec)), codec.samples_per_frame
    frames = [2, 9, 16, 30]
    for _ in range(2):
        for count in frames:
            clip = speech_like(count * rate - 7, seed=count)
            tokens = fast.encode(clip)[0][0]
            assert_same_tokens(codec, clip.numpy(), tokens)
            audio = fast.decode(tokens)[0][0]
            assert (audio - reference_decode(codec, tokens)).abs().max() < 1e-5
    # Two widths (16 and 32 frames), each for the encoder and the decoder, give 4 graphs.
    assert fast.backend.capture.captures == 4 and fast.backend.capture.replays == 2 * 2 * len(frames) - 4


@pytest.mark.slow
def test_batches_share_a_graph_whatever_their_lengths():
    codec = cached_codec("two_stages")
    fast, rate = Codec(GpuOnCpu(codec)), codec.samples_per_frame
    for lengths in ([300, 222], [400, 301], [239, 400], [333, 400]):
        clips = [speech_like(length * rate, seed=length) for length in lengths]
        batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        fast.chunk_frames = 1000
        tokens, counts = fast.encode(batch, [len(clip) for clip in clips])
        for clip, row, count in zip(clips, tokens, counts.tolist(), strict=True):
            assert_same_tokens(codec, clip.numpy(), row[:, :count])
    assert fast.backend.capture.captures <= 4


@pytest.mark.slow
def test_low_precision_keeps_the_quantizer_and_the_first_and_last_layers_in_fp32(monkeypatch):
    monkeypatch.setattr(torch_backend, "has_bf16", lambda: True)  # a CPU without bf16 instructions emulates them
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # oneDNN's bf16 convolutions are wrong on some CPUs
    codec = cached_codec("symmetric")
    clip = speech_like(30 * 1024)
    for precision, share in (("tf32", 1.0), ("bf16", 0.6), ("fp16", 0.9)):
        tokens = Codec(GpuOnCpu(codec, precision)).encode(clip)[0]
        agreement = float((tokens[0] == reference_encode(codec, clip.numpy())).float().mean())
        assert agreement >= share, (precision, agreement)
        plan = Plan(codec.encoder, PRECISIONS[precision], None)
        dtypes = [layer.weight.dtype for step in plan.steps for layer in step.layers]
        assert dtypes[0] == dtypes[-1] == torch.float32 and set(dtypes[1:-1]) == {PRECISIONS[precision].dtype}
        assert plan(torch.zeros(1, 16 * 1024, 1), torch.tensor([16])).dtype == torch.float32


@pytest.mark.slow
def test_cuda_module_ignores_caller_modes():
    codec = fresh_codec()
    audio = torch.randn(1, 48 * codec.samples_per_frame) / 10
    expected = codec.backend.encode_frames(audio, [48])
    capture = Recorder()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        run = CudaModule(codec.encoder, codec.quantizer, "fp32", CPU, capture)
        results = [run(audio, [48], 48) for _ in range(2)]
    results += [run(audio, [48], 48) for _ in range(2)]  # graphs captured in inference mode also work outside of it
    assert capture.captures == 1
    assert all(torch.equal(result, expected) and not result.requires_grad for result in results)
    assert torch.backends.cudnn.allow_tf32  # PyTorch's default is restored


def test_large_batches_are_launched_without_a_graph(monkeypatch):
    monkeypatch.setattr(graphs, "GRAPH_FRAMES", 64)
    codec, capture = cached_codec("two_stages"), Recorder()
    run = CudaModule(codec.encoder, codec.quantizer, "fp32", CPU, capture)
    for rows, captures in ((2, 1), (3, 1)):
        for _ in range(2):
            run(torch.zeros(rows, 32 * codec.samples_per_frame), [32] * rows, 32)
        assert capture.captures == captures


def test_windows_of_similar_width_share_a_batch_on_gpu():
    widths = {16: ["a"], 96: ["b", "c"], 128: ["d"], 112: ["e"], 64: ["f"], 48: ["g"]}
    assert BATCHING["cuda"].mix_widths
    assert dict(group_widths(widths, mix=True)) == {128: ["d", "e", "b", "c"], 64: ["f", "g"], 16: ["a"]}
    assert list(group_widths({}, mix=True)) == []


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_gpu_streams_use_tf32_only_on_request(precision, monkeypatch):
    codec = same_parts(cached_codec("two_stages"), precision=precision)
    monkeypatch.setattr(TorchBackend, "device", torch.device("cuda"))
    with codec.backend.autocast():
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert torch.backends.cudnn.allow_tf32


def test_triton_is_not_imported_without_a_gpu():
    assert find_kernels(CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("tf32", 0.98), ("bf16", 0.8), ("fp16", 0.95)])
def test_gpu_tokens_and_audio_equal_the_cpus(precision, share):
    codec = build_codec("symmetric")
    clips = [speech_like(length, seed=length) for length in (22050, 30000, 51000)]
    expected = [reference_encode(codec, clip.numpy()) for clip in clips]
    heard = [reference_decode(codec, tokens) for tokens in expected]
    for part in (codec.encoder, codec.quantizer, codec.decoder):
        part.cuda()
    fast = same_parts(codec, precision=precision)
    for _ in range(3):  # the calls run eagerly, capture a graph, and replay it
        found = [fast.encode(clip)[0][0].cpu() for clip in clips]
        same = sum(int((got == want).sum()) for got, want in zip(found, expected, strict=True))
        assert same >= (share - 0.002) * sum(tokens.numel() for tokens in expected)
        for tokens, want in zip(expected, heard, strict=True):
            error = (fast.decode(tokens)[0][0].cpu() - want).square().mean() / want.square().mean()
            assert error < (1e-8 if precision == "fp32" else 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_uses_changed_weights_immediately():
    codec = build_codec("symmetric")
    for part in (codec.encoder, codec.quantizer, codec.decoder):
        part.cuda()
    clip = speech_like(22050)
    before = [codec.encode(clip)[0] for _ in range(3)]
    assert all(torch.equal(before[0], tokens) for tokens in before)
    with torch.no_grad():
        codec.encoder.post_conv.conv.bias.add_(0.7)
    assert not torch.equal(codec.encode(clip)[0], before[0])
