"""Drive a headless Chromium by its own protocol (https://chromedevtools.github.io/devtools-protocol/), for the tests,
the screenshots and the benchmark of the dashboard. Needs Debian's package chromium, and the package websockets."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_S = 60.0
WAIT_S = 30.0
# Without these it asks the network for updates and more at each start.
ARGUMENTS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-port=0",
)


class BrowserError(Exception):
    """The browser, or what ran in a page of it, failed."""


class Page:
    """One tab. seen: the requests (URLs) and the console's and the page's errors so far."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call("Log.enable")
        self.call("Network.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        end_s = time.monotonic() + WAIT_S
        while True:
            found = json.loads(self._socket.recv(max(0.1, end_s - time.monotonic())))
            if found.get("id") == self._number:
                if "error" in found:
                    raise BrowserError(f"{method}: {found['error']['message']}")
                result: dict[str, Any] = found["result"]
                return result
            self._event(found)

    def _event(self, found: dict[str, Any]) -> None:
        about = found.get("params", {})
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif found.get("method") == "Runtime.exceptionThrown":
            thrown = about["exceptionDetails"]
            self.errors.append(thrown.get("exception", {}).get("description") or thrown["text"])
        elif found.get("method") == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def run(self, code: str) -> Any:
        """The value of an expression; a promise is waited for. Raises BrowserError."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            thrown = found["exceptionDetails"]
            raise BrowserError(thrown.get("exception", {}).get("description") or thrown["text"])
        return found["result"].get("value")

    def wait(self, code: str, within_s: float = WAIT_S) -> None:
        """Until an expression is true. Raises BrowserError."""
        end_s = time.monotonic() + within_s
        while True:
            with contextlib.suppress(BrowserError):  # the page is being replaced
                if self.run(f"Boolean({code})"):
                    return
            if time.monotonic() > end_s:
                raise BrowserError(f"not within {within_s} s: {code}; errors: {self.errors[-5:]}; shows: {self.text()}")
            time.sleep(0.05)

    def text(self) -> str:
        with contextlib.suppress(BrowserError):
            return str(self.run("document.body.innerText"))[:2000]
        return ""

    def open(self, url: str) -> None:
        found = self.call("Page.navigate", url=url)
        if found.get("errorText"):
            raise BrowserError(f"{url}: {found['errorText']}")

    def show(self, width: int, height: int, dark: bool = False, phone: bool = False, pixels: float = 1) -> None:
        """The size of the window, and whether the user likes it dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=pixels, mobile=phone
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def picture(self, path: Path, whole: bool = False) -> None:
        """whole: with what is below the window."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A page of a new browser with an empty profile. Raises BrowserError."""
    from websockets.sync.client import connect

    if CHROMIUM is None:
        raise BrowserError("chromium is not installed (apt-get install chromium)")
    with tempfile.TemporaryDirectory(prefix="stonechat-browser-", ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *ARGUMENTS, f"--user-data-dir={folder}", "about:blank"]
        if os.geteuid() == 0:
            command.insert(1, "--no-sandbox")
        environment = os.environ | {"HOME": folder}
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            port, _ = _port(process, Path(folder) / "DevToolsActivePort")
            with connect(_target(port), max_size=1 << 28, open_timeout=START_S) as socket:
                yield Page(socket)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _port(process: "subprocess.Popen[bytes]", file: Path) -> tuple[int, str]:
    end_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end_s:
        with contextlib.suppress(OSError, ValueError):
            port, path = file.read_text().splitlines()[:2]
            return int(port), path
        time.sleep(0.05)
    raise BrowserError(f"chromium did not start (exit status {process.poll()})")


def _target(port: int) -> str:
    import urllib.request

    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            for target in json.load(answer):
                if target["type"] == "page":
                    return str(target["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise BrowserError("chromium has no page")
