"""Tests of untrusted Lhotse cuts: they start no program and download nothing. A refused cut does not affect others."""

import copy
import gzip
import http.server
import io
import json
import math
import os
import shlex
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.corpus.sources import open_corpus
from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.evaluation.recordings import read as read_recording
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.cut_audio import check_cut, read_cut
from nemo_lfr.io.cut_files import CutFile
from nemo_lfr.io.resampling import count_samples
from nemo_lfr.training.data import CodecDataset
from tests.models import RATE, synthesize

pytest.importorskip("lhotse", reason="pip install '.[corpus]'")

WAVE = synthesize(1.0)


def recording(kind: str, source: object, name: str = "a", channels: int = 1, **more: object) -> dict:
    ids = list(range(channels))
    made = {"id": name, "sampling_rate": RATE, "num_samples": RATE, "duration": 1.0, "channel_ids": ids}
    return made | {"sources": [{"type": kind, "channels": ids, "source": source}]} | more


def cut_of(audio: dict, name: str = "a", **more: object) -> dict:
    made = {"id": name, "start": 0, "duration": 1.0, "channel": 0, "supervisions": [], "type": "MonoCut"}
    return made | {"recording": audio} | more


def write(path: Path, items: list) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


def clips_of(path: Path, tmp_path: Path, **options) -> dict:
    corpus = open_corpus(path, None, tmp_path / "unused", **options)
    return {clip.id: clip for part in corpus.shards(100) for clip in corpus.read(part)}


@pytest.fixture
def wav(tmp_path) -> Path:
    soundfile.write(tmp_path / "ok.wav", WAVE, RATE)
    return tmp_path / "ok.wav"


def hostile(folder: Path) -> dict[str, dict]:
    """Return recordings for which Lhotse would run a shell command or open a URL."""
    touch = f"touch {shlex.quote(str(folder / 'PWNED'))}"
    return {
        "command": recording("command", f"{touch}; cat {folder}/ok.wav"),
        "pipe in a URL": recording("url", f"pipe:{touch}; cat {folder}/ok.wav"),
        "pipe in a file": recording("file", f"pipe:{touch}; cat {folder}/ok.wav"),
        "sph name": recording("file", f"{folder}/x; {touch}; echo .sph"),
        "sph name of two channels": recording("file", f"{folder}/x; {touch}; echo .sph", channels=2),
        "opus name": recording("file", f"{folder}/x'; {touch}; echo '.opus"),
        "file URL": recording("url", f"file://{folder}/ok.wav"),
        "bucket": recording("url", "s3://bucket/a.wav"),
        "aistore": recording("url", "ais://bucket/a.wav"),
        "web": recording("url", "http://127.0.0.1:9/a.wav"),
        "web in a file": recording("file", "http://127.0.0.1:9/a.wav"),
        "text in memory": recording("memory", "abc"),
        "placeholder": recording("shar", ""),
        "unknown type": recording("exec", touch),
        "no type": recording(None, touch),
    }


