"""The dashboard by its requests: what it shows, who may do what, and what it refuses."""

import contextlib
import gzip
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dashboard_support import PASSWORD, Server, command, dashboard
from fleet_support import free_port, wait_for
from postgres_support import needs_postgres, postgres, postgres_server
from starlette.types import ASGIApp, Receive, Scope, Send
from stonechat.delivery import Delivery
from stonechat.errors import ConfigError
from stonechat.outbox_memory import MemoryOutbox
from stonechat_tools.dashboard import accounts, api, audit, serving
from stonechat_tools.dashboard import dashboard as dashboard_verb
from stonechat_tools.dashboard.app import make
from stonechat_tools.dashboard.state import Options, State, load_files
from stonechat_tools.dashboard.view import FIELDS, View
from stonechat_tools.fleet import keyring, labels, operator, provision, wire
from stonechat_tools.fleet.certificates import pem, pem_key
from stonechat_tools.fleet.labels import Labels
from stonechat_tools.fleet.presence import AWAY
from stonechat_tools.fleet.store import Store, rollouts
from stonechat_tools.proofs.dashboard_fleet import MadeFleet
from stonechat_tools.proofs.postgres_server import Server as PostgresServer

__all__ = ["postgres", "postgres_server"]

MOST_PAGES, MOST_DATA = 100_000, 300_000  # bytes, compressed


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, MadeFleet]]:
    db = tmp_path_factory.mktemp("dashboard") / "fleet.db"
    made = MadeFleet(db, 200)
    accounts.put(made.store, "vera", "viewer", PASSWORD)
    accounts.put(made.store, "otto", "operator", PASSWORD)
    yield db, made
    made.close()


@pytest.fixture(scope="module")
def open_to_all(fleet: tuple[Path, MadeFleet]) -> Iterator[Server]:
    with dashboard(fleet[0]) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(fleet: tuple[Path, MadeFleet]) -> Iterator[Server]:
    with dashboard(fleet[0], "--login") as server:
        yield server


def columns(snapshot: dict) -> dict[str, dict[str, object]]:
    """By device: field -> value."""
    strings, found = snapshot["strings"], {}
    for row in zip(*snapshot["columns"], strict=True):
        values = dict(zip(snapshot["fields"], row, strict=True))
        found[values["device"]] = {
            name: strings[value] if name in snapshot["texts"] else value for name, value in values.items()
        }
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_fleet_is_what_the_database_has(fleet: tuple[Path, MadeFleet], open_to_all: Server) -> None:
    made = fleet[1]
    snapshot = open_to_all.json("/api/fleet")
    rows = columns(snapshot)
    assert sorted(rows) == sorted(made.names)
    for seen in made.monitor.states():
        row = rows[seen.device]
        assert snapshot["states"][row["state"]] == seen.state.state, seen
        assert row["since"] + snapshot["base"] == round(seen.state.since_s)
        assert (row["class"], row["site"]) == (seen.labels.group, seen.labels.site)
        assert row["level"] == seen.level and row["model"] == seen.model[:16] and row["firmware"] == seen.firmware
        assert bool(row["cause"]) == (bool(seen.cause) and seen.state.state in AWAY), (row, seen.cause)
    states = {snapshot["states"][row["state"]] for row in rows.values()}
    assert states >= {"reporting", "silent", "gone", "asleep", "lying"}


def test_a_device_has_its_explanation_its_incidents_and_its_presence(open_to_all: Server) -> None:
    found = open_to_all.json("/api/device/pump-00003?span=6h")
    assert found["row"]["name"] == "Pump by the gate" and found["row"]["level"] == 2
    assert len(found["reports"][0]["features"]) == 3
    assert all(not name.startswith("feature") for name, _, _ in found["reports"][0]["features"])
    assert len(found["points"]["time"]) == len(found["points"]["score"]) > 5
    assert found["points"]["time"] == sorted(found["points"]["time"])
    assert found["facts"]["sources"] and found["facts"]["interval_s"] == 600
    away = open_to_all.json("/api/device/meter-00017")
    assert away["row"]["state"] == "silent" and "two intervals" in away["row"]["why"]
    for span in api.SPANS:
        open_to_all.json(f"/api/device/pump-00003?span={span}")


def test_what_a_later_state_has_under_response_and_update_is_a_row(tmp_path: Path) -> None:
    made = MadeFleet(tmp_path / "fleet.db", 5)
    with made.store.transaction() as db:
        facts = json.loads(db.execute("SELECT facts FROM statuses").fetchone()[0])
        facts |= {"response": {"action": "quarantine", "seconds": 300}, "update": ["1.4.3", "b", True]}
        db.execute("UPDATE statuses SET facts = ?", (json.dumps(facts),))
    view = View(made.store)
    view.poll()
    found = api.device(made.store, view, made.names[0], "1d")
    assert found and found["facts"]["response"] == "action quarantine, seconds 300"
    assert found["row"]["update"].startswith("1.4.3")
    made.close()


def test_a_change_is_all_that_is_sent(tmp_path: Path) -> None:
    made = MadeFleet(tmp_path / "fleet.db", 60)
    view = View(made.store)
    assert view.poll() and not view.poll()
    before = view.version, len(view._strings)
    assert json.loads(view.changes(view.epoch, *before) or b"")["rows"] == []
    time.sleep(0.01)
    name = made.names[7]
    made._now_s = time.time()
    made.put([made.report(name, 2)])
    made.step()
    assert view.poll()
    found = json.loads(view.changes(view.epoch, *before) or b"")
    assert [row[0] for row in found["rows"]] == [name] and found["rows"][0][FIELDS.index("level")] == 2
    labels.write(made.store, {name: Labels("Front", "pump", "new-site")})
    view.poll()
    found = json.loads(view.changes(view.epoch, *before) or b"")
    texts = dict(enumerate(list(view._strings)))
    assert found["strings"] and texts[found["rows"][0][FIELDS.index("site")]] == "new-site"
    labels.write(made.store, {name: Labels(removed_s=time.time())})
    view.poll()
    found = json.loads(view.changes(view.epoch, *before) or b"")
    assert found["gone"] == [name] and not found["rows"]
    assert view.changes("other", *before) is None
    assert view.changes(view.epoch, view.version + 1, 1) is None
    made.close()


