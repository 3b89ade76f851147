"""Tests of finding audio files in folders: formats, skipped files, links, names and order."""

import os
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.folders import AUDIO_SUFFIXES, MEDIA_SUFFIXES, SOUND_SUFFIXES, find_files
from nemo_lfr.io.globs import find_matches
from nemo_lfr.io.layouts import LAYOUTS
from nemo_lfr.io.layouts import folder as folder_layout
from nemo_lfr.io.transcripts import text_of
from tests.permissions import closed

# Formats that libsndfile reads, but that are skipped in folders: such files have no header, or are rarely audio.
NOT_TAKEN = {"RAW", "MAT4", "MAT5", "MPC2K", "SD2"}
SUFFIXES = {
    "WAV": [".wav", ".wave", ".bwf"],
    "WAVEX": [".wav", ".wavex"],
    "AIFF": [".aiff", ".aif", ".aifc"],
    "AU": [".au", ".snd"],
    "OGG": [".ogg", ".oga", ".opus"],
    "MP3": [".mp3", ".mp2", ".mp1", ".mpga", ".mpa"],
    "NIST": [".sph", ".nist"],
    "SVX": [".svx", ".8svx", ".iff"],
    "IRCAM": [".sf", ".ircam"],
}


def names(root, suffixes=AUDIO_SUFFIXES):
    lines = []
    found = find_files(root, suffixes, report=lines.append, unread=[])
    return [path.relative_to(root).as_posix() for path in found], lines


