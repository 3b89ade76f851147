"""Write a static site with the web page. The codec runs in the browser.

The site consists of these files:

index.html         the page
page/              scripts and style of the page, and the example recording
page/codec/        the files of `nemo-lfr export onnx`
page/ort/          the files of onnxruntime-web
"""

import html
import os
from pathlib import Path
from typing import Any

from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.onnx.export import export_onnx
from nemo_lfr.errors import printable
from nemo_lfr.io.atomic import check_overwrite, sweep, write_bytes
from nemo_lfr.io.locate import expand_home
from nemo_lfr.web import EXAMPLE, EXAMPLE_PATH, FOLDER, INDEX, PAGE
from nemo_lfr.web.runtime import DEFAULT, NOTICE, read_runtime

_BACKEND = '<meta name="backend" content="server">'


def export_site(
    codec: Codec[Any],
    folder: str | os.PathLike[str],
    onnxruntime_web: str | os.PathLike[str] = DEFAULT,
    *,
    name: str = "codec",
    overwrite: bool = False,
) -> list[Path]:
    """Write a static site that encodes and decodes in the browser.

    Any static web host can serve the folder. Browsers do not run the page from a `file://` address.

    Args:
        codec: codec with the PyTorch backend, in fp32.
        folder: folder to write to; created if it does not exist.
        onnxruntime_web: folder of the installed npm package onnxruntime-web, or its `.tgz` file from `npm pack`.
        name: name of the codec, which the page shows.
        overwrite: whether to replace existing files.

    Returns:
        Paths of all files; index.html is written last.

    Raises:
        MissingExtraError: if onnx or onnxscript is not installed.
        NemoLfrError: if a file exists and `overwrite` is not set, if onnxruntime-web is missing or has another
            version, or if the codec cannot be exported.
    """
    folder = expand_home(folder)
    page = folder / FOLDER
    contents = {page / path.name: path.read_bytes() for path in sorted(PAGE.iterdir()) if path.name != INDEX}
    contents[page / EXAMPLE] = EXAMPLE_PATH.read_bytes()
    contents |= {page / "ort" / file: data for file, data in read_runtime(onnxruntime_web).items()}
    contents[page / "ort" / "NOTICE.txt"] = NOTICE.encode()
    contents[folder / INDEX] = index(name).encode()
    for path in contents:
        check_overwrite(path, overwrite)
    exported = export_onnx(codec, page / "codec", overwrite=overwrite)
    for parent in {path.parent for path in contents}:
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent, [path.name for path in contents if path.parent == parent])
    return [*exported, *(write_bytes(path, data, overwrite) for path, data in contents.items())]


def index(name: str) -> str:
    """Return the content of index.html for a static site.

    Args:
        name: name of the codec, which the page shows.
    """
    text = (PAGE / INDEX).read_text(encoding="utf-8")
    assert _BACKEND in text
    codec = f'<meta name="codec" content="{html.escape(printable(name))}">'
    return text.replace(_BACKEND, _BACKEND.replace("server", "browser") + "\n" + codec)
