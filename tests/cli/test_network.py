"""Tests that commands on local files use no network, in Python or native code, and that usage reports are off."""

import json
import os
import subprocess
import sys

import pytest
import soundfile

from nemo_lfr import telemetry
from tests.crash import ROOT
from tests.models import RATE, codec_config, synthesize, write_nemo
from tests.network import TELEMETRY, build_watcher, run_watched

# Runs commands one after the other in one process, each with its own log, and then waits for delayed usage reports:
# ONNX Runtime looks up Microsoft's server 10 to 15 seconds after it was imported. The wait includes other commands.
DRIVER = """
import json, os, sys, time
from nemo_lfr.cli.main import main

begun = None
for name, arguments in json.loads(sys.argv[1]).items():
    os.environ["NETWORK_LOG"] = os.path.join(os.getcwd(), f"{name}.log")
    try:
        main([*arguments])
    except SystemExit as end:
        assert not end.code, (name, end.code)
    if begun is None and "onnxruntime" in sys.modules:
        begun = time.monotonic()
os.environ["NETWORK_LOG"] = os.path.join(os.getcwd(), "afterwards.log")
if begun is not None:
    time.sleep(max(0, begun + 20 - time.monotonic()))
"""


@pytest.fixture(scope="module")
def watcher(tmp_path_factory):
    return build_watcher(tmp_path_factory.mktemp("watcher"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write four clips, a manifest of them, one of the first clip, and two tiny codecs."""
    folder = tmp_path_factory.mktemp("network")
    lines = []
    (folder / "audio").mkdir()
    for number in range(4):
        soundfile.write(folder / "audio" / f"{number}.wav", synthesize(1.1, number), RATE)
        lines.append(json.dumps({"audio_filepath": f"audio/{number}.wav", "duration": 1.1, "text": "a clip"}))
    (folder / "manifest.json").write_text("\n".join(lines))
    (folder / "logged.json").write_text(lines[0])  # by training, with pictures that take longer than a step
    write_nemo(folder / "tiny.nemo", codec_config())
    write_nemo(folder / "two_stages.nemo", codec_config("two_stages"))  # converted to ONNX in half the time
    return folder


# A local Ray cluster asks metadata services which cloud it runs in, and finds its own address by connecting a UDP
# socket to a public server, without sending anything. No setting of Ray disables either.
RAYS_OWN = (
    "look-up metadata.google.internal ",
    "connection to 169.254.169.254 port 80 ",
    "connection to 8.8.8.8 port 53 ",
)


def seen(folder, allowed: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return the network accesses of each command, except those in `allowed`, for all commands that have any."""
    logs = {path.stem: path.read_text().splitlines() for path in sorted(folder.glob("*.log"))}
    asked = {name: [line for line in lines if not line.startswith(allowed)] for name, lines in logs.items()}
    return {name: lines for name, lines in asked.items() if lines}


def run_commands(watcher, folder, out, commands: dict[str, str], allowed: tuple[str, ...] = ()):
    """Run commands in `out`; `{in}` and `{out}` in them stand for the two folders."""
    commands = {
        name: [part.replace("{in}", str(folder)).replace("{out}", str(out)) for part in command.split()]
        for name, command in commands.items()
    }
    command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = run_watched(watcher, out / "import.log", command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert seen(out, allowed) == {}


@pytest.mark.slow
def test_the_watcher_sees_python_native_code_and_children(watcher, tmp_path):
    look_up = "import socket; socket.getaddrinfo('name.invalid', 80)"
    connect = "import socket; socket.socket().connect(('192.0.2.1', 80))"  # reserved by RFC 5737, no host
    here = """
import socket
for name in ("localhost", "127.0.0.1", socket.gethostname()):
    socket.getaddrinfo(name, 80)
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 80))  # sends nothing
"""
    for number, (code, expected) in enumerate(
        ((look_up, "look-up name.invalid"), (connect, "connection to 192.0.2.1"))
    ):
        log = tmp_path / f"{number}.log"
        child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], timeout=10)"
        run_watched(watcher, log, [sys.executable, "-c", child])
        assert log.read_text().startswith(expected)
    done = run_watched(watcher, tmp_path / "here.log", [sys.executable, "-c", here])
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "here.log").exists()


