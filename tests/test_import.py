import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_lfr

ROOT = Path(nemo_lfr.__file__).parents[1]


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that a new process has imported after it ran `code`."""
    report = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_neither_torch_nor_numpy():
    assert not modules_after("import nemo_lfr; dir(nemo_lfr); nemo_lfr.__version__") & {"torch", "numpy", "nemo"}


@pytest.mark.slow
def test_encoding_and_decoding_import_neither_nemo_nor_lightning_nor_transformers():
    code = (
        "import nemo_lfr, numpy as np\n"
        "codec = nemo_lfr.load(device='cpu')\n"
        "codec.decode(*codec.encode(np.zeros(16000, np.float32), sample_rate=16000))"
    )
    unwanted = {"nemo", "lightning", "pytorch_lightning", "transformers", "librosa", "huggingface_hub", "hydra"}
    assert not modules_after(code) & unwanted


def test_every_public_name_that_needs_no_nemo_loads():
    for name in set(nemo_lfr.__all__) - {"AudioCodecModel", "LFRCodecModel", "accelerate"}:
        assert getattr(nemo_lfr, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'nemo_lfr' has no attribute 'encode_everything'"):
        nemo_lfr.encode_everything  # noqa: B018


def test_every_error_is_a_nemo_lfr_error_and_a_value_error():
    for name in nemo_lfr.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(nemo_lfr, name), (nemo_lfr.NemoLfrError, ValueError))


EARLIER_PATHS = {
    "audio": ("AudioReader", "AudioWriter"),
    "manifests": ("read_manifest",),
    "pretrained": ("embedded_checkpoint",),
    "streaming": ("push_decoders", "push_encoders"),
    "tokens.format": ("Metadata", "TokenReader", "TokenWriter"),
}


@pytest.mark.parametrize("module", EARLIER_PATHS)
def test_names_of_earlier_versions_still_import(module):
    imported = importlib.import_module(f"nemo_lfr.{module}")
    assert all(callable(getattr(imported, name)) for name in EARLIER_PATHS[module])