@pytest.mark.parametrize("ahead_s", [-7200.0, 7200.0])
def test_the_clock_of_the_collectors_machine_may_be_another(tmp_path: Path, ahead_s: float) -> None:
    made = MadeFleet(tmp_path / "fleet.db", 10)
    view = View(made.store, clock=lambda: time.time() + ahead_s)
    for n in range(3):
        made._now_s = time.time()
        made.store.listened(made._now_s - 60, made._now_s)
        view.poll()
        made.put([made.report(made.names[n], 2)])
        assert view.poll() and view.facts(made.names[n])["level"] == 2  # type: ignore[index]
    made.close()


def test_another_database_at_the_path_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    MadeFleet(path, 5).close()
    with Store(path) as store:
        view = View(store)
        view.poll()
        epoch = view.epoch
        for end in ("", "-wal", "-shm"):
            Path(str(path) + end).unlink(missing_ok=True)
        MadeFleet(path, 3).close()
        view.poll()
        assert view.epoch != epoch and len(view.rows) == 3
        assert view.changes(epoch, 0, 1) is None


@pytest.mark.parametrize(
    "harm",
    [
        "INSERT INTO notes VALUES ('presence', 'pump-00003', '[') ON CONFLICT (kind, name) DO UPDATE SET value = '['",
        "INSERT INTO notes VALUES ('incident', '9', '{\"id\": 9}')",
        "INSERT INTO notes VALUES ('label', 'x', 'null')",
        "UPDATE statuses SET facts = '{'",
    ],
)
def test_a_database_that_somebody_has_written_to_is_named_and_read_again(tmp_path: Path, harm: str) -> None:
    made = MadeFleet(tmp_path / "fleet.db", 10)
    kept = made.store.rows("SELECT kind, name, value FROM notes")
    facts = made.store.rows("SELECT device, facts FROM statuses")
    with made.store.transaction() as db:
        db.execute(harm)
    with dashboard(tmp_path / "fleet.db") as server:
        status, _, data = server.ask("/api/fleet")
        assert status == 503 and b"can't be read" in data, data
        with made.store.transaction() as db:
            db.execute("DELETE FROM notes")
            db.executemany("INSERT INTO notes VALUES (?, ?, ?)", kept)
            db.executemany("UPDATE statuses SET facts = ? WHERE device = ?", [(text, row) for row, text in facts])
        assert wait_for(lambda: server.ask("/api/fleet")[0] == 200, 40)
        assert sorted(columns(server.json("/api/fleet"))) == sorted(made.names)
    made.close()


@pytest.mark.parametrize("kind", ["presence", "label", "incident", "cause"])
def test_what_came_with_a_note_that_can_not_be_read_is_shown_later(tmp_path: Path, kind: str) -> None:
    made = MadeFleet(tmp_path / "fleet.db", 20)
    view = View(made.store)
    view.poll()
    names = (made.names[0], made.names[-1])
    made._now_s = time.time()
    made.put([made.report(name, 2) for name in names])
    made.step()
    labels.write(made.store, {name: Labels("Moved", "pump", "far") for name in names})
    row = made.store.rows("SELECT name, value FROM notes WHERE kind = ? ORDER BY name DESC", (kind,))
    name, value = row[0] if row else ("zz", None)
    with made.store.transaction() as db:
        db.execute("DELETE FROM notes WHERE kind = ? AND name = ?", (kind, name))
        db.execute("INSERT INTO notes VALUES (?, ?, '[')", (kind, name))
    with pytest.raises(ValueError):
        view.poll()
    with made.store.transaction() as db:
        db.execute("DELETE FROM notes WHERE kind = ? AND name = ?", (kind, name))
        if value is not None:
            db.execute("INSERT INTO notes VALUES (?, ?, ?)", (kind, name, value))
    view.poll()
    for name in names:
        found = view.facts(name)
        assert found and (found["level"], found["site"], found["name"]) == (2, "far", "Moved"), found
    made.close()


