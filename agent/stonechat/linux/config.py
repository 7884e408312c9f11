"""The daemon's configuration: one TOML file, read once, every key checked.

KEYS is the only list of keys there is: what the daemon accepts, its defaults, its checks, and the commented example
that `stonechat-agent --example-config` prints all come from it.
"""

import socket
import tomllib
from os.path import isfile

from ..errors import ConfigError
from . import allow_list, respond, shipped
from .files import read_regular


class Key:
    """One key: its default (REQUIRED: none), what a value must be, and the sentence for the example."""

    def __init__(self, default, check, doc: str, example=None) -> None:
        self.default = default
        self.check = check
        self.doc = doc
        self.example = default if example is None else example


REQUIRED = object()
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def _integer(low: int, high: int):
    def check(value) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if good else "a whole number from %d to %d" % (low, high)

    return check


MAX_BYTES = 1 << 20  # of the file
MAX_TEXT_BYTES = 1024
_MAX_SHOWN = 60  # characters of a value in a message


def _is_text(value, most: int = MAX_TEXT_BYTES) -> bool:
    """No NUL, no line break: such a text is no path, no name and no topic."""
    return isinstance(value, str) and len(value.encode()) <= most and (value == "" or value.isprintable())


def _text(value) -> str | None:
    return None if _is_text(value) else "a text in quotes, printable, at most %d bytes" % MAX_TEXT_BYTES


def _filled(value) -> str | None:
    return _text(value) or (None if value else "a text in quotes, not empty")


def _device_id(value) -> str | None:
    good = _is_text(value, 64) and not set(value) - _ID_CHARACTERS and set(value) - set("-_.")
    return None if good else "a text of 1 to 64 letters, digits, - _ . without / + # and not of - _ . alone"


def _fleet(value) -> str | None:
    good = _is_text(value, 64) and value and not set(value) & set("/+#")
    return None if good else "a text of 1 to 64 bytes without / + # (it becomes part of an MQTT topic)"


def _prefix(value) -> str | None:
    good = _is_text(value, 128) and value and not set(value) & set("+#") and value[0] != "$"
    return None if good else "a text of 1 to 128 bytes without + # and no $ in front (every topic begins with it)"


def _firmware(value) -> str | None:
    return None if _is_text(value, 64) else "a text of at most 64 bytes"


def _device_class(value) -> str | None:
    return None if _is_text(value, 32) else "a text of at most 32 bytes"


def _host(value) -> str | None:
    try:
        good = _is_text(value, 253) and value and not set(value) & set(" /[]@") and len(value.encode("idna")) <= 253
        if good and ":" in value:
            socket.inet_pton(socket.AF_INET6, value.split("%")[0])
    except (UnicodeError, OSError):
        good = False
    words = "a name or an address without scheme, port and [] (a host's name has no blank, no empty or long part)"
    return None if good else words


def _user(value) -> str | None:
    good = _is_text(value, 32) and value.isascii() and not set(value) & set(" :/")
    return None if good else "the name or the number of a user"


def _alpn(value) -> str | None:
    return None if _is_text(value, 255) and value.isascii() else "a text of at most 255 ASCII characters"


def _absolute(value) -> str | None:
    good = _text(value) is None and (not value or value[0] == "/" and ".." not in value.split("/"))
    return None if good else "an absolute path without .., or empty"


def _flag(value) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _one_of(*choices):
    def check(value) -> str | None:
        if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            return None
        return "one of " + ", ".join(_toml(choice) for choice in choices)

    return check


def _texts(value) -> str | None:
    good = isinstance(value, list) and all(_is_text(item) and item for item in value)
    return None if good else "a list of texts"


def _tables(value) -> str | None:
    rows = value if isinstance(value, list) else [None]
    good = all(isinstance(row, dict) and all(_is_text(text) for text in row.values()) for row in rows)
    return None if good else 'a list like [{name = "openings", unit = "1", kind = "rate", path = "/run/door/openings"}]'


