"""Every key of the daemon's configuration: its default, its check, and its sentence in the example.

KEYS is the only list of keys there is: what the daemon accepts and the commented example that
`stonechat-agent --example-config` prints both come from it.
"""

from . import allow_list, respond
from .config_checks import (
    absolute,
    alpn,
    device_class,
    device_id,
    filled,
    firmware,
    flag,
    fleet,
    host,
    integer,
    one_of,
    prefix,
    tables,
    text,
    texts,
    user,
)


class Key:
    """One key: its default (REQUIRED: none), what a value must be, and the sentence for the example."""

    def __init__(self, default, check, doc: str, example=None) -> None:
        self.default = default
        self.check = check
        self.doc = doc
        self.example = default if example is None else example


REQUIRED = object()

KEYS = {
    "device": {
        "id": Key(REQUIRED, device_id, "Name of this device, unique in its fleet.", "pump-17"),
        "fleet": Key("fleet", fleet, "Name of the fleet: the level above the device in every topic."),
        "key_file": Key(
            REQUIRED,
            filled,
            "The device's secret of 32 bytes in hexadecimal, readable by the agent's user only (mode 0600);\n"
            "`stonechat provision` makes it. Reports are authenticated with a key derived from it.",
            "/etc/stonechat/device.key",
        ),
        "firmware": Key("", firmware, "Id of the installed firmware. A new id makes the agent calibrate itself again."),
        "state_file": Key(
            "/var/lib/stonechat/state",
            filled,
            "What the device has learned; must survive a restart. One atomic file of at most 32 KiB.",
        ),
    },
    "model": {
        "file": Key(
            REQUIRED,
            filled,
            "The model: a .tflite with stonechat's metadata, or the name of one that comes with the package (linux-1).",
            "/etc/stonechat/model.tflite",
        ),
        "backend": Key(
            "own",
            one_of("own", "tflite"),
            "Who computes: own = the built-in integer interpreter (no package needed), tflite = tflite-runtime\n"
            "with its reference kernels. Both give the same bytes.",
        ),
        "personalize": Key(
            False,
            flag,
            "true: the device also trains a model of its own, on its own windows, which never leave it. It watches\n"
            "with both: the model above goes on. Nothing is trained where the vendor of that model forbids it.",
        ),
        "personalize_windows": Key(
            2000,
            integer(240, 20_000),
            "How many windows it is trained on; a quarter as many more must pass in silence before it is adopted.",
        ),
    },
    "collector": {
        "interfaces": Key(
            [],
            texts,
            'Interfaces to count. Empty: all of them but "lo".',
        ),
        "disks": Key(
            [],
            texts,
            "Block devices or partitions whose reads and writes count, as in /proc/diskstats: mmcblk0 without the USB\n"
            "disk beside it. Empty: all of them.",
        ),
        "cgroup": Key(
            "",
            text,
            "A cgroup v2 folder to watch in place of the whole machine, such as\n"
            "/sys/fs/cgroup/system.slice/app.service: one container or slice of a gateway, with a model of its own.\n"
            "Needs BPF. The agent itself stays outside.\n"
            "Packets of interfaces and the kernel's TCP counters are those of the agent's network namespace.",
        ),
        "services": Key(
            [],
            texts,
            "Services that are watched by themselves, too, at most 8: systemd units, or cgroup v2 folders such as\n"
            '"/system.slice/docker.slice". An attack inside one of them is plain in its own counters and hidden in\n'
            "the machine's; alarms name the service. Each need not run yet, and may restart. Needs BPF.",
        ),
        "service_model": Key(
            "linux-service-1",
            filled,
            "The model of every service: a .tflite made of recordings of services (stonechat record --services), the\n"
            "name of one that comes with the package, or a folder that has one for each, as `stonechat train --each`\n"
            "makes them: nginx/model.tflite for nginx.service. Of the same window length as the device's.",
        ),
        "bpf": Key(
            "auto",
            one_of("auto", True, False),
            'Syscalls and peers from the kernel by eBPF: true = required, false = never, "auto" = where it starts.\n'
            "The model must be made for what starts: schema linux-1 with it, linux-proc-1 without.",
        ),
        "learn_peers_hours": Key(
            24,
            integer(0, 8_760),
            "How long the device's own peers are learned; afterwards a host that is not among them and is met again\n"
            "and again for ten minutes raises an alarm (without BPF: over TCP). With BPF, much more than usual to one\n"
            "of them raises one, too. 0: without both.",
        ),
        "user": Key(
            "",
            user,
            "User to become after start, when started as root. Every capability is dropped. Empty: `stonechat` if\n"
            "there is such a user, else `nobody`.",
        ),
    },
    "counters": {
        "list": Key(
            [],
            tables,
            "The product's own counters, one small file each that holds a whole number; they are scored by a model\n"
            "of their own beside the device's (kind: rate = it only grows, level = a reading, share = percent):\n"
            '[{name = "openings", unit = "1", kind = "rate", path = "/run/door/openings"}]',
        ),
        "schema": Key("counters", filled, "Name of their schema, as the model was trained with."),
        "model": Key("", text, "Their model, of the same window length as the device's."),
    },
    "mqtt": {
        "host": Key(REQUIRED, host, "The broker's name or address.", "broker.example.org"),
        "port": Key(8883, integer(1, 65535), "The broker's port."),
        "transport": Key(
            "auto",
            one_of("auto", "lean", "paho"),
            "The MQTT client: auto and lean = the built-in one (no package, 10 MB less memory), paho = paho-mqtt.",
        ),
        "tls": Key(True, flag, "TLS with the broker's certificate verified. false sends everything in the clear."),
        "ca_file": Key("", text, "Certificate authority of the broker, PEM. Empty: the system's own."),
        "cert_file": Key("", text, "This device's certificate, PEM, where the broker asks for one."),
        "cert_key_file": Key("", text, "Its private key, PEM, mode 0600."),
        "alpn": Key("", alpn, "ALPN protocol name, for managed brokers on port 443.", ""),
        "username": Key("", text, "User name at the broker."),
        "username_file": Key("", text, "File that holds the user name, as an alternative to `username`."),
        "password_file": Key(
            "", text, "File that holds the password, mode 0600. A password is never written in this configuration."
        ),
        "prefix": Key("stonechat/1", prefix, "Where the topics start: PREFIX/FLEET/DEVICE/report and so on."),
        "keepalive_s": Key(60, integer(5, 3600), "Seconds of silence after which the broker calls the device lost."),
    },
    "report": {
        "heartbeat_windows": Key(
            60,
            integer(1, 100_000),
            "Normal windows are summarized in one report for N windows; a change of level is sent at once. 1 reports\n"
            "every window.",
        ),
        "bytes_per_day": Key(
            40_000,
            integer(1_000, 1_000_000_000),
            "What the device may send in a day, counted in MQTT payload bytes.",
        ),
        "outbox_dir": Key(
            "/var/lib/stonechat/outbox",
            text,
            "Folder of the store-and-forward ring. Empty: reports wait in memory only.",
        ),
        "outbox_bytes": Key(32_768, integer(2_048, 16_777_216), "Size of that ring; when full the oldest is dropped."),
        "free_on": Key(
            "ack",
            one_of("ack", "publish"),
            "What frees a report: ack = the collector's word that it is in its database, publish = the broker's\n"
            "acknowledgement (a broker that is killed loses what it acknowledged).",
        ),
        "resend_s": Key(
            30,
            integer(1, 3_600),
            "Seconds without a word from the collector after which the oldest report is sent again; the wait doubles\n"
            "each time, up to an hour.",
        ),
    },
    "response": {
        "mode": Key(
            "dry-run",
            one_of("off", "dry-run", "on"),
            "What is done about an alarm: off = nothing is decided, dry-run = decisions are made, reported and logged\n"
            "as what would have been done, on = they are carried out. on needs nf_tables and CAP_NET_ADMIN, the one\n"
            "capability that the agent keeps then.",
        ),
        "lease_s": Key(
            120,
            integer(1, 3600),
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
            integer(0, 86_400),
            "For a device without a collector: how many seconds in one alarm it may be kept in by itself, all leases\n"
            "together, with pauses that grow between them. 0: a lease that nobody renews ends, and none follows\n"
            "before a new alarm.",
        ),
        "hook": Key(
            [],
            texts,
            "The vendor's own response: a program and its arguments, run without a shell as the agent's user, its\n"
            "facts in the environment (STONECHAT_DEVICE, _LEVEL, _FAMILIES, _FEATURES). Empty: none.\n"
            '["/usr/local/bin/pump-safe", "--stop"]',
        ),
        "hook_timeout_s": Key(30, integer(1, 3600), "Seconds after which that program is killed."),
    },
    "monitoring": {
        "on": Key(True, flag, "false: the user has switched monitoring off: one status says so, nothing is read."),
        "off_file": Key(
            "/etc/stonechat/monitoring-off",
            absolute,
            "The user's switch: while this file is there, monitoring is off. File and folder must be root's, and\n"
            "nobody else may write to them; else it does not count. Empty: no such file.",
        ),
    },
    "update": {
        "enabled": Key(
            False,
            flag,
            "true: the device takes models and alarm rules that the vendor has signed (stonechat release), from the\n"
            "collector. A new model is proven on the device's own last windows, and final once it is confirmed.",
        ),
        "keys": Key(
            [],
            texts,
            "Files of the vendor's public keys, as `stonechat release keygen` writes them. Where they hold keys of\n"
            "both roles, release and officer, both must have signed.",
            ["/etc/stonechat/vendor.key.pub"],
        ),
        "class": Key("", device_class, "Class of devices that this one belongs to, as releases name it.", "pump"),
        "folder": Key(
            "/var/lib/stonechat/update",
            filled,
            "Where releases are kept: two slots beside the model above. The agent's user alone writes it (mode 0700).",
        ),
        "most_bytes": Key(262_144, integer(1_024, 1_048_576), "The largest model that is taken."),
        "bytes_per_day": Key(
            2_000_000,
            integer(10_000, 1_000_000_000),
            "What updates may send and receive in a day; report.bytes_per_day is not touched by it.",
        ),
        "windows": Key(
            64,
            integer(0, 1_000),
            "How many of the device's own last windows a new model must score without an alarm before it is tried.",
        ),
    },
    "homeassistant": {
        "discovery": Key(
            False,
            one_of(True, False, "remove"),
            "true announces this device to Home Assistant over the same broker and publishes its state as JSON, which\n"
            'is not authenticated and not counted in bytes_per_day; "remove" takes it out of Home Assistant again.',
        ),
        "prefix": Key("homeassistant", prefix, "Home Assistant's discovery prefix."),
        "name": Key("", text, "What Home Assistant calls the device. Empty: its id."),
    },
    "log": {
        "level": Key("info", one_of("error", "warning", "info", "debug"), "What goes to standard error (journald)."),
    },
}
