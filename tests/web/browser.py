"""Chromium, driven over its DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0 --mute-audio "
    "--autoplay-policy=no-user-gesture-required --use-fake-ui-for-media-stream --use-fake-device-for-media-stream"
)

SPY = """
    const create = URL.createObjectURL;
    window.blobs = new Map();
    URL.createObjectURL = blob => {
        const url = create(blob);
        blobs.set(url, blob);
        return url;
    };
"""


class Tab:
    """One page of a browser."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._numbers, self._session = socket, itertools.count(1), None
        self.problems: list[str] = []  # exceptions, and messages of the console and the log
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=SPY)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"])[:1000])
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.problems.append(json.dumps(parameters["args"])[:1000])
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(parameters["entry"])[:1000])

    def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light", scale: float = 1) -> None:
        """Open an address in a window of a size in CSS pixels, and a color scheme."""
        self.show(width, height, scheme, scale)
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def show(self, width: int, height: int, scheme: str = "light", scale: float = 1) -> None:
        """Change the window's size and the color scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def run(self, script: str) -> Any:
        """Evaluate an expression, as if the user had clicked, and return its value; a promise is awaited."""
        result = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition}: {self.run('document.body.innerText')} {self.problems}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def key(self, name: str) -> None:
        """Press a key, such as "Tab"."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"Enter": "\r", " ": " "}.get(name, "")
        common = {"key": name, "windowsVirtualKeyCode": codes[name], "text": text}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=codes[name])

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in an input element."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def bytes_of(self, expression: str) -> bytes:
        """Return the bytes of a Blob or a typed array, or those behind the URL of a download or an audio element."""
        script = f"""Promise.resolve({expression}).then(value => new Promise(done => {{
            const reader = new FileReader();
            reader.onload = () => done(reader.result.split(",")[1]);
            reader.readAsDataURL(blobs.get(value) ?? new Blob([value]));
        }}))"""
        return base64.b64decode(self.run(script) or "")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG file of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browsing(profile: Path, microphone: Path | None = None) -> Iterator[Tab]:
    """Run Chromium with one tab.

    Args:
        profile: folder for the browser's own files.
        microphone: WAV file that its microphone records, once.
    """
    options = [*OPTIONS.split(), f"--user-data-dir={profile}"]
    if microphone:
        options.append(f"--use-file-for-fake-audio-capture={microphone}%noloop")
    profile.mkdir(parents=True, exist_ok=True)
    with open(profile / "log", "wb") as log:
        browser = subprocess.Popen([str(CHROMIUM), *options], stdout=log, stderr=log)
    port = profile / "DevToolsActivePort"
    try:
        end = time.monotonic() + 60
        while not (port.is_file() and port.read_text().count("\n")):
            assert browser.poll() is None and time.monotonic() < end, (profile / "log").read_text()[-2000:]
            time.sleep(0.02)
        number, path = port.read_text().split("\n")[:2]
        with connect(f"ws://127.0.0.1:{number}{path}", proxy=None, max_size=None, compression=None) as socket:
            yield Tab(socket)
    finally:
        browser.kill()
        browser.wait()
