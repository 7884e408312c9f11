"""Delivery of notifications: a signed webhook, Alertmanager, OpenTelemetry logs, and Apprise for e-mail, ntfy, Slack
and others.

Each receiver has a thread and a bounded queue: one that is slow or away holds up neither the collector nor the others.
"""

import contextlib
import hashlib
import hmac
import http.client
import json
import os
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from stonechat.errors import StonechatError

from ..console import counted, install_command
from .alert_settings import ENDS_S, Receiver, Settings
from .incidents import Incident, Notification

TIMEOUT_S = 10.0  # of a single step
DEADLINE_S = 30.0  # of a request and the head of its answer
TRIES = 8  # after as many, a notification that fails while the receiver takes a later one is given up
GIVE_UP_S = 86_400.0  # a receiver that is away for longer does not get what waited for it
DOUBTED_S = 3600.0  # the same where it may have taken each try, and only failed to say so: nobody wants it 300 times
CLOSE_S = 5.0
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 300.0
MAX_WAITING = 1000  # notifications for one receiver; the oldest are dropped
MAX_SENT = 1000  # incidents in one request
MAX_LISTED = 20  # incidents in the text of one notification
REPLAY_S = 300  # a webhook's time may differ from the receiver's clock by so much
SIGNATURE, TIMESTAMP, IDENTITY = "Stonechat-Signature", "Stonechat-Timestamp", "Stonechat-Id"


class DeliveryError(StonechatError):
    """A receiver did not take a notification; `again` says whether another try may help, `doubted` whether it may
    have taken it all the same."""

    def __init__(self, text: str, again: bool = True, doubted: bool = False) -> None:
        super().__init__(text)
        self.again = again
        self.doubted = doubted


# --- what is sent -----------------------------------------------------------------------------------------------------


def text_of(notification: Notification, link: str = "") -> tuple[str, str]:
    """-> (title, body) for people."""
    incidents = notification.incidents
    words = {"firing": "", "repeat": "still: ", "resolved": "over: ", "escalation": "nobody acknowledged: "}
    if notification.reason == "digest":
        title = f"stonechat: {counted(len(incidents), 'incident')} since the last digest"
    else:
        more = f" and {len(incidents) - 1} more" if len(incidents) > 1 else ""
        title = f"stonechat {notification.severity}: {words[notification.reason]}{incidents[0].title}{more}"
    lines = []
    for incident in incidents[:MAX_LISTED]:
        lines.append(f"#{incident.id} {incident.severity} {incident.title}")
        lines.append(f"  {_times(incident)}")
        lines += [f"  {name}: {_shown(value)}" for name, value in incident.evidence.items() if value not in ([], None)]
        if incident.count > 1:
            named = ", ".join(incident.devices[:10])
            lines.append(f"  {incident.count} devices: {named}{', ...' if incident.count > 10 else ''}")
        if link:
            lines.append("  " + link.replace("{id}", str(incident.id)))
    if len(incidents) > MAX_LISTED:
        lines.append(f"and {len(incidents) - MAX_LISTED} more")
    return title, "\n".join(lines)


def _times(incident: Incident) -> str:
    def when(at_s: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at_s))

    return f"since {when(incident.start_s)}" + (f" until {when(incident.end_s)}" if incident.end_s else "")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e6 else f"{value:.0f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def as_json(notification: Notification, link: str = "") -> bytes:
    """The body of a webhook."""
    rows = []
    for incident in notification.incidents[:MAX_SENT]:
        row = incident.dump()
        del row["sent_labels"]
        row["link"] = link.replace("{id}", str(incident.id)) if link else ""
        rows.append(row)
    value = {"version": 1, "reason": notification.reason, "group": notification.group, "at_s": notification.at_s}
    value["count"] = len(notification.incidents)
    return json.dumps({**value, "incidents": rows}, separators=(",", ":")).encode()