def make(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


@pytest.mark.parametrize("kind", sorted(set(soundfile.available_formats()) - NOT_TAKEN))
def test_every_format_that_libsndfile_reads_has_its_suffixes(kind, tmp_path):
    for suffix in SUFFIXES.get(kind, [f".{kind.lower()}"]):
        assert suffix in SOUND_SUFFIXES
        make(tmp_path, f"a{suffix}", f"B{suffix.upper()}")
        assert {f"a{suffix}", f"B{suffix.upper()}"} <= set(names(tmp_path)[0])


def test_suffixes_of_the_media_extra_are_accepted_too(tmp_path):
    make(tmp_path, *(f"a{suffix}" for suffix in MEDIA_SUFFIXES))
    assert len(names(tmp_path)[0]) == len(MEDIA_SUFFIXES)


@pytest.mark.parametrize(
    "junk",
    [
        "._a.wav",
        ".hidden.wav",
        "__MACOSX/._a.wav",
        "__MACOSX/b.wav",
        "x/.ipynb_checkpoints/a-checkpoint.wav",
        ".git/a.wav",
        "@eaDir/a.wav/SYNOAUDIO.wav",
        ".Trash-1000/files/a.wav",
        "System Volume Information/a.wav",
        "$RECYCLE.BIN/a.wav",
        "#recycle/a.wav",
        "a.txt",
        "without",
    ],
)
def test_system_files_are_skipped_and_counted(junk, tmp_path):
    make(tmp_path, "a.wav", junk)
    found, lines = names(tmp_path)
    assert found == ["a.wav"]
    assert len(lines) == 1 and "1 file found; 1 skipped: 1 " in lines[0]
    assert not re.search("files|folders", lines[0].removeprefix(str(tmp_path)))


def test_a_hidden_folder_is_read_if_it_is_the_input(tmp_path):
    make(tmp_path, ".cache/__MACOSX/a.wav")
    assert names(tmp_path / ".cache" / "__MACOSX") == (["a.wav"], [])


def test_the_order_is_fixed_and_the_summary_counts_skipped_suffixes(tmp_path):
    make(tmp_path, "b/2.wav", "b/10.wav", "a.wav", "B.wav", "a/1.wav", "1.txt", "2.TXT", "3.pdf", "c/4.lab")
    found, lines = names(tmp_path)
    assert found == ["B.wav", "a/1.wav", "a.wav", "b/10.wav", "b/2.wav"]
    assert lines == [f"{tmp_path}: 5 files found; 4 skipped: 2 .txt, 1 .lab, 1 .pdf"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
class TestLinks:
    def test_links_to_folders_are_followed_once(self, tmp_path):
        make(tmp_path, "real/a.wav", "outside/b.wav")
        os.symlink(tmp_path / "outside", tmp_path / "real" / "0-link")
        os.symlink(tmp_path / "outside", tmp_path / "real" / "1-link")
        found, lines = names(tmp_path / "real")
        assert found == ["0-link/b.wav", "a.wav"]
        assert "1 link to a folder that was already read" in lines[0]

    def test_loops_end_and_real_folders_keep_their_names(self, tmp_path):
        make(tmp_path, "z/a.wav")
        os.symlink(tmp_path / "z", tmp_path / "a-link")
        os.symlink(tmp_path, tmp_path / "z" / "up")
        os.symlink(tmp_path / "self", tmp_path / "self")
        assert names(tmp_path)[0] == ["z/a.wav"]

    def test_links_that_multiply_are_read_in_linear_time(self, tmp_path):
        for level in range(40):  # 2 ** 40 paths
            make(tmp_path, f"{level}/a.wav")
            for name in "xy":
                os.symlink(tmp_path / str(level + 1), tmp_path / str(level) / name)
        assert len(names(tmp_path)[0]) == 40

    def test_a_link_to_a_missing_recording_is_kept_so_that_it_fails_by_name(self, tmp_path):
        os.symlink(tmp_path / "gone.wav", tmp_path / "a.wav")
        os.symlink(tmp_path / "gone.txt", tmp_path / "a.txt")
        assert names(tmp_path)[0] == ["a.wav"]

    def test_pipes_and_sockets_are_skipped(self, tmp_path, monkeypatch):
        os.mkfifo(tmp_path / "a.wav")
        monkeypatch.chdir(tmp_path)  # a socket's address is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("b.wav")
            found, lines = names(tmp_path)
        assert found == [] and "2 pipes, sockets or devices" in lines[0]
        with pytest.raises(NemoLfrError, match="not a folder"):
            find_files(tmp_path / "a.wav", AUDIO_SUFFIXES)

    def test_a_folder_that_cannot_be_read_is_named(self, tmp_path):
        make(tmp_path, "a.wav", "closed/b.wav")
        with closed(tmp_path / "closed", root=tmp_path):
            found, lines = names(tmp_path)
            problems = {
                kind: [str(item.path) for item in read(tmp_path) if "cannot be read (Perm" in (item.problem or "")]
                for kind, read in LAYOUTS.items()
                if kind != "table"
            }
            with pytest.raises(PermissionError):
                find_files(tmp_path, AUDIO_SUFFIXES)
        assert len(problems) == 5 and all(places == ["closed"] for places in problems.values()), problems
        assert found == ["a.wav"] and "1 folder cannot be read: closed (Permission denied)" in lines[0]

    def test_a_link_that_may_lead_to_a_folder_and_a_folder_without_status_are_named(self, tmp_path):
        """The folder of a network drive that is not available is listed, but has no status."""
        make(tmp_path, "root/a.wav", "closed/b.wav", "root/listed/below/c.wav", "root/listed/d.wav")
        (tmp_path / "root" / "link").symlink_to(tmp_path / "closed" / "more")
        unread = []
        (tmp_path / "root" / "listed").chmod(0o444)
        with closed(tmp_path / "closed", root=tmp_path):
            found = find_files(tmp_path / "root", AUDIO_SUFFIXES, report=str, unread=unread)
        (tmp_path / "root" / "listed").chmod(0o755)
        assert [path.name for path in found] == ["a.wav", "d.wav"]
        assert sorted(Path(error.filename).name for error in unread) == ["below", "link"]

    @pytest.mark.parametrize(
        ("pattern", "found", "unread"),
        [
            ("**/*.wav", ["a.wav", "open/b.wav"], ["closed"]),
            ("*/*.wav", ["open/b.wav"], ["closed"]),
            ("*/b.wav", ["open/b.wav"], []),
            ("*/*/../b.wav", [], ["closed"]),
            ("c*/*/*.wav", [], ["closed"]),
            ("./**/closed/**/*.wav", [], ["closed"]),
            ("o*/*.wav", ["open/b.wav"], []),
            ("*.wav", ["a.wav"], []),
            ("[a]*", ["a.wav"], []),
        ],
    )
    def test_a_folder_that_a_glob_cannot_search_is_named_once(self, pattern, found, unread, tmp_path, monkeypatch):
        make(tmp_path, "a.wav", "open/b.wav", "closed/c.wav", "closed/more/d.wav")
        monkeypatch.chdir(tmp_path)
        errors = []
        with closed(tmp_path / "closed", root=tmp_path):
            assert find_matches(pattern, errors) == found
            assert find_matches(pattern) == found
            absolute = find_matches(f"{tmp_path}/{pattern}", errors)
        assert [os.path.relpath(path) for path in absolute] == found
        assert [os.path.relpath(error.filename) for error in errors] == unread * 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_names_that_are_not_text_survive_and_are_not_printed_raw(tmp_path):
    odd = os.fsdecode(b"\xff\x1b[31m")
    make(tmp_path, f"{odd}/{odd}.wav", f"a.{odd}")
    found, lines = names(tmp_path)
    assert found == [f"{odd}/{odd}.wav"] and lines[0].isprintable()


def test_the_folder_layout_finds_the_same_files_and_their_texts(tmp_path):
    make(tmp_path, "s/a.oga", "__MACOSX/._a.wav", "._a.wav", "s/.ipynb_checkpoints/a.wav")
    soundfile.write(tmp_path / "s" / "a.oga", np.zeros(100), 16000, format="OGG", subtype="VORBIS")
    (tmp_path / "s" / "a.txt").write_text("hello")
    for level, speaker in ((None, ""), (1, "s"), (2, "")):
        (utterance,) = folder_layout(tmp_path, level)
        expected = ("s/a.oga", speaker, {"text": "hello"})
        assert (utterance.path.as_posix(), utterance.speaker, utterance.labels) == expected


@pytest.mark.parametrize(
    ("names", "text", "skipped"),
    [
        (("SA1.WAV", "SA1.TXT"), "SA1.TXT", ""),  # TIMIT
        (("a.wav", "a.TXT", "a.txt"), "a.txt", ""),
        (
            ("a.wav", "a.normalized.txt", "a.original.txt"),
            None,
            "2 skipped: 2 .txt; nemo-lfr prepare may read their texts (KIND lhotse:libritts)",
        ),
        *(
            (
                ("x/a.flac", name),
                None,
                f"1 skipped: 1 .{name[-3:]}; nemo-lfr prepare may read their texts (KIND {kind})",
            )
            for name, kind in (
                ("dev-clean/84/121123/84-121123.trans.txt", "librispeech"),
                ("mls_german/dev/transcripts.txt", "mls"),
                ("txt/p225/p225_001.txt", "vctk"),
                ("de/train.tsv", "commonvoice"),
                ("de/ss-corpus-de.tsv", "commonvoice"),
            )
        ),
        (("a.wav", "txt/p225/notes.txt", "train.txt"), None, "2 skipped: 2 .txt"),
        (("a.wav", "README.txt", "b.TXT"), None, "2 skipped: 2 .txt"),
        (("a.wav", "x/a.txt"), None, "1 skipped: 1 .txt"),
        (("a.wav", "a.Txt"), None, "1 skipped: 1 .txt"),
        (("a.mp3", "a.json"), None, "1 skipped: 1 .json"),  # Emilia
    ],
)
def test_a_transcript_is_used_or_counted_as_skipped(names, text, skipped, tmp_path, caplog):
    for name in names:
        make(tmp_path, name)
        (tmp_path / name).write_text(name)
    (utterance,) = folder_layout(tmp_path)
    assert utterance.labels.get("text") == text and utterance.problem is None
    assert caplog.messages == ([f"{tmp_path}: 1 file found; {skipped}"] if skipped else [])


DVC = f".dvc/cache/files/md5/0a/{'1b' * 15}"
BLOB = f"datasets--x--y/blobs/{'1b' * 20}"
ANNEX = "annex/objects/0/1/{0}/{0}".format(f"SHA256E-s27--{'1b' * 32}.txt")


@pytest.mark.parametrize(
    ("files", "links", "is_read"),
    [
        (["secret"], {"corpus/a.txt": "secret"}, False),
        (["secret", "x.wav"], {"corpus/a.txt": "secret", "corpus/a.wav": "x.wav"}, False),
        (["y/a.txt", "y/a.wav"], {"corpus/a.txt": "y/a.txt", "corpus/a.wav": "y/a.wav"}, True),
        (["y/b.txt", "y/b.wav"], {"corpus/a.txt": "y/b.txt", "corpus/a.wav": "y/b.wav"}, True),
        (["y/a.txt", "y/a.wav"], {"corpus/y": "y"}, True),
        (["corpus/texts/1", "corpus/a.wav"], {"corpus/a.txt": "corpus/texts/1"}, True),
        (["secret"], {"corpus/metadata.csv": "secret"}, False),
        (["corpus/table", "corpus/a.wav"], {"corpus/metadata.csv": "corpus/table"}, True),
        (["blobs/1", "blobs/2"], {"snapshots/0/corpus/a.txt": "blobs/1", "snapshots/0/corpus/a.wav": "blobs/2"}, True),
        (["secret", "blobs/2"], {"snapshots/0/corpus/a.txt": "secret", "snapshots/0/corpus/a.wav": "blobs/2"}, False),
        (["y/1"], {"snapshots/0/corpus/a.txt": "y/1", "blobs": "y"}, False),
        ([DVC, "b.wav"], {"corpus/a.txt": DVC, "corpus/a.wav": "b.wav"}, True),
        ([BLOB, "b.wav"], {"corpus/a.txt": BLOB, "corpus/a.wav": "b.wav"}, True),
        ([ANNEX, "b.wav"], {"corpus/a.txt": ANNEX, "corpus/a.wav": "b.wav"}, True),
        (["annex/objects/0/1/W-s1--a/W-s1--a"], {"corpus/a.txt": "annex/objects/0/1/W-s1--a/W-s1--a"}, False),
        (["y/metadata.csv", "y/a.wav"], {"corpus/metadata.csv": "y/metadata.csv", "corpus/a.wav": "y/a.wav"}, True),
        (["secret", "y/a.wav"], {"corpus/metadata.csv": "secret", "corpus/a.wav": "y/a.wav"}, False),
        (["y/1", "corpus/x/snapshots/0/a.wav"], {"corpus/x/snapshots/0/a.txt": "y/1", "corpus/x/blobs": "y"}, False),
    ],
)
def test_a_linked_text_is_read_only_if_the_link_cannot_lead_to_a_private_file(files, links, is_read, tmp_path):
    for name in files:
        make(tmp_path, name)
        (tmp_path / name).write_text("file_name,text\na.wav,hi")
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / target)
    corpus = next(path for path in tmp_path.rglob("corpus"))
    if not any(name.endswith(".wav") for name in (*files, *links)):
        make(corpus, "a.wav")
    listed = list(folder_layout(corpus))
    texts = [utterance.labels["text"] for utterance in listed if "text" in utterance.labels]
    problems = [utterance.problem for utterance in listed if utterance.problem]
    assert (len(texts), len(problems)) == ((1, 0) if is_read else (0, 1))
    assert is_read or "link that leads out of the corpus and is not followed; copy the file" in problems[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 46797 She had your dark suit.\n", "She had your dark suit."),  # TIMIT
        ("0 10 is a score", "0 10 is a score"),
        ("1 46797 people", "1 46797 people"),
        ("0 46797", "0 46797"),
    ],
)
def test_the_sample_numbers_of_timit_are_removed(text, expected, tmp_path):
    make(tmp_path, "a.wav")
    (tmp_path / "a.TXT").write_text(text)
    (utterance,) = folder_layout(tmp_path)
    assert utterance.labels == {"text": expected}