KEYS = {
    "device": {
        "id": Key(REQUIRED, _device_id, "Name of this device, unique in its fleet.", "pump-17"),
        "fleet": Key("fleet", _fleet, "Name of the fleet: the level above the device in every topic."),
        "key_file": Key(
            REQUIRED,
            _filled,
            "The device's secret of 32 bytes in hexadecimal, readable by the agent's user only (mode 0600);\n"
            "`stonechat provision` makes it. Reports are authenticated with a key derived from it.",
            "/etc/stonechat/device.key",
        ),
        "firmware": Key(
            "", _firmware, "Id of the installed firmware. A new id makes the agent calibrate itself again."
        ),
        "state_file": Key(
            "/var/lib/stonechat/state",
            _filled,
            "What the device has learned; must survive a restart. One atomic file of at most 32 KiB.",
        ),
    },
    "model": {
        "file": Key(
            REQUIRED,
            _filled,
            "The model: a .tflite with stonechat's metadata, or the name of one that comes with the package (linux-1).",
            "/etc/stonechat/model.tflite",
        ),
        "backend": Key(
            "own",
            _one_of("own", "tflite"),
            "Who computes: own = the built-in integer interpreter (no package needed), tflite = tflite-runtime\n"
            "with its reference kernels. Both give the same bytes.",
        ),
        "personalize": Key(
            False,
            _flag,
            "true: the device also trains a model of its own, on its own windows, which never leave it. It watches\n"
            "with both: the model above goes on. Nothing is trained where the vendor of that model forbids it.",
        ),
        "personalize_windows": Key(
            2000,
            _integer(240, 20_000),
            "How many windows it is trained on; a quarter as many more must pass in silence before it is adopted.",
        ),
    },
    "collector": {
        "interfaces": Key(
            [],
            _texts,
            'Interfaces to count. Empty: all of them but "lo".',
        ),
        "disks": Key(
            [],
            _texts,
            "Block devices or partitions whose reads and writes count, as in /proc/diskstats: mmcblk0 without the USB\n"
            "disk beside it. Empty: all of them.",
        ),
        "cgroup": Key(
            "",
            _text,
            "A cgroup v2 folder to watch in place of the whole machine, such as\n"
            "/sys/fs/cgroup/system.slice/app.service: one container or slice of a gateway, with a model of its own.\n"
            "Needs BPF. The agent itself stays outside.\n"
            "Packets of interfaces and the kernel's TCP counters are those of the agent's network namespace.",
        ),
        "services": Key(
            [],
            _texts,
            "Services that are watched by themselves, too, at most 8: systemd units, or cgroup v2 folders such as\n"
            '"/system.slice/docker.slice". An attack inside one of them is plain in its own counters and hidden in\n'
            "the machine's; alarms name the service. Each need not run yet, and may restart. Needs BPF.",
        ),
        "service_model": Key(
            "linux-service-1",
            _filled,
            "The model of every service: a .tflite made of recordings of services (stonechat record --services), the\n"
            "name of one that comes with the package, or a folder that has one for each, as `stonechat train --each`\n"
            "makes them: nginx/model.tflite for nginx.service. Of the same window length as the device's.",
        ),
        "bpf": Key(
            "auto",
            _one_of("auto", True, False),
            'Syscalls and peers from the kernel by eBPF: true = required, false = never, "auto" = where it starts.\n'
            "The model must be made for what starts: schema linux-1 with it, linux-proc-1 without.",
        ),
        "learn_peers_hours": Key(
            24,
            _integer(0, 8_760),
            "How long the device's own peers are learned; afterwards a host that is not among them and is met again\n"
            "and again for ten minutes raises an alarm (without BPF: over TCP). 0: without that.",
        ),
        "user": Key(
            "",
            _user,
            "User to become after start, when started as root. Every capability is dropped. Empty: `stonechat` if\n"
            "there is such a user, else `nobody`.",
        ),
    },
    "counters": {
        "list": Key(
            [],
            _tables,
            "The product's own counters, one small file each that holds a whole number; they are scored by a model\n"
            "of their own beside the device's (kind: rate = it only grows, level = a reading, share = percent):\n"
            '[{name = "openings", unit = "1", kind = "rate", path = "/run/door/openings"}]',
        ),
        "schema": Key("counters", _filled, "Name of their schema, as the model was trained with."),
        "model": Key("", _text, "Their model, of the same window length as the device's."),
    },
    "mqtt": {
        "host": Key(REQUIRED, _host, "The broker's name or address.", "broker.example.org"),
        "port": Key(8883, _integer(1, 65535), "The broker's port."),
        "transport": Key(
            "auto",
            _one_of("auto", "lean", "paho"),
            "The MQTT client: auto and lean = the built-in one (no package, 10 MB less memory), paho = paho-mqtt.",
        ),
        "tls": Key(True, _flag, "TLS with the broker's certificate verified. false sends everything in the clear."),
        "ca_file": Key("", _text, "Certificate authority of the broker, PEM. Empty: the system's own."),
        "cert_file": Key("", _text, "This device's certificate, PEM, where the broker asks for one."),
        "cert_key_file": Key("", _text, "Its private key, PEM, mode 0600."),
        "alpn": Key("", _alpn, "ALPN protocol name, for managed brokers on port 443.", ""),
        "username": Key("", _text, "User name at the broker."),
        "username_file": Key("", _text, "File that holds the user name, as an alternative to `username`."),
        "password_file": Key(
            "", _text, "File that holds the password, mode 0600. A password is never written in this configuration."
        ),
        "prefix": Key("stonechat/1", _prefix, "Where the topics start: PREFIX/FLEET/DEVICE/report and so on."),
        "keepalive_s": Key(60, _integer(5, 3600), "Seconds of silence after which the broker calls the device lost."),
    },
    "report": {
        "heartbeat_windows": Key(
            60,
            _integer(1, 100_000),
            "Normal windows are summarized in one report for N windows; a change of level is sent at once. 1 reports\n"
            "every window.",
        ),
        "bytes_per_day": Key(
            40_000,
            _integer(1_000, 1_000_000_000),
            "What the device may send in a day, counted in MQTT payload bytes.",
        ),
        "outbox_dir": Key(
            "/var/lib/stonechat/outbox",
            _text,
            "Folder of the store-and-forward ring. Empty: reports wait in memory only.",
        ),
        "outbox_bytes": Key(32_768, _integer(2_048, 16_777_216), "Size of that ring; when full the oldest is dropped."),
        "free_on": Key(
            "ack",
            _one_of("ack", "publish"),
            "What frees a report: ack = the collector's word that it is in its database, publish = the broker's\n"
            "acknowledgement (a broker that is killed loses what it acknowledged).",
        ),
        "resend_s": Key(
            30,
            _integer(1, 3_600),
            "Seconds without a word from the collector after which the oldest report is sent again; the wait doubles\n"
            "each time, up to an hour.",
        ),
    },
    "response": {
        "mode": Key(
            "dry-run",
            _one_of("off", "dry-run", "on"),
            "What is done about an alarm: off = nothing is decided, dry-run = decisions are made, reported and logged\n"
            "as what would have been done, on = they are carried out. on needs nf_tables and CAP_NET_ADMIN, the one\n"
            "capability that the agent keeps then.",
        ),
        "lease_s": Key(
            120,
            _integer(1, 3600),
            "Seconds that a throttle or a quarantine lasts. The kernel ends it, even if the agent is gone. It lasts\n"
            "longer only while the collector or an operator renews it; after its end there is a pause as long.",
        ),
        "rules": Key(
            [],
            respond.check,
            "Which decision is made when. Empty: these three, which first slow down what is not on the allow-list,\n"
            "stop it after three more windows, and call the hook once an alarm:\n"
            '[{action = "throttle", features = "network"},\n'
            ' {action = "quarantine", features = "network", windows = 3},\n'
            ' {action = "hook"}]\n'
            "action: alert (a decision of its own in the record), throttle, quarantine or hook.\n"
            "level: watch or alarm, the least level; alarm where it is left out.\n"
            "features: what must carry the alarm to a quarter or more: any, network, programs, files, machine, or\n"
            'some of them like "network+files".\n'
            "windows: how many windows the level must have lasted before; 0 where it is left out.\n"
            "seconds: of the lease; lease_s where it is left out. The next one within a day is twice as long,\n"
            "most_seconds: but never longer than this; four times `seconds` where it is left out.",
        ),
        "allow": Key(
            [],
            allow_list.check,
            "Who is reached whatever is in force, besides the broker, DNS, DHCP, NTP and the gateways, which always\n"
            "are: addresses or networks, each with its reason, and until when where that is wanted:\n"
            '[{address = "192.0.2.0/24", reason = "office", until = "2027-01-31"}]\n'
            "essential = true in an entry: a response that its connections die of is not renewed.",
        ),
        "self_renew_s": Key(
            0,
            _integer(0, 86_400),
            "For a device without a collector: how many seconds in one alarm it may be kept in by itself, all leases\n"
            "together, with pauses that grow between them. 0: a lease that nobody renews ends, and none follows\n"
            "before a new alarm.",
        ),
        "hook": Key(
            [],
            _texts,
            "The vendor's own response: a program and its arguments, run without a shell as the agent's user, its\n"
            "facts in the environment (STONECHAT_DEVICE, _LEVEL, _FAMILIES, _FEATURES). Empty: none.\n"
            '["/usr/local/bin/pump-safe", "--stop"]',
        ),
        "hook_timeout_s": Key(30, _integer(1, 3600), "Seconds after which that program is killed."),
    },
    "monitoring": {
        "on": Key(True, _flag, "false: the user has switched monitoring off: one status says so, nothing is read."),
        "off_file": Key(
            "/etc/stonechat/monitoring-off",
            _absolute,
            "The user's switch: while this file is there, monitoring is off. File and folder must be root's, and\n"
            "nobody else may write to them; else it does not count. Empty: no such file.",
        ),
    },
    "update": {
        "enabled": Key(
            False,
            _flag,
            "true: the device takes models and alarm rules that the vendor has signed (stonechat release), from the\n"
            "collector. A new model is proven on the device's own last windows, and final once it is confirmed.",
        ),
        "keys": Key(
            [],
            _texts,
            "Files of the vendor's public keys, as `stonechat release keygen` writes them. Where they hold keys of\n"
            "both roles, release and officer, both must have signed.",
            ["/etc/stonechat/vendor.key.pub"],
        ),
        "class": Key("", _device_class, "Class of devices that this one belongs to, as releases name it.", "pump"),
        "folder": Key(
            "/var/lib/stonechat/update",
            _filled,
            "Where releases are kept: two slots beside the model above. The agent's user alone writes it (mode 0700).",
        ),
        "most_bytes": Key(262_144, _integer(1_024, 1_048_576), "The largest model that is taken."),
        "bytes_per_day": Key(
            2_000_000,
            _integer(10_000, 1_000_000_000),
            "What updates may send and receive in a day; report.bytes_per_day is not touched by it.",
        ),
        "windows": Key(
            64,
            _integer(0, 1_000),
            "How many of the device's own last windows a new model must score without an alarm before it is tried.",
        ),
    },
    "homeassistant": {
        "discovery": Key(
            False,
            _one_of(True, False, "remove"),
            "true announces this device to Home Assistant over the same broker and publishes its state as JSON, which\n"
            'is not authenticated and not counted in bytes_per_day; "remove" takes it out of Home Assistant again.',
        ),
        "prefix": Key("homeassistant", _prefix, "Home Assistant's discovery prefix."),
        "name": Key("", _text, "What Home Assistant calls the device. Empty: its id."),
    },
    "log": {
        "level": Key("info", _one_of("error", "warning", "info", "debug"), "What goes to standard error (journald)."),
    },
}