@pytest.mark.slow
def test_commands_on_local_files_use_no_network(watcher, folder, tmp_path):
    for module in ("onnxruntime", "onnxscript", "lhotse", "pyarrow", "matplotlib", "pesq"):
        pytest.importorskip(module, reason="pip install '.[onnx,corpus,evaluate]'")
    commands = {
        "export": "export onnx --model {in}/two_stages.nemo --out {out}/onnx",
        "encode with ONNX Runtime": "encode {in}/audio --out {out}/onnx-tokens --model {out}/onnx",
        "decode with ONNX Runtime": "decode {out}/onnx-tokens --out {out}/onnx-audio --model {out}/onnx",
        "encode": "encode {in}/audio --out {out}/tokens --model {in}/tiny.nemo",
        "encode with the bundled codec": "encode {in}/audio/0.wav --out {out}/more",
        "decode": "decode {out}/tokens --out {out}/decoded --model {in}/tiny.nemo",
        "info": "info {out}/tokens/0.lfr {in}/tiny.nemo",
        "prepare": "prepare folder {in}/audio --out {out}/manifests",
        **{
            f"{verb} {kind}": f"{verb} {source} --out {{out}}/{verb}-{kind} --model {{in}}/tiny.nemo {more}"
            for kind in ("shar", "manifest", "parquet", "lfr")
            for verb, source, more in (
                ("tokenize", "{in}/manifest.json", f"--device cpu --workers 1 --format {kind}"),
                ("detokenize", f"{{out}}/tokenize-{kind}", "--device cpu"),
            )
        },
        "evaluate": "evaluate {in}/manifest.json --out {out}/report --limit 2 --workers 1 --codec lfr:{in}/tiny.nemo",
    }
    run_commands(watcher, folder, tmp_path, commands)


@pytest.mark.slow
def test_tokenizing_on_ray_uses_no_network_beyond_ray_itself(watcher, folder, tmp_path):
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    command = (
        "tokenize {in}/manifest.json --out {out}/tokens --model {in}/tiny.nemo --device cpu --ray local --format lfr"
    )
    run_commands(watcher, folder, tmp_path, {"tokenize on Ray": command}, allowed=RAYS_OWN)


@pytest.mark.slow
def test_training_uses_no_network(watcher, folder, tmp_path):
    pytest.importorskip("nemo", reason="needs NeMo: pip install '.[nemo]'")
    meta = [
        f"+{kind}_ds_meta.mine.{key}={value}"
        for kind, name in (("train", "manifest.json"), ("val", "manifest.json"), ("log", "logged.json"))
        for key, value in (("manifest_path", folder / name), ("audio_dir", folder))
    ]
    script = [
        sys.executable,
        ROOT / "examples" / "audio_codec.py",
        "--config-name=audio_codec_low_frame_rate_22050_debug",
    ]
    directories = [f"log_dir={tmp_path / 'logs'}", f"exp_manager.exp_dir={tmp_path}"]
    done = run_watched(watcher, tmp_path / "training.log", [*script, "max_epochs=1", *directories, *meta])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert seen(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, "", "0", "another"])
@pytest.mark.parametrize("name", sorted(telemetry.VARIABLES))
def test_import_disables_usage_reports_unless_the_variable_is_set(name, value):
    environment = {key: text for key, text in os.environ.items() if key not in TELEMETRY}
    environment |= {"PYTHONPATH": str(ROOT)} | ({} if value is None else {name: value})
    code = f"import nemo_lfr, os; print(os.environ[{name!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (telemetry.VARIABLES[name] if value is None else value)
