"""Tests of CSV and TSV tables, and of AudioFolder's metadata.jsonl."""

import gzip
import json
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.errors import ConfigError
from nemo_lfr.io.layouts import LAYOUTS
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.io.tables import is_table, read_table
from tests.models import RATE, synthesize


def named(path: str, **labels: str) -> dict:
    return {"audio_filepath": path, **labels}


TWO = [named("a.wav", text="hi"), named("b.wav", text="ho")]
SENTENCES = [entry | {"sentence": entry["text"]} for entry in TWO]
JSON_LINES = b'\xef\xbb\xbf{"file_name": "a.wav", "text": "hi"}\n{"file_name": "b.wav", "text": "ho"}\n'
GOOD: dict[str, tuple[str, bytes, list[dict]]] = {
    "CSV": ("t.csv", b"file_name,text\na.wav,hi\nb.wav,ho\n", TWO),
    "a byte order mark": ("t.csv", b"\xef\xbb\xbffile_name,text\r\na.wav,hi\r\nb.wav,ho\r\n", TWO),
    "no line end at the end": ("t.csv", b"file_name,text\na.wav,hi\nb.wav,ho", TWO),
    "blank lines": ("t.CSV", b"file_name,text\n\na.wav,hi\n,\nb.wav,ho\n\n", TWO),
    "blank lines before the header": ("t.csv", b"\n\r\nfile_name,text\na.wav,hi\nb.wav,ho\n", TWO),
    "line ends of old Macs": ("t.csv", b"file_name,text\ra.wav,hi\rb.wav,ho\r", TWO),
    "semicolons": ("t.csv", b"path;sentence\na.wav;hi\nb.wav;ho\n", SENTENCES),
    "tabs in a CSV": ("t.csv", b"file_name\ttext\na.wav\thi\nb.wav\tho\n", TWO),
    "TSV": ("t.tsv", b"file_name\ttext\na.wav\thi\nb.wav\tho\n", TWO),
    "a quote in a TSV": ("t.tsv", b'path\ttext\na.wav\t"hi\n', [named("a.wav", text='"hi')]),
    "quotes": ("t.csv", b'file_name,text\n"a.wav","hi, ""you"""\n', [named("a.wav", text='hi, "you"')]),
    "lines in a field": ("t.csv", b'file_name,text\na.wav,"hi\nho"\n', [named("a.wav", text="hi\nho")]),
    "a quote inside a field": ("t.csv", b'file_name,text\na.wav,5" disk\n', [named("a.wav", text='5" disk')]),
    "text after a quote": ("t.csv", b'file_name,text\na.wav,"a" b\n', [named("a.wav", text="a b")]),
    "spaces in the header": ("t.csv", b"file_name, text\na.wav,hi\n", TWO[:1]),
    "empty columns at the end": ("t.csv", b"file_name,text,,\na.wav,hi,,\n", TWO[:1]),
    "an index of pandas": ("t.csv", b",file_name,text\n0,a.wav,hi\n1,b.wav,ho\n", TWO),
    "an empty label": ("t.csv", b"file_name,text\na.wav,\n", [named("a.wav")]),
    "durations in unknown units": ("t.csv", b"path,duration\na.wav,1500\n", [named("a.wav")]),
    "NeMo's names": (
        "t.csv",
        b"audio_filepath,duration,offset\na.wav,0.5,0\n",
        [named("a.wav", duration="0.5", offset="0")],
    ),
    "decimal commas": (
        "t.csv",
        b"audio_filepath;duration;offset;text\na.wav;0,5; 1,250;1,5\n",
        [named("a.wav", duration="0.5", offset=" 1.250", text="1,5")],
    ),
    "decimal commas in a TSV": (
        "t.tsv",
        b"audio_filepath\tduration\na.wav\t0,5\n",
        [named("a.wav", duration="0.5")],
    ),
    "a decimal comma in a table with commas": (
        "t.csv",
        b'audio_filepath,duration\na.wav,"0,5"\n',
        [named("a.wav", duration="0,5")],
    ),
    "a CSV that a browser decompressed": ("t.csv.gz", b"file_name,text\na.wav,hi\nb.wav,ho\n", TWO),
    "a compressed CSV without its suffix": ("t.csv", gzip.compress(b"file_name,text\na.wav,hi\nb.wav,ho\n"), TWO),
    "metadata.jsonl": ("metadata.jsonl", JSON_LINES, TWO),
    "vertical bars": ("t.csv", b"path|sentence\na.wav|hi\nb.wav|ho\n", SENTENCES),
    "a comma in another delimiter's header": ("t.csv", b"path;sentence;a,b\na.wav;hi;\nb.wav;ho;\n", SENTENCES),
    "quotes in semicolons": ("t.csv", b'"path";"text"\n"a.wav";"hi; ""you"""\n', [named("a.wav", text='hi; "you"')]),
    "Excel's delimiter": ("t.csv", b"\xef\xbb\xbfsep=;\r\nfile_name;text\r\na.wav;hi\r\nb.wav;ho\r\n", TWO),
    "another delimiter": ("t.csv", b'"SEP=:"\nfile_name:text\na.wav:hi\nb.wav:ho\n', TWO),
    "a declared tab": ("t.csv", b"sep=\t\nfile_name\ttext\na.wav\thi\nb.wav\tho\n", TWO),
    "a declared tab in C": ("t.csv", b"sep=\\t\nfile_name\ttext\na.wav\thi\nb.wav\tho\n", TWO),
    "a compressed CSV": ("t.csv.gz", gzip.compress(b"file_name,text\na.wav,hi\nb.wav,ho\n"), TWO),
    "a compressed TSV": ("T.TSV.GZ", gzip.compress(b"file_name\ttext\r\na.wav\thi\r\nb.wav\tho\r\n"), TWO),
    "capitals": ("t.csv", b"Path,SENTENCE\na.wav,hi\nb.wav,ho\n", SENTENCES),
    "capitals in NeMo's names": (
        "t.csv",
        b"Audio_filepath,Duration,X\na.wav,1,y\n",
        [named("a.wav", duration="1", X="y")],
    ),
    "capitals in JSON": ("t.jsonl", b'{"File_Name": "a.wav", "Text": "hi"}\n', TWO[:1]),
    "an exact name": ("t.csv", b"path,Text,text\na.wav,HI,hi\n", [named("a.wav", text="hi", Text="HI")]),
}