def as_alertmanager(notification: Notification, link: str, now_s: float) -> list[dict[str, Any]]:
    """Alertmanager's POST /api/v2/alerts. An incident that goes on ends there by itself unless it is sent again. The
    labels are an alert's identity there: they stay as they were at first, so that the end ends it."""
    found = []
    for incident in notification.incidents:
        labels = {"alertname": "stonechat_" + incident.kind.replace("-", "_"), "incident": str(incident.id)}
        known = incident.sent_labels or incident.labels
        labels |= {name.replace("-", "_"): value for name, value in known.items() if value}
        annotations = {"summary": incident.title, "devices": ", ".join(incident.devices[:10])}
        annotations |= {name.replace(" ", "_"): _shown(value) for name, value in incident.evidence.items()}
        alert: dict[str, Any] = {"labels": labels, "annotations": annotations, "startsAt": _rfc3339(incident.start_s)}
        alert["endsAt"] = _rfc3339(incident.end_s or now_s + ENDS_S)
        if link:
            alert["generatorURL"] = link.replace("{id}", str(incident.id))
        found.append(alert)
    return found


OTLP_SEVERITIES = {"info": 9, "warning": 13, "critical": 17}  # INFO, WARN, ERROR


def as_otlp(notification: Notification, link: str, now_s: float) -> dict[str, Any]:
    """OTLP's ExportLogsServiceRequest in its JSON form: a log record for each incident. See the OpenTelemetry protocol,
    opentelemetry.io/docs/specs/otlp."""
    records = []
    for incident in notification.incidents:
        facts: dict[str, Any] = {"incident.id": incident.id, "incident.kind": incident.kind}
        facts |= {"incident.reason": notification.reason, "incident.devices": incident.count}
        facts |= {f"stonechat.{name}": value for name, value in incident.labels.items() if value}
        facts |= {f"evidence.{name.replace(' ', '_')}": _shown(value) for name, value in incident.evidence.items()}
        facts |= {"devices": ", ".join(incident.devices[:10])}
        facts |= {"url.full": link.replace("{id}", str(incident.id))} if link else {}
        at_s = incident.end_s if notification.reason == "resolved" and incident.end_s else incident.start_s
        records.append(
            {
                "timeUnixNano": str(int(at_s * 1000) * 1_000_000),
                "observedTimeUnixNano": str(int(now_s * 1000) * 1_000_000),
                "severityNumber": OTLP_SEVERITIES[incident.severity],
                "severityText": incident.severity,
                "eventName": "stonechat.incident",
                "body": {"stringValue": incident.title},
                "attributes": [_otlp(name, value) for name, value in facts.items()],
            }
        )
    scope = {"scope": {"name": "stonechat"}, "logRecords": records}
    return {"resourceLogs": [{"resource": {"attributes": [_otlp("service.name", "stonechat")]}, "scopeLogs": [scope]}]}


def _otlp(name: str, value: Any) -> dict[str, Any]:
    return {"key": name, "value": {"intValue": str(value)} if type(value) is int else {"stringValue": str(value)}}


def _rfc3339(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_s)) + f".{int(at_s % 1 * 1000):03d}Z"


def sign(secret: bytes, timestamp: str, identity: str, body: bytes) -> str:
    """HMAC-SHA256 of timestamp, id and body, with a dot between, in hexadecimal."""
    return hmac.new(secret, f"{timestamp}.{identity}.".encode() + body, hashlib.sha256).hexdigest()


class Verifier:
    """For whoever receives the webhook: check() is True once for each genuine delivery that is not older than
    REPLAY_S. Copy it, or import it."""

    def __init__(self, secret: bytes, replay_s: float = REPLAY_S) -> None:
        self._secret = secret
        self._replay_s = replay_s
        self._seen: OrderedDict[str, float] = OrderedDict()

    def check(self, headers: Mapping[str, str], body: bytes, now_s: float) -> bool:
        given = {name.lower(): value for name, value in headers.items()}  # as some servers give them
        timestamp, identity = given.get(TIMESTAMP.lower(), ""), given.get(IDENTITY.lower(), "")
        signature = given.get(SIGNATURE.lower(), "").removeprefix("sha256=")
        if not timestamp.isdecimal() or len(timestamp) > 12 or abs(now_s - int(timestamp)) > self._replay_s:
            return False
        if not hmac.compare_digest(sign(self._secret, timestamp, identity, body).encode(), signature.encode()):
            return False
        while self._seen and next(iter(self._seen.values())) < now_s - 2 * self._replay_s:
            self._seen.popitem(last=False)
        if identity in self._seen:
            return False
        self._seen[identity] = now_s
        return True


