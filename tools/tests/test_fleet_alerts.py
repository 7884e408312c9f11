"""Delivery of notifications, each way into a real receiver on this machine."""

import contextlib
import email
import email.policy
import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_support import Mosquitto, Peer, free_port, needs_mosquitto, wait_for
from stonechat.errors import ConfigError
from stonechat_tools import cli
from stonechat_tools.fleet import alert_settings, alerts
from stonechat_tools.fleet.alert_settings import Receiver
from stonechat_tools.fleet.incidents import Alert, Incident, Incidents, Notification, Policy

SECRET = b"a key of more than sixteen characters"
LINK = "https://fleet.example.org/incidents/{id}"


def notification(reason: str = "firing", severity: str = "critical", count: int = 1, **more: Any) -> Notification:
    incidents = tuple(
        Incident(
            n,
            f"cause-{n}",
            "cause",
            severity,
            "2000 of 2000 devices left together: site north",
            {"kind": "cause", "severity": severity, "site": "north"},
            {"by chance": 1e-30, "left": 2000},
            [f"d-{k}" for k in range(50)],
            2000,
            1_795_000_000.0,
            1_795_000_000.0,
            **more,
        )
        for n in range(1, count + 1)
    )
    return Notification(reason, "kind=cause,site=north", incidents, 1_795_000_060.0)


class Receiving(http.server.ThreadingHTTPServer):
    """An HTTP server that keeps what it is sent; `answers`: the statuses of the next requests, then 200; `refused`: 500
    for what has that in its body."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.refused = b""  # what a body must not have
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiving

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers.items()), body))
        status = self.server.answers.pop(0) if self.server.answers else 200
        if self.server.refused and self.server.refused in body:
            status = 500
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Receiving]:
    with Receiving() as receiving:
        threading.Thread(target=receiving.serve_forever, daemon=True).start()
        yield receiving
        receiving.shutdown()


def send(receiver: Receiver, *sent: Notification) -> alerts.Sender:
    sender = alerts.Sender(receiver, LINK, wait_s=0.05)
    for each in sent:
        sender.put(each)
    sender.close(30)
    return sender


# --- webhook ----------------------------------------------------------------------------------------------------------


def test_the_webhook_is_signed_fresh_and_taken_once(server: Receiving) -> None:
    sender = send(Receiver("hook", "webhook", server.url + "/hook?x=1", SECRET), notification(count=3))
    assert sender.counts == {"sent": 1, "failed": 0, "dropped": 0}
    ((path, headers, body),) = server.got
    assert path == "/hook?x=1"
    value = json.loads(body)
    assert value["reason"] == "firing" and [each["id"] for each in value["incidents"]] == [1, 2, 3]
    assert value["incidents"][0]["link"] == "https://fleet.example.org/incidents/1"
    now_s = time.time()
    assert alerts.Verifier(SECRET).check(headers, body, now_s)
    verifier = alerts.Verifier(SECRET)
    assert not verifier.check(headers, body + b" ", now_s)
    assert not verifier.check(headers, body, now_s + 301) and not verifier.check(headers, body, now_s - 301)
    assert not verifier.check(headers | {alerts.TIMESTAMP: str(int(now_s) + 1)}, body, now_s)
    assert not verifier.check(headers | {alerts.IDENTITY: "other"}, body, now_s)
    assert not verifier.check({}, body, now_s) and not alerts.Verifier(b"x" * 16).check(headers, body, now_s)
    lower = {name.lower(): value for name, value in headers.items()}
    assert verifier.check(lower, body, now_s) and not verifier.check(headers, body, now_s)  # a replay


def test_a_receiver_that_fails_is_tried_again_and_one_that_refuses_is_not(server: Receiving) -> None:
    receiver = Receiver("hook", "webhook", server.url, SECRET)
    server.answers = [503, 500, 429]
    assert send(receiver, notification()).counts["sent"] == 1 and len(server.got) == 4
    ids = {headers[alerts.IDENTITY] for _, headers, _ in server.got}
    assert len(ids) == 4  # the receiver's check for replays does not refuse another try
    for status in (400, 404, 302):
        server.got.clear()
        server.answers = [status]
        sender = send(receiver, notification())
        assert sender.counts["failed"] == 1 and len(server.got) == 1 and str(status) in (sender.error or "")


@pytest.mark.parametrize("kind", ["webhook", "alertmanager", "otlp"])
def test_a_receiver_that_is_back_after_a_long_time_gets_all_in_order(
    kind: str, server: Receiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "LONGEST_WAIT_S", 0.01)
    server.answers = [503] * 60  # five hours, at the waits of a real one
    sender = alerts.Sender(Receiver("hook", kind, server.url, SECRET), wait_s=0.01)
    for reason in ("firing", "resolved"):
        sender.put(notification(reason, end_s=1_795_000_100.0 if reason == "resolved" else None))
    assert wait_for(lambda: not sender.unsent), sender.counts
    sender.close()
    assert not sender.counts["failed"] and not sender.counts["dropped"] and len(server.got) >= 62
    # the end is the last that it hears
    wanted = {"webhook": b'"resolved"', "alertmanager": b"11:08:20", "otlp": b'"resolved"'}[kind]
    assert wanted in server.got[-1][2] and any(wanted not in body for *_, body in server.got[60:])


def test_one_notification_that_is_refused_again_and_again_holds_up_no_other(
    server: Receiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "LONGEST_WAIT_S", 0.01)
    server.refused = b'"repeat"'
    sender = alerts.Sender(Receiver("hook", "webhook", server.url, SECRET), wait_s=0.01)
    for reason in ("firing", "repeat", "resolved", "firing"):
        sender.put(notification(reason))
    assert wait_for(lambda: sender.counts == {"sent": 3, "failed": 1, "dropped": 0}), sender.counts
    assert not sender.unsent
    sender.close()


def test_one_that_takes_each_try_and_never_says_so_is_not_flooded(
    server: Receiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of 500, or none, may come from a receiver that has sent its message on: that is tried for an hour. One
    that is not there is tried for a day."""
    monkeypatch.setattr(alerts, "LONGEST_WAIT_S", 0.01)
    for limit, answers in (("DOUBTED_S", [500] * 10_000), ("GIVE_UP_S", [503] * 10_000)):
        with monkeypatch.context() as patch:
            patch.setattr(alerts, limit, 0.3)
            server.answers = answers
            sender = alerts.Sender(Receiver("hook", "webhook", server.url, SECRET), wait_s=0.01)
            sender.put(notification())
            assert wait_for(lambda each=sender: each.counts["failed"] == 1), limit
            sender.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def take_and_close() -> None:
            with listener.accept()[0] as peer:
                taken = b""
                while b"]}" not in taken and (part := peer.recv(65_536)):
                    taken += part

        threading.Thread(target=take_and_close, daemon=True).start()
        with pytest.raises(alerts.DeliveryError) as raised:
            alerts.send(Receiver("hook", "webhook", url, SECRET), notification(), "", "id", time.time())
    assert raised.value.again and raised.value.doubted
    with pytest.raises(alerts.DeliveryError) as raised:
        alerts.send(Receiver("hook", "webhook", url, SECRET), notification(), "", "id", time.time())
    assert raised.value.again and not raised.value.doubted


