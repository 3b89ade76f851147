import os
import pickle
import zipfile

import pytest
import torch

from nemo_lfr.corpus.token_tensor import read_token_tensor
from nemo_lfr.errors import TokenFileError


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(8, 5), (1, 1), (13, 0)])
def test_tensor_saved_by_torch_is_read(tmp_path, dtype, shape):
    tokens = torch.randint(0, 200, shape).to(dtype)
    torch.save(tokens, tmp_path / "a.pt")
    got = read_token_tensor(tmp_path / "a.pt")
    assert got.dtype == torch.int64 and torch.equal(got, tokens.long())


def test_a_view_of_a_larger_tensor_is_read_as_it_was(tmp_path):
    tokens = torch.arange(800).reshape(8, 100)[:, 10:20]
    torch.save(tokens, tmp_path / "a.pt")
    assert torch.equal(read_token_tensor(tmp_path / "a.pt"), tokens)


class Runs:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def bare_pickle(path, folder):
    path.write_bytes(pickle.dumps(Runs(folder)))


def old_format(path, folder):
    torch.save(torch.zeros(8, 5, dtype=torch.int64), path, _use_new_zipfile_serialization=False)


def another_pickle(path, folder):
    torch.save(torch.zeros(8, 5, dtype=torch.int64), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, pickle.dumps(Runs(folder), 2) if name.endswith("data.pkl") else data)


def flipped_bit(path, folder):
    torch.save(torch.full((8, 5), 7), path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(bytes([7, 0, 0, 0, 0, 0, 0, 0]) * 4)] ^= 1
    path.write_bytes(raw)


def cut_short(path, folder):
    torch.save(torch.full((8, 5), 7), path)
    path.write_bytes(path.read_bytes()[:-100])


def saved(value):
    return lambda path, folder: torch.save(value, path)


HOSTILE = {
    "a pickle that runs code": bare_pickle,
    "a zip whose pickle runs code": another_pickle,
    "an object of a class in torch.save": lambda path, folder: torch.save(Runs(folder), path),
    "the format before PyTorch 1.6": old_format,
    "a flipped bit": flipped_bit,
    "a truncated file": cut_short,
    "an empty file": lambda path, folder: path.write_bytes(b""),
    "text": lambda path, folder: path.write_text("tokens"),
    "a list": saved([1, 2, 3]),
    "a dictionary": saved({"tokens": torch.zeros(8, 5, dtype=torch.int64)}),
    "floats": saved(torch.zeros(8, 5)),
    "booleans": saved(torch.zeros(8, 5, dtype=torch.bool)),
    "one dimension": saved(torch.zeros(5, dtype=torch.int64)),
    "three dimensions": saved(torch.zeros(1, 8, 5, dtype=torch.int64)),
    "nothing": lambda path, folder: None,
    "a folder": lambda path, folder: path.mkdir(),
    "a huge file": lambda path, folder: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 34),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_other_pickles_are_refused_without_running_code(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # turns PyTorch's own check off
    path, folder = tmp_path / "a.pt", tmp_path / "made"
    HOSTILE[kind](path, folder)
    with pytest.raises(TokenFileError, match=r"a\.pt") as caught:
        read_token_tensor(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(path))
    assert not folder.exists()