def places(bad: dict, good: dict) -> dict[str, dict]:
    """Return one cut for each field that may contain a recording, with the bad recording in this field."""
    mixed = {"id": "a", "type": "MixedCut"}
    reverb = {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": bad}}
    inner = {key: value for key, value in cut_of(bad).items() if key != "type"}
    bad_track = {"type": "MonoCut", "offset": 0, "cut": inner}
    track = {"type": "MonoCut", "offset": 0, "cut": {k: v for k, v in cut_of(good).items() if k != "type"}}
    return {
        "recording": cut_of(bad),
        "target_audio": cut_of(good, custom={"target_audio": bad}),
        "context_audio": cut_of(good, custom={"context_audio": bad}),
        "another custom field": cut_of(good, custom={"noise": bad}),
        "a track": mixed | {"tracks": [track, bad_track]},
        "the reference of a mix": mixed | {"tracks": [track], "snr_reference": bad_track},
        "an impulse response": cut_of(good | {"transforms": [reverb]}),
        "an impulse response of a mix": mixed | {"tracks": [track], "transforms": [reverb]},
        "a supervision": cut_of(
            good,
            supervisions=[{"id": "s", "recording_id": "a", "start": 0, "duration": 1.0, "custom": {"audio": bad}}],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", sorted(hostile(Path("."))))
def test_no_source_of_a_cut_runs_or_fetches_anything(kind, wav, tmp_path, monkeypatch):
    monkeypatch.setenv("LHOTSE_LEGACY_OPUS_LOADING", "1")
    bad, good = hostile(tmp_path)[kind], recording("file", str(wav))
    for number, (place, cut) in enumerate(places(bad, good).items()):
        path = write(tmp_path / f"{number}.jsonl.gz", [copy.deepcopy(cut), cut_of(good, "b")])
        clips = clips_of(path, tmp_path)
        assert clips.keys() == {"a", "b"}, place
        if place in ("recording", "target_audio", "a track"):
            with pytest.raises(AudioError, match="cut a"):
                clips["a"].audio(RATE, 100)
        elif place == "context_audio" and clips["a"].context is not None:
            with pytest.raises(AudioError, match="cut a"):
                clips["a"].context(RATE, 100)
        elif bad["sources"][0]["type"] not in ("file", "memory", "shar"):
            with pytest.raises(AudioError, match="cut a"):
                clips["a"].audio(RATE, 100)
        assert np.array_equal(clips["b"].audio(RATE, 100), AudioReader(wav, RATE).segment(0, 9))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("kind", sorted(hostile(Path("."))))
def test_a_cut_that_reaches_the_reader_unchecked_runs_nothing_either(kind, wav, tmp_path):
    """In training, NeMo opens the manifests, so cuts are not checked first."""
    from lhotse import CutSet

    bad, good = hostile(tmp_path)[kind], recording("file", str(wav))
    for place, cut in places(bad, good).items():
        if place in ("recording", "a track", "an impulse response of a mix", "the reference of a mix"):
            (made,) = CutSet.from_dicts([copy.deepcopy(cut)])
            with pytest.raises(AudioError, match="cut a"):
                read_cut(made, RATE)
    assert not (tmp_path / "PWNED").exists()


STORAGE = {
    "lilcom_url": ("lilcom_url", "http://127.0.0.1:9", "a.llc"),
    "kaldiio": ("kaldiio", "touch x |", "a"),
    "memory_raw": ("memory_raw", "", "pickle"),
    "unknown": ("new_storage", "", ""),
    "numpy_files of a pipe": ("numpy_files", "pipe:touch x", "a.npy"),
    "numpy_files of a URL": ("numpy_files", "/tmp", "s3://a.npy"),
}


@pytest.mark.parametrize("kind", STORAGE)
def test_arrays_that_open_urls_or_run_programs_refuse_their_cut(kind, wav):
    storage, path, key = STORAGE[kind]
    array = {"storage_type": storage, "storage_path": path, "storage_key": key, "shape": [1]}
    good = recording("file", str(wav))
    for cut in (
        cut_of(good, custom={"codes": array}),
        cut_of(good, custom={"codes": {"array": array, "temporal_dim": 0, "frame_shift": 1, "start": 0}}),
        cut_of(good, features={"type": "fbank", "num_features": 80, **array}),
    ):
        with pytest.raises(AudioError, match=r"allowed.*; remove the field"):
            check_cut(cut)
    check_cut(
        cut_of(
            good, custom={"codes": array | {"storage_type": "numpy_hdf5", "storage_path": "a.h5", "storage_key": "a"}}
        )
    )
    check_cut(cut_of(good, custom={"sources": ["web"], "storage_type": "ssd"}))


def test_a_plain_cut_has_the_samples_of_a_manifests_line(wav, tmp_path):
    from lhotse import MonoCut, MultiCut, Recording

    stereo = np.stack([WAVE, np.zeros_like(WAVE)], axis=1)
    soundfile.write(tmp_path / "stereo.flac", stereo, 44_100, subtype="PCM_16")
    mono, two = Recording.from_file(wav), Recording.from_file(tmp_path / "stereo.flac")
    with AudioReader(wav, 16_000) as reader:
        whole = np.concatenate(list(reader.blocks()))
    assert np.array_equal(read_cut(mono, 16_000), whole)
    assert np.array_equal(read_cut(mono.to_cut(), 16_000), whole)
    samples = soundfile.read(wav, dtype="float32")[0]
    part = MonoCut("p", 3001 / RATE, 5003 / RATE, 0, recording=mono)
    assert np.array_equal(read_cut(part, RATE), samples[3001:8004])
    part = MonoCut("p", round(3001 / RATE, 8), round(5003 / RATE, 8), 0, recording=mono)
    assert np.array_equal(read_cut(part, RATE), samples[3001:8004])
    left, right = soundfile.read(tmp_path / "stereo.flac", dtype="float32")[0].T
    assert np.allclose(read_cut(MultiCut("m", 0, two.duration, [0, 1], recording=two), 44_100), (left + right) / 2)
    assert np.array_equal(read_cut(MonoCut("l", 0, two.duration, 0, recording=two), 44_100), left)
    assert not read_cut(MonoCut("r", 0, two.duration, 1, recording=two), 44_100).any()
    part = MonoCut("l", 100 / 44_100, 200 / 44_100, 0, recording=two)
    assert np.array_equal(read_cut(part, 44_100), left[100:300])


SECTIONS = {  # rate, offset and duration
    "13 frames": (22_050, 0.0, 13 * 1024 / 22_050),
    "product above a whole number": (22_050, 0.1, 0.07),
    "product below a whole number": (16_000, 1.001, 0.5),
    "eight digits": (22_050, round(3001 / 22_050, 8), round(5003 / 22_050, 8)),
    "half a sample": (16_000, 2.5 / 16_000, 1000.5 / 16_000),
    "between samples": (16_000, 0.1234567, 0.2345678),
    "44.1 kHz": (44_100, 0.7, 0.29),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_has_the_same_samples_everywhere(section, tmp_path):
    from lhotse import MonoCut, Recording
    from lhotse.utils import compute_num_samples

    rate, offset, duration = SECTIONS[section]
    path = tmp_path / "a.wav"
    soundfile.write(path, synthesize(2.0), rate, subtype="FLOAT")
    first, count = compute_num_samples(offset, rate), compute_num_samples(duration, rate)
    expected = soundfile.read(path, dtype="float32")[0][first : first + count]
    assert (count_samples(offset, rate), count_samples(duration, rate)) == (first, count)

    entry = {"audio_filepath": str(path), "offset": offset, "duration": duration}
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps(entry | {"context_audio_filepath": str(path), "context_audio_duration": duration}))
    recording = Recording.from_file(path)
    cut = MonoCut("a", offset, duration, 0, recording=recording)
    twice = MonoCut("a", offset, duration, 0, recording=replace(recording, transforms=[])).append(cut)
    training = CodecDataset({"a": {"manifest_path": manifest}}, rate)
    (clip,) = clips_of(manifest, tmp_path).values()
    sections = {
        "Lhotse": cut.load_audio()[0],
        "cut": read_cut(cut, rate),
        "cut of several tracks": read_cut(twice, rate)[:count],
        "manifest": clip.audio(rate, 100),
        "training": training[0]["audio"].numpy(),
        "evaluation": read_recording(path, rate, offset, duration),
        "bytes": AudioReader("a", rate, path.read_bytes()).segment(offset, duration),
    }
    for name, samples in sections.items():
        assert np.array_equal(samples, expected), name
    assert len(clip.context(rate, 100)) == count


ENDS = {  # start and duration of a cut of 1 s of audio
    "all of the audio": (0.0, 1.0),
    "20 ms too long": (0.0, 1.02),
    "one sample too long": (0.0, 1 + 1 / RATE),
    "shorter by 5 ms": (0.0, 0.995),
    "an excerpt that is too long": (0.35, 0.67),
    "more than rounding": (0.25, 1.0),
    "longer than the excerpt": (0.9, 0.55),
    "beyond the tolerance": (0.0, 1.51),
    "beyond the end": (1.01, 0.1),
}


@pytest.mark.parametrize("kind", ["mono", "two channels", "one channel", "memory", "mixed"])
@pytest.mark.parametrize("end", ENDS)
def test_a_cut_has_the_samples_of_lhotse_wherever_it_ends(end, kind, tmp_path, caplog):
    from lhotse import MonoCut, MultiCut, Recording

    start, duration = ENDS[end]
    wave = WAVE if kind in ("mono", "memory", "mixed") else np.stack([WAVE, -WAVE / 2], axis=1)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    made = Recording.from_file(tmp_path / "a.wav")
    longer = replace(made, num_samples=2 * RATE, duration=2.0)
    channels = [0, 1] if kind == "two channels" else 0
    cut = (MultiCut if kind == "two channels" else MonoCut)("a", start, duration, channels, recording=longer)
    if kind == "memory":
        longer.sources = [replace(longer.sources[0], type="memory", source=(tmp_path / "a.wav").read_bytes())]
    if kind == "mixed":
        cut = cut.append(made.to_cut())
    if "beyond" in end:
        with pytest.raises(AudioError, match=r"^cut .*: the audio lasts 1\.00 s, but the cut requires 1\.\d1 s"):
            read_cut(cut, RATE)
        return
    expected = cut.load_audio().mean(axis=0)
    found = read_cut(cut, RATE)
    assert len(found) == cut.num_samples
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
    assert len(read_cut(cut, 16_000)) == math.ceil(len(expected) * 16_000 / RATE)
    assert ("filled by reflection" in caplog.text) == (start + duration > 1.1)


@pytest.mark.parametrize("source", ["file", "memory"])
def test_one_channel_of_a_file_whose_header_is_wrong_is_read_whole(source, tmp_path):
    """The header of a killed recorder still states a length of 0."""
    from lhotse import AudioSource, MonoCut, Recording

    stereo = np.stack([WAVE, -WAVE / 2], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, subtype="PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    position = data.index(b"data") + 4
    data[position : position + 4] = bytes(4)
    (tmp_path / "a.wav").write_bytes(data)
    audio = str(tmp_path / "a.wav") if source == "file" else bytes(data)
    recording = Recording("a", [AudioSource(source, [0, 1], audio)], RATE, len(WAVE), len(WAVE) / RATE)
    right = read_cut(MonoCut("r", 0, recording.duration, 1, recording=recording), RATE)
    np.testing.assert_allclose(right, -WAVE / 2, rtol=0, atol=2**-14)  # a step of 16 bits


def test_mixed_and_augmented_cuts_equal_lhotse(wav, tmp_path):
    from lhotse import Recording

    soundfile.write(tmp_path / "noise.wav", synthesize(1.0, seed=3), RATE)
    cut, noise = (Recording.from_file(path).to_cut() for path in (wav, tmp_path / "noise.wav"))
    rir = Recording.from_file(tmp_path / "noise.wav")
    for made in (
        cut.pad(duration=2.0),
        cut.mix(noise, snr=10, offset_other_by=0.2),
        cut.append(noise),
        cut.perturb_speed(1.1),
        cut.resample(16_000),
        cut.perturb_volume(0.5).truncate(offset=0.2, duration=0.5),
        cut.reverb_rir(rir),
        cut.mix(noise, snr=5).perturb_volume(0.3),
    ):
        rate = made.sampling_rate
        expected = made.load_audio().mean(axis=0)
        assert np.abs(read_cut(made, rate) - expected).max() < 1e-6
    assert cut.recording.sources[0].type == "file"


def test_the_reason_of_a_failure_is_kept(wav, tmp_path):
    from lhotse import Recording

    cut = Recording.from_file(wav).to_cut()
    wav.unlink()
    for made in (cut, cut.pad(duration=2.0), cut.perturb_speed(0.9)):
        with pytest.raises(AudioError, match=r"ok\.wav: no such file") as error:
            read_cut(made, RATE)
        assert "\n" not in str(error.value)
    with pytest.raises(AudioError, match="the cut has no audio"):
        read_cut(replace(cut, recording=None), RATE)
    with pytest.raises(AudioError, match=r"expected a Lhotse cut or recording, got 'a\.wav'"):
        read_cut("a.wav", RATE)


# Change of a cut -> message.
TIMES = {
    "start": {math.nan: "starts at nan s", -1.0: "starts at -1 s", "x": "start is 'x'; expected a number of seconds"},
    "duration": {math.inf: "lasts inf s", 1e300: r"lasts 1e\+300 s", "x": "duration is 'x'; expected a number"},
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in TIMES.items() for value in values])
def test_absurd_times_fail_only_their_cut(field, value, wav, tmp_path):
    change = {field: value}
    path = write(tmp_path / "c.jsonl.gz", [cut_of(recording("file", str(wav)), **change)])
    with pytest.raises(AudioError, match=f"cut a: .*{TIMES[field][value]}"):
        clips_of(path, tmp_path)["a"].audio(RATE, 100)


def test_urls_are_read_on_request_without_foreign_redirects(wav, tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/ok.wav":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(wav.read_bytes())
            else:
                places = {"/to-file": f"file://{wav}", "/to-ftp": "ftp://127.0.0.1:9/a.wav", "/to-ok": "/ok.wav"}
                self.send_response(302 if self.path in places else 404)
                self.send_header("Location", places.get(self.path, ""))
                self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        cuts = [
            cut_of(recording("url", f"{base}/{name}"), name)
            for name in ("ok.wav", "to-ok", "to-file", "to-ftp", "gone")
        ]
        path = write(tmp_path / "c.jsonl.gz", cuts)
        clips = clips_of(path, tmp_path, allow_url=True)
        for name in ("ok.wav", "to-ok"):
            assert np.array_equal(clips[name].audio(RATE, 100), soundfile.read(wav, dtype="float32")[0])
        for name in ("to-file", "to-ftp", "gone"):
            with pytest.raises(AudioError, match=f"cut {name}: .*127"):
                clips[name].audio(RATE, 100)
        with pytest.raises(AudioError, match="--allow-url"):
            clips_of(path, tmp_path)["ok.wav"].audio(RATE, 100)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("first", ['{"id": "half", "sta', '{"id": "no type"}', '{"id": "b", "type": "Other"}', "7"])
def test_kind_of_a_cuts_file_is_that_of_its_first_valid_line(first, wav, tmp_path):
    path = write(tmp_path / "c.jsonl", [first, cut_of(recording("file", str(wav)), "good")])
    assert len(clips_of(path, tmp_path)["good"].audio(RATE, 100)) == RATE


def test_invalid_line_of_a_cuts_file_fails_only_its_clip(wav, tmp_path):
    good = recording("file", str(wav))
    lines = [
        "\ufeff" + json.dumps(cut_of(good, "first")),
        '{"id": "half", "sta',
        "[1, 2]",
        '{"id": "no type"}',
        json.dumps(cut_of(good, "no duration") | {"duration": None}),
        json.dumps({"id": "strange", "type": "MonoCut", "color": "red"}),
        {"id": "padding", "type": "PaddingCut", "duration": 1.0, "sampling_rate": RATE, "feat_value": 0.0},
        cut_of(None, "null"),
        cut_of({"id": "empty"}, "empty"),
        cut_of(good | {"transforms": [{"name": "no such", "kwargs": {}}]}, "transform"),
        cut_of(good | {"sources": []}, "no source"),
        cut_of(good, "list of words", supervisions=["a", "b"]),
        "",
        cut_of(good, "custom", custom={"sources": "abc", "more": {"sources": "abc"}, "array": {"array": "x"}}),
        cut_of(good, "last"),
    ]
    clips = clips_of(write(tmp_path / "c.jsonl.gz", lines), tmp_path)
    assert len(clips) == 14
    for name, clip in clips.items():
        if name in ("first", "custom", "last"):
            assert len(clip.audio(RATE, 100)) == RATE
        else:
            with pytest.raises(AudioError) as error:
                clip.audio(RATE, 100)
            assert "\n" not in str(error.value)
            assert name != "no source" or "has no audio source" in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["cuts.000000.jsonl", "recording.000000.tar", "custom.000000.jsonl.gz"])
def test_a_pipe_in_a_shar_is_refused_and_not_waited_for(wav, tmp_path, name):
    (tmp_path / "shar").mkdir()
    write(tmp_path / "shar" / "cuts.000000.jsonl.gz", [cut_of(recording("file", str(wav)))])
    os.mkfifo(tmp_path / "shar" / name)
    with pytest.raises(ConfigError, match=rf"{name}: not a regular file but a pipe"):
        open_corpus(tmp_path / "shar", None, tmp_path / "unused")


def test_lhotse_recordings_are_read_with_supervisions_beside_them(wav, tmp_path, caplog):
    segments = [
        {"id": f"s{n}", "recording_id": "a", "start": start, "duration": 0.4, "text": text, "speaker": "sam"}
        for n, (start, text) in enumerate([(0.5, "there"), (0.0, "hello")])
    ]
    segments.append(segments[0] | {"id": "s2", "recording_id": "gone"})
    segments[1] |= {"gender": "f", "custom": {"emotion": "sad", "vector": [1, 2]}}  # the first by its start
    write(tmp_path / "x_recordings_train.jsonl.gz", [recording("file", str(wav)), recording("command", "true", "b")])
    (clip_a, clip_b) = clips_of(tmp_path / "x_recordings_train.jsonl.gz", tmp_path).values()
    assert len(clip_a.audio(RATE, 100)) == RATE and "text" not in clip_a.labels
    with pytest.raises(AudioError, match="output of a command"):
        clip_b.audio(RATE, 100)
    write(tmp_path / "x_supervisions_train.jsonl.gz", segments)
    clip_a = clips_of(tmp_path / "x_recordings_train.jsonl.gz", tmp_path)["a"]
    assert clip_a.labels == {"text": "hello there", "speaker": "sam", "gender": "f", "emotion": "sad"}
    assert clip_a.cut["supervisions"][0]["text"] == "hello there" and len(clip_a.cut["supervisions"]) == 1
    assert "several supervisions in 1 cut;" in caplog.text
    assert "skipped 1 supervision of recordings that are not listed in x_recordings_train.jsonl.gz." in caplog.text
    with pytest.raises(
        ConfigError, match="contains Lhotse supervisions, which refer to no audio; pass cuts or recordings"
    ):
        open_corpus(tmp_path / "x_supervisions_train.jsonl.gz", None, tmp_path / "unused")
    write(tmp_path / "features.jsonl.gz", [{"type": "fbank", "num_features": 80, "recording_id": "a", "start": 0}])
    with pytest.raises(ConfigError, match="contains Lhotse features"):
        open_corpus(tmp_path / "features.jsonl.gz", None, tmp_path / "unused")
    whole = (tmp_path / "features.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="ends too early"):
        list(CutFile(tmp_path / "cut.jsonl.gz").read())


def shard(folder: Path, names: list[str], metas: dict[str, bytes]) -> Path:
    """Write a Shar with one shard, whose tar contains these manifests instead of valid ones."""
    folder.mkdir()
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, RATE, format="FLAC")
    cuts = [cut_of(recording("shar", "", name), name) for name in names]
    write(folder / "cuts.000000.jsonl.gz", cuts)
    with tarfile.open(folder / "recording.000000.tar", "w") as tar:
        for name in names:
            meta = metas.get(name, json.dumps(recording("shar", "", name)).encode())
            for suffix, data in ((".flac", buffer.getvalue()), (".json", meta)):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def test_invalid_item_of_a_shar_fails_only_its_clip(tmp_path):
    command = recording("command", f"touch {tmp_path}/PWNED", "command")
    metas = {
        "json": b"{no",
        "number": b"7",
        "command": json.dumps(command).encode(),
        "two": json.dumps(command | {"sources": [*recording("shar", "")["sources"], *command["sources"]]}).encode(),
    }
    folder = shard(tmp_path / "shar", ["first", *metas, "last"], metas)
    clips = clips_of(folder, tmp_path)
    assert list(clips) == ["first", *metas, "last"]
    for name, clip in clips.items():
        if name in ("first", "last"):
            assert np.abs(clip.audio(RATE, 100) - WAVE).max() < 1e-4
        else:
            with pytest.raises(AudioError, match=f"cut {name}"):
                clip.audio(RATE, 100)
    assert not (tmp_path / "PWNED").exists()


def test_fields_in_json_lines_are_validated_too(tmp_path, wav):
    folder = shard(tmp_path / "shar", ["a", "b"], {})
    values = [
        {"cut_id": "a", "target_audio": recording("command", f"touch {tmp_path}/PWNED")},
        {"cut_id": "b", "target_audio": recording("file", str(wav))},
    ]
    write(folder / "target_audio.000000.jsonl.gz", values)
    clips = clips_of(folder, tmp_path)
    with pytest.raises(AudioError, match="output of a command"):
        clips["a"].audio(RATE, 100)
    assert len(clips["b"].audio(RATE, 100)) == RATE
    assert not (tmp_path / "PWNED").exists()
