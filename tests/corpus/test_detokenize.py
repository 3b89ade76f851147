"""Tests of `nemo-lfr detokenize` with damaged or malicious folders: each fault is one line, the rest is decoded."""

import errno
import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr.cli.main import main
from nemo_lfr.corpus.decode import decode_folder
from nemo_lfr.corpus.formats import BUILT_IN
from nemo_lfr.errors import OutputExistsError
from tests.corpora import write_tokens
from tests.crash import on_a_full_disk
from tests.tiers import slow_after, slow_except, slow_if

pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> dict[str, Path]:
    """Write three clips in a shard of two and a shard of one, in every format. Tests change copies of them."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in BUILT_IN}
    for kind, folder in made.items():
        write_tokens(folder, kind, [2, 1], model)
    return made


def run(folder: Path, out: Path, model: Path, capsys, *options: object) -> tuple[int, list[str]]:
    """Run `detokenize`, and return the exit code and the lines of stderr."""
    code = 0
    try:
        main(["detokenize", *map(str, [folder, "--out", out, "--model", model, "--device", "cpu", *options])])
    except SystemExit as end:
        code = int(end.code or 0)
    text = capsys.readouterr().err
    assert all(char.isprintable() or char == "\n" for char in text)
    return code, text.splitlines()


def edit_manifest(folder: Path, change: Callable[[dict], object], number: int = 0) -> None:
    lines = (folder / "manifest.json").read_text().splitlines()
    line = json.loads(lines[number])
    changed = change(line)
    lines[number] = changed if isinstance(changed, str) else json.dumps(line)
    (folder / "manifest.json").write_text("\n".join(lines) + "\n")


def edit_cuts(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "shar" / "cuts.000000.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    cut = json.loads(lines[0])
    changed = change(cut)
    lines[0] = changed if isinstance(changed, str) else json.dumps(cut)
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def edit_tar(folder: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[str, bytes]]) -> None:
    """Change the first two members of a tar file, which belong to one clip."""
    path = folder / "shar" / "target_codes.000000.tar"
    with tarfile.open(path) as old:
        members = [(member, old.extractfile(member).read()) for member in old.getmembers()]
    with tarfile.open(path, "w") as new:
        for number, (member, data) in enumerate(members):
            if number < 2:
                member.name, data = change(member, data)
                member.pax_headers.pop("path", None)
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))


def edit_rows(folder: Path, change: Callable[[dict], object], types: dict | None = None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "data" / "000000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows[0])
    schema = pa.schema([pa.field(item.name, (types or {}).get(item.name, item.type)) for item in table.schema])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def edit_summary(folder: Path, change: Callable[[dict], object]) -> None:
    summary = json.loads((folder / "tokens.json").read_text())
    changed = change(summary)
    (folder / "tokens.json").write_text(changed if isinstance(changed, str) else json.dumps(summary))


def save_first(folder: Path, value: object) -> None:
    torch.save(value, folder / "target_codes" / "s0" / "clip0.pt")


def exchange_files(folder: Path) -> None:
    first, second = folder / "tokens" / "s0" / "clip0.lfr", folder / "tokens" / "s1" / "clip2.lfr"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def rename_first(folder: Path, kind: str, new: str) -> None:
    """Give the first clip another id, as an attacker could."""
    if kind == "shar":
        edit_cuts(folder, lambda cut: cut.update(id=new))
        edit_tar(folder, lambda member, data: (f"{new}.{member.name.rpartition('.')[2]}", data))
    elif kind == "parquet":
        edit_rows(folder, lambda row: row.update(id=new))
    else:
        edit_manifest(folder, lambda line: line.update(id=new))


# Manifests of .pt and .lfr files share a reader, and so do ids of Parquet rows and manifest lines.
by_kind = slow_if(BUILT_IN, ("manifest", "parquet"))
IDS = ["../../up", "/abs/x", "a/../../b", "", ".", "nul\0byte", "con", "aux.txt", "語" * 200, "x" * 5000, "a/" * 600]
IDS += ["s0/CLIP1", "s0/clip1", "s0/clip1.wav/inner", "\x1b[2Jred", "new\nline", "C:\\x", "trailing. ", "half \ud800"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", by_kind)
@pytest.mark.parametrize("clip_id", slow_after(3, IDS), ids=[ascii(name[:20]) for name in IDS])
def test_ids_stay_inside_the_folder_and_unique(kind, clip_id, whole, model, tmp_path, capsys):
    if kind == "parquet" and "\ud800" in clip_id:
        pytest.skip("Parquet has no text that is not UTF-8")
    folder, out = tmp_path / "tokens", tmp_path / "deep" / "er" / "out"
    shutil.copytree(whole[kind], folder)
    shutil.rmtree(folder / ".tokenize")
    if kind == "shar" and "\ud800" in clip_id:
        edit_cuts(folder, lambda cut: cut.update(id=clip_id))  # a tar cannot contain such a name
    else:
        rename_first(folder, kind, clip_id)
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    code, lines = run(folder, out, model, capsys)
    made = [path for path in out.rglob("*") if path.is_file()]
    assert {path for path in tmp_path.rglob("*") if out not in path.parents} - before == {out, *out.parents} & {
        out,
        out.parent,
        out.parent.parent,
    }
    assert not Path("/abs/x.wav").exists()
    assert all(path.suffix == ".wav" for path in made)
    names = [path.as_posix().lower() for path in made]
    assert len(set(names)) == len(names)
    # If an archive cannot contain an id, only the two other clips are decoded.
    assert (len(made), code) == (3, 0) or (kind == "shar" and code == 1 and lines)


HUGE = torch.zeros(1, dtype=torch.int16).as_strided((8, 2**37), (0, 0))
Damage = Callable[[Path], object]
# name -> (format, damage, remaining utterances, words of the error)
CASES: dict[str, tuple[str, Damage, int, str]] = {
    "pt: huge": ("manifest", lambda f: save_first(f, HUGE), 2, "clip0"),
    "pt: dict": ("manifest", lambda f: save_first(f, {"a": 1}), 2, "clip0"),
    "pt: empty": ("manifest", lambda f: (f / "target_codes/s0/clip0.pt").write_bytes(b""), 2, "clip0"),
    "pt: noise": ("manifest", lambda f: (f / "target_codes/s0/clip0.pt").write_bytes(bytes(99)), 2, "clip0"),
    "pt: floats": ("manifest", lambda f: save_first(f, torch.zeros(8, 3)), 2, "float32"),
    "pt: bools": ("manifest", lambda f: save_first(f, torch.zeros(8, 3, dtype=torch.bool)), 2, "bool"),
    "pt: one axis": ("manifest", lambda f: save_first(f, torch.zeros(8, dtype=torch.int16)), 2, "shape"),
    "pt: seven codebooks": ("manifest", lambda f: save_first(f, torch.zeros(7, 3, dtype=torch.int16)), 2, "shape"),
    "pt: no frames": ("manifest", lambda f: save_first(f, torch.zeros(8, 0, dtype=torch.int16)), 2, "shape"),
    "pt: too many frames": ("manifest", lambda f: save_first(f, torch.zeros(8, 99, dtype=torch.int16)), 2, "frames"),
    "pt: beyond the codebook": (
        "manifest",
        lambda f: (
            edit_manifest(f, lambda line: line.update(num_samples=40)),
            save_first(f, torch.full((8, 3), 2016, dtype=torch.int16)),
        ),
        2,
        "range from 2016 to 2016; expected [0, 2016)",
    ),
    "pt: a folder": (
        "manifest",
        lambda f: ((f / "target_codes/s0/clip0.pt").unlink(), (f / "target_codes/s0/clip0.pt").mkdir()),
        2,
        "not a regular file",
    ),
    "pt: a pipe": (
        "manifest",
        lambda f: ((f / "target_codes/s0/clip0.pt").unlink(), os.mkfifo(f / "target_codes/s0/clip0.pt")),
        2,
        "not a regular file",
    ),
    "path: outside": (
        "manifest",
        lambda f: edit_manifest(f, lambda line: line.update(target_audio_codes_path="/etc/passwd")),
        2,
        "outside",
    ),
    "path: up": (
        "lfr",
        lambda f: edit_manifest(f, lambda line: line.update(tokens_filepath="../x.lfr")),
        2,
        "outside",
    ),
    "path: link": (
        "lfr",
        lambda f: (f / "tokens/s0/clip0.lfr").unlink() or (f / "tokens/s0/clip0.lfr").symlink_to("/etc/passwd"),
        2,
        "outside",
    ),
    "path: number": (
        "lfr",
        lambda f: edit_manifest(f, lambda line: line.update(tokens_filepath=7)),
        2,
        "not a string",
    ),
    "line: not JSON": ("manifest", lambda f: edit_manifest(f, lambda line: "not json"), 2, "utterance 0"),
    "line: a list": ("lfr", lambda f: edit_manifest(f, lambda line: "[]"), 2, "utterance 0"),
    "line: deep": ("lfr", lambda f: edit_manifest(f, lambda line: "[" * 99999), 2, "utterance 0"),
    "line: no id": ("manifest", lambda f: edit_manifest(f, lambda line: line.pop("id") and None), 2, "missing"),
    "line: id 7": ("lfr", lambda f: edit_manifest(f, lambda line: line.update(id=7)), 2, "id is 7, not a string"),
    "line: num_samples x": (
        "manifest",
        lambda f: edit_manifest(f, lambda line: line.update(num_samples="x")),
        2,
        "'x'",
    ),
    "line: num_samples -5": (
        "manifest",
        lambda f: edit_manifest(f, lambda line: line.update(num_samples=-5)),
        2,
        "-5",
    ),
    "line: no num_samples": (
        "manifest",
        lambda f: edit_manifest(f, lambda line: line.pop("num_samples")),
        2,
        "missing",
    ),
    "line: missing": ("lfr", lambda f: (f / "manifest.json").write_text(""), 0, "found 0 lines"),
    "lfr: cut": ("lfr", lambda f: os.truncate(f / "tokens/s0/clip0.lfr", 50), 2, "clip0"),
    "lfr: gone": ("lfr", lambda f: (f / "tokens/s0/clip0.lfr").unlink(), 2, "no such file"),
    "lfr: exchanged": ("lfr", exchange_files, 1, "the file is probably that of another clip"),
    "shar: cuts cut": (
        "shar",
        lambda f: os.truncate(f / "shar/cuts.000000.jsonl.gz", (f / "shar/cuts.000000.jsonl.gz").stat().st_size - 8),
        1,
        "",
    ),
    "shar: cuts of 12 bytes": ("shar", lambda f: os.truncate(f / "shar/cuts.000000.jsonl.gz", 12), 1, "12 bytes"),
    "shar: cuts empty": (
        "shar",
        lambda f: (f / "shar/cuts.000000.jsonl.gz").write_bytes(gzip.compress(b"")),
        1,
        "cuts.000000",
    ),
    "shar: tar cut": ("shar", lambda f: os.truncate(f / "shar/target_codes.000000.tar", 700), 1, "700 bytes"),
    "shar: tar empty": ("shar", lambda f: os.truncate(f / "shar/target_codes.000000.tar", 0), 1, "0 bytes"),
    "shar: tar noise": (
        "shar",
        lambda f: (f / "shar/target_codes.000000.tar").write_bytes(bytes(range(256)) * 40),
        1,
        "",
    ),
    "shar: no num_samples": (
        "shar",
        lambda f: edit_cuts(f, lambda cut: cut["custom"].pop("num_samples")),
        2,
        "missing",
    ),
    "shar: no supervisions": (
        "shar",
        lambda f: edit_cuts(f, lambda cut: cut.update(supervisions=[])),
        2,
        "utterance 0",
    ),
    "shar: floats": (
        "shar",
        lambda f: edit_tar(
            f, lambda member, data: (member.name, npy(np.zeros((8, 2))) if member.name.endswith("npy") else data)
        ),
        2,
        "float64",
    ),
    "shar: objects": (
        "shar",
        lambda f: edit_tar(
            f,
            lambda member, data: (
                member.name,
                npy(np.array([{"a": 1}], dtype=object)) if member.name.endswith("npy") else data,
            ),
        ),
        2,
        "Python objects",
    ),
    "shar: huge header": (
        "shar",
        lambda f: edit_tar(
            f,
            lambda member, data: (
                member.name,
                npy(np.zeros((8, 2), np.int16)).replace(b"(8, 2),", b"(8, 9999999999),")
                if member.name.endswith("npy")
                else data,
            ),
        ),
        2,
        "utterance 0",
    ),
    "parquet: cut": ("parquet", lambda f: os.truncate(f / "data/000000.parquet", 300), 1, "300 bytes"),
    "parquet: empty": ("parquet", lambda f: os.truncate(f / "data/000000.parquet", 0), 1, "0 bytes"),
    "parquet: unequal layers": (
        "parquet",
        lambda f: edit_rows(f, lambda row: row["nano_layer_2"].append(1)),
        2,
        "unequal",
    ),
    "parquet: null layer": ("parquet", lambda f: edit_rows(f, lambda row: row.update(nano_layer_2=None)), 2, ""),
    "parquet: too many layers": (
        "parquet",
        lambda f: edit_summary(f, lambda summary: summary["codec"].update(num_codebooks=4)),
        0,
        "expected [4, T]",
    ),
    "parquet: labels": ("parquet", lambda f: edit_rows(f, lambda row: row.update(labels="{")), 2, "utterance 0"),
    "parquet: labels a list": (
        "parquet",
        lambda f: edit_rows(f, lambda row: row.update(labels="[1]")),
        2,
        "labels are",
    ),
    "parquet: negative token": (
        "parquet",
        lambda f: edit_rows(f, lambda row: row["nano_layer_1"].__setitem__(0, -1)),
        2,
        "range from -1",
    ),
}


@pytest.mark.skipif(os.name == "nt", reason="pipes and links")
@pytest.mark.parametrize("has_records", slow_except([True, False], False))
@pytest.mark.parametrize(
    ("kind", "damage", "left", "reason"), slow_after(2, CASES.values(), itemgetter(0)), ids=list(CASES)
)
def test_invalid_utterance_fails_alone_with_one_line(
    kind, damage, left, reason, has_records, whole, model, tmp_path, capsys
):
    folder, out = tmp_path / "tokens", tmp_path / "out"
    shutil.copytree(whole[kind], folder)
    if kind == "manifest":  # the paths in this manifest are absolute
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace(str(whole[kind].resolve()), str(folder)))
    damage(folder)
    if not has_records:
        shutil.rmtree(folder / ".tokenize")
    code, lines = run(folder, out, model, capsys)
    assert code == 1 and len(lines) >= 2 and not any("Traceback" in line for line in lines)
    # With the records of the run, the first error is the difference from them.
    assert any(reason in line for line in lines) or reason.endswith("bytes") or has_records
    made = list(out.rglob("*.wav"))
    assert len(made) >= left and int(lines[-1].split()[1]) >= 3 - len(made)  # ... 1 of 3 failed.
    for path in made:
        assert soundfile.info(str(path)).frames > 0
    assert not list(out.rglob("*.part"))


SUMMARIES: dict[str, Callable[[dict], object]] = {
    "no fingerprint": lambda s: s["codec"].pop("fingerprint"),
    "no codec": lambda s: s.pop("codec"),
    "codec x": lambda s: s.update(codec="x"),
    "codec without levels": lambda s: s["codec"].pop("levels"),
    "no shards": lambda s: s.pop("shards"),
    "shards x": lambda s: s.update(shards="x"),
    "many shards": lambda s: s.update(shards=10**9),
    "negative shards": lambda s: s.update(shards=-1),
    "other shards": lambda s: s.update(shards=3),
    "clips true": lambda s: s.update(clips=True),
    "more clips": lambda s: s.update(clips=4),
    "no format": lambda s: s.pop("format"),
    "format list": lambda s: s.update(format=["lfr"]),
    "format unknown": lambda s: s.update(format="x\x1b[2J"),
    "context 7": lambda s: s.update(context=7),
    "a list": lambda s: "[]",
    "a number": lambda s: "7",
    "deep": lambda s: "[" * 99999,
    "empty": lambda s: "",
    "negative counts": lambda s: s.update(shard_clips=[-1, 4]),
    "counts x": lambda s: s.update(shard_clips="x"),
    "other codec": lambda s: s["codec"].update(fingerprint="0" * 16, model="\x1b[2J"),
}


@pytest.mark.parametrize("change", SUMMARIES.values(), ids=list(SUMMARIES))
def test_a_damaged_summary_is_refused_in_one_line(change, whole, model, tmp_path, capsys):
    shutil.copytree(whole["lfr"], tmp_path / "tokens")
    edit_summary(tmp_path / "tokens", change)
    code, lines = run(tmp_path / "tokens", tmp_path / "out", model, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("nemo-lfr: error: ") and len(lines[0]) < 600
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_folder_of_tokens_is_refused(model, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "tokens.json").mkdir(parents=True)
    for name in ("file", "empty", "odd", "missing"):
        code, lines = run(tmp_path / name, tmp_path / "out", model, capsys)
        assert code == 2 and len(lines) == 1, name


@pytest.mark.parametrize("name", ["tokens", "tokens/../tokens", "link"])
def test_audio_is_not_written_into_the_folder_of_the_tokens(name, whole, model, tmp_path, capsys):
    shutil.copytree(whole["lfr"], tmp_path / "tokens")
    if name == "link":
        (tmp_path / "link").symlink_to("tokens")
    before = sorted(tmp_path.rglob("*"))
    code, lines = run(tmp_path / "tokens", tmp_path / name, model, capsys)
    assert code == 2 and len(lines) == 1 and "choose another --out" in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_audio_that_another_process_writes_in_the_meantime_is_no_failure(whole, model, tmp_path, capsys, monkeypatch):
    def publish(temporary, path, overwrite):
        path.write_bytes(b"precious")
        raise OutputExistsError(f"{path} was written by another program")

    monkeypatch.setattr("nemo_lfr.io.audio_writer.publish", publish)
    code, _ = run(whole["lfr"], tmp_path / "out", model, capsys)
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*.wav")]
    assert code == 0 and written and set(written) == {b"precious"}


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_links_in_the_output_are_not_followed(whole, model, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "out" / "s0").symlink_to(tmp_path / "other")
    (tmp_path / "out" / "s1").mkdir()
    (tmp_path / "out" / "s1" / "clip2.wav").symlink_to(tmp_path / "gone")
    code, lines = run(whole["lfr"], tmp_path / "out", model, capsys)
    assert code == 1 and sum("leads out" in line for line in lines) == 2
    assert not list((tmp_path / "other").iterdir()) and not (tmp_path / "gone").exists()
    (path,) = (tmp_path / "out" / "s1").iterdir()
    assert path.is_file() and not path.is_symlink()


def test_file_in_place_of_a_folder_fails_only_its_utterances(whole, model, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "s0").write_text("mine")
    code, lines = run(whole["lfr"], tmp_path / "out", model, capsys)
    assert code == 1 and len(lines) == 3 and (tmp_path / "out" / "s0").read_text() == "mine"


@pytest.mark.parametrize("is_invalid", [False, True])
def test_failure_names_its_utterance(is_invalid, whole, model, tmp_path, capsys):
    folder, out = tmp_path / "tokens", tmp_path / "out"
    shutil.copytree(whole["shar"], folder)
    if is_invalid:
        edit_cuts(folder, lambda cut: cut["custom"].update(num_samples=-1))
        shutil.rmtree(folder / ".tokenize")
    else:
        out.mkdir()
        (out / "s0").write_text("mine")
    with pytest.raises(SystemExit):
        main(["detokenize", str(folder), "--out", str(out), "--model", str(model), "--device", "cpu", "--json"])
    sources = [failure["input"] for failure in json.loads(capsys.readouterr().out)["failures"]]
    place = "shard 0, utterance 0" if is_invalid else "utterance s0/clip0"
    assert sources[0] == f"{folder}, {place}"


def test_verification_skips_changed_shards(whole, model, tmp_path, capsys):
    shutil.copytree(whole["parquet"], tmp_path / "tokens")
    path = tmp_path / "tokens" / "data" / "000000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, lines = run(tmp_path / "tokens", tmp_path / "out", model, capsys, "--verify")
    assert code == 1 and "SHA-256" in lines[0] and len(list((tmp_path / "out").rglob("*.wav"))) == 1


@pytest.mark.slow
def test_existing_files_are_kept_without_overwrite(whole, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(whole["shar"], out, model, capsys, "--limit", 1) == (0, [])
    kept = out / "s0" / "clip0.wav"
    before = kept.stat().st_mtime_ns
    code, (line,) = run(whole["shar"], out, model, capsys)
    assert code == 0 and line == f"{out}: 1 file existed and was kept; to decode again, pass --overwrite"
    assert kept.stat().st_mtime_ns == before
    assert run(whole["shar"], out, model, capsys, "--overwrite", "--limit", 1) == (0, [])
    assert kept.stat().st_mtime_ns > before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file systems with names that are not UTF-8")
@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_folder_whose_name_is_not_utf8_is_resumed(kind, whole, model, tmp_path):
    out = Path(os.fsdecode(bytes(tmp_path) + b"/d\xff"))
    first, second = (list(decode_folder(whole["lfr"], out, kind, model=str(model), device="cpu")) for _ in range(2))
    assert first == second and all(isinstance(path, Path) for path in first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "other length", "other rate"])
def test_an_existing_file_that_is_not_the_audio_of_the_tokens_is_a_failure(kind, whole, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(whole["shar"], out, model, capsys, "--limit", 1) == (0, [])
    path = out / "s0" / "clip0.wav"
    audio, rate = soundfile.read(path)
    if kind == "text":
        path.write_text("mine")
    else:
        soundfile.write(path, audio[: -1 if kind == "other length" else None], rate - 50 * (kind == "other rate"))
    before = path.read_bytes()
    code, lines = run(whole["shar"], out, model, capsys)
    problem = "is not an audio file" if kind == "text" else "has "
    assert code == 1 and f"clip0.wav: this file exists, but {problem}" in lines[0]
    assert path.read_bytes() == before
    assert run(whole["shar"], out, model, capsys, "--overwrite")[0] == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="limits of files")
def test_a_full_disk_is_a_one_line_error_and_leaves_no_truncated_file(whole, model, tmp_path):
    arguments = ["detokenize", str(whole["lfr"]), "--out", str(tmp_path / "out"), "--model", str(model)]
    said = on_a_full_disk(f"from nemo_lfr.cli.main import main\nmain({[*arguments, '--device', 'cpu']!r})", 50)
    assert "Traceback" not in said and said.strip().splitlines()[-1].startswith("nemo-lfr: error: ")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_non_regular_audio_target_fails_only_its_utterance(kind, whole, model, tmp_path, capsys):
    out = tmp_path / "out"
    place = out / "s0" / "clip0.wav"
    place.parent.mkdir(parents=True)
    place.mkdir() if kind == "folder" else os.mkfifo(place)
    code, lines = run(whole["lfr"], out, model, capsys)
    assert code == 1 and "clip0.wav: not a regular file" in lines[0] and (out / "s0" / "clip1.wav").is_file()


@pytest.mark.slow
def test_an_existing_file_that_cannot_be_read_is_a_failure(whole, model, tmp_path, monkeypatch):
    list(decode_folder(whole["lfr"], tmp_path, "wav", model=str(model), device="cpu"))
    monkeypatch.setattr(soundfile, "info", _denied)
    found = list(decode_folder(whole["lfr"], tmp_path, "wav", model=str(model), device="cpu"))
    assert found and all("exists, but cannot be read (Permission denied)" in str(error) for error in found)


def _denied(file: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")
