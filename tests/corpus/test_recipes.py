"""Tests of the recipes in docs/guides/token-formats.md, and of the layouts of Shar."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from nemo_lfr.corpus.dataset import TokenDataset
from nemo_lfr.corpus.formats.shar import SharFormat
from tests.corpora import write_tokens

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "token-formats.md"
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PACKAGES = ("lhotse", "nemo", "pandas", "polars", "datasets", "nemo_lfr", "pyarrow")
KINDS = ("shar", "parquet", "manifest", "lfr")


def packages(code: str) -> list[str]:
    found = [name for name in PACKAGES if re.search(rf"^(from|import) {name}\b", code, re.MULTILINE)]
    return [*found, "pyarrow"] if "parquet" in code else found


def recipe(code: str):
    kind = re.search(r"tokens-(\w+)", code).group(1)
    marks = [pytest.mark.nemo, pytest.mark.slow] if "nemo" in packages(code) else []
    return pytest.param(kind, code, id=f"{kind} {packages(code)[0]}", marks=marks)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("error:::recipe")  # for instance, because an argument is deprecated
@pytest.mark.parametrize(("kind", "code"), [recipe(code) for code in CODE])
def test_each_recipe_gives_our_tokens(kind, code, folder):
    for package in packages(code):
        pytest.importorskip(package, reason=f"pip install {package}")
    expected = [*write_tokens(folder / f"tokens-{kind}", kind, [2, 0, 1]).values()]
    code = re.sub(r"^( +tokens = .*)$", r"\1; found.append(tokens)", code, flags=re.MULTILINE)
    names = {"found": [], "__name__": "recipe"}
    exec(code, names)
    assert len(expected) == 3 and len(names["found"]) == 3
    for tokens in expected:
        assert any(np.array_equal(tokens, found) for found in names["found"])


def test_every_format_has_a_recipe():
    assert {re.search(r"tokens-(\w+)", code).group(1) for code in CODE} == set(KINDS)


def test_lhotse_reads_a_shar_in_its_first_call(folder):
    lhotse = pytest.importorskip("lhotse", reason="pip install lhotse")
    expected = write_tokens(folder / "out", "shar", [2, 0, 1], context=True)
    cuts = list(lhotse.CutSet.from_shar(in_dir=folder / "out" / "shar"))
    assert [cut.id for cut in cuts] == list(expected)
    assert all(np.array_equal(cut.target_codes.load(), expected[cut.id]) for cut in cuts)


@pytest.mark.nemo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain $x", "a (copy)", "[v1]", "<a>", "{a,b}", "_OP_1_CL_", "(${x})", r"\${x}\$"])
def test_nemo_reads_a_shar_in_a_folder_whose_name_it_would_expand(name, folder):
    pytest.importorskip("nemo", reason="pip install nemo_toolkit")
    from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
    from omegaconf import OmegaConf

    expected = write_tokens(folder / name, "shar", [2, 0, 1], context=True)
    config = {"input_cfg": OmegaConf.load(folder / name / "input_cfg.yaml"), "force_finite": True}
    cuts, _ = read_cutset_from_config(OmegaConf.create(config))
    found = {cut.id: cut.target_codes.load() for cut in cuts}
    assert found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


def earlier(folder: Path) -> None:
    """Rename the files of a Shar to the names in earlier versions."""
    for path in list((folder / "shar").iterdir()):
        field, rest = path.name.split(".", 1)
        target = folder / field / (path.name if field == "cuts" else f"codes.{rest}")
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    (folder / "shar").rmdir()
    shutil.rmtree(folder / ".tokenize", ignore_errors=True)


def test_a_shar_of_earlier_versions_is_read_and_summarized_as_it_is(folder):
    pytest.importorskip("lhotse", reason="pip install lhotse")
    expected = write_tokens(folder / "out", "shar", [2, 1])
    earlier(folder / "out")
    found = {item.id: item.tokens.numpy() for item in TokenDataset(folder / "out")}
    assert list(found) == list(expected) and all(np.array_equal(found[key], expected[key]) for key in expected)
    SharFormat.finish(folder / "out", 2, False)
    text = (folder / "out" / "input_cfg.yaml").read_text()
    assert "cuts/cuts._OP_" in text and "target_codes/codes._OP_" in text and "/shar/" not in text
