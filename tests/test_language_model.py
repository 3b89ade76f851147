"""Tests of the example language model: it learns, resumes exactly, trains on several ranks, and makes sound."""

import gc
import importlib.util
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr import load
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.lm import DelayLayout
from tests.corpora import write_tokens
from tests.crash import ROOT
from tests.models import RATE, synthesize

SMALL = "model.width=32 model.layers=1 model.heads=2 max_frames=16 batch_size=4 warmup_steps=5 learning_rate=1e-2"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Return tokens of generated speech, made by the bundled codec."""
    root = tmp_path_factory.mktemp("speech")
    for number in range(12):
        soundfile.write(root / f"{number}.wav", synthesize(0.6, number), RATE)
    tokenize(TokenizeConfig(str(root), str(root / "tokens"), "lfr", shard_size=5), device="cpu", workers=1)
    return root / "tokens"


def metrics_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def assert_same_run(out: Path, expected: Path) -> None:
    assert metrics_of(out) == metrics_of(expected)
    weights = weights_of(expected)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(out).items())


@pytest.mark.slow
def test_the_model_learns_and_makes_sound(example, tokens, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    keys = f"tokens={tokens} valid={tokens} out={tmp_path} {SMALL} steps=60 valid_every=20 sample_frames=8"
    assert example.main([*keys.split(), "--plot", str(tmp_path / "curve.png")]) == 0
    losses = [line["valid_bits_per_frame"] for line in metrics_of(tmp_path)]
    assert len(losses) == 3 and 8 * np.log2(2016) > losses[0] > losses[1] > losses[2]
    assert losses[2] < 70  # equal probabilities cost 88 bits per frame
    audio, rate = soundfile.read(tmp_path / "sample.wav")
    assert rate == RATE and len(audio) == 8 * 1024 and audio.std() > 1e-4
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert "step 60, train bits per frame" in capsys.readouterr().out


def test_the_loss_counts_tokens_and_eos_only(example):
    """If all ids are equally likely, each token and the EOS of each stream cost log(vocab)."""
    layout = DelayLayout(3, 10)
    frames = torch.tensor([5, 2])
    equal = lambda ids: torch.zeros(*ids.shape, layout.vocab_size)  # noqa: E731
    loss = example.loss_of(equal, layout, torch.zeros(2, 3, 5, dtype=torch.int64), frames)
    assert float(loss) == pytest.approx((7 + 2) * 3 * np.log(layout.vocab_size), rel=1e-5)


def test_a_step_does_not_see_later_ids(example):
    torch.manual_seed(0)
    model = example.LanguageModel(DelayLayout(3, 10), 8, width=16, layers=2, heads=2).eval()
    ids = torch.randint(0, 10, (1, 3, 8))
    changed = ids.clone()
    changed[..., 5:] = (ids[..., 5:] + 1) % 10
    assert torch.allclose(model(ids)[:, :, :5], model(changed)[:, :, :5], atol=1e-6)
    assert not torch.allclose(model(ids)[:, :, 5:], model(changed)[:, :, 5:], atol=1e-3)


def test_sampled_frames_are_those_of_the_delay_pattern(example):
    """A model that predicts every next id perfectly samples the tokens that the layout arranged."""
    layout = DelayLayout(3, 10)
    tokens = torch.randint(0, 10, (3, 6), generator=torch.Generator().manual_seed(0))
    ids = layout.arrange(tokens)[0][None]

    class Oracle(torch.nn.Module):
        streams = 3
        head = torch.nn.Linear(1, 1)

        def forward(self, seen):
            assert torch.equal(seen, ids[..., : seen.shape[2]])
            following = ids[..., seen.shape[2]].masked_fill(ids[..., seen.shape[2]] >= 10, 0)
            return 100 * torch.nn.functional.one_hot(following, layout.vocab_size)[:, :, None].float()

    frames = list(example.sample(Oracle(), layout, 4, 1.0, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.stack(frames, dim=1), tokens[:, :4])


@pytest.mark.slow
def test_a_server_decodes_the_frames_while_they_are_sampled(example, undisturbed, tmp_path, capsys):
    pytest.importorskip("prometheus_client", reason="the server's packages are not installed: pip install '.[serve]'")
    from tests.serve.running import running

    keys, _ = undisturbed
    arguments = [*keys.split(), f"out={tmp_path}", "steps=1", "max_frames=32", "sample_frames=32"]
    with running() as server:
        assert example.main([*arguments, f"server={server.url('')}"]) == 2
    assert "were not made by the codec of this server" in capsys.readouterr().err
    with running(codec=load(None, "cpu")) as server:
        assert example.main([*arguments, f"server={server.url('')}"]) == 0
    assert "first audio after" in capsys.readouterr().out
    audio, rate = soundfile.read(tmp_path / "sample.wav")
    assert rate == RATE and len(audio) == 32 * 1024


class Killed(BaseException):
    """Exception that ends a run without a checkpoint."""


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def die() -> None:
    raise Killed


def disturbed(example: ModuleType, monkeypatch: pytest.MonkeyPatch, step: int, disturb: Callable[[], None]) -> None:
    """Patch the trainer so that the next run calls `disturb` at a step."""
    update = example.Trainer._update

    def wrapped(trainer, batch):
        if trainer.step + 1 == step:
            monkeypatch.setattr(example.Trainer, "_update", update)
            disturb()
        return update(trainer, batch)

    monkeypatch.setattr(example.Trainer, "_update", wrapped)


@pytest.fixture(scope="module")
def undisturbed(example, tokens, tmp_path_factory) -> tuple[str, Path]:
    """Return the arguments and result of a run of more than two epochs, with three batches each."""
    out = tmp_path_factory.mktemp("undisturbed")
    keys = f"tokens={tokens} valid={tokens} {SMALL} steps=8 valid_every=1 save_every=2 sample_frames=0"
    assert example.main([*keys.split(), f"out={out}"]) == 0
    return keys, out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disturb", "step", "code", "saved"),
    [(interrupt, 3, 130, 3), (interrupt, 4, 130, 4), (terminate, 5, 143, 5), (die, 6, None, 4), (die, 2, None, None)],
)
def test_a_resumed_run_equals_an_undisturbed_one(
    disturb, step, code, saved, example, undisturbed, tmp_path, monkeypatch, capsys
):
    keys, expected = undisturbed
    arguments = [*keys.split(), f"out={tmp_path}"]
    disturbed(example, monkeypatch, step, disturb)
    if code is None:
        with pytest.raises(Killed):
            example.main(arguments)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 7, "tr')
    else:
        assert example.main(arguments) == code
        assert f"at step {saved}; the same command resumes the run" in capsys.readouterr().out
    if saved is not None:
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == saved
    if saved == 3:  # the validation of an interrupted run is that of its step
        assert len(metrics_of(tmp_path)) == 3
    assert example.main(arguments) == 0
    assert_same_run(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no such limit")
@pytest.mark.parametrize(("limit", "name"), [(100, "metrics.jsonl"), (10_000, "checkpoint.pt")])
def test_a_run_on_a_full_disk_ends_in_one_line_and_can_be_resumed(limit, name, example, undisturbed, tmp_path, capsys):
    import resource

    keys, expected = undisturbed
    arguments = [*keys.split(), f"out={tmp_path}"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert example.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    error = capsys.readouterr().err
    assert f"{tmp_path / name}'; the same command resumes the run" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.part"))
    assert example.main(arguments) == 0
    assert_same_run(tmp_path, expected)


@pytest.mark.slow
def test_a_damaged_line_of_the_metrics_is_named(example, undisturbed, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tr\n{"step": 2}\n')
    assert example.main([*undisturbed[0].split(), f"out={tmp_path}"]) == 2
    assert "metrics.jsonl: line 1 is damaged; remove this line" in capsys.readouterr().err


def load_example() -> ModuleType:
    path = ROOT / "examples" / "train_language_model.py"
    spec = importlib.util.spec_from_file_location("train_language_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def destroy_without_wrappers(destroy: Callable[[], None] = torch.distributed.destroy_process_group) -> None:
    """Destroy the process group, which may deadlock if `DistributedDataParallel` still refers to it."""
    assert not any(isinstance(each, torch.nn.parallel.DistributedDataParallel) for each in gc.get_objects())
    destroy()


def run_rank(number: int, ports: list[int], runs: list[tuple[list[str], int | None]], out: Path) -> None:
    """Take part in several distributed runs; the second rank receives SIGTERM in a step."""
    torch.set_num_threads(1)
    example, codes = load_example(), []
    for port, (arguments, stop_at) in zip(ports, runs, strict=True):
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy_without_wrappers)
            if number == 1 and stop_at is not None:
                disturbed(example, monkeypatch, stop_at, terminate)
            codes.append(example.main(arguments))
    (out / f"{number}.json").write_text(json.dumps(codes))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.slow
def test_two_ranks_stop_together_and_resume_exactly(undisturbed, tmp_path):
    """Start only two processes, which do all runs."""
    arguments = [*undisturbed[0].split(), "steps=4", "save_every=4"]
    whole, stopped = [*arguments, f"out={tmp_path / 'a'}"], [*arguments, f"out={tmp_path / 'b'}"]
    runs = [(whole, None), (stopped, 2), (stopped, None)]
    torch.multiprocessing.spawn(run_rank, (free_ports(3), runs, tmp_path), nprocs=2, join=True)
    assert [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)] == [[0, 143, 0]] * 2
    assert_same_run(tmp_path / "b", tmp_path / "a")
    assert [line["step"] for line in metrics_of(tmp_path / "a")] == [1, 2, 3, 4]
    assert not torch.equal(weights_of(tmp_path / "a")["head.weight"], weights_of(undisturbed[1])["head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("width=3", "Key 'width' is not in struct"),
        ("tokens=???", "Missing mandatory value: tokens"),
        ("out=???", "Missing mandatory value: out"),
        ("tokens=nowhere", "nowhere"),
        ("out={file}", "file: cannot be used as a folder"),
        ("out={file}/below", "below: cannot be used as a folder"),
        ("steps=many", "steps is 'many'; pass a positive int"),
        ("batch_size=0", "batch_size is 0; pass a positive int"),
        ("seed=-1", "seed is -1; pass 0 or a positive int"),
        ("model.width=33", "model.width is 33; pass a multiple of model.heads"),
        ("model=null", "model is None; set its values, such as model.width=..."),
        ("model=3", "model is 3; set its values"),
        ("tokens={{", "while parsing"),
        ("seed=9223372036854775807", "seed is 9223372036854775807; pass less than"),
        ("temperature=1e-40", "temperature is 1e-40; pass 0.001 or more"),
        ("model.layers=2", "saved with other values of model; restore .* another out="),
        ("valid={other}", "were made by another codec"),
        ("tokens={other} valid=null out={new}", "the tokens in .*other were made by another codec"),
    ],
)
def test_a_user_error_is_a_one_line_error(overrides, message, example, undisturbed, tmp_path, capsys):
    import re

    keys, out = undisturbed
    write_tokens(tmp_path / "other", "lfr", [2])
    overrides = overrides.format(other=tmp_path / "other", new=tmp_path / "new", file=tmp_path / "file")
    (tmp_path / "file").touch()
    arguments = [*keys.split(), f"out={out}", "sample_frames=4", *overrides.split()]
    before = weights_of(out)
    assert example.main([*arguments, "steps=1"] if "steps" not in overrides else arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), error
    assert all(torch.equal(value, before[name]) for name, value in weights_of(out).items())


@pytest.mark.skipif(os.name == "nt", reason="folders have no locks")
def test_a_second_run_in_the_same_folder_is_refused(example, undisturbed, tmp_path, capsys):
    with exclusive(tmp_path):
        assert example.main([*undisturbed[0].split(), f"out={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: another run is writing to this folder")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(example, undisturbed, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    assert example.main([*undisturbed[0].split(), f"out={tmp_path}"]) == 2
    assert "checkpoint.pt: damaged checkpoint; remove it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_reported_before_the_training(example, tokens, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "SERVER_WAIT_S", 0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    keys = f"tokens={tokens} out={tmp_path} {SMALL} steps=2 sample_frames=4 server={url}"
    assert example.main(keys.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {url} cannot be reached") and captured.err.count("\n") == 1
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "checkpoint.pt").exists()
    assert example.main([*keys.split(), "sample_frames=0"]) == 0  # the server is not needed