# --- sending ----------------------------------------------------------------------------------------------------------


def send(receiver: Receiver, notification: Notification, link: str, identity: str, now_s: float) -> None:
    """One try. Raises DeliveryError."""
    if receiver.type == "apprise":
        _apprise(receiver, notification, link)
        return
    if receiver.type == "alertmanager":
        url = receiver.url.rstrip("/") + ("" if receiver.url.rstrip("/").endswith("/alerts") else "/api/v2/alerts")
        for at in range(0, len(notification.incidents), MAX_SENT):
            part = replace(notification, incidents=notification.incidents[at : at + MAX_SENT])
            _post(url, json.dumps(as_alertmanager(part, link, now_s)).encode(), {}, receiver)
        return
    if receiver.type == "otlp":
        url = receiver.url.rstrip("/") + ("" if receiver.url.rstrip("/").endswith("/v1/logs") else "/v1/logs")
        for at in range(0, len(notification.incidents), MAX_SENT):
            part = replace(notification, incidents=notification.incidents[at : at + MAX_SENT])
            _post(url, json.dumps(as_otlp(part, link, now_s)).encode(), {}, receiver)
        return
    body = as_json(notification, link)
    timestamp = str(int(now_s))
    headers = {TIMESTAMP: timestamp, IDENTITY: identity}
    headers[SIGNATURE] = "sha256=" + sign(receiver.secret, timestamp, identity, body)
    _post(receiver.url, body, headers, receiver)


