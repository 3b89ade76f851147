"""Read the files of onnxruntime-web from its npm package, and check their SHA-512.

This module downloads nothing. The user installs the package with npm, or passes an archive from `npm pack`.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.locate import expand_home

VERSION = "1.30.0"
DEFAULT = Path("node_modules", "onnxruntime-web")  # where npm installs it
SHA512 = {
    "ort.wasm.min.mjs": "02779f420972927b9fe109e8c8bf0715be78b3582b5b1eeae85eafd94651afb4"
    "7155bb0979777f93ab228978f59a59109a9c871270c8049cf1d41b5adc9dd90a",
    "ort-wasm-simd-threaded.mjs": "21ba108743f06fed82bd495a1258e50552c95a515f1940b10aab94ea48f2c205"
    "beaa3f7e0d9b4961253da6e786638038bd3d96e6b43c66de0234d2032fc29fd6",
    "ort-wasm-simd-threaded.wasm": "1adeded62203219fcf5c484cfce5657aa5875689b490423f86cf1ca1dd1cad77"
    "15f630c6337f41db71ee42794e3a00ce0b7c78939a71220b5d83368bf6ea7730",
}
NOTICE = f"""These files are part of onnxruntime-web {VERSION}.

Copyright (c) Microsoft Corporation. MIT License:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
_MAX_BYTES = 64 << 20
_HINT = f"run npm install onnxruntime-web@{VERSION}, or run npm pack onnxruntime-web@{VERSION} and pass the .tgz file"


def read_runtime(source: str | os.PathLike[str]) -> dict[str, bytes]:
    """Read the files that the page needs, and check their hashes.

    Args:
        source: folder of the installed package, or the `.tgz` file of `npm pack`.

    Returns:
        The content of each file, by file name.

    Raises:
        NemoLfrError: if a file is missing, or is not from version `VERSION` of the package.
    """
    source = expand_home(source)
    if source.is_dir():
        return {name: _checked(source, name, _read_file(source / "dist" / name)) for name in SHA512}
    if not source.is_file():
        raise NemoLfrError(f"{source}: no such file or folder; {_HINT}.")
    try:
        with tarfile.open(source, "r:gz") as archive:
            read = _member_reader(archive)
            return {name: _checked(source, name, read(f"package/dist/{name}")) for name in SHA512}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise NemoLfrError(
            f"{source}: cannot be read as an archive of npm pack ({shorten(error)}); {_HINT}."
        ) from error


def _read_file(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NemoLfrError(f"{path}: the file cannot be read ({shorten(error.strerror or error)}).") from error


def _member_reader(archive: tarfile.TarFile) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        try:
            file = archive.extractfile(name)
        except KeyError:
            return None
        return file.read(_MAX_BYTES) if file is not None else None

    return read


def _checked(source: Path, name: str, data: bytes | None) -> bytes:
    if data is None:
        raise NemoLfrError(f"{source}: no dist/{name} in this package; {_HINT}.")
    if hashlib.sha512(data).hexdigest() != SHA512[name]:
        raise NemoLfrError(
            f"{source}: dist/{name} is not the file of onnxruntime-web {VERSION} (the SHA-512 differs); {_HINT}."
        )
    return data