def test_an_incident_is_one_alert_of_alertmanager_whatever_becomes_of_its_labels() -> None:
    incidents = Incidents(Policy(group_wait_s=0))
    sent: list[Notification] = []
    for now_s, state, site in ((0.0, "silent", "north"), (60.0, "gone", "south"), (120.0, "", "")):
        held = {"away-d-1": Alert("away-d-1", state, "warning", f"d-1 is {state}", 0.0, {"site": site})}
        incidents.step(held if state else {}, now_s)
        sent += incidents.due(now_s)
    assert [each.reason for each in sent] == ["firing", "resolved"]
    firing, resolved = (alerts.as_alertmanager(each, "", 120.0)[0]["labels"] for each in sent)
    assert firing == resolved and firing["site"] == "north"
    assert sent[1].incidents[0].labels["site"] == "south"  # of everybody else


def test_a_receiver_that_is_away_holds_up_nobody(server: Receiving) -> None:
    away = alerts.Sender(Receiver("away", "webhook", "http://127.0.0.1:1/", SECRET), wait_s=30)
    begin_s = time.monotonic()
    for _ in range(alerts.MAX_WAITING + 50):
        away.put(notification())
    assert time.monotonic() - begin_s < 5 and away.counts["dropped"] >= 48
    assert wait_for(lambda: away.error)
    assert "127.0.0.1" in (away.error or "") and SECRET.decode() not in (away.error or "")
    taken = send(Receiver("hook", "webhook", server.url, SECRET), notification())
    assert taken.counts["sent"] == 1 and not taken.unsent
    assert away.unsent == {1}
    away.close(0.1)
    assert away.unsent == {1}  # for the next start