def _post(url: str, body: bytes, headers: dict[str, str], receiver: Receiver) -> None:
    """No redirect is followed: the signature is for this receiver."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    sent = False
    try:
        if parts.scheme == "https":
            tls = ssl.create_default_context(cafile=receiver.ca_file or None)
            link: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=TIMEOUT_S, context=tls
            )
        else:
            link = http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)
        with contextlib.closing(link):
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            link.connect()
            guard = threading.Timer(DEADLINE_S, _end, (link.sock,))  # of one that answers a byte now and then
            guard.start()
            try:
                link.request("POST", target, body, {"Content-Type": "application/json", **headers})
                sent = True
                answer = link.getresponse()  # the status is enough: what follows is not read
            finally:
                guard.cancel()
    except http.client.InvalidURL:  # its text has the URL, which may be secret
        raise DeliveryError(f"{receiver.name}: {host}: its URL has characters that no URL has", again=False) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        text = f"{receiver.name}: {host}: {getattr(error, 'strerror', None) or error}"
        raise DeliveryError(text, doubted=sent) from None
    if not 200 <= answer.status < 300:
        again = answer.status >= 500 or answer.status in (408, 425, 429)
        reason = "".join(letter for letter in answer.reason[:100] if letter.isprintable())
        doubted = answer.status >= 500 and answer.status not in (502, 503, 504)  # these are said by what is before it
        raise DeliveryError(f"{receiver.name}: {host} answers {answer.status} {reason}", again, doubted)


def _end(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _apprise(receiver: Receiver, notification: Notification, link: str) -> None:
    try:
        import apprise
    except ModuleNotFoundError:
        text = f"needs apprise: {install_command('alerts')}"
        raise DeliveryError(f"{receiver.name}: {text}", again=False) from None
    target = apprise.Apprise()
    if not target.add(receiver.url):
        raise DeliveryError(f"{receiver.name}: Apprise does not understand its URL", again=False)
    title, body = text_of(notification, link)
    kinds = {"critical": "failure", "warning": "warning", "info": "info"}
    kind = "success" if notification.reason == "resolved" else kinds[notification.severity]
    # as text: a mail is HTML, and a name in it may be a stranger's
    if not target.notify(body=body, title=title, notify_type=kind, body_format=apprise.NotifyFormat.TEXT):
        raise DeliveryError(f"{receiver.name}: Apprise could not deliver it")


class Sender:
    """A receiver's thread and queue. counts: sent, failed (given up), dropped; error: why the last try failed, None
    when it worked."""

    def __init__(
        self,
        receiver: Receiver,
        link: str = "",
        *,
        clock: Callable[[], float] = time.time,
        wait_s: float = FIRST_WAIT_S,
    ) -> None:
        self.receiver = receiver
        self.counts = {"sent": 0, "failed": 0, "dropped": 0}
        self.error: str | None = None
        self._doubted = False  # whether the last try may have been taken
        self._link = link
        self._clock = clock
        self._wait_s = wait_s
        self._queue: queue.Queue[Notification | None] = queue.Queue(MAX_WAITING)
        self._unsent: dict[int, Notification] = {}  # by id(): those in the queue, and the one that is being sent
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"alerts-{receiver.name}", daemon=True)
        self._thread.start()

    def takes(self, notification: Notification) -> Notification | None:
        """What of a notification this receiver gets."""
        if (notification.reason == "escalation") != self.receiver.escalation and notification.reason != "resolved":
            return None
        wanted = tuple(each for each in notification.incidents if each.severity in self.receiver.severities)
        if notification.reason == "resolved" and self.receiver.escalation:
            wanted = tuple(each for each in wanted if each.escalated_s is not None)
        return Notification(notification.reason, notification.group, wanted, notification.at_s) if wanted else None

    def put(self, notification: Notification) -> None:
        mine = self.takes(notification)
        if mine is not None:
            self._unsent[id(mine)] = mine
        while mine is not None:
            try:
                self._queue.put_nowait(mine)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._unsent.pop(id(self._queue.get_nowait()), None)
                    self.counts["dropped"] += 1

    @property
    def unsent(self) -> set[int]:
        """Ids of the incidents whose notification is on its way."""
        return {incident.id for each in list(self._unsent.values()) for incident in each.incidents}

    def _work(self) -> None:
        later: Notification | None = None  # out of the queue already, behind one that fails
        while (notification := later or self._queue.get()) is not None:
            later, wait_s, tries = None, self._wait_s, 0
            begun_s = time.monotonic()
            while (again := self._try(notification)) is not None:
                give_up_s = begun_s + (DOUBTED_S if self._doubted else GIVE_UP_S)
                tries += 1
                if again and tries >= TRIES:
                    later = later or self._next()
                    if later is not None and self._try(later) is None:
                        if self._try(notification) is None:
                            break  # it was back just then: the later one again, so that it is the last
                        later, again = None, False  # it takes others, and not this one
                if not again or time.monotonic() >= give_up_s:
                    self.counts["failed"] += 1
                    self._unsent.pop(id(notification), None)
                    break
                if self._stopping.wait(wait_s):  # not given up: the next start sends it
                    return
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _next(self) -> Notification | None:
        try:
            found = self._queue.get_nowait()
        except queue.Empty:
            return None
        if found is None:  # the end: for whoever waits for it
            self._queue.put_nowait(None)
        return found

    def _try(self, notification: Notification) -> bool | None:
        """-> None where it is sent, else whether another try may help."""
        try:
            # an id of its own for each try: a receiver that took one and could not say so gets it again
            send(self.receiver, notification, self._link, os.urandom(12).hex(), self._clock())
        except Exception as error:  # a receiver's library may raise anything; the next one is another try
            self.error = str(error) if isinstance(error, DeliveryError) else f"{self.receiver.name}: {error!r}"
            self._doubted = bool(getattr(error, "doubted", False))
            return bool(getattr(error, "again", True))
        self.counts["sent"] += 1
        self.error = None
        self._unsent.pop(id(notification), None)
        return None

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Send what waits, for at most wait_s."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=wait_s)
        self._thread.join(wait_s)
        self._stopping.set()


class Alerts:
    """All receivers; notify() is for Monitor. Used as a `with` block."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        self.senders = [Sender(receiver, settings.link, **options) for receiver in settings.receivers]

    def notify(self, notification: Notification) -> None:
        for sender in self.senders:
            sender.put(notification)

    def unsent(self) -> set[int]:
        """Ids of the incidents whose notification has not reached each of its receivers yet."""
        return set().union(*(sender.unsent for sender in self.senders))

    @property
    def errors(self) -> list[str]:
        return [sender.error for sender in self.senders if sender.error]

    def __enter__(self) -> "Alerts":
        return self

    def __exit__(self, *_: object) -> None:
        end_s = time.monotonic() + CLOSE_S
        for sender in self.senders:
            sender.close(max(0.1, end_s - time.monotonic()))