def test_a_glob_with_two_stars_ends_where_links_lead_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "x/b.wav", "x/y[1]/c.wav", ".hidden/d.wav", "x/.e.wav", "far/f.wav", "x/y[1]/n.txt"):
        path = tmp_path / "g" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "z.wav").write_bytes(b"")
    for number in range(4):
        os.symlink("..", tmp_path / "g" / "x" / f"up{number}")
    os.symlink(tmp_path / "far", tmp_path / "g" / "linked")
    os.symlink(tmp_path / "gone", tmp_path / "g" / "x" / "broken")
    wanted = ["a.wav", "far/f.wav", "linked/z.wav", "x/b.wav", "x/y[1]/c.wav"]
    assert find_matches("g/**/*.wav") == [f"g/{name}" for name in wanted]
    assert find_matches(f"{tmp_path}/g/**/*.wav") == [f"{tmp_path}/g/{name}" for name in wanted]
    assert find_matches("**/x/**/c.*") == ["g/x/y[1]/c.wav"]
    assert find_matches("g/x/**/*.wav") == ["g/x/b.wav", "g/x/up0/a.wav", "g/x/up0/far/f.wav", "g/x/up0/linked/z.wav",
                                           "g/x/y[1]/c.wav"]  # fmt: skip
    assert find_matches("g/**") == ["g/"]
    unread: list[OSError] = []
    assert find_matches("g/x/*/*.wav", unread) == [
        "g/x/up0/a.wav", "g/x/up1/a.wav", "g/x/up2/a.wav", "g/x/up3/a.wav", "g/x/y[1]/c.wav",
    ]  # fmt: skip
    find_matches("g/x/**/*.wav", unread)
    assert not unread
    assert find_matches("g/*.wav") == ["g/a.wav"]
    assert find_matches("nothing/**/*.wav") == []
    monkeypatch.chdir(tmp_path / "g")
    assert find_matches("**/*.wav") == wanted


def test_a_folder_that_cannot_be_entered_is_not_a_problem_of_the_transcript(tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    make(tmp_path, "sub/u0.wav")
    with closed(folder, root=tmp_path):
        assert text_of(folder / "u0.txt", folder / "u0.TXT", corpus=tmp_path, audio=folder / "u0.wav") == ({}, None)
