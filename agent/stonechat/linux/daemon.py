"""The daemon: everything that runs, put together from a checked configuration.

The program that reads the command line and the configuration (cli.py) replaces itself by this one, so that the resident
process never holds argparse, tomllib and re (3.5 MB).
"""

import marshal
import os
import signal
import stat
import sys

from .. import cose
from ..agent import Agent
from ..compat import replace, sleep_ms
from ..delivery import Delivery
from ..detection import ALARM, NORMAL, WATCH
from ..errors import ConfigError, ModelError, StonechatError
from ..model import load_model
from ..outbox import Outbox
from ..outbox_memory import MemoryOutbox
from ..state import State
from .tflite_runtime import TfliteRuntime

LEVEL_NAMES = {NORMAL: "normal", WATCH: "watch", ALARM: "alarm"}
PRIORITIES = {"error": 3, "warning": 4, "info": 6, "debug": 7}  # syslog(3), as journald reads them from standard error
MODEL_MAX_BYTES = 1 << 20
IDLE_MS = 1000  # the longest nap while connected: a message ends it at once, a signal does not
CONNECTING_MS = 100  # and while a connection is being made


class Log:
    """Lines on standard error; under systemd each carries its priority, so `journalctl -p warning` finds the alarms."""

    def __init__(self, level: str) -> None:
        self._most = PRIORITIES[level]
        self._journal = "JOURNAL_STREAM" in os.environ

    def __call__(self, level: str, text: str) -> None:
        if PRIORITIES[level] <= self._most:
            prefix = "<%d>" % PRIORITIES[level] if self._journal else "stonechat-agent: %s: " % level
            sys.stderr.write(prefix + text + "\n")
            sys.stderr.flush()


