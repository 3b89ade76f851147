"""Packages that extend nemo_lfr, written to a folder as an installer leaves them."""

from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, name: str, code: str, entry_points: Mapping[str, str]) -> Path:
    """Write a package of one module and its metadata.

    Args:
        folder: folder to add to `sys.path` or PYTHONPATH; created if missing.
        name: name of the package and its module.
        code: source of the module.
        entry_points: by "group:name", the attribute of the module.

    Returns:
        The folder.
    """
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups: dict[str, list[str]] = {}
    for key, attribute in entry_points.items():
        group, _, entry = key.partition(":")
        groups.setdefault(group, []).append(f"{entry} = {name}:{attribute}")
    sections = (f"[{group}]\n" + "\n".join(lines) for group, lines in groups.items())
    (metadata / "entry_points.txt").write_text("\n".join(sections))
    (folder / f"{name}.py").write_text(code)
    return folder