@pytest.mark.parametrize("head", ["", "HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n"])
def test_a_receiver_that_answers_a_byte_now_and_then_is_not_waited_for(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "DEADLINE_S", 1.0)
    over = threading.Event()

    def serve(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            peer.recv(65_536)
            peer.sendall(head.encode())
            while not over.wait(0.1):
                peer.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        sender = alerts.Sender(Receiver("slow", "webhook", f"http://127.0.0.1:{listener.getsockname()[1]}/", SECRET))
        sender.put(notification())
        assert wait_for(lambda: sender.counts["sent"] if head else sender.error), sender.counts
        over.set()
        sender.close(0.1)


def test_who_gets_what() -> None:
    def takes(receiver: Receiver, each: Notification) -> bool:
        sender = alerts.Sender(receiver)
        found = sender.takes(each) is not None
        sender.close(1)
        return found

    ops = Receiver("ops", "webhook", "http://x/", SECRET, severities=("critical",))
    boss = Receiver("boss", "webhook", "http://x/", SECRET, escalation=True)
    assert takes(ops, notification()) and not takes(ops, notification(severity="info"))
    assert not takes(ops, notification("escalation")) and takes(boss, notification("escalation"))
    assert not takes(boss, notification()) and not takes(boss, notification("resolved"))
    assert takes(boss, notification("resolved", escalated_s=1.0))


# --- Alertmanager, Apprise --------------------------------------------------------------------------------------------


def test_alertmanagers_api(server: Receiving) -> None:
    receiver = Receiver("am", "alertmanager", server.url)
    send(receiver, notification(), notification("resolved", end_s=1_795_000_900.0))
    (path, headers, body), (_, _, over) = server.got
    assert path == "/api/v2/alerts" and headers["Content-Type"] == "application/json"
    (alert,) = json.loads(body)
    # the postableAlert of Alertmanager's openapi.yaml: labels and annotations are maps of text to text
    assert set(alert) == {"labels", "annotations", "startsAt", "endsAt", "generatorURL"}
    for part in ("labels", "annotations"):
        for name, value in alert[part].items():
            assert name.replace("_", "a").isalnum() and isinstance(value, str), name
    assert alert["labels"]["alertname"] == "stonechat_cause" and alert["labels"]["site"] == "north"
    assert alert["startsAt"] == "2026-11-18T11:06:40.000Z" and alert["endsAt"] > alert["startsAt"]
    (ended,) = json.loads(over)
    assert ended["endsAt"] == "2026-11-18T11:21:40.000Z"
    assert ended["labels"] == alert["labels"]  # else Alertmanager would take it for another alert


def test_opentelemetry_logs(server: Receiving) -> None:
    """Read by the protocol's own definition."""
    from google.protobuf import json_format
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

    receiver = Receiver("otel", "otlp", server.url)
    sender = send(receiver, notification(count=2), notification("resolved", "warning", end_s=1_795_000_900.0))
    assert sender.counts["sent"] == 2
    found = []
    for path, headers, body in server.got:
        assert path == "/v1/logs" and headers["Content-Type"] == "application/json"
        asked = json_format.Parse(body, ExportLogsServiceRequest(), ignore_unknown_fields=False)
        (resource,) = asked.resource_logs
        assert {each.key: each.value.string_value for each in resource.resource.attributes} == {
            "service.name": "stonechat"
        }
        found += list(resource.scope_logs[0].log_records)
    first, second, over = found
    assert first.body.string_value.startswith("2000 of 2000 devices") and first.severity_number == 17
    facts = {each.key: each.value for each in first.attributes}
    assert facts["incident.id"].int_value == 1 and facts["stonechat.site"].string_value == "north"
    assert facts["url.full"].string_value.endswith("/1") and facts["evidence.left"].string_value == "2000"
    assert first.time_unix_nano == 1_795_000_000 * 10**9 and over.time_unix_nano == 1_795_000_900 * 10**9
    assert over.severity_number == 13 and {each.key for each in second.attributes} == set(facts)
    url = send(Receiver("otel", "otlp", server.url + "/v1/logs"), notification())
    assert url.counts["sent"] == 1 and server.got[-1][0] == "/v1/logs"


def test_no_request_has_more_incidents_than_a_receiver_takes(server: Receiving) -> None:
    many = notification(count=2 * alerts.MAX_SENT + 1)
    assert send(Receiver("hook", "webhook", server.url, SECRET), many).counts["sent"] == 1
    assert send(Receiver("am", "alertmanager", server.url), many).counts["sent"] == 1
    value, *posts = (json.loads(body) for _, _, body in server.got)
    assert (len(value["incidents"]), value["count"]) == (alerts.MAX_SENT, 2 * alerts.MAX_SENT + 1)
    assert [len(each) for each in posts] == [alerts.MAX_SENT, alerts.MAX_SENT, 1]


def test_apprise_to_a_json_receiver(server: Receiving) -> None:
    pytest.importorskip("apprise")
    url = f"json://127.0.0.1:{server.server_port}/there"
    sender = send(Receiver("apprise", "apprise", url), notification(count=30))
    assert sender.counts["sent"] == 1, sender.error
    ((path, _, body),) = server.got
    value = json.loads(body)
    assert path == "/there" and value["type"] == "failure"
    assert value["title"].startswith("stonechat critical: 2000 of 2000 devices left together: site north and 29 more")
    assert "and 10 more" in value["message"] and "incidents/1" in value["message"]
    server.answers = [500] * 3
    assert send(Receiver("apprise", "apprise", url), notification()).counts["sent"] == 1 and not server.answers


@needs_mosquitto
def test_apprise_to_a_broker(tmp_path: Path) -> None:
    pytest.importorskip("apprise")
    with Mosquitto.plain(tmp_path) as broker:
        peer = Peer(broker.port, "listener")
        peer.topics = ["alerts/#"]
        with peer:
            assert peer.connected.wait(20)
            url = f"mqtt://127.0.0.1:{broker.port}/alerts/fleet"
            sender = send(Receiver("mqtt", "apprise", url), notification("resolved", end_s=1_795_000_900.0))
            assert sender.counts["sent"] == 1, sender.error
            assert wait_for(lambda: peer.got)
    topic, payload = peer.got[0]
    assert topic == "alerts/fleet" and b"site north" in payload and b"until 2026-11-18 11:21:40 UTC" in payload


def test_apprise_to_a_mail_server() -> None:
    pytest.importorskip("apprise")
    controller = pytest.importorskip("aiosmtpd.controller")
    got: list[Any] = []

    class Sink:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            got.append(envelope)
            return "250 OK"

    running = controller.Controller(Sink(), hostname="127.0.0.1", port=free_port())
    running.start()
    try:
        port = running.server.sockets[0].getsockname()[1]
        url = f"mailto://127.0.0.1:{port}?from=fleet@example.org&to=ops@example.org&mode=insecure&smtp=127.0.0.1"
        named = notification()
        for incident in named.incidents:
            incident.devices[0] = "<img src=http://a>"  # a stranger's name
        sender = send(Receiver("mail", "apprise", url), named)
        assert sender.counts["sent"] == 1, sender.error
    finally:
        running.stop()
    (envelope,) = got
    parts = list(email.message_from_bytes(envelope.content, policy=email.policy.default).walk())
    pages = [part.get_content() for part in parts if part.get_content_type() == "text/html"]
    assert not [page for page in pages if "<img" in page]
    assert envelope.rcpt_tos == ["ops@example.org"] and b"site north" in envelope.content


def test_a_url_that_apprise_does_not_know_is_not_tried_again() -> None:
    pytest.importorskip("apprise")
    sender = send(Receiver("x", "apprise", "nothing://here"), notification())
    assert sender.counts["failed"] == 1 and "does not understand" in (sender.error or "")


# --- the configuration ------------------------------------------------------------------------------------------------


def written(folder: Path, text: str, mode: int = 0o600) -> str:
    (folder / "hook.key").touch(mode=mode)
    (folder / "hook.key").write_text(SECRET.decode() + "\n")
    (folder / "alerts.toml").write_text(text)
    return str(folder / "alerts.toml")


HOOK = '[[receivers]]\nname = "ops"\nurl = "https://example.org/hook"\nsecret_file = "hook.key"\n'


def test_the_example_has_every_key_and_is_the_default(tmp_path: Path) -> None:
    text = alert_settings.example()
    (tmp_path / "alerts.toml").write_text(text)
    settings = alert_settings.load(str(tmp_path / "alerts.toml"))  # as it is printed, with no other file
    assert settings == alert_settings.load(written(tmp_path, "")) and not settings.receivers
    settings = alert_settings.load(written(tmp_path, re.sub("^#(?! )", "", text, flags=re.M)))
    assert settings.receivers[0].name == "ops" and settings.receivers[0].secret == SECRET
    for key in (*alert_settings.KEYS, *alert_settings.RECEIVER_KEYS):
        assert f"{key} = " in text


def test_spans_and_hours(tmp_path: Path) -> None:
    text = 'repeat = "2h"\nquiet_hours = "22:00-07:30"\nescalate_after = "15m"\ndigest_at = "06:45"\n' + HOOK
    text += "escalation = true\n"
    policy = alert_settings.load(written(tmp_path, text)).policy
    assert (policy.repeat_s, policy.quiet, policy.escalate_s) == (7200, (79_200, 27_000), 900)
    assert policy.digest_s == 24_300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("repeat = 5", "a number with s, m, h or d"),
        ('repeat = "5 h"', "a number with s, m, h or d"),
        ('quiet_hours = "22-7"', "hours like"),
        ('digest_at = "25:00"', "a time like"),
        ('digest = ["loud"]', "info warning critical"),
        ("resolved = 1", "true or false"),
        ('reapeat = "5h"', "unknown key"),
        ("receivers = 3", "[[receivers]]"),
        ("x = [", "not TOML"),
        ('[[receivers]]\nurl = "https://example.org"', "needs secret_file"),
        ('[[receivers]]\nsecret_file = "hook.key"', "url or url_file"),
        ('[[receivers]]\nurl = "http://[geheim"', "must begin with https:// or http://"),
        ('[[receivers]]\nurl = "https://h/a b"', "without spaces"),
        ('[[receivers]]\nurl = "https://h:geheim/"', "must begin with https:// or http://"),
        ('[[receivers]]\nurl = "https://a..b/"', "must begin with https:// or http://"),
        (HOOK.replace("https", "ftp"), "must begin with https:// or http://"),
        (HOOK.replace("hook.key", "none.key"), "No such file"),
        (HOOK + 'type = "pager"', "one of webhook, alertmanager, apprise, otlp"),
        (HOOK + 'severities = ["critical", "bad"]', "info warning critical"),
        (HOOK.replace("hook.key", "."), "is not a file"),
        ('[[receivers]]\nurl_file = "/dev/null"', "is not a file"),
        (HOOK + HOOK, "one name"),
        (HOOK + "escalation = true", "escalate_after is 0s"),
        ('escalate_after = "5m"\n' + HOOK, "no receiver has escalation = true"),
        ('escalate_after = "5m"', "no receiver has escalation = true"),
        (HOOK + "severities = []", "would get nothing"),
        ('quiet_hours = "22:00-22:00"', "of some length"),
        ('repeat = "1d"\n' + HOOK + 'type = "alertmanager"', "below 24h"),
        ('group_by = ["sit"]', "kind severity device site"),
        (HOOK + 'ca_file = "none.pem"', "no such file"),
    ],
)
def test_a_wrong_configuration_costs_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="alerts.toml") as raised:
        alert_settings.load(written(tmp_path, text))
    assert says in str(raised.value) and "\n" not in str(raised.value) and "geheim" not in str(raised.value)