def read_file(path: str, what: str) -> bytes:
    """A model file's bytes. Raises ConfigError where it can't be read or is too large."""
    try:
        with open(path, "rb") as file:
            data = file.read(MODEL_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError("%s %s: %s" % (what, path, error.strerror))
    if len(data) > MODEL_MAX_BYTES:
        raise ConfigError("%s %s is larger than %d bytes" % (what, path, MODEL_MAX_BYTES))
    return data


def read_model(path: str, backend: str, what: str = "[model] file"):
    """path -> Model. Raises ConfigError where the file can't be read, ModelError where it is no model."""
    data = read_file(path, what)
    try:
        model = load_model(data, TfliteRuntime if backend == "tflite" else None)
        if model.metadata is None:
            raise ModelError("it has no stonechat metadata; make one with `stonechat train`")
    except ModelError as error:
        raise ModelError("%s %s: %s" % (what, path, error))
    return model


def read_secret(path: str, what: str) -> bytes:
    """The first line of a file that nobody else may read. Raises ConfigError with the fix."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            line = file.readline(1024).strip()
    except OSError as error:
        raise ConfigError("%s %s: %s" % (what, path, error.strerror))
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError("%s %s is open to others (mode %03o): chmod 600 %s" % (what, path, mode & 0o777, path))
    if not line:
        raise ConfigError("%s %s is empty" % (what, path))
    return line


def read_key(path: str) -> bytes:
    """The device's secret: 64 hexadecimal digits -> 32 bytes. Raises ConfigError."""
    line = read_secret(path, "[device] key_file")
    try:
        key = bytes.fromhex(line.decode())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(
            "[device] key_file %s must hold 64 hexadecimal digits (`stonechat provision` makes it)" % path
        )
    return key


def open_collector(config: dict, model, key: bytes, user_id: int | None):
    """The collector that the model's schema asks for. Raises CollectorError, ConfigError, ModelError."""
    from .collector import LinuxCollector
    from .schemas import LINUX_1, LINUX_PROC_1

    wanted = model.metadata.schema_id
    bpf = config["collector"]["bpf"]
    if wanted not in (LINUX_1.id, LINUX_PROC_1.id):
        raise ModelError(
            "[model] file %s is for schema %s; this device has %s and %s"
            % (config["model"]["file"], model.metadata.schema_name, LINUX_1.name, LINUX_PROC_1.name)
        )
    if bpf == "auto":
        bpf = wanted == LINUX_1.id
    return LinuxCollector(
        interfaces=config["collector"]["interfaces"] or None,
        peers_secret=cose.derive(key, b"peers"),
        use_bpf=bpf,
        cgroup=config["collector"]["cgroup"] or None,
        own_user_id=user_id,
        disks=config["collector"]["disks"] or None,
    )


def open_counters(config: dict, model) -> list:
    """The product's own counters as the agent's `extra`: [(collector, model)], or [] where there are none. Raises
    ConfigError, ModelError."""
    rows = config["counters"]["list"]
    if not rows:
        return []
    from ..custom_counters import from_config

    if not config["counters"]["model"]:
        raise ConfigError("[counters] needs model: the .tflite trained on recordings of these counters")
    own = read_model(config["counters"]["model"], config["model"]["backend"], "[counters] model")
    if own.metadata.window_ms != model.metadata.window_ms:
        raise ConfigError(
            "[counters] model has windows of %d ms, the device's model %d ms; they must be the same"
            % (own.metadata.window_ms, model.metadata.window_ms)
        )
    return [(from_config(config["counters"]["schema"], rows), own)]


def prepare_transport(config: dict):
    """What the MQTT client needs that only root may read, and its class: all that must happen before the user is
    changed -> a function (reporter, on_message, on_connect) that makes the client. Raises ConfigError."""
    mqtt = config["mqtt"]
    user: str | None = mqtt["username"] or None
    if mqtt["username_file"]:
        user = read_secret(mqtt["username_file"], "[mqtt] username_file").decode()
    password = read_secret(mqtt["password_file"], "[mqtt] password_file").decode() if mqtt["password_file"] else None
    tls = None
    if mqtt["tls"]:
        from .tls import tls_context

        tls = tls_context(mqtt["ca_file"], mqtt["cert_file"], mqtt["cert_key_file"], mqtt["alpn"])
    if mqtt["transport"] == "paho":
        from .paho import Paho, load

        load()
        make: type = Paho
        options: dict = {}
    else:
        from ..mqtt import Client

        if tls is None:
            import _socket as net  # all that a plain connection needs, and a quarter of socket's memory
        else:
            import socket as net  # type: ignore[no-redef]  # what ssl wraps
        make = Client
        options = {"socket": net}

    try:
        mqtt["host"].encode("idna")  # getaddrinfo loads this codec, and Python may lie where only root can read
    except UnicodeError:
        raise ConfigError("[mqtt] host %r is no name of a host" % mqtt["host"])

    def connectable(reporter, on_message, on_connect):
        transport = make(
            config["device"]["id"],
            mqtt["host"],
            mqtt["port"],
            user=user,
            password=password,
            tls=tls,
            keepalive_s=mqtt["keepalive_s"],
            will=(reporter.status_topic, reporter.status(online=False), 1, True),
            on_message=on_message,
            on_connect=on_connect,
            **options,
        )
        for topic in reporter.subscriptions:
            transport.subscribe(topic, 1)
        return transport

    return connectable


def own_folder(folder: str, user_id: int | None) -> None:
    """Make the folder, mode 0700, for the user that we become. Raises ConfigError."""
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        if user_id is not None:
            os.chown(folder, user_id, -1)
    except OSError as error:
        raise ConfigError("can't make the folder %s: %s" % (folder, error.strerror))


class Daemon:
    """Everything that runs, put together from the configuration. Raises StonechatError where it can't be."""

    def __init__(self, config: dict, log: Log) -> None:
        from . import privileges

        self.log = log
        self.stopping = False
        self._said = ""  # the last trouble logged: one line a change, not one a window
        device = config["device"]
        report = config["report"]
        key = read_key(device["key_file"])
        model = read_model(config["model"]["file"], config["model"]["backend"])
        user = config["collector"]["user"]
        user_id = privileges.user_ids(user)[0] if os.geteuid() == 0 else None
        collector = open_collector(config, model, key, user_id)
        extra = open_counters(config, model)
        connectable = prepare_transport(config)
        own_folder(os.path.dirname(os.path.abspath(device["state_file"])), user_id)
        if report["outbox_dir"]:
            own_folder(report["outbox_dir"], user_id)
        privileges.drop(user)
        state = State(device["state_file"])
        if state.damaged:
            log("warning", "%s: %s; set aside, starting afresh" % (device["state_file"], state.damaged))
            try:
                replace(device["state_file"], device["state_file"] + ".bad")
            except OSError:
                pass  # then the next save writes over it
        outbox = Outbox(report["outbox_dir"], report["outbox_bytes"]) if report["outbox_dir"] else MemoryOutbox()
        reporter = Delivery(
            device["id"],
            key,
            outbox,
            prefix=config["mqtt"]["prefix"] + "/" + device["fleet"] + "/",
            heartbeat_windows=report["heartbeat_windows"],
            bytes_per_day=report["bytes_per_day"],
            state=state,
            free_on_publish=report["free_on"] == "publish",
            resend_ms=report["resend_s"] * 1000,
        )
        self.transport = connectable(reporter, self._on_message, self._on_connect)
        self.transport.resend = False
        self.transport.on_published = reporter.on_published
        self.agent = Agent(
            collector,
            model,
            reporter=reporter,
            state=state,
            firmware=device["firmware"],
            publish=self.transport.publish,
            extra=extra,
            on_verdict=self._on_verdict,
        )
        if hasattr(collector, "exclude_peer"):
            collector.exclude_peer(config["mqtt"]["host"], config["mqtt"]["port"])
        self._where = "%s:%d" % (config["mqtt"]["host"], config["mqtt"]["port"])

    def plan(self) -> str:
        scorer = self.agent.channels[0].scorer
        lines = ["model %s, version %d, digest %s" % (scorer.meta.name, scorer.meta.version, scorer.model.digest.hex())]
        lines.append("schema %s, windows of %g s" % (scorer.meta.schema_name, self.agent.window_ms / 1000))
        for group, source, note in self.agent.channels[0].collector.sources:
            lines.append("%s: %s%s" % (group, source, " (%s)" % note if note else ""))
        return "\n".join(lines)

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then save, say goodbye and return."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        scorer = self.agent.channels[0].scorer
        doing = "learning what is normal here" if scorer.learning else "watching"
        self.log("info", "%s with model %s, windows of %g s" % (doing, scorer.meta.name, self.agent.window_ms / 1000))
        while not self.stopping:
            self.agent.tick()
            try:
                if self.transport.connected:
                    self.transport.poll(min(self.agent.due_in_ms, IDLE_MS) / 1000)
                else:
                    self.transport.poll()
                    if not self.transport.connected:
                        sleep_ms(min(self.agent.due_in_ms, CONNECTING_MS))
            except (StonechatError, OSError) as error:
                self._trouble("broker %s: %s" % (self._where, error))
            if self.agent.last_error:
                self._trouble(self.agent.last_error)
                self.agent.last_error = ""
        self.agent.close()
        self.transport.close()
        self.log(
            "info",
            "stopped after %d windows, %d reports published" % (self.agent.windows, self.agent.reporter.published),
        )

    def _stop(self, number, frame) -> None:
        self.stopping = True

    def _trouble(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self.log("warning", text)

    def _on_message(self, topic: str, payload: bytes) -> None:
        self.agent.on_message(topic, payload)

    def _on_connect(self) -> None:
        self.log("info", "connected to " + self._where)
        self._said = ""
        self.agent.connected()

    def _on_verdict(self, verdict, agent) -> None:
        if verdict.changed:
            columns = []
            for channel in agent.channels:
                columns += [column[0] for column in channel.collector.schema.columns]
            causes = ["%s %+.1f sd (%d %%)" % (columns[i], z / 16, share) for i, z, share in verdict.explain(3)]
            text = "%s: score %.2f, 1 in 10^%.1f windows; %s" % (
                LEVEL_NAMES[verdict.level],
                verdict.score_q8 / 256,
                verdict.surprise_q8 / 256,
                ", ".join(causes),
            )
            self.log("info" if verdict.level == NORMAL else "warning", text)


def main(config_fd: int) -> int:
    """config_fd: an open file that holds the checked configuration, marshalled (daemon.become_service) -> the exit
    status."""
    with open(config_fd, "rb") as file:
        config = marshal.loads(file.read())
    try:
        with open("/proc/self/comm", "w") as file:  # what ps and top call it
            file.write("stonechat-agent")
        Daemon(config, Log(config["log"]["level"])).run()
    except (StonechatError, OSError) as error:
        Log("error")("error", str(error))
        return 1
    return 0