@pytest.mark.parametrize("case", GOOD)
def test_tables_are_read(tmp_path, case):
    name, data, expected = GOOD[case]
    path = tmp_path / name
    path.write_bytes(data)
    assert is_table(path)
    rows = list(read_table(path))
    assert [row.problem for row in rows] == [None] * len(expected)
    assert [row.values for row in rows] == expected


BAD_ROWS: dict[str, tuple[str, bytes, str]] = {
    "too few fields": ("t.csv", b"a.wav", "the row has 1 field (['a.wav']), but the header has 2"),
    "too many fields": ("t.csv", b"a.wav,hi,ho", "the row has 3 fields"),
    "Latin-1": ("t.csv", b"a.wav,caf\xe9", "not UTF-8 text"),
    "NUL": ("t.csv", b"a.wav,\0", "NUL"),
    "a quote that is not closed": ("t.csv", b'a.wav,"hi', "quote is not closed"),
    "two kinds of line ends": ("t.csv", b"a.wav,hi\rb.wav,ho\r\n", "carriage return without quotes; save the table"),
    "a field of a megabyte": ("t.csv", b"a.wav," + b"x" * (1 << 20), "field larger than"),
    "no name": ("t.csv", b",hi", "the column 'file_name' is empty"),
    "TSV": ("t.tsv", b"a.wav\thi\tho", "the row has 3 fields"),
    "JSON": ("t.jsonl", b'{"file_name"', "not JSON"),
    "JSON, a list": ("t.jsonl", b"[1]", "is not a JSON object"),
    "JSON, a number": ("t.jsonl", b'{"file_name": 5}', "the column 'file_name' is 5"),
    "JSON, capitals": (
        "t.jsonl",
        b'{"file_name": "a", "Text": "b", "TEXT": ""}',
        "'Text' and 'TEXT' differ only in case",
    ),
    "JSON, no name": ("t.jsonl", b'{"text": "a"}', "no key 'file_name'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_invalid_row_skips_only_itself(tmp_path, case):
    name, row, problem = BAD_ROWS[case]
    good = {"t.csv": b"a.wav,hi", "t.tsv": b"a.wav\thi", "t.jsonl": b'{"file_name": "a.wav", "text": "hi"}'}[name]
    header = {"t.csv": [b"file_name,text"], "t.tsv": [b"file_name\ttext"], "t.jsonl": []}[name]
    path = tmp_path / name
    path.write_bytes(b"\n".join([*header, good, row, good]) + b"\n")
    rows = list(read_table(path))
    assert [row.values for row in rows] == [TWO[0], {}, TWO[0]]
    assert problem in (rows[1].problem or "") and rows[1].line == len(header) + 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the table is empty"),
        (b"\n\n \n", "the table is empty"),
        (b"id,text\n1,hi\n", r"no column contains the audio.*'id', 'text'"),
        (b"LJ001|Printing|Printing\n", "no column contains the audio"),
        (b"\xff\xfef\0i\0", "UTF-16"),
        (b"file_name,\xe9\n", "header cannot be read"),
        (b"file_name,text,text\na.wav,,hi\n", "two columns are named 'text'; rename or remove one of them"),
        (b"file_name,note,note \na.wav,a,b\n", "two columns are named 'note'"),
        (b"audio,Text,TEXT\na.wav,hi,b.wav\n", "'Text' and 'TEXT' differ only in case; rename or remove one"),
        (b"sep=ab\naudio,text\na.wav,hi\n", "declares the delimiter 'ab'; expected one character"),
        (b"sep=\naudio,text\na.wav,hi\n", "declares the delimiter ''; expected one character"),
        (b"sep=;\n\n", "the table is empty"),
        (b"sep=;\naudio,text\na.wav,hi\n", r"no column contains the audio.*\['audio,text'\]"),
        (b"LJ001|x, y|z\n", "no column contains the audio"),
        (b"audio,text,audio\na.wav,hi,b.wav\n", "two columns are named 'audio'"),
        (b"path,start,end\na.wav,0,1\nb.wav,0,1\na.wav,1,2\n", "line 4: 'a.wav' is listed again, but 'start' does"),
        (b"path;Segment Start;x\na.wav;0,5;\na.wav;1,5;\n", "line 3: 'a.wav' is listed again, but 'Segment Start'"),
        (b"file,offset,duration\na.wav,0,1\na.wav,1,1\n", "'offset' does not .* audio_filepath for the path"),
    ],
)
def test_invalid_table_is_refused(tmp_path, data, message):
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        list(read_table(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "compressed data ends too early; download it again"),
        (lambda data: data[:10] + b"\xff" * 20 + data[30:], "compressed data is damaged"),
        pytest.param(
            lambda data: gzip.compress(b"file_name,text\n" + (b"x" * (1 << 20) + b"\n") * 120),
            "expand to more than",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_damaged_compressed_table_is_refused(tmp_path, damage, message):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(damage(gzip.compress(b"file_name,text\na.wav,hi\n" * 9)))
    with pytest.raises(ConfigError, match=rf"t\.csv\.gz: the table cannot be read: .*{message}"):
        list(read_table(path))


def test_manifests_and_cuts_are_not_tables(tmp_path):
    for name, data in {
        "m.json": '{"audio_filepath": "a.wav"}',
        "c.jsonl": '{"id": "x", "start": 0}',
        "n.csv": None,
    }.items():
        if data is not None:
            (tmp_path / name).write_text(data)
        assert not is_table(tmp_path / name)


@pytest.fixture
def audio_folder(tmp_path) -> Path:
    (tmp_path / "wavs").mkdir()
    for name in "abc":
        soundfile.write(tmp_path / "wavs" / f"{name}.wav", synthesize(0.2), RATE)
    return tmp_path


def test_recordings_of_a_table_have_paths_relative_to_its_folder(audio_folder):
    path = audio_folder / "t.csv"
    path.write_text("file_name,sentence\nwavs/a.wav,hi\nbad\nwavs/b.wav,ho\n")
    problems: list[str] = []
    recordings = read_manifest(path, on_bad_line=problems.append)
    assert [recording.path for recording in recordings] == [audio_folder / "wavs/a.wav", audio_folder / "wavs/b.wav"]
    assert [recording.labels["text"] for recording in recordings] == ["hi", "ho"]
    assert recordings[0].duration == pytest.approx(0.2, abs=1e-3)
    assert len(problems) == 1 and "t.csv, line 3: skipped: the row has 1 field" in problems[0]
    assert read_manifest(path, audio_folder / "wavs" / "..", on_bad_line=lambda _: None)[0].path.exists()
    path.write_text("file_name,sentence\nbad\n")
    with pytest.raises(ConfigError, match=r"line 2: this line cannot be used: .*; expected a table of recordings\."):
        read_manifest(path)


@pytest.mark.parametrize(
    ("table", "cell", "name"),
    [
        ("t.csv", " a.wav", "a.wav"),
        ("t.csv", "a.wav ", "a.wav"),
        ("t.tsv", " a.wav", "a.wav"),
        ("t.csv", " b.wav", " b.wav"),  # both " b.wav" and "b.wav" exist
        ("t.csv", " gone.wav", " gone.wav"),
        ("t.csv", " ", " "),
        ("t.jsonl", " a.wav", " a.wav"),
    ],
)
def test_blanks_around_a_path_are_removed_if_only_the_other_file_exists(audio_folder, table, cell, name):
    (audio_folder / "wavs" / " b.wav").touch()
    mark = "\t" if table == "t.tsv" else ","
    lines = [f"path{mark}context_audio_filepath", f"{cell}{mark}{cell}"]
    if table == "t.jsonl":
        lines = [json.dumps({"file_name": cell, "context_audio_filepath": cell})]
    (audio_folder / table).write_text("\n".join(lines))
    (row,) = read_table(audio_folder / table, audio_folder / "wavs")
    assert row.values == named(name, context_audio_filepath=name)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_labels_of_audio_folders_are_used(audio_folder, name, caplog):
    rows = [("a.wav", "hi"), ("b.wav", "ho"), ("gone.wav", "x")]
    lines = ["file_name,transcription", *map(",".join, rows), "bad"]
    if name.endswith("jsonl"):
        lines = [*(json.dumps({"file_name": file, "transcription": text}) for file, text in rows), "{"]
    (audio_folder / "wavs" / name).write_text("\n".join(lines))
    (audio_folder / "wavs" / "a.txt").write_text("another text")
    (audio_folder / "wavs" / "c.txt").write_text("from a file")
    utterances = {str(utterance.path): utterance for utterance in LAYOUTS["folder"](audio_folder)}
    texts = {path: utterance.labels.get("text") for path, utterance in utterances.items() if not utterance.problem}
    assert texts == {"wavs/a.wav": "hi", "wavs/b.wav": "ho", "wavs/c.wav": "from a file"}
    problems = {path: utterance.problem for path, utterance in utterances.items() if utterance.problem}
    assert problems.pop("wavs/gone.wav") == "the file is listed in a table, but does not exist"
    assert list(problems) == [f"wavs/{name}, line {len(lines)}"]
    assert "skipped" not in caplog.text
