"""Mutation test of the readers' guards: removes each one in turn and runs the tests.

    python -m tests.mutate

Prints the first test that fails without each guard. The exit code is 1 if no test fails without some guard.
"""

import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.crash import ROOT

# (file, guard, replacement)
GUARDS = [
    ("checkpoint/archive.py", "if name in found:", "if False:"),
    ("checkpoint/archive.py", "if not member.isreg() or member.issparse():", "if False:"),
    ("checkpoint/archive.py", "if count > MAX_MEMBERS:", "if False:"),
    ("checkpoint/archive.py", "if not 0 <= member.size <= limit:", "if False:"),
    ("checkpoint/archive.py", "if not 0 <= size <= MAX_READ:", "if False:"),
    ("checkpoint/archive.py", "if self._limit is not None and position > self._limit:", "if False:"),
    ("checkpoint/config.py", "if isinstance(event, yaml.AliasEvent):", "if False:"),
    ("checkpoint/config.py", "if count > MAX_CONFIG_EVENTS or depth > MAX_CONFIG_DEPTH:", "if False:"),
    ("checkpoint/config.py", 'if "${" in value and ":" in NEMO_RESOLVERS.sub("", value):', "if False:"),
    ("checkpoint/config.py", "if encoder.encoded_dim != quantizer.codebook_dim:", "if False:"),
    ("checkpoint/tensors.py", "if (module, name) not in _NAMES:", "if False:"),
    ("checkpoint/tensors.py", "if opcode.name not in allowed:", "if False:"),
    (
        "checkpoint/tensors.py",
        "if self._checksum(place + end, info.file_size - end, checksum) != info.CRC:",
        "if False:",
    ),
    ("checkpoint/tensors.py", " and (last >= available or numel > available):", " and False:"),
    ("checkpoint/tensors.py", "if size > MAX_DIRECTORY_BYTES:", "if False:"),
    ("checkpoint/reader.py", "if missing and strict:", "if False:"),
    ("checkpoint/reader.py", "if unexpected and strict:", "if False:"),
    ("checkpoint/reader.py", "if entry.shape != shape:", "if False:"),
    ("checkpoint/reader.py", "if not _is_finite(value):", "if False:"),
    ("checkpoint/reader.py", "if not want.is_floating_point() and not torch.equal(direction, want):", "if False:"),
    ("io/token_file.py", "if version not in READABLE_VERSIONS:", "if False:"),
    ("io/token_file.py", "if coding not in CODINGS:", "if False:"),
    ("io/token_file.py", 'if checksum != struct.pack("<I", zlib.crc32(section, zlib.crc32(before))):', "if False:"),
    ("io/token_file.py", 'before if self.version > 1 else b""', 'b""'),
    ("io/token_file.py", 'if self.version > 1 and fields[8:] != struct.pack("<I", self._outline):', "if False:"),
    ("io/token_file.py", "if read_whole(self._file, 1):", "if False:"),
    (
        "io/token_file.py",
        "if count > self._max_block_frames:",
        "if False:",
    ),
    ("io/token_file.py", "if length > MAX_METADATA_BYTES:", "if False:"),
]


def limit_memory() -> None:
    """Limit the address space of a child process to 8 GiB."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))


def failures_without(name: str, guard: str, replacement: str) -> list[str]:
    """Return the names of the tests that fail without a guard."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("nemo_lfr", "tests", "docs", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder, part))
        source = Path(folder, "nemo_lfr", name)
        text = source.read_text()
        if text.count(guard) != 1:
            raise SystemExit(f"{name} holds {guard!r} {text.count(guard)} times, expected once.")
        source.write_text(text.replace(guard, replacement))
        test = "tests/io/test_format.py" if name.startswith("io/") else "tests/checkpoint/test_checkpoint.py"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-m", "not slow", test]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, cwd=folder, timeout=120, preexec_fn=limit_memory
            )
        except subprocess.TimeoutExpired:
            return ["(it hangs)"]
        return re.findall(r"^FAILED (.*?)(?: - .*)?$", run.stdout, re.MULTILINE)


def main() -> None:
    """Print the result for each guard, and exit with 1 if some guard has no test."""
    unguarded = 0
    for name, guard, replacement in GUARDS:
        failed = failures_without(name, guard, replacement)
        unguarded += not failed
        print(f"{name}: without `{guard}` fails: {failed[0] if failed else 'NOTHING'}", flush=True)
    print(f"{len(GUARDS) - unguarded} of {len(GUARDS)} guards are needed by a test.")
    sys.exit(unguarded > 0)


if __name__ == "__main__":
    main()