def test_a_dashboard_waits_for_its_database_and_makes_none(tmp_path: Path) -> None:
    """One that is moved away, copied back bit by bit, or damaged is left to whoever does that."""
    path, away = tmp_path / "fleet.db", tmp_path / "away"
    made = MadeFleet(path, 5)
    accounts.put(made.store, "otto", "operator", PASSWORD)
    made.close()
    kept = path.read_bytes()

    def files() -> set[str]:
        return {each.name for each in tmp_path.iterdir()} - {"dashboard.log", "fleet.db-wal", "fleet.db-shm"}

    with dashboard(path) as server:
        assert len(columns(server.json("/api/fleet"))) == 5
        path.rename(away)
        for end in ("-wal", "-shm"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        for harm in (None, b"", kept[:4096], kept[: len(kept) // 2], b"x" * len(kept)):
            if harm is not None:
                path.write_bytes(harm)
            for asked, body in (
                ("/api/device/pump-00003", None),
                ("/api/login", {"name": "otto", "password": PASSWORD}),
            ):
                status, _, data = server.ask(asked, body)
                assert status == 503 and b"fleet.db" in data, (harm and harm[:20], asked, status, data)
            assert files() == ({"away"} if harm is None else {"away", "fleet.db"})
            assert harm is None or path.read_bytes() == harm
        path.unlink()
        away.rename(path)
        server.log_in("otto")
        assert wait_for(lambda: server.ask("/api/device/pump-00003")[0] == 200, 30)
    assert files() == {"fleet.db"}


def test_who_reads_does_not_wait_for_who_writes(fleet: tuple[Path, MadeFleet], guarded: Server) -> None:
    vera, otto = guarded.log_in("vera"), guarded.log_in("otto")
    number = guarded.json("/api/incidents", **vera)["open"][0]["id"]
    with contextlib.closing(sqlite3.connect(fleet[0], isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        path = f"/api/incidents/{number}/acknowledge"
        asked = [threading.Thread(target=guarded.ask, args=(path, {}), kwargs=otto) for _ in range(50)]
        for thread in asked:
            thread.start()
        time.sleep(0.5)
        began_s = time.monotonic()
        for path in ("/api/fleet", "/api/incidents", "/api/device/pump-00003", "/api/rollouts"):
            assert guarded.ask(path, **vera)[0] == 200
        assert time.monotonic() - began_s < 5  # one that waits for the lock waits for 10 s
        lock.execute("ROLLBACK")
    for thread in asked:
        thread.join(60)


def test_browsers_hear_of_a_change(fleet: tuple[Path, MadeFleet], open_to_all: Server) -> None:
    made = fleet[1]
    snapshot = open_to_all.json("/api/fleet")
    query = f"epoch={snapshot['epoch']}&version={snapshot['version']}&strings={len(snapshot['strings'])}"
    with socket.create_connection(("127.0.0.1", open_to_all.port), 60) as link:
        link.sendall(f"GET /api/live?{query} HTTP/1.1\r\nHost: 127.0.0.1:{open_to_all.port}\r\n\r\n".encode())
        made._now_s = time.time()
        made.put([made.report(made.names[70], 1)])
        made.step()
        got, end_s = b"", time.monotonic() + 60
        while made.names[70].encode() not in got and time.monotonic() < end_s:
            got += link.recv(65536)
    assert b"text/event-stream" in got and made.names[70].encode() in got
    assert b"content-security-policy" in got


def test_it_ends_at_once_while_browsers_listen(fleet: tuple[Path, MadeFleet]) -> None:
    """dashboard() looks for errors in what it printed."""
    with dashboard(fleet[0]) as server:
        snapshot = server.json("/api/fleet")
        query = f"epoch={snapshot['epoch']}&version={snapshot['version']}&strings={len(snapshot['strings'])}"
        links = []
        for _ in range(5):
            link = socket.create_connection(("127.0.0.1", server.port), 60)
            link.sendall(f"GET /api/live?{query} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
            assert link.recv(4096)
            links.append(link)
    for link in links:
        while link.recv(65536):
            pass
        link.close()


def test_pages_and_the_data_of_ten_thousand_devices_are_small(tmp_path: Path) -> None:
    files = load_files()
    assert sum(len(file.packed) for file in files.values()) <= MOST_PAGES
    made = MadeFleet(tmp_path / "fleet.db", 40)
    view = View(made.store)
    view.poll()
    rows = list(view.rows.values())
    chance = random.Random(4)
    for n in range(10_000):  # names that no other has anything in common with: the worst case
        name = "dev-" + hashlib.sha256(b"%d" % n).hexdigest()[:12]
        row = list(rows[n % len(rows)])
        row[0] = name
        for field, most in (("since", 500_000), ("seen", 600), ("score", 2000), ("evidence", 300), ("reports", 9999)):
            row[FIELDS.index(field)] = chance.randrange(most)
        view.rows[name] = tuple(row)
    view.version += 1
    assert len(view.snapshot()) <= MOST_DATA
    made.close()


# --- who may do what --------------------------------------------------------------------------------------------------


def test_without_a_session_nothing_but_the_pages_is_given_out(guarded: Server) -> None:
    for path in ("/", "/static/app.js", "/static/icon.svg"):
        assert guarded.ask(path)[0] == 200
    assert guarded.json("/api/session")["role"] is None
    for path in ("/api/fleet", "/api/live", "/api/device/pump-00003", "/api/incidents", "/api/audit", "/metrics"):
        status, headers, data = guarded.ask(path)
        assert status in (401, 404) and b"pump" not in data, path
    for name in ("vera", "otto"):
        assert len(columns(guarded.json("/api/fleet", **guarded.log_in(name)))) == 200
    assert guarded.ask("/api/fleet", Cookie="stonechat=AAAA")[0] == 401


def test_a_wrong_password_is_refused_and_many_are_for_a_while(fleet: tuple[Path, MadeFleet]) -> None:
    with dashboard(fleet[0], "--login") as server:
        statuses = []
        for n in range(accounts.NAME_TRIES + 2):
            status, headers, _ = server.ask("/api/login", {"name": "vera", "password": f"wrong number {n}"})
            statuses.append(status)
        assert statuses == [401] * accounts.NAME_TRIES + [429] * 2
        assert 0 < int(headers["retry-after"]) <= accounts.WINDOW_S + 1
        assert server.ask("/api/login", {"name": "vera", "password": PASSWORD})[0] == 429
        server.log_in("otto")  # another account is not locked out
        for n in range(accounts.ADDRESS_TRIES):
            server.ask("/api/login", {"name": f"guess{n}", "password": "wrong"})
        assert server.ask("/api/login", {"name": "otto", "password": PASSWORD})[0] == 429
    said = [entry["what"] for entry in audit.entries(fleet[1].store)]
    assert "log-in refused" in said and "log-in" in said


def test_many_addresses_have_no_more_tries_than_one_and_lock_nobody_out(
    served: Callable[..., tuple[int, serving.Server]], fleet: tuple[Path, MadeFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password that is tried from everywhere: who has logged in before does so again, from where it was."""
    path, made = fleet
    monkeypatch.setattr(accounts, "ACCOUNT_TRIES", 4)
    audit.note(made.store, "otto", "log-in", address="10.9.9.9")
    audit.note(made.store, "ada", "log-in", address="10.8.8.8")
    audit.note(made.store, "otto", "log-in refused", address="10.7.7.7")
    proxied = {"host": "fleet.example", "origin": "https://fleet.example", "x-forwarded-proto": "https"}
    with Store(path) as store, Store(path) as own:
        options = Options(anonymous=False, hosts=("fleet.example",), tls=True, proxies=("127.0.0.1/32",))
        port, _ = served(*make(store, View(own), options))

        def login(address: str, password: str, name: str = "otto") -> int:
            headers = proxied | {"x-forwarded-for": f"1.1.1.1, {address}", "content-type": "application/json"}
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as link:
                link.request("POST", "/api/login", json.dumps({"name": name, "password": password}), headers)
                return link.getresponse().status

        assert [login(f"10.0.{n}.1", "wrong password") for n in range(6)] == [401] * 4 + [429] * 2
        assert login("10.1.1.1", PASSWORD) == login("10.8.8.8", PASSWORD) == login("10.7.7.7", PASSWORD) == 429
        assert login("10.9.9.9", PASSWORD) == 200
        assert login("10.1.1.1", PASSWORD, "vera") == 200


def test_the_cookie_is_for_this_page_alone(guarded: Server) -> None:
    _, headers, _ = guarded.ask("/api/login", {"name": "vera", "password": PASSWORD})
    words = {word.strip().lower() for word in headers["set-cookie"].split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= words
    assert "domain" not in headers["set-cookie"].lower()


def test_what_another_page_sends_is_refused(guarded: Server) -> None:
    me = guarded.log_in("otto")
    silence = {"matchers": ["site=berlin"], "for": "1h", "comment": "test"}
    good = guarded.ask("/api/silences", silence, **me)
    assert good[0] == 200, good
    identity = json.loads(good[2])["id"]
    for change in (
        {"Origin": "https://evil.example"},
        {"Origin": ""},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"X-CSRF-Token": "A" * 32},
        {"X-CSRF-Token": ""},
        {"X-CSRF-Token": "\u00e4"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
    ):
        for path in ("/api/silences", f"/api/silences/{identity}/end", "/api/incidents/1/acknowledge"):
            status, _, data = guarded.ask(path, silence, **(me | change))
            assert status in (403, 415), (change, path, status, data)
    assert guarded.ask("/api/login", {"name": "otto", "password": PASSWORD}, Origin="https://evil.example")[0] == 403
    assert guarded.ask(f"/api/silences/{identity}/end", method="GET", **me)[0] == 405
    assert guarded.ask(f"/api/silences/{identity}/end", {}, **me)[0] == 200


def test_a_viewer_looks_and_an_operator_acts(fleet: tuple[Path, MadeFleet], guarded: Server) -> None:
    vera, otto = guarded.log_in("vera"), guarded.log_in("otto")
    incidents = guarded.json("/api/incidents", **vera)
    number = incidents["open"][0]["id"]
    for path, body in (
        (f"/api/incidents/{number}/acknowledge", {}),
        ("/api/silences", {"matchers": ["kind=silent"], "for": "1h"}),
        ("/api/device/pump-00003/command", {"command": "report-now"}),
    ):
        assert guarded.ask(path, body, **vera)[0] == 403, path
        assert guarded.ask(path, body)[0] == 401, path
    assert guarded.ask("/api/audit", **vera)[0] == 403
    assert guarded.ask(f"/api/incidents/{number}/acknowledge", {}, **otto)[0] == 200
    assert guarded.ask("/api/incidents/99999/acknowledge", {}, **otto)[0] == 400
    assert guarded.ask("/api/device/pump-00003/command", {"command": "report-now"}, **otto)[0] == 404  # no --operator
    made = fleet[1]
    made.step(time.time() + 5)  # the collector takes the request
    saved = made.store.notes("incident", str(number))[str(number)]
    assert saved["acknowledged_by"] == "otto"
    newest = guarded.json("/api/audit", **otto)["entries"]
    assert any(entry["what"] == "acknowledge" and entry["facts"] == {"incident": number} for entry in newest)
    audit.verify(made.store)


def test_roll_outs_are_shown_and_paused_by_an_operator(tmp_path: Path) -> None:
    made = MadeFleet(tmp_path / "fleet.db", 20)
    accounts.put(made.store, "otto", "operator", PASSWORD)
    accounts.put(made.store, "vera", "viewer", PASSWORD)
    with dashboard(tmp_path / "fleet.db") as server:
        (found,) = server.json("/api/rollouts")["rollouts"]
        assert (found["class"], found["version"], found["state"]) == ("pump", 3, "running")
        otto, vera = server.log_in("otto"), server.log_in("vera")
        path = f"/api/rollouts/{found['id']}/"
        assert server.ask(path + "pause", {}, **vera)[0] == 403
        assert server.ask(path + "resume", {}, **otto)[0] == 400  # it runs
        assert server.ask(path + "delete", {}, **otto)[0] == 400
        assert server.ask("/api/rollouts/999/pause", {}, **otto)[0] == 400
        assert server.ask(path + "pause", {"comment": "\x1b"}, **otto)[0] == 400
        server.json(path + "pause", {"comment": "too many alarms"}, **otto)
        assert server.json("/api/rollouts")["rollouts"][0]["state"] == "paused"
    assert "otto" in [each["by"] for each in rollouts.log(made.store, found["id"])]
    assert audit.entries(made.store)[0]["what"] == "roll-out: pause"
    made.close()


def test_an_account_that_is_changed_or_removed_is_logged_out(fleet: tuple[Path, MadeFleet]) -> None:
    db, made = fleet
    with dashboard(db, "--login") as server:
        accounts.put(made.store, "temp", "operator", PASSWORD)
        me = server.log_in("temp")
        assert server.ask("/api/fleet", **me)[0] == 200
        accounts.put(made.store, "temp", "viewer", PASSWORD + "2")
        time.sleep(accounts.CACHE_S + 0.5)
        assert server.ask("/api/fleet", **me)[0] == 401
        me = server.log_in("temp", PASSWORD + "2")
        accounts.remove(made.store, "temp")
        time.sleep(accounts.CACHE_S + 0.5)
        assert server.ask("/api/fleet", **me)[0] == 401
        me = server.log_in("vera")
        assert server.ask("/api/logout", {}, **me)[0] == 200
        assert server.ask("/api/fleet", **me)[0] == 401


def test_on_loopback_everybody_looks_and_nobody_acts(open_to_all: Server) -> None:
    session = open_to_all.json("/api/session")
    assert session["role"] == "viewer" and session["user"] == "" and not session["commands"]
    assert open_to_all.ask("/api/incidents/1/acknowledge", {})[0] == 401
    assert open_to_all.ask("/api/audit")[0] == 403
    me = open_to_all.log_in("otto")
    assert open_to_all.ask("/api/audit", **me)[0] == 200


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_every_answer_has_a_strict_policy(open_to_all: Server) -> None:
    for path in ("/", "/static/app.js", "/static/none", "/api/fleet", "/api/nothing", "/metrics", "/../x"):
        _, headers, _ = open_to_all.ask(path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert "frame-ancestors 'none'" in policy and "base-uri 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
    page = load_files()["index.html"].body.decode()
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*src=)|javascript:", page)


def test_pages_ask_nobody_else() -> None:
    for name, file in load_files().items():
        if name.startswith("uplot") or not name.endswith((".js", ".css", ".html")):
            continue
        text = file.body.decode()
        assert not re.search(r"https?:|[\"'(]//", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/..%5capp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/index.html%00.js",
        "//static/../../../../etc/passwd",
        "/api/device/..%2f..%2fetc%2fpasswd",
        "/api/device/%00",
        "/api/device/" + "a" * 5000,
        "/api/device/pump'%20OR%201=1--",
        "/.git/config",
        "/app.py",
    ],
)
def test_no_path_reaches_the_disk(open_to_all: Server, path: str) -> None:
    status, _, data = open_to_all.ask(path)
    assert status in (400, 404, 414, 431), (status, data)
    assert b"root:" not in data and b"import" not in data


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": ""},
        {"Host": "127.0.0.1.evil.example"},
        {"X_Forwarded_For": "10.0.0.9"},
        {"Forwarded": "for=1"},
        {"X_Real_IP": "10.0.0.9"},
        {"Via": "1.1 proxy"},
    ],
)
def test_a_name_that_is_not_ours_and_a_proxy_are_refused(open_to_all: Server, headers: dict[str, str]) -> None:
    status, _, data = open_to_all.ask("/api/fleet", **headers)
    assert status in (400, 403, 421) and b"columns" not in data


HAPROXY = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin")


@contextlib.contextmanager
def haproxy(folder: Path, port: int) -> Iterator[int]:
    """A real HAProxy in front of a dashboard on this port -> its own port. TLS is only said, by the header."""
    assert HAPROXY
    own = free_port()
    (folder / "haproxy.cfg").write_text(
        f"defaults\n mode http\n timeout connect 10s\n timeout client 60s\n timeout server 60s\n"
        f"frontend f\n bind 127.0.0.1:{own}\n option forwardfor\n http-request set-header X-Forwarded-Proto https\n"
        f" default_backend b\nbackend b\n server d 127.0.0.1:{port}\n"
    )
    process = subprocess.Popen([HAPROXY, "-db", "-f", str(folder / "haproxy.cfg")], stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", own)), 20)
        yield own
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed (make setup, as root)")
def test_behind_a_proxy_each_client_counts_for_itself(fleet: tuple[Path, MadeFleet], tmp_path: Path) -> None:
    name = {"Host": "fleet.example.org", "Origin": "https://fleet.example.org"}
    with dashboard(fleet[0], "--proxy", "127.0.0.1", "--host", "fleet.example.org") as direct:
        assert direct.ask("/api/session", **name)[0] == 403  # not by TLS
        with haproxy(tmp_path, direct.port) as port:
            behind = Server(f"http://127.0.0.1:{port}/", port)
            assert behind.ask("/api/fleet", **name)[0] == 401
            assert behind.ask("/api/fleet", Host="evil.example")[0] == 421  # a name that --host does not have
            assert behind.ask("/metrics", **name)[0] == 404
            guess = {"name": "vera", "password": "wrong"}
            for n in range(accounts.ADDRESS_TRIES):
                spoofed = {"X_Forwarded_For": f"10.0.0.{n}"}  # what a client claims of itself is not believed
                behind.ask("/api/login", guess | {"name": f"guess{n}"}, source="127.0.0.2", **name, **spoofed)
            known = {"name": "vera", "password": PASSWORD}
            assert behind.ask("/api/login", known, source="127.0.0.2", **name)[0] == 429
            status, headers, _ = behind.ask("/api/login", known, source="127.0.0.3", **name)
            assert status == 200 and "; secure" in headers["set-cookie"].lower()
            assert headers["set-cookie"].startswith("__Host-") and headers["strict-transport-security"]
    said = [entry["facts"].get("address") for entry in audit.entries(fleet[1].store)]
    assert "127.0.0.2" in said and "127.0.0.3" in said


@pytest.mark.parametrize("proxy", ["", "*", "nginx", "10.0.0.1/8", "0.0.0.0/0", "::/0", "127.0.0.1:80", "999.1.1.1"])
def test_a_proxy_that_is_no_address_or_everybody_is_refused(proxy: str) -> None:
    with pytest.raises(ConfigError, match="--proxy"):
        dashboard_verb._proxies([proxy])


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"null", b'{"name": 1}', b'{"name": "a", "password": []}', b"[" * 9000, b"{" + b" " * 20_000],
)
def test_nonsense_is_refused_with_one_line(open_to_all: Server, body: bytes) -> None:
    status, _, data = open_to_all.ask("/api/login", body)
    assert status in (400, 413) and len(json.loads(data)["error"]) < 300


@pytest.mark.parametrize(
    "silence",
    [
        {},
        {"matchers": [], "for": "1h"},
        {"matchers": ["site"], "for": "1h"},
        {"matchers": ["site=~("], "for": "1h"},
        {"matchers": ["site=a"], "for": "1000d"},
        {"matchers": ["site=a"], "for": 5},
        {"matchers": ["site=a"], "for": "1h", "comment": "\x1b[31m"},
        {"matchers": ["site=" + "a" * 600], "for": "1h"},
        {"matchers": "site=a", "for": "1h"},
    ],
)
def test_a_silence_that_can_not_be_is_refused(guarded: Server, silence: dict) -> None:
    status, _, data = guarded.ask("/api/silences", silence, **guarded.log_in("otto"))
    assert status == 400 and json.loads(data)["error"], data


ODD: tuple[object, ...] = ("", "\ud800", "\0", "\x1b[31m", "a" * 5000, "9" * 40 + "d", "site=~\ud800", "(a|a)" * 39)
ODD += (-1, 10**30, 1e308, True, None, [], {}, [None], ["\ud800"], ["site=\ud800"], ["\0=\0"], [["site=a"]])


def test_any_value_of_any_field_is_refused_with_one_line(tmp_path: Path) -> None:
    """dashboard() looks for a traceback in what it printed."""
    made = MadeFleet(tmp_path / "fleet.db", 3)
    accounts.put(made.store, "otto", "operator", PASSWORD)
    rollout = rollouts.rollouts(made.store)[0].id
    right: dict[str, dict[str, object]] = {
        "/api/silences": {"matchers": ["site=a"], "for": "soon", "comment": ""},
        "/api/device/pump-00000/command": {"command": "mute", "lasts_s": 60},
        f"/api/device/{made.names[0]}/command": {"command": "was-normal", "report": 1},
        f"/api/rollouts/{rollout}/resume": {"comment": ""},
        f"/api/rollouts/{10**30}/pause": {"comment": ""},
        f"/api/incidents/{10**30}/acknowledge": {"x": ""},
        "/api/silences/%ED%A0%80/end": {"x": ""},
        "/api/silences/%00/end": {"x": ""},
        "/api/login": {"name": "a", "password": "b"},
    }
    with dashboard(tmp_path / "fleet.db", "--operator", str(tmp_path / "no-socket")) as server:
        me = server.log_in("otto")
        for path, body in right.items():
            for field in body:
                for value in ODD:
                    status, _, data = server.ask(path, body | {field: value}, **me)
                    assert 400 <= status < 500, (path, field, value, status, data)
                    assert len(json.loads(data)["error"]) < 700, (path, field, value)
        for path in ("/api/live?epoch=%00&version=%C2%B2&strings=1", "/api/live?version=1_0", "/api/device/%ED%A0%80"):
            assert 400 <= server.ask(path, **me)[0] < 500, path
    made.close()


def test_the_cookies_of_other_programs_on_this_host_hide_none(guarded: Server) -> None:
    me = guarded.log_in("vera")
    for other in ('jar={"a": 1}', "expires=never", "a b=c", "x", '="', "k=" + "v" * 6000, "\u00e4=1", "path=/; secure"):
        assert guarded.ask("/api/fleet", **(me | {"Cookie": f"{other}; {me['Cookie']}; {other}"}))[0] == 200, other


def test_a_page_that_refreshes_itself_does_not_keep_its_session(tmp_path: Path) -> None:
    now = [0.0]
    with Store(tmp_path / "a.db") as store:
        accounts.put(store, "otto", "operator", PASSWORD)
        sessions = accounts.Sessions(store, lambda: now[0])
        cookie, _ = sessions.begin(accounts.read(store)[0])
        for step in range(1, 8):
            now[0] = step * accounts.IDLE_S / 2
            assert sessions.get(cookie) is not None
        for part in (0.4, 0.8, 1.0):
            now[0] = (3.5 + part) * accounts.IDLE_S
            assert sessions.get(cookie, used=False) is not None
        now[0] += 1
        assert sessions.get(cookie, used=False) is None


@pytest.mark.parametrize(
    ("address", "other", "same"),
    [("10.0.0.1", "10.0.0.2", False), ("2001:db8::1", "2001:db8::ffff:1", True), ("2001:db8::1", "2001:db9::1", False)]
    + [
        ("x" * 64 + "1", "x" * 64 + "2", True),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "10.0.0.1", False),
    ],
)
def test_whoever_has_a_network_has_no_more_tries(address: str, other: str, same: bool) -> None:
    tries = accounts.Tries()
    for n in range(accounts.ADDRESS_TRIES):
        tries.failed(f"guess{n}", address)
    assert bool(tries.wait_s("vera", other)) == same and tries.wait_s("vera", address)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, serving.Server]]]:
    """served(application, state) -> (its port, the server), in a thread, with short limits."""
    monkeypatch.setattr(serving, "REQUEST_S", 0.5)
    monkeypatch.setattr(serving, "STALLED_S", 1.0)
    running: list[tuple[serving.Server, threading.Thread, socket.socket]] = []

    def start(app: ASGIApp, state: State | None = None) -> tuple[int, serving.Server]:
        listener = serving.listen("127.0.0.1", 0)
        server = serving.Server(app, state)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        running.append((server, thread, listener))
        return listener.getsockname()[1], server

    yield start
    for server, thread, listener in running:
        server.should_exit = True
        thread.join(30)
        listener.close()


def test_who_connects_and_says_nothing_keeps_nobody_out(
    served: Callable[..., tuple[int, serving.Server]], fleet: tuple[Path, MadeFleet]
) -> None:
    with Store(fleet[0]) as store, Store(fleet[0]) as own:
        view = View(own)
        view.poll()
        port, server = served(*make(store, view, Options()))
        host = f"Host: 127.0.0.1:{port}\r\n"
        with contextlib.ExitStack() as links:
            idle = []
            for said in ("", "GET", "GET / HTTP/1.1\r\n", f"GET / HTTP/1.1\r\n{host}\r\nGET / HTTP/1.1\r\nX: "):
                for _ in range(3):
                    link = links.enter_context(socket.create_connection(("127.0.0.1", port), 30))
                    link.sendall(said.encode())
                    idle.append(link)
            query = f"epoch={view.epoch}&version={view.version}&strings=1"
            busy = links.enter_context(socket.create_connection(("127.0.0.1", port), 30))
            busy.sendall(f"GET /api/live?{query} HTTP/1.1\r\n{host}\r\n".encode())
            for link in idle:
                with contextlib.suppress(ConnectionResetError):
                    while link.recv(65536):
                        pass  # at last it is closed
            assert busy.recv(65536)
        assert wait_for(lambda: not server.server_state.connections, 30)


@pytest.mark.parametrize("proxies", [(), ("127.0.0.0/30",)])
def test_one_address_takes_only_its_part_of_the_connections(
    served: Callable[..., tuple[int, serving.Server]],
    fleet: tuple[Path, MadeFleet],
    monkeypatch: pytest.MonkeyPatch,
    proxies: tuple[str, ...],
) -> None:
    monkeypatch.setattr(serving, "REQUEST_S", 60.0)
    monkeypatch.setattr(serving, "MAX_OF_ADDRESS", 5)
    with Store(fleet[0]) as store, Store(fleet[0]) as own, contextlib.ExitStack() as links:
        port, server = served(*make(store, View(own), Options(proxies=proxies)))

        def connect(address: str) -> socket.socket:
            return links.enter_context(socket.create_connection(("127.0.0.1", port), 30, (address, 0)))

        held = [connect("127.0.0.2") for _ in range(9)]
        assert wait_for(lambda: len(server.server_state.connections) == (9 if proxies else 5))
        for address in ("127.0.0.4", "127.0.0.2"):
            link = connect(address)
            with contextlib.suppress(ConnectionError):
                link.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                assert link.recv(100).startswith(b"HTTP/1.1 200") == (address == "127.0.0.4" or bool(proxies))
        for each in held:
            each.close()
        assert wait_for(lambda: len(server.server_state.connections) <= 2)
        connect("127.0.0.2").close()
        assert wait_for(lambda: not server.config.http.held.get("127.0.0.2"))  # type: ignore[union-attr]


def test_the_head_of_what_has_no_end_has_one(open_to_all: Server) -> None:
    status, headers, data = open_to_all.ask("/api/live?epoch=x&version=0&strings=1", method="HEAD")
    assert status == 200 and headers["content-type"].startswith("text/event-stream") and not data


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has TCP_USER_TIMEOUT")
def test_who_reads_nothing_is_gone(served: Callable[..., tuple[int, serving.Server]]) -> None:
    async def endless(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while server.server_state.connections:
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})

    port, server = served(endless)
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(30)
        link.connect(("127.0.0.1", port))
        link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert wait_for(lambda: server.server_state.tasks, 30)
        assert wait_for(lambda: not server.server_state.connections, 30)


def test_a_command_is_signed_by_the_operator_and_its_answer_is_shown(tmp_path: Path) -> None:
    """From the page to a device that verifies it. The operator's keys, socket and checks are real; the broker is not
    there."""
    fleet = provision.Fleet.init(tmp_path / "fleet", provision.Settings("127.0.0.1", 1883, auth="plain"))
    fleet.add("pump-00003")
    made = MadeFleet(tmp_path / "fleet.db", 20)
    accounts.put(made.store, "otto", "operator", PASSWORD)
    sent: list[tuple[str, bytes]] = []
    with Store(":memory:") as own:
        keys = keyring.Keys(fleet.folder / "operator/keys")
        signer = operator.Operator(
            keys, own, lambda topic, payload: sent.append((topic, payload)), allow=("mute", "report-now")
        )
        door = operator.Door(tmp_path / "socket", signer)
        with dashboard(tmp_path / "fleet.db", "--operator", str(tmp_path / "socket")) as server:
            me = server.log_in("otto")
            assert server.json("/api/session", **me)["commands"] == list(api.COMMANDS)
            path = "/api/device/pump-00003/command"
            sequence = server.json(path, {"command": "mute", "lasts_s": 600}, **me)["sequence"]
            refused = (
                {"command": "calibrate"},  # not among what this operator signs
                {"command": "own-model"},
                {"command": "mute"},
                {"command": "mute", "lasts_s": -1},
                {"command": "mute", "lasts_s": 10**10},
                {"command": "was-normal", "report": "1"},
                {},
            )
            for asked in refused:
                assert server.ask(path, asked, **me)[0] == 400, asked
            assert server.ask("/api/device/other/command", {"command": "report-now"}, **me)[0] == 400
            shown = server.json("/api/device/pump-00003", **me)["commands"]
            assert [(each["command"], each["sequence"], each["answer"]) for each in shown] == [("mute", sequence, None)]
            device = Delivery(
                "pump-00003", keyring.read_secrets(fleet.folder / "devices/pump-00003/device.key")[0], MemoryOutbox()
            )
            device.on_message(*sent[0])
            assert device.rejected == 0 and len(sent) == 1
            fields = {0: 1, 1: 4000, 2: 1, 3: int(time.time()), 15: [sequence, 0], 16: b"abcd"}
            made.put([wire.reread("pump-00003", wire.encode(fields))])
            shown = server.json("/api/device/pump-00003", **me)["commands"]
            assert [(each["command"], each["answer"]) for each in shown] == [("mute", "accepted")]
        door.close()
        with dashboard(tmp_path / "fleet.db", "--operator", str(tmp_path / "socket")) as server:
            me = server.log_in("otto")
            status, _, data = server.ask("/api/device/pump-00003/command", {"command": "report-now"}, **me)
            assert status == 400 and b"is `stonechat operator` running" in data
    made.close()


def test_the_audit_log_shows_what_was_changed(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        for n in range(5):
            audit.note(store, "otto", "silence", id=str(n))
        count, head = audit.verify(store)
        assert count == 5
        audit.note(store, "otto", "command", device="pump-1")
        assert audit.verify(store, head)[0] == 6
        tried = {
            "changed": "UPDATE audit SET facts = '{}' WHERE sequence = 3",
            "who": "UPDATE audit SET who = 'vera' WHERE sequence = 6",
            "time": "UPDATE audit SET at_ms = at_ms + 1 WHERE sequence = 1",
            "removed": "DELETE FROM audit WHERE sequence = 2",
            "first": "DELETE FROM audit WHERE sequence = 1",
        }
        for what, statement in tried.items():
            with pytest.raises(ConfigError, match="broken at entry"), store.transaction() as db:
                db.execute(statement)
                rows = db.execute("SELECT count(*) FROM audit").fetchone()
                assert rows[0] >= 5, what
                audit.verify(store)
            audit.verify(store)  # the transaction was rolled back
        with store.transaction() as db:
            db.execute("DELETE FROM audit WHERE sequence >= 5")
        audit.verify(store)  # what is cut off at the end is whole by itself
        for harm in (
            "facts = '{'",
            "facts = x'00ff'",
            "facts = '[]'",
            "at_ms = 'soon'",
            "who = x'00'",
            "digest = x'00'",
        ):
            with pytest.raises(ConfigError, match="broken at entry 2"), store.transaction() as db:
                db.execute(f"UPDATE audit SET {harm} WHERE sequence = 2")
                shown = audit.entries(store)  # the page shows what there is
                assert len(json.dumps(shown, default=str)) > 100 and len(shown) == 4, harm
                audit.verify(store)
        with pytest.raises(ConfigError, match="removed from the end"):
            audit.verify(store, head)


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Store(path) as one, Store(path) as other:
        threads = [
            threading.Thread(target=lambda store=store: [audit.note(store, "x", "y", n=n) for n in range(20)])
            for store in (one, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert audit.verify(one)[0] == 40


@needs_postgres
@pytest.mark.slow(5)
def test_the_same_on_postgresql(postgres: PostgresServer, tmp_path: Path) -> None:
    made = MadeFleet(postgres.url, 60)
    view = View(made.store)
    assert view.poll() and not view.poll()
    snapshot = json.loads(gzip.decompress(view.snapshot()))
    for seen in made.monitor.states():
        row = columns(snapshot)[seen.device]
        assert snapshot["states"][row["state"]] == seen.state.state and row["firmware"] == seen.firmware
    accounts.put(made.store, "otto", "viewer", PASSWORD)
    accounts.put(made.store, "otto", "operator", PASSWORD)
    made.store.sent_command("pump-00003", 4711, 5, [], time.time())
    made.store.sent_command("pump-00003", 4711, 5, [], time.time())
    with Store(postgres.url) as other:
        threads = [
            threading.Thread(target=lambda store=store: [audit.note(store, "x", "y", n=n) for n in range(15)])
            for store in (made.store, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert audit.verify(made.store)[0] == 30
    url_file = tmp_path / "url"
    url_file.touch(0o600)
    url_file.write_text(postgres.url + "\n")
    call = [sys.executable, "-m", "stonechat_tools.cli", "dashboard", "--database-file", str(url_file), "--json"]
    process = subprocess.Popen([*call, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = json.loads(process.stdout.readline())["url"]
        server = Server(url, int(url.rstrip("/").rpartition(":")[2]))
        me = server.log_in("otto")
        assert len(columns(server.json("/api/fleet", **me))) == 60
        found = server.json("/api/device/pump-00003", **me)
        assert [each["command"] for each in found["commands"]] == ["report-now"] and found["reports"]
    finally:
        process.terminate()
        process.wait(30)
    made.close()


def test_with_tls_the_cookie_never_leaves_it(fleet: tuple[Path, MadeFleet], tmp_path: Path) -> None:
    ca = provision.Fleet.init(tmp_path / "fleet", provision.Settings("localhost", 1883))
    certificate, key = ca.certificate("broker", ["localhost", "127.0.0.1"])
    (tmp_path / "c.pem").write_bytes(pem(certificate))
    (tmp_path / "k.pem").write_bytes(pem_key(key))
    call = [sys.executable, "-m", "stonechat_tools.cli", "dashboard", "--db", str(fleet[0]), "--json"]
    call += ["--listen", "127.0.0.1:0", "--login", "--cert", str(tmp_path / "c.pem"), "--key", str(tmp_path / "k.pem")]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = json.loads(process.stdout.readline())["url"]
        assert url.startswith("https://")
        asked = urllib.request.Request(
            url + "api/login",
            json.dumps({"name": "vera", "password": PASSWORD}).encode(),
            {"Content-Type": "application/json", "Origin": url.rstrip("/")},
        )
        trust = ssl.create_default_context(cafile=str(tmp_path / "fleet/ca.crt"))
        with urllib.request.urlopen(asked, timeout=60, context=trust) as answer:
            cookie = answer.headers["set-cookie"]
            assert cookie.startswith("__Host-stonechat=") and "secure" in cookie.lower()
            assert answer.headers["strict-transport-security"]
    finally:
        process.terminate()
        process.wait(30)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_accounts_by_the_command_line(tmp_path: Path) -> None:
    db = str(tmp_path / "a.db")
    assert command("--db", db, "user", "list").returncode == 1  # there is no database yet
    Store(db).close()
    assert stat.S_IMODE(os.stat(db).st_mode) == 0o600
    done = command("--db", db, "user", "add", "otto", "--role", "operator", stdin=PASSWORD + "\n")
    assert done.returncode == 0, done.stderr
    call = [sys.executable, "-m", "stonechat_tools.cli", "dashboard", "--db", db, "user", "add", "x"]
    done = subprocess.run(call, input=b"\xff\xfe" * 8 + b"\n", capture_output=True, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    for name, password, role in (("a b", PASSWORD, "viewer"), ("x", "short", "viewer"), ("", PASSWORD, "viewer")):
        done = command("--db", db, "user", "add", name, "--role", role, stdin=password + "\n")
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "otto" in command("--db", db, "user", "list").stdout
    with Store(db) as store:
        (account,) = accounts.read(store)
        assert PASSWORD not in account.secret and account.secret.startswith("scrypt$15$")
    assert command("--db", db, "user", "remove", "otto").returncode == 0
    assert command("--db", db, "user", "remove", "otto").returncode == 1
    done = command("--db", db, "audit", "--verify")
    assert done.returncode == 0 and done.stdout.startswith("2 entries")
    assert "otto" in command("--db", db, "audit").stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--listen", "0.0.0.0:0"),
        ("--listen", "127.0.0.1:0", "--cert=x.pem"),
        ("--listen", "127.0.0.1:0", "--cert", "x.pem", "--key", "/dev/null"),
        ("--listen", "127.0.0.1:0", "--cert", __file__, "--key", "."),
        ("--listen", "127.0.0.1:0", "--cert", __file__, "--key", __file__),
        ("--listen", "192.0.2.1:0", "--plain"),
        ("--listen", "nowhere.invalid:1"),
        ("--login",),
        ("--metrics-token", "/nonexistent"),
    ],
)
def test_an_unsafe_or_wrong_start_is_one_line(tmp_path: Path, options: tuple[str, ...]) -> None:
    db = tmp_path / "a.db"
    Store(db).close()
    done = command("--db", str(db), *options)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr
    assert "Errno" not in done.stderr and "_ssl.c" not in done.stderr  # and the file is named
    assert "--cert" not in options or any(each in done.stderr for each in options[3:] if each[0] != "-")


def test_it_says_what_to_install(tmp_path: Path) -> None:
    Store(tmp_path / "a.db").close()
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from stonechat_tools.cli import main\n"
        f"sys.exit(main(['dashboard', '--db', {str(tmp_path / 'a.db')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "stonechat[dashboard]" in done.stderr
