"""The dashboard's pages in a real browser: they work, with a keyboard and a screen reader too, and ask nobody else."""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from stonechat_tools.bench import dashboard as bench
from stonechat_tools.dashboard import accounts
from stonechat_tools.fleet import labels
from stonechat_tools.fleet.store import Store
from stonechat_tools.proofs import screenshots
from stonechat_tools.proofs.browser import CHROMIUM, Page, browser
from stonechat_tools.proofs.dashboard_fleet import MadeFleet
from stonechat_tools.proofs.screenshots import EMPTY, NAME, PASSWORD, SHAPES, VIEWS, View, go, log_in, serving

ROOT = Path(__file__).resolve().parents[2]
AXE = next(iter((ROOT / ".targets").glob("axe-*.js")), None)
pytestmark = [
    pytest.mark.slow(2),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (make setup, as root)"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeFleet]:
    fleet = MadeFleet(tmp_path_factory.mktemp("browser") / "fleet.db", 60)
    accounts.put(fleet.store, NAME, "operator", PASSWORD)
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def places(made: MadeFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A dashboard with devices, and one without."""
    folder = tmp_path_factory.mktemp("empty")
    Store(folder / "empty.db").close()
    with (
        serving(Path(made.store.path), "--operator", str(folder / "socket")) as full,
        serving(folder / "empty.db") as empty,
    ):
        yield full, empty


@pytest.fixture(scope="module")
def page(places: tuple[str, str]) -> Iterator[Page]:
    with browser() as found:
        found.show(1280, 800)
        log_in(found, places[0])
        yield found


EVERYTHING = '{ resultTypes: ["violations"] }'
COLOURS = '{ resultTypes: ["violations"], runOnly: ["color-contrast"] }'
AUDIT = """(async () => {
  const words = (node) => node.html.slice(0, 150) + " " + node.any.map((why) => why.message).join("; ");
  const found = await axe.run(document, RULES);
  return found.violations.map((each) => each.id + ": " + each.nodes.map(words).slice(0, 3).join(" | "));
})()"""
WIDER = """[...document.querySelectorAll("body *")]
  .filter((each) => !each.closest(".scroll, .quiet, .skip"))
  .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
  .map((each) => each.outerHTML.slice(0, 120))"""


@pytest.mark.skipif(AXE is None, reason="axe-core is not there (make setup; it needs npm)")
@pytest.mark.parametrize("view", [*VIEWS, *EMPTY], ids=lambda view: view.name)
def test_nothing_is_out_of_reach_or_off_the_page(page: Page, places: tuple[str, str], view: View) -> None:
    """By axe-core: names, roles, order, contrast in light and dark. No element is wider than a phone, nothing is an
    error in the console, and nobody but the dashboard is asked for anything."""
    assert AXE is not None
    page.show(1280, 800)
    page.open("about:blank")
    page.requests.clear()
    page.errors.clear()
    go(page, places[1] if view in EMPTY else places[0], view)
    page.run(AXE.read_text() + "\ntrue")
    for shape in ("light", "dark", "phone"):
        width, height, dark = SHAPES[shape]
        page.show(width, height, dark, phone=shape == "phone")
        page.run(screenshots.SETTLED)
        if shape != "phone":
            assert page.run(AUDIT.replace("RULES", EVERYTHING if shape == "light" else COLOURS)) == [], shape
        assert page.run(WIDER) == [], shape
    page.show(1280, 800)
    others = [url for url in page.requests if not url.startswith((*places, "about:", "data:"))]
    assert others == [] and page.requests
    assert page.errors == [] or view.name == "device-none" and "404" in page.errors[0]


HOSTILE = '"><img src=x onerror="window.hit=1"><script>window.hit=1</script>\u202e\x1b[31m' + "A" * 70


def test_what_anybody_wrote_is_a_text_and_fits(page: Page, tmp_path: Path) -> None:
    """Each text of the database is markup, control characters and one long word."""
    made = MadeFleet(tmp_path / "fleet.db", 12)
    with made.store.transaction() as db:
        for device, text in db.execute("SELECT device, facts FROM statuses").fetchall():
            facts = json.loads(text) | {"sources": [HOSTILE] * 3, "firmware": HOSTILE, "agent": HOSTILE}
            facts |= {"response": {"shown": HOSTILE}, "update": {"shown": "A" * 80}}
            db.execute("UPDATE statuses SET facts = ? WHERE device = ?", (json.dumps(facts), device))
    made.step()
    for name, device in made.store.notes("presence").items():
        made.store.note("presence", {name: device | {"why": HOSTILE}})
    for name, incident in made.store.notes("incident").items():
        more = {"title": HOSTILE, "evidence": {"features": [HOSTILE]}, "labels": {"site": HOSTILE}}
        made.store.note("incident", {name: incident | more})
    labels.write(made.store, {name: labels.Labels(HOSTILE, HOSTILE, HOSTILE, (HOSTILE,)) for name in made.names})
    with serving(tmp_path / "fleet.db") as url:
        for view in (
            VIEWS[0],
            VIEWS[2],
            replace(VIEWS[5], place="#/device/" + made.names[0]),
            View("m", "#/models", "tr"),
        ):
            go(page, url, view)
            assert "onerror" in page.run("document.body.innerHTML + (document.querySelector('canvas') && 'onerror')")
            assert not page.run("window.hit || document.querySelectorAll('main img, main script').length"), view
            for shape in ("light", "phone"):
                page.show(*SHAPES[shape][:2], phone=shape == "phone")
                page.run(screenshots.SETTLED)
                assert page.run(WIDER) == [] and page.run("document.documentElement.scrollWidth <= innerWidth"), view
    page.show(1280, 800)
    made.close()


def test_the_map_follows_the_fleet_and_the_keyboard(page: Page, places: tuple[str, str], made: MadeFleet) -> None:
    go(page, places[0], VIEWS[0])
    before = page.run("document.querySelector('.legend').innerText")
    silent = next(seen.device for seen in made.monitor.states() if seen.state.state == "silent")
    made._now_s = time.time()
    made.put([made.report(silent)])
    made.step()
    page.wait(f"document.querySelector('.legend').innerText !== {before!r}")
    page.run("document.querySelector('canvas').focus()")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    page.wait("document.querySelector('main [role=status]').innerText.includes('camera-00010')")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", text="\r")
    page.wait("location.hash === '#/device/camera-00010' && document.querySelector('main h1')")


def test_an_operator_acknowledges_and_silences_by_the_page(
    page: Page, places: tuple[str, str], made: MadeFleet
) -> None:
    go(page, places[0], View("incidents", "#/incidents", ".incident button"))
    number = page.run("document.querySelector('.incident').id.split('-')[1]")
    page.run(
        "[...document.querySelectorAll('.incident button')].find((each) => each.innerText === 'Acknowledge').click()"
    )
    page.wait("document.getElementById('toast').innerText.includes('noted')")
    made.step(time.time() + 10)
    page.wait(f"document.getElementById('incident-{number}').innerText.includes('acknowledged by {NAME}')")
    page.run("document.querySelector('.incident button[aria-expanded]').click()")
    page.run("document.querySelector('form.silence').requestSubmit()")
    page.wait("document.querySelector('#silences').innerText.includes('(1)')")
    assert len(made.store.notes("silence")) == 1


def test_a_stranger_gets_a_form_and_a_wrong_password_a_line(made: MadeFleet) -> None:
    with serving(Path(made.store.path), "--login") as url, browser() as stranger:
        stranger.show(1280, 800)
        stranger.open(url + "#/incidents")
        stranger.wait("document.querySelector('input[name=password]')")
        assert "pump" not in stranger.text()
        fill = (
            "document.querySelector('[name=name]').value = {!r};"
            "document.querySelector('[name=password]').value = {!r};"
            "document.querySelector('main form').requestSubmit()"
        )
        stranger.run(fill.format(NAME, "not the password"))
        stranger.wait("document.querySelector('[role=alert]').innerText.includes('no such account')")
        stranger.run(fill.format(NAME, PASSWORD))
        stranger.wait("document.querySelector('.legend li')")
        assert stranger.run("document.cookie") == ""  # no script can read it


def test_no_address_and_no_search_leaves_a_page_empty(page: Page, places: tuple[str, str]) -> None:
    """Names that every JavaScript object has are no pages, keys or spans."""
    page.errors.clear()
    shown = "document.querySelector('main h1') && !document.querySelector('main').innerText.includes('Loading')"
    for name in ("constructor", "__proto__"):
        for place in (name, f"devices?q={name}:x", f"devices?q={name}", f"device/pump-00003?span={name}", f"?{name}"):
            page.open("about:blank")
            page.open(f"{places[0]}#/{place}")
            page.wait(shown)
            assert "Try again" not in page.text(), place
    assert page.errors == []


def test_counts_links_and_times_are_right_for_one_device_too(tmp_path: Path) -> None:
    from stonechat_tools.fleet import labels
    from stonechat_tools.fleet.labels import Labels

    fleet = MadeFleet(tmp_path / "fleet.db", 3)
    first, second, _ = fleet.names
    labels.write(fleet.store, {first: Labels("", "pump 2", "plant 1"), second: Labels("", "pump 3", "plant 2")})
    with serving(tmp_path / "fleet.db") as url, browser() as alone:
        alone.show(1280, 800)
        go(alone, url, View("one", f"#/device/{first}", ".chip"))
        alone.run("document.querySelector('a.chip').click()")  # its class, which has a space in it
        alone.wait("document.querySelector('tbody tr')")
        assert alone.run("document.querySelectorAll('tbody tr').length") == 1
        assert "1 of 3 devices" in alone.text()
        labels.write(fleet.store, {name: Labels(removed_s=time.time()) for name in (second, fleet.names[2])})
        alone.wait("document.querySelector('main [role=status]').innerText === '1 device'")
        for place, ready in (("#/", ".legend li"), ("#/devices", "tbody tr"), (f"#/device/{first}", "h2#about")):
            go(alone, url, View("one", place, ready))
            assert not re.search(r"\b1 (devices|reports|points|incidents)\b", alone.text()), place
            aria = alone.run("[...document.querySelectorAll('[aria-label]')].map((e) => e.getAttribute('aria-label'))")
            assert not re.search(r"\b1 (devices|reports|points|incidents)\b", "\n".join(aria)), place
            zone = alone.run("Intl.DateTimeFormat().resolvedOptions().timeZone")
            shown = alone.run("document.querySelector('footer').innerText")
            assert shown.startswith("Times are in this browser's zone: ") and (zone in shown or "UTC" in shown)
    fleet.close()


def test_what_a_device_calls_itself_is_text(page: Page, places: tuple[str, str], made: MadeFleet) -> None:
    """Markup in what devices and operators write, and a script that somebody got into the page."""
    from stonechat_tools.fleet import labels
    from stonechat_tools.fleet.labels import Labels

    evil = '<img src=x onerror="window.evil=1"><b>'
    labels.write(made.store, {"pump-00003": Labels(evil, "<script>window.evil=1</script>", "'\"><svg onload>")})
    with made.store.transaction() as db:
        db.execute("UPDATE statuses SET facts = replace(facts, '1.4.2', '<img src=x onerror=window.evil=1>')")
    page.errors.clear()
    for place, ready in (
        ("#/", ".legend li"),
        ("#/devices", "tbody tr"),
        ("#/device/pump-00003", "h2#about"),
        ("#/models", "tbody tr"),
    ):
        go(page, places[0], View("evil", place, ready))
        assert page.run("window.evil === undefined && !document.querySelector('main img, main script')")
    blocked = page.run(
        "(() => { try { const script = document.createElement('script'); script.textContent = 'window.evil = 1';"
        " document.body.append(script); } catch (error) { return 'refused'; } return String(window.evil); })()"
    )
    assert blocked in ("refused", "undefined")
    assert page.run("window.evil === undefined")
    page.errors.clear()


def test_the_benchmark_sees_every_update_and_no_other_request() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    figures = bench.run(parser.parse_args(["--devices", "40", "--seconds", "2", "--rounds", "1"]))
    assert figures["changed"] >= 2 and figures["requests_meanwhile"] == 0 and figures["versions_behind"] <= 2
    assert figures["errors"] == figures["elsewhere"] == []
    assert 0 < figures["first_paint_ms"][0] <= figures["map_ms"][0]
