"""What mosquitto reads of a fleet: the access list, and the entries of its password file."""

import base64
import hashlib
import secrets
from pathlib import Path

from stonechat.linux import homeassistant

BRIDGE_STATES = ("home/state", "home/event")  # of a device, by `stonechat home-assistant`
BRIDGE_COMMANDS = ("home/calibrate", "home/maintenance", "home/release")  # by Home Assistant
BRIDGE_ONLINE = "homeassistant/home/online"  # no device has that name


def acl(topics: str, home_assistant: bool = False, home_bridge: bool = False) -> str:
    """mosquitto's access list: a device reaches its own topics only, the collector, the operator and Home Assistant
    what they need."""
    lines = ["# A device's user name is its id."]
    lines += [f"pattern write {topics}%u/{name}" for name in ("report", "status", "want")]
    lines += [f"pattern read {topics}%u/{name}" for name in ("ack", "command", "model")]
    lines += ["", "user collector"]
    lines += [f"topic read {topics}+/{name}" for name in ("report", "status", "want")]
    lines += [f"topic write {topics}+/{name}" for name in ("ack", "model")]
    lines += ["", "user operator", f"topic write {topics}+/command"]
    if home_assistant:
        lines += ["", *(f"pattern write {topics}%u/{name}" for name in homeassistant.TOPICS)]
        lines += ["pattern write homeassistant/device/%u/config", "pattern read homeassistant/status"]
    if home_assistant or home_bridge:
        lines += ["", "user homeassistant", "topic read homeassistant/#", "topic write homeassistant/status"]
    if home_assistant:
        lines += [f"topic read {topics}+/ha/+"]
    if home_bridge:
        lines += [f"topic read {topics}+/{name}" for name in BRIDGE_STATES]
        lines += [f"topic read {topics}{BRIDGE_ONLINE}"]
        lines += [f"topic write {topics}+/{name}" for name in BRIDGE_COMMANDS]
        lines += ["", "user homebridge", "topic readwrite homeassistant/device/+/config"]
        lines += ["topic read homeassistant/status", f"topic write {topics}{BRIDGE_ONLINE}"]
        lines += [f"topic readwrite {topics}+/{name}" for name in BRIDGE_STATES]
        lines += [f"topic read {topics}+/{name}" for name in BRIDGE_COMMANDS]
    return "\n".join(lines) + "\n"


def password_entries(path: Path) -> dict[str, str]:
    """The lines of a password file by user; none where it is missing or a link."""
    lines = path.read_text().splitlines() if path.is_file() and not path.is_symlink() else []
    return {line.partition(":")[0]: line for line in lines}


def password_entry(name: str, file: Path, before: dict[str, str]) -> str:
    """mosquitto's form (PBKDF2-SHA512). An entry that still fits is left as it is, and so is that of a device whose
    folder is not here any more."""
    try:
        password = file.read_text().strip()
    except FileNotFoundError:
        return before[name] + "\n" if name in before else ""
    old = before.get(name, "").split("$")
    if len(old) == 5 and _hash(password, base64.b64decode(old[3]), int(old[2])) == old[4]:
        return before[name] + "\n"
    salt = secrets.token_bytes(12)
    return f"{name}:$7$101${base64.b64encode(salt).decode()}${_hash(password, salt, 101)}\n"


def _hash(password: str, salt: bytes, iterations: int) -> str:
    return base64.b64encode(hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations, 64)).decode()