ODD = ["1", "-1", "nan", "inf", "true", '""', '"x"', "[]", "[1]", "[[]]", "{a = 1}", "2024-01-01", "07:32:00", '"."']
ODD += ['"\\u0000"', '"\\u202e"', '"99999999d"', '"-5s"', '"\\uff11h"', '"24:00"', '"7:0-7:0"', '"/dev/zero"']
ODD += [
    '"https://[::1]:99999/"',
    '"http://h:0/"',
    '"json://x"',
    '"hook.key"',
    '"../"',
    '["kind", "kind"]',
    '"/dev/tty"',
]


def test_each_receiver_is_tried_by_a_verb(
    tmp_path: Path, server: Receiving, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f'[[receivers]]\nname = "am"\ntype = "alertmanager"\nurl = "{server.url}"\n'
    path = written(tmp_path, HOOK.replace("https://example.org", server.url) + more)
    assert cli.main(["fleet", "try", path]) == 0
    assert capsys.readouterr().out == "ops: taken\nam: taken\n" and len(server.got) == 2
    assert all(b"nothing is wrong" in body for *_, body in server.got)
    server.answers = [403]
    assert cli.main(["fleet", "try", path, "--json"]) == 1
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert not first["taken"] and "403" in first["error"] and second["taken"]
    assert cli.main(["fleet", "try", written(tmp_path, alert_settings.example())]) == 1
    assert "no receiver" in capsys.readouterr().err


@pytest.mark.parametrize("key", [*alert_settings.KEYS, *alert_settings.RECEIVER_KEYS])
def test_no_value_of_any_key_ends_in_a_traceback(tmp_path: Path, key: str) -> None:
    for value in ODD:
        lines = HOOK.splitlines() if key in alert_settings.RECEIVER_KEYS else []
        text = "\n".join([*(line for line in lines if not line.startswith(key)), f"{key} = {value}"])
        try:
            alert_settings.load(written(tmp_path, text))
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 700


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, HOOK)
    (tmp_path / "hook.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        alert_settings.load(path)
