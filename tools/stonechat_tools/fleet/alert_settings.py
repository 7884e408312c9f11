"""Whom to notify of what: one TOML file, every key checked. KEYS and RECEIVER_KEYS are the only list of keys there is.

Secrets are read from files that nobody else may read.
"""

import os
import stat
import tomllib
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..console import read_file
from .incidents import LABELS, SEVERITIES, Policy

MAX_BYTES = 1 << 20
ENDS_S = 86_400.0  # what is not sent again by then is over for Alertmanager
TYPES = ("webhook", "alertmanager", "apprise", "otlp")

_SPANS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

# key: (default as TOML, what it is)
KEYS = {
    "group_by": ('["kind", "site"]', "incidents that agree in these labels are one notification"),
    "group_wait": ('"30s"', "a new group waits so long for others to join it"),
    "group_interval": ('"5m"', "a group that was notified waits so long before its new incidents are"),
    "repeat": ('"4h"', "what still goes on and nobody acknowledged is sent again after that"),
    "escalate_after": ('"0s"', "what nobody acknowledged by then goes to the receivers of escalations; 0s: never"),
    "quiet_hours": ('""', 'local time in which only critical incidents are sent, for example "22:00-07:00"'),
    "digest_at": ('"08:00"', "local time of the daily digest"),
    "digest": ('["info"]', "severities that are only in the digest"),
    "resolved": ("true", "send the end of an incident, too"),
    "link": ('""', 'where an incident is shown, for example "https://fleet.example.org/#/incident/{id}"'),
}
RECEIVER_KEYS = {
    "name": ('"ops"', "for messages and counters"),
    "type": ('"webhook"', "webhook, alertmanager, apprise or otlp"),
    "url": ('"https://example.org/hook"', "where to; a URL with a secret in it belongs into url_file"),
    "url_file": ('""', "file of mode 0600 that holds the URL, instead of url"),
    "secret_file": (
        '"hook.key"',
        "webhook: file of mode 0600 with the key of the signature, beside this file;"
        " made by: (umask 077; openssl rand -hex 32 > hook.key)",
    ),
    "ca_file": ('""', "PEM of the authority that signed the receiver's certificate; empty: those of the system"),
    "severities": ('["info", "warning", "critical"]', "what it gets"),
    "escalation": ("false", "it gets escalations only"),
}


@dataclass(frozen=True, slots=True)
class Receiver:
    name: str
    type: str
    url: str
    secret: bytes = b""
    ca_file: str = ""
    severities: tuple[str, ...] = SEVERITIES
    escalation: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    policy: Policy
    receivers: tuple[Receiver, ...]
    link: str = ""


def example() -> str:
    """A complete commented configuration, which works as it is: without receivers nothing is sent to anybody."""
    lines = ["# stonechat collect --alerts FILE: every key there is, at its default."]
    for name, (default, text) in KEYS.items():
        lines += [f"# {text}", f"{name} = {default}"]
    lines += ["", "# One section for each receiver; take away the # of its first line and of the keys that you set."]
    lines.append("#[[receivers]]")
    for name, (default, text) in RECEIVER_KEYS.items():
        lines += [f"# {text}", f"#{name} = {default}"]
    return "\n".join(lines) + "\n"


