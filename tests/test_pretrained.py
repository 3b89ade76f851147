import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import nemo_lfr
from nemo_lfr.bundled import LFR, bundled_checkpoint
from nemo_lfr.checkpoint import reader, split_weight_norm, write_checkpoint
from nemo_lfr.checkpoint.folder import export_safetensors
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.devices import choose_device
from nemo_lfr.corpus.token_folder import TokenFolder
from nemo_lfr.errors import CheckpointError, NemoLfrError
from nemo_lfr.io.hub import ALIASES, find_checkpoint
from nemo_lfr.io.locate import looks_local
from nemo_lfr.io.manifests import read_manifest
from tests.hub_server import HubServer
from tests.models import cached_codec, codec_config, synthesize
from tests.tiers import slow_after, slow_except

ROOT = Path(nemo_lfr.__file__).parents[1]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Set huggingface_hub offline with an empty cache.

    It reads its environment on import, so its constants are changed as well.
    """
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def save(codec: Codec, path: Path, kind: str = "symmetric") -> Path:
    parts = {"audio_encoder": codec.encoder, "vector_quantizer": codec.quantizer, "audio_decoder": codec.decoder}
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in split_weight_norm(part).items()}
    write_checkpoint(path, codec_config(kind), state)
    return path


def test_the_bundled_codec_has_the_released_layout():
    codec = nemo_lfr.load(device="cpu")
    # The model card: 22.05 kHz, 21.5 frames/s, 8 codebooks of 2016 entries, 1.89 kbps.
    assert (codec.sample_rate, codec.samples_per_frame, codec.num_codebooks, codec.codebook_size) == (
        22050,
        1024,
        8,
        2016,
    )
    assert codec.levels == (8, 7, 6, 6)
    assert codec.bit_rate == pytest.approx(1891, abs=1)
    assert bundled_checkpoint().stat().st_size < 21e6


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "gc.disable()", "gc.freeze()", "import torch"])
def test_loading_leaves_the_garbage_collector_as_it_was(before):
    script = f"""
import gc, nemo_lfr
{before}
was = gc.isenabled(), bool(gc.get_freeze_count())
nemo_lfr.load(device="cpu")
assert (gc.isenabled(), bool(gc.get_freeze_count())) == was
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_bundled_codec_encodes_and_decodes_speech():
    codec = nemo_lfr.load(device="cpu")
    wave = synthesize(1)
    tokens, tokens_len = codec.encode(wave)
    audio, audio_len = codec.decode(tokens, tokens_len, [len(wave)])
    assert tokens.shape == (1, 8, 22) and audio_len.tolist() == [22050]
    assert min(len(codebook.unique()) for codebook in tokens[0]) > 5
    assert audio.abs().max() > 0.01 and torch.isfinite(audio).all()


@pytest.mark.slow
def test_a_path_loads_the_file_under_it(tmp_path):
    codec = cached_codec("symmetric")
    path = save(codec, tmp_path / "my.nemo")
    wave = synthesize(0.5)
    for source in (path, str(path)):
        loaded = nemo_lfr.load(source, device="cpu")
        assert torch.equal(loaded.encode(wave)[0], codec.encode(wave)[0])
        assert "my.nemo" in repr(loaded)


def test_the_alias_of_the_card_is_the_hub_id():
    assert ALIASES["audio_codec_low_frame_rate_22khz"] == LFR == "nvidia/low-frame-rate-speech-codec-22khz"


@pytest.mark.parametrize(
    "source",
    ["missing.nemo", "sub/missing.nemo", "runs/last.ckpt", "./last", "nonsense", "a/b/c", "/no/such/file", ""],
)
def test_missing_file_is_named_with_advice(offline, source):
    with pytest.raises(CheckpointError, match="no such file, and not a Hub id such as nvidia/"):
        nemo_lfr.load(source)