def load(path: str) -> dict:
    """path -> {section: {key: value}} with every default filled in. Raises ConfigError naming file, key and fix."""
    data, _ = read_regular(path, MAX_BYTES + 1, "can't read")
    if len(data) > MAX_BYTES:
        raise ConfigError("%s is larger than %d bytes" % (path, MAX_BYTES))
    try:
        config = check(tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n")), path)
    except RecursionError:
        raise ConfigError("%s is not TOML that can be read: brackets nested too deeply" % path)
    except UnicodeDecodeError as error:
        raise ConfigError("%s is not TOML: it is not UTF-8 (%s)" % (path, error.reason))
    except ValueError as error:  # tomllib.TOMLDecodeError, and a number of thousands of digits
        raise ConfigError("%s is not TOML: %s" % (path, str(error)[:200]))
    for section, name in (("model", "file"), ("collector", "service_model")):
        file = config[section][name]
        config[section][name] = shipped.path(file)
        wanted = section == "model" or config["collector"]["services"]
        if wanted and "/" not in file and config[section][name] == file and not isfile(file):
            names = ", ".join(shipped.names())
            raise ConfigError(
                "%s: [%s] %s %s: no such file; models of the package: %s" % (path, section, name, file, names)
            )
    return config


def check(raw: dict, path: str = "config") -> dict:
    """raw: what the TOML file said -> the whole configuration. Raises ConfigError."""
    for section in raw:
        if section not in KEYS:
            raise ConfigError("%s: unknown section [%s]%s" % (path, _shown(section)[1:-1], _nearest(section, KEYS)))
        if not isinstance(raw[section], dict):
            raise ConfigError("%s: %s must be a section: [%s]" % (path, section, section))
    config: dict = {}
    for section, keys in KEYS.items():
        given = raw.get(section, {})
        for name in given:
            if name not in keys:
                raise ConfigError(
                    "%s: [%s] has no key %s%s" % (path, section, _shown(name)[1:-1], _nearest(name, keys))
                )
        config[section] = {}
        for name, key in keys.items():
            value = given.get(name, key.default)
            if value is REQUIRED:
                raise ConfigError("%s: [%s] needs %s = %s" % (path, section, name, _toml(key.example)))
            wrong = key.check(value)
            if wrong:
                raise ConfigError("%s: [%s] %s must be %s, not %s" % (path, section, name, wrong, _shown(value)))
            config[section][name] = value
    return config


def _shown(value) -> str:
    """A wrong value, as far as it fits into a message."""
    try:
        text = _toml(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        text = "something of that size"
    text = "".join([c if c.isprintable() else "?" for c in text[: _MAX_SHOWN + 1]])
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _nearest(word: str, words) -> str:
    from difflib import get_close_matches  # only on the way to an error: costs memory

    close = get_close_matches(word[:_MAX_SHOWN], list(words), 1)
    return "; is it %s?" % close[0] if close else "; known: " + ", ".join(words)


def _toml(value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"%s"' % value.replace("\\", "\\\\").replace('"', '\\"')
    if isinstance(value, list):
        return "[%s]" % ", ".join(_toml(item) for item in value)
    return str(value)


def example() -> str:
    """A complete commented configuration: required keys set to a sample, the others commented out at their default."""
    lines = ["# stonechat-agent: every key there is. What is commented out shows its default."]
    for section, keys in KEYS.items():
        lines += ["", "[%s]" % section]
        for name, key in keys.items():
            lines += ["# " + line for line in key.doc.split("\n")]
            shown = key.example if key.default is REQUIRED else key.default
            lines.append("%s%s = %s" % ("" if key.default is REQUIRED else "# ", name, _toml(shown)))
    return "\n".join(lines) + "\n"
