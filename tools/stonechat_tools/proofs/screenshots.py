"""Every page of the dashboard as a picture: light, dark and as wide as a phone, with its empty, error and loading
states, of a real dashboard over a made fleet in a real browser.

    python -m stonechat_tools.proofs.screenshots build/screenshots
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..dashboard import accounts
from ..fleet.store import Store
from .browser import Page, browser
from .dashboard_fleet import MadeFleet

NAME, PASSWORD = "otto", "only for pictures"
SHAPES = {
    "light": (1280, 800, False),
    "dark": (1280, 800, True),
    "phone": (390, 844, False),
    "phone-dark": (390, 844, True),
}


@dataclass(frozen=True, slots=True)
class View:
    """A page: its place, what is there once it is shown, and what is done then."""

    name: str
    place: str
    ready: str
    then: str = ""


VIEWS = (
    View("fleet", "#/", ".legend li"),
    View("fleet-keys", "#/", ".legend li", "map_keys"),
    View("devices", "#/devices", "tbody tr"),
    View("search", "#/devices?q=site:faro state:gone", "tbody tr"),
    View("search-nothing", "#/devices?q=nowhere", "div.state"),
    View("device", "#/device/pump-00003", "h2#about"),
    View("device-silent", "#/device/meter-00017", "h2#about"),
    View("device-none", "#/device/nobody", ".state button"),
    View("incidents", "#/incidents", ".incident"),
    View("silence", "#/incidents", ".incident", "silence"),
    View("incident", "#/incident/1", ".cards"),
    View("models", "#/models", "tbody tr"),
    View("log", "#/audit", "tbody tr"),
    View("login", "#/login", "input"),
)
EMPTY = (
    View("empty-fleet", "#/", ".first"),
    View("empty-devices", "#/devices", ".first"),
    View("empty-incidents", "#/incidents", "section"),
    View("empty-models", "#/models", ".first"),
)
ACTIONS = {
    "map_keys": "(() => { const map = document.querySelector('canvas'); map.focus(); for (const key of ['ArrowRight',"
    " 'ArrowRight', 'ArrowDown']) map.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true })); })()",
    "silence": "document.querySelector('.incident button[aria-expanded]').click()",
}
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 250))))"
LOG_IN = (
    "fetch('/api/login', { method: 'POST', headers: { 'content-type': 'application/json' },"
    f" body: JSON.stringify({{ name: '{NAME}', password: '{PASSWORD}' }}) }}).then((answer) => answer.status)"
)


@contextlib.contextmanager
def serving(db: Path, *options: str) -> Iterator[str]:
    """A dashboard in a process of its own -> its address."""
    command = [sys.executable, "-m", "stonechat_tools.cli", "dashboard", "--db", str(db), "--json"]
    command += ["--listen", "127.0.0.1:0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(30)


def log_in(page: Page, url: str) -> None:
    page.open(url)
    page.wait("document.readyState === 'complete'")
    status = page.run(LOG_IN)
    if status != 200:
        raise RuntimeError(f"the log-in answers {status}")


def go(page: Page, url: str, view: View) -> None:
    """Show a view, loaded anew."""
    page.open("about:blank")
    page.open(url + view.place.replace(" ", "%20"))
    page.wait(f"document.querySelector('main {view.ready}')")
    page.run(SETTLED)
    if view.then:
        page.run(ACTIONS[view.then])
        page.run(SETTLED)


def take(folder: Path, devices: int = 600, said: Callable[[str], None] = print) -> list[Path]:
    """-> the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="stonechat-screenshots-") as temporary:
        full, empty = Path(temporary) / "full.db", Path(temporary) / "empty.db"
        fleet = MadeFleet(full, devices)
        accounts.put(fleet.store, NAME, "operator", PASSWORD)
        Store(empty).close()
        socket = Path(temporary) / "socket"  # nobody listens there: the buttons are shown all the same

        def picture(page: Page, shape: str, name: str, whole: bool = True) -> None:
            path = folder / f"{name}-{shape}.png"
            page.picture(path, whole)
            made.append(path)
            said(str(path))

        with browser() as page, serving(full, "--operator", str(socket)) as url, serving(empty) as other:
            log_in(page, url)
            for shape, (width, height, dark) in SHAPES.items():
                page.show(width, height, dark, phone=shape.startswith("phone"))
                fleet.step()  # a collector is there
                for view in VIEWS:
                    go(page, url, view)
                    picture(page, shape, view.name)
                for view in EMPTY:
                    go(page, other, view)
                    picture(page, shape, view.name)
                page.open("about:blank")
                page.call("Fetch.enable", patterns=[{"urlPattern": "*/api/fleet*"}, {"urlPattern": "*/api/incidents*"}])
                page.open(url)
                page.wait("document.querySelector('main .state')")
                picture(page, shape, "loading", whole=False)
                page.call("Fetch.disable")
                page.call("Network.setBlockedURLs", urls=["*/api/fleet*", "*/api/incidents*"])
                page.open("about:blank")
                page.open(url)
                page.wait("document.querySelector('main .state button')")
                picture(page, shape, "error")
                page.call("Network.setBlockedURLs", urls=["*/api/incidents*", "*/api/device/*"])
                for view in (
                    View("error-incidents", "#/incidents", ".state button"),
                    View("error-device", "#/device/pump-00003", ".state button"),
                ):
                    go(page, url, view)
                    picture(page, shape, view.name)
                page.call("Network.setBlockedURLs", urls=[])
        fleet.close()
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=600)
    arguments = parser.parse_args()
    take(arguments.folder, arguments.devices)