@pytest.mark.parametrize("source", ["nobody/no-such-codec", "a b/c d", "audio_codec_low_frame_rate_22khz", "../none"])
def test_unavailable_repository_is_named_with_advice(offline, source):
    with pytest.raises(CheckpointError, match=r"network|no such file") as caught:
        nemo_lfr.load(source)
    assert ALIASES.get(source, source) in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "models/typo", "models/typo.nemo", "models/sub", "./nvidia/codec", "~/codec", "typo.NEMO", "nvidia/codec.ckpt",
        "nvidia/codec.safetensors", "elsewhere/typo.pt", ".hidden/codec", "models/sub/deep",
    ],
)  # fmt: skip
@pytest.mark.parametrize("find", [nemo_lfr.load, find_checkpoint], ids=["load", "find"])
def test_a_mistyped_path_never_asks_the_hub(source, find, tmp_path, monkeypatch):
    """Replace the Hub by an unreachable server, so that a request would raise another error after retries."""
    import huggingface_hub

    def fail(*arguments, **options):
        if not options.get("local_files_only"):
            raise AssertionError("the Hub was asked")
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError, match=r"no such file") as caught:
        find(source)
    assert source in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("owner/name", False), ("nvidia/low-frame-rate-speech-codec-22khz", False), ("owner/name-v1.5", False),
        ("name", False), ("there/name", True), ("./name", True), ("../a/b", True), ("~/a", True), ("/a/b", True),
        ("a.nemo", True), ("owner/a.ckpt", True), ("owner/a.Nemo", True), ("a\\b", True), ("there", False),
    ],
)  # fmt: skip
def test_a_model_name_that_looks_like_a_path_is_recognized(name, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert looks_local(name) is local


def test_a_folder_is_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the folder contains no checkpoint"):
        nemo_lfr.load(tmp_path)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:x", "meta", "vulkan"])
def test_unavailable_device_is_named(device):
    with pytest.raises(NemoLfrError, match=device) as caught:
        nemo_lfr.load(device=device)
    assert len(str(caught.value)) < 300  # messages of torch have up to 1500 characters


def test_the_default_device_is_a_gpu_if_there_is_one_else_the_cpu():
    assert choose_device(None) == choose_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_precision_is_named_before_anything_is_read():
    with pytest.raises(NemoLfrError, match=r"int4.*bf16"):
        nemo_lfr.load("missing.nemo", precision="int4")


# Downloads from the Hub.

CLIENT = """
import json, sys, logging
import numpy as np
logging.basicConfig(stream=sys.stderr)
import nemo_lfr
wave, *sources = sys.argv[1:]
for source in sources:
    try:
        codec = nemo_lfr.load(source, device="cpu")
    except nemo_lfr.CheckpointError as error:
        print(json.dumps({"error": str(error)}))
    else:
        tokens, _ = codec.encode(np.load(wave))
        print(json.dumps({"tokens": tokens.tolist()}))
"""


def clients(sources: Sequence[str], wave: Path, environment: dict[str, str]) -> tuple[list[dict], str]:
    """Call `nemo_lfr.load` with each source in a new process; return the results and the log."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, wave, *sources],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def client(source: str, wave: Path, environment: dict[str, str]) -> tuple[dict, str]:
    """Call `nemo_lfr.load` in a new process; return its result and the log."""
    (result,), log = clients([source], wave, environment)
    return result, log


@pytest.mark.slow
def test_a_hub_id_loads_cold_then_from_the_cache_then_offline(tmp_path):
    codec = cached_codec("symmetric")
    path, wave = save(codec, tmp_path / "tiny.nemo"), synthesize(0.5)
    np.save(tmp_path / "wave.npy", wave)
    expected = {"tokens": codec.encode(wave)[0].tolist()}
    with HubServer({LFR: {"low-frame-rate-speech-codec-22khz.nemo": path}}) as hub:
        environment = hub.environment(tmp_path / "home")
        answer, log = client(LFR, tmp_path / "wave.npy", environment)
        assert answer == expected
        assert "non-commercial" in log  # the license is printed at the first download
        asked = len(hub.requests)
        assert f"GET /{LFR}/resolve/main/low-frame-rate-speech-codec-22khz.nemo" in hub.requests

        answer, log = client("audio_codec_low_frame_rate_22khz", tmp_path / "wave.npy", environment)
        assert answer == expected
        assert "non-commercial" not in log and len(hub.requests) == asked
    # The server has stopped, so only the cache can answer.
    answer, _ = client(LFR, tmp_path / "wave.npy", environment | {"HF_HUB_OFFLINE": "1"})
    assert answer == expected
    answer, log = client(LFR, tmp_path / "wave.npy", environment | {"HF_HOME": str(tmp_path / "other")})
    assert LFR in answer["error"] and "path of a downloaded .nemo" in answer["error"]
    assert "Retrying" not in log


@pytest.mark.slow
def test_a_repository_with_another_file_name_loads_its_only_nemo_file(tmp_path):
    codec = cached_codec("symmetric")
    path, wave = save(codec, tmp_path / "tiny.nemo"), synthesize(0.3)
    np.save(tmp_path / "wave.npy", wave)
    repositories = {"me/one": {"README.md": path, "codec.nemo": path}, "me/two": {"a.nemo": path, "b.nemo": path}}
    repositories["me/empty"] = {"README.md": path}
    with HubServer(repositories) as hub:
        environment = hub.environment(tmp_path / "home")
        (one, two, empty, none), _ = clients([*repositories, "me/none"], tmp_path / "wave.npy", environment)
        assert one == {"tokens": codec.encode(wave)[0].tolist()}
        assert "2 .nemo files" in two["error"]
        assert "me/empty" in empty["error"] and "neither a .nemo file, nor config.json" in empty["error"]
        assert "me/none" in none["error"] and "check the name" in none["error"]
        asked = len(hub.requests)
        assert client("me/one", tmp_path / "wave.npy", environment)[0] == one
        assert len(hub.requests) == asked, "it is in the cache"
    # The server has stopped, so only the cache can answer.
    environment |= {"HF_HUB_OFFLINE": "1"}
    assert client("me/one", tmp_path / "wave.npy", environment)[0] == {"tokens": codec.encode(wave)[0].tolist()}


def unpack(path: Path, folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder


def to_safetensors(path: Path, folder: Path, *others: str) -> Path:
    export_safetensors(path, folder)
    for name in others:
        (folder / name).write_text("something else")
    return folder


def link_blob(path: Path, folder: Path) -> Path:
    """Return a folder like that of `snapshot_download`, with a link to the file under its name on the Hub."""
    (folder / "snapshot").mkdir(parents=True)
    (folder / "snapshot" / "codec.nemo").symlink_to(path)
    return folder / "snapshot"


def beside(path: Path, folder: Path, *others: str) -> Path:
    folder.mkdir()
    shutil.copy(path, folder / "codec.nemo")
    for name in others:
        (folder / name).write_text("something else")
    return folder


PLACES = {
    "unpacked": unpack,
    "unpacked, named as a file": lambda path, folder: unpack(path, folder.with_suffix(".nemo")),
    "safetensors": to_safetensors,
    "safetensors and other files": lambda path, folder: to_safetensors(path, folder, "README.md", "model_config.yaml"),
    "snapshot": link_blob,
    "one .nemo and other files": lambda path, folder: beside(path, folder, "README.md", ".hidden.nemo", "last.ckpt"),
    "one .nemo, and a folder of that suffix": lambda path, folder: (
        unpack(path, beside(path, folder) / "x.nemo").parent
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", slow_after(3, PLACES))
@pytest.mark.parametrize("home", slow_except([False, True], False))
def test_a_folder_that_holds_a_checkpoint_loads(tmp_path, monkeypatch, place, home):
    codec = cached_codec("symmetric")
    folder = PLACES[place](save(codec, tmp_path / "my.nemo"), tmp_path / "folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = f"~/{folder.relative_to(tmp_path)}" if home else folder
    loaded = nemo_lfr.load(source, device="cpu")
    assert torch.equal(loaded.encode(synthesize(0.3))[0], codec.encode(synthesize(0.3))[0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.nemo", "b.nemo"], r"contains 2 \.nemo files \(a\.nemo, b\.nemo\); pass the path of one"),
        (["model_config.yaml"], "but no model_weights.ckpt"),
        (["model_weights.ckpt"], "but no model_config.yaml"),
        (["model.safetensors"], r"but no config\.json"),
        (["config.json"], "the folder contains no checkpoint"),
        (["last.ckpt"], "the folder contains no checkpoint"),
        ([], "the folder contains no checkpoint"),
    ],
)
def test_incomplete_folder_names_the_missing_file(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        nemo_lfr.load(tmp_path)


@pytest.mark.slow
def test_a_tilde_is_the_home_directory_for_models_and_files(tmp_path, monkeypatch):
    codec, wave = cached_codec("symmetric"), synthesize(0.3)
    save(codec, tmp_path / "my.nemo")
    soundfile.write(tmp_path / "a.wav", wave, 22050, subtype="FLOAT")
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = nemo_lfr.load("~/my.nemo", device="cpu")
    assert loaded.encode_file("~/a.wav", "~/a.lfr") == len(wave)
    assert loaded.decode_file("~/a.lfr", "~/b.wav") == len(wave)
    assert soundfile.info(tmp_path / "b.wav").frames == len(wave)
    with pytest.raises(CheckpointError, match="no such file"):
        nemo_lfr.load("~nobody-of-this-name/my.nemo")


def test_finding_a_local_file_makes_no_request(tmp_path, monkeypatch):
    (tmp_path / "here.nemo").touch()
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("here.nemo") == Path("here.nemo")
    os.makedirs("nvidia")
    (tmp_path / "nvidia" / "local").touch()
    assert find_checkpoint("nvidia/local") == Path("nvidia/local")


# Layouts of the Hub's cache: file names of the snapshot, the text of refs/main (or a dict of texts by reference), and
# whether files are links to blobs.
USUAL, OTHER, REVISION = "one.nemo", "codec.nemo", "a" * 40
CACHES = {
    "as downloaded": ([USUAL], REVISION, True),
    "without links": ([USUAL], REVISION, False),
    "other name": ([OTHER], REVISION, True),
    "in a folder": (["sub/" + OTHER], REVISION, True),
    "by its commit": ([USUAL], None, True),
    "by its commit, other name": ([OTHER], None, False),
    "by its commit, others beside": ([OTHER, USUAL], None, False),
    "reference to another commit": ([USUAL], "b" * 40, True),
    "reference to nowhere": ([USUAL], "../../../x", True),
    "empty reference": ([OTHER], "", True),
    "a tag of main": ([OTHER], {"main": REVISION, "v1": REVISION}, True),
}
OTHER_REVISIONS = {
    "a branch": {"dev": REVISION},
    "a branch of several words": {"features/dev": REVISION},
    "an interrupted download of main": {"dev": REVISION, "main": "b" * 40},
    "a branch that has moved": {"dev": "b" * 40},
}


def is_main(layout: str) -> bool:
    reference = CACHES[layout][1]
    return (reference["main"] if isinstance(reference, dict) else reference) == REVISION


def fill_cache(
    cache: Path, path: Path, names: list[str], reference: str | dict[str, str] | None, linked: bool
) -> Path:
    """Fill a Hub cache. `reference` is the text of refs/main, or a dict with the texts of several references."""
    repository = cache / "models--me--one"
    snapshot = repository / "snapshots" / REVISION
    for number, name in enumerate(names):
        target = snapshot / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if linked:
            blob = repository / "blobs" / str(number)
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(path, blob)
            target.symlink_to(blob)
        else:
            shutil.copy(path, target)
    references = {"main": reference} if isinstance(reference, str) else reference or {}
    for name, commit in references.items():
        (repository / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return snapshot


@pytest.mark.slow
@pytest.mark.parametrize("layout", slow_after(2, CACHES))
def test_cached_repository_loads_offline_for_any_cache_layout(tmp_path, offline, layout, caplog):
    path = save(cached_codec("symmetric"), tmp_path / "tiny.nemo")
    snapshot = fill_cache(tmp_path / "cache", path, *CACHES[layout])
    assert nemo_lfr.load("me/one").fingerprint == nemo_lfr.load(path).fingerprint
    assert (f"using the only snapshot, {snapshot}" in caplog.text) is not is_main(layout)
    codec = Codec.from_pretrained("me/one", device="cpu", revision=REVISION, cache_dir=tmp_path / "cache")
    assert codec.fingerprint == nemo_lfr.load(path).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("references", slow_after(2, OTHER_REVISIONS))
@pytest.mark.parametrize("source", ["id", "repository"])
def test_a_snapshot_of_another_branch_is_not_taken_for_main(tmp_path, offline, references, source):
    path = save(cached_codec("symmetric"), tmp_path / "tiny.nemo")
    snapshot = fill_cache(tmp_path / "cache", path, [USUAL], OTHER_REVISIONS[references], True)
    message = r"no reference to the main branch \(found: (features/)?dev\); pass the path .* to use this"
    with pytest.raises(CheckpointError, match=message) as raised:
        nemo_lfr.load("me/one" if source == "id" else snapshot.parents[1])
    assert str(snapshot) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", slow_after(2, [name for name in CACHES if not is_main(name)]))
def test_a_snapshot_that_may_not_be_main_is_not_used_if_the_hub_answers(tmp_path, monkeypatch, offline, layout):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    path = save(cached_codec("symmetric"), tmp_path / "tiny.nemo")
    fill_cache(tmp_path / "cache", path, *CACHES[layout])
    monkeypatch.setattr("nemo_lfr.io.hub.files_on_hub", lambda repository: [USUAL])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "tiny.nemo"))
    assert find_checkpoint("me/one") == tmp_path / "tiny.nemo"

    def refuse(repository):
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        error.response = SimpleNamespace(status_code=404)
        raise error

    monkeypatch.setattr("nemo_lfr.io.hub.files_on_hub", refuse)
    with pytest.raises(CheckpointError, match=r"could not be downloaded .*\), and its main branch is not in the"):
        find_checkpoint("me/one")
    with pytest.raises(CheckpointError, match=r"could not be downloaded .*\); check the name"):
        find_checkpoint("me/one", refresh=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", slow_after(3, [name for name in CACHES if name != "in a folder"]))
def test_a_repositorys_folder_in_the_cache_is_a_path(tmp_path, layout, caplog):
    path = save(cached_codec("symmetric"), tmp_path / "tiny.nemo")
    fill_cache(tmp_path / "cache", path, *CACHES[layout])
    repository = tmp_path / "cache" / "models--me--one"
    if layout == "by its commit, others beside":
        with pytest.raises(CheckpointError, match=r"2 \.nemo files"):
            nemo_lfr.load(repository)
    else:
        assert nemo_lfr.load(repository, "cpu").fingerprint == nemo_lfr.load(path, "cpu").fingerprint
        assert ("using the only snapshot" in caplog.text) is not is_main(layout)


@pytest.mark.slow
@pytest.mark.parametrize("linked", slow_after(1, [True, False]))
@pytest.mark.parametrize("source", slow_after(1, ["id", "repository", "snapshot"]))
def test_a_cached_unpacked_checkpoint_is_read(tmp_path, offline, source, linked):
    path = save(cached_codec("symmetric"), tmp_path / "tiny.nemo")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "members", filter="data")
    snapshot = tmp_path / "cache" / "models--me--one" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    fill_cache(tmp_path / "cache", path, [], REVISION if linked else None, linked)
    for member in (tmp_path / "members").iterdir():
        target = snapshot / member.name
        target.symlink_to(member) if linked else shutil.copy(member, target)
    place = {"id": "me/one", "repository": snapshot.parents[1], "snapshot": snapshot}[source]
    assert nemo_lfr.load(place, "cpu").fingerprint == nemo_lfr.load(path, "cpu").fingerprint
    codec = Codec.from_pretrained(place, device="cpu", revision=REVISION, cache_dir=tmp_path / "cache")
    assert codec.fingerprint == nemo_lfr.load(path).fingerprint


@pytest.mark.parametrize("count", [0, 2])
def test_a_cache_folder_without_one_snapshot_is_refused(tmp_path, count):
    for number in range(count):
        (tmp_path / "models--me--one" / "snapshots" / str(number)).mkdir(parents=True)
    (tmp_path / "models--me--one" / "snapshots").mkdir(parents=True, exist_ok=True)
    with pytest.raises(CheckpointError, match=f"has {count or 'no'} snapshots"):
        nemo_lfr.load(tmp_path / "models--me--one")


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "load": nemo_lfr.load,
    "device": lambda value: nemo_lfr.load(None, value),
    "precision": lambda value: nemo_lfr.load(None, "cpu", value),
    "backend": lambda value: nemo_lfr.load(None, "cpu", backend=value),
    "find_checkpoint": find_checkpoint,
    "encode": lambda value: cached_codec("symmetric").encode(value),
    "decode": lambda value: cached_codec("symmetric").decode(value),
    "encode_file, source": lambda value: cached_codec("symmetric").encode_file(value, "a.lfr"),
    "encode_file, target": lambda value: cached_codec("symmetric").encode_file("a.wav", value),
    "decode_file, source": lambda value: cached_codec("symmetric").decode_file(value, "a.wav"),
    "decode_file, target": lambda value: cached_codec("symmetric").decode_file("a.lfr", value),
    "read_manifest": read_manifest,
    "TokenFolder": TokenFolder,
}
VALUES: dict[str, Any] = {
    "None": None,
    "an int": 5,
    "bytes": b"a.nemo",
    "a list": ["a.nemo"],
    "a dict": {"a": 1},
    "a float": 1.5,
    "a bool": True,
    "an object": object(),
    "NUL": "a\0b",
}
DEFAULTS = {"load", "find_checkpoint", "device", "backend"}  # None means a default


@pytest.mark.parametrize("value", [*VALUES])
@pytest.mark.parametrize("entry", [*ENTRIES])
def test_arguments_of_a_wrong_type_are_our_errors(entry, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if entry in DEFAULTS and value == "None":
        pytest.skip("None means a default")
    with pytest.raises(nemo_lfr.NemoLfrError) as raised:
        ENTRIES[entry](VALUES[value])
    assert "\n" not in str(raised.value) and str(raised.value).isprintable()


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\nb", "\u202e", "\x9b"])
@pytest.mark.parametrize("suffix", ["", ".nemo", ".ckpt", "/x.nemo"])
@pytest.mark.parametrize("exists", ["nothing", "a file", "a folder"])
def test_control_characters_of_a_path_are_not_in_messages(tmp_path, text, suffix, exists):
    path = tmp_path / f"m{text}{suffix}"
    if exists == "a folder":
        path.mkdir(parents=True)
    elif exists == "a file":
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no checkpoint")
    for source in (path, str(path)):
        with pytest.raises(CheckpointError) as raised:
            nemo_lfr.load(source)
        assert str(raised.value).isprintable() and "m?" in str(raised.value)
        copied = pickle.loads(pickle.dumps(raised.value))
        assert type(copied) is CheckpointError and str(copied) == str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("reference", [REVISION, None])
def test_a_cached_repository_of_several_codecs_names_them_offline(tmp_path, offline, reference):
    path = save(cached_codec("symmetric"), tmp_path / "tiny.nemo")
    snapshot = fill_cache(tmp_path / "cache", path, ["a.nemo", "b.nemo"], reference, True)
    with pytest.raises(CheckpointError, match=r"2 \.nemo files in .* \(a\.nemo, b\.nemo\)") as raised:
        nemo_lfr.load("me/one")
    assert str(snapshot) in str(raised.value)
    assert nemo_lfr.load(snapshot / "a.nemo").fingerprint
    with pytest.raises(CheckpointError, match=r"2 \.nemo files in .* \(a\.nemo, b\.nemo\)"):
        Codec.from_pretrained("me/one", revision=REVISION, cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_a_forked_process_reads_what_a_thread_was_reading(tmp_path, monkeypatch):
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    codec = nemo_lfr.load(save(cached_codec("symmetric"), tmp_path / "tiny.nemo"))
    reading, go_on = threading.Event(), threading.Event()
    parent, fill = os.getpid(), reader._fill

    def slow(*arguments, **keywords):
        if os.getpid() == parent:
            reading.set()
            go_on.wait()
        fill(*arguments, **keywords)

    monkeypatch.setattr(reader, "_fill", slow)
    thread = threading.Thread(target=lambda: codec.encoder)
    thread.start()
    reading.wait()
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends the child if it deadlocks on a lock of a thread that fork did not copy
        sound = all(value.isfinite().all() for value in codec.encoder.state_dict().values())
        os._exit(0 if sound and not codec.encoder.pre_conv.conv.weight.is_meta else 1)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    thread.join()
    assert status == 0


@pytest.mark.parametrize("source", [None, 5, "a\0b"])
def test_from_pretrained_refuses_what_is_not_a_path(source):
    with pytest.raises(CheckpointError, match="is not a path"):
        nemo_lfr.Codec.from_pretrained(source)