def load(path: str) -> Settings:
    """Raises ConfigError naming the file, the key and the fix."""
    try:
        data = read_file(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        raw = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {str(error)[:200]}") from None
    where = Path(path).parent
    values = _Table(raw, path, [*KEYS, "receivers"])
    receivers = raw.get("receivers", [])
    if not isinstance(receivers, list) or not all(isinstance(each, dict) for each in receivers):
        raise ConfigError(f"{path}: receivers must be sections: [[receivers]]")
    escalate_s = values.span("escalate_after", 0)
    digest = values.time_of_day("digest_at", "08:00")
    policy = Policy(
        group_by=values.texts("group_by", ("kind", "site"), LABELS),
        group_wait_s=values.span("group_wait", 30),
        group_interval_s=values.span("group_interval", 300),
        repeat_s=max(60.0, values.span("repeat", 14_400)),
        escalate_s=escalate_s or None,
        quiet=values.hours("quiet_hours"),
        digest_s=digest,
        digest=values.texts("digest", ("info",), SEVERITIES),
        resolved=values.flag("resolved", True),
    )
    found = tuple(_receiver(each, f"{path}: receiver {n}", where) for n, each in enumerate(receivers, 1))
    names = [receiver.name for receiver in found]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: two receivers have one name; each needs its own")
    if policy.repeat_s >= ENDS_S and any(receiver.type == "alertmanager" for receiver in found):
        raise ConfigError(f"{path}: repeat: below 24h: Alertmanager takes what is not sent again by then for over")
    for_escalations = any(receiver.escalation for receiver in found)
    if escalate_s and not for_escalations:
        raise ConfigError(f"{path}: escalate_after is set, and no receiver has escalation = true")
    if for_escalations and not escalate_s:
        raise ConfigError(f"{path}: a receiver has escalation = true, and escalate_after is 0s: it would get nothing")
    return Settings(policy, found, values.text("link", ""))


def _receiver(raw: dict[str, Any], what: str, folder: Path) -> Receiver:
    values = _Table(raw, what, list(RECEIVER_KEYS))
    kind = values.text("type", "webhook")
    if kind not in TYPES:
        raise ConfigError(f"{what}: type must be one of {', '.join(TYPES)}, not {kind!r}")
    url, url_file = values.text("url", ""), values.text("url_file", "")
    if bool(url) == bool(url_file):
        raise ConfigError(f"{what}: needs url or url_file, one of them")
    if url_file:
        url = _secret(folder / url_file, f"{what}: url_file").decode("utf-8", "replace")
    if kind != "apprise" and not _is_web(url):
        text = "must begin with https:// or http://, name a host, and be ASCII without spaces (write %20)"
        raise ConfigError(f"{what}: {'url_file: the URL' if url_file else 'url'} {text}")
    secret_file = values.text("secret_file", "")
    secret = _secret(folder / secret_file, f"{what}: secret_file") if secret_file else b""
    if kind == "webhook" and len(secret) < 16:
        raise ConfigError(f"{what}: a webhook needs secret_file, a file with a key of at least 16 characters")
    severities = values.texts("severities", SEVERITIES, SEVERITIES)
    if not severities:
        raise ConfigError(f"{what}: severities is empty: it would get nothing")
    ca_file = values.text("ca_file", "")
    if ca_file and not (folder / ca_file).is_file():
        raise ConfigError(f"{what}: ca_file {folder / ca_file}: no such file")
    return Receiver(
        values.text("name", "") or kind,
        kind,
        url,
        secret,
        str(folder / ca_file) if ca_file else "",
        severities,
        values.flag("escalation", False),
    )


def _is_web(url: str) -> bool:
    """Whether http.client takes it: what it says of one that it does not has parts of the URL, which may be secret."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and url.isascii() and url.isprintable() and " " not in url


def _secret(path: Path, what: str) -> bytes:
    """The first line of a file that nobody else may read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{what} {path} is not a file")
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigError(f"{what} {path} is open to others (mode {mode & 0o777:03o}): chmod 600 {path}")
        line = os.read(handle, 4096).split(b"\n", 1)[0].strip()
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    finally:
        os.close(handle)
    if not line:
        raise ConfigError(f"{what} {path} is empty")
    return line


class _Table:
    """Checked access to a TOML table."""

    def __init__(self, raw: dict[str, Any], what: str, known: list[str]) -> None:
        self._raw, self._what = raw, what
        for name in raw:
            if name not in known:
                raise ConfigError(f"{what}: unknown key {name[:40]!r}; known: {', '.join(known)}")

    def _wrong(self, name: str, must: str) -> ConfigError:
        return ConfigError(f"{self._what}: {name} must be {must}, not {str(self._raw[name])[:60]!r}")

    def text(self, name: str, default: str) -> str:
        value = self._raw.get(name, default)
        if not isinstance(value, str) or not (value == "" or value.isprintable()) or len(value) > 2000:
            raise self._wrong(name, "a text in quotes")
        return value

    def texts(self, name: str, default: tuple[str, ...], among: tuple[str, ...] = ()) -> tuple[str, ...]:
        value = self._raw.get(name, list(default))
        good = isinstance(value, list) and all(isinstance(item, str) and (not among or item in among) for item in value)
        if not good:
            raise self._wrong(name, f"a list of {' '.join(among) or 'texts'}")
        return tuple(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._raw.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def span(self, name: str, default_s: float) -> float:
        if name not in self._raw:
            return default_s
        value = self._raw[name]
        if isinstance(value, str) and value[-1:] in _SPANS and value[:-1].isdecimal() and len(value) < 9:
            return int(value[:-1]) * _SPANS[value[-1]]
        raise self._wrong(name, 'a number with s, m, h or d, like "30s"')

    def time_of_day(self, name: str, default: str) -> float:
        found = _day_s(self._raw.get(name, default))
        if found is None:
            raise self._wrong(name, 'a time like "08:00"')
        return found

    def hours(self, name: str) -> tuple[float, float] | None:
        value = self._raw.get(name, "")
        if value == "":
            return None
        first, _, last = value.partition("-") if isinstance(value, str) else ("", "", "")
        begin_s, end_s = _day_s(first), _day_s(last)
        if begin_s is None or end_s is None or begin_s == end_s:
            raise self._wrong(name, 'hours like "22:00-07:00", of some length')
        return begin_s, end_s


def _day_s(text: Any) -> float | None:
    try:
        hour, minute = (int(part) for part in text.split(":")) if len(text) <= 5 else (99, 0)
    except (ValueError, AttributeError, TypeError):
        return None
    return hour * 3600.0 + minute * 60 if 0 <= hour < 24 and 0 <= minute < 60 else None
