"""The daemon: everything that runs, put together from a checked configuration.

The program that reads the command line and the configuration (cli.py) replaces itself by this one, so that the resident
process never holds argparse, tomllib and re (3.5 MB).
"""

import _signal as signal  # type: ignore[import-not-found]  # signal itself loads enum and collections, 0.7 MB
import marshal
import os

from .. import cose
from ..agent import Agent
from ..compat import replace, sleep_ms, ticks_add, ticks_diff, ticks_ms
from ..delivery import Delivery
from ..errors import StonechatError
from ..outbox_memory import MemoryOutbox
from ..state import State
from . import files
from .broker import Credentials, prepare
from .broker_errors import explain
from .channels import open_channels, open_collector, own_channel, read_model, train
from .disk_outbox import DiskOutbox
from .health import HealthFile
from .log import Log, Troubles
from .planned_sleep import Announcements
from .process import EXIT_UNFORESEEN, describe, exit_status, give_memory_back, keep_standard_files
from .respond import open_response
from .switch import Switch
from .verdict_log import VerdictLog

IDLE_MS = 1000  # the longest nap while connected: a message ends it at once, a signal does not
CONNECTING_MS = 100  # and while a connection is being made


class LinuxDelivery(Delivery):
    """A Delivery whose key can be replaced while it runs."""

    def use_key(self, key: bytes) -> None:
        """key: 32 bytes. What was sealed with the old one goes again, sealed with the new one."""
        device_id = self.topic.split("/")[-2]
        self._mac = cose.Mac(key, b"report", device_id)
        self._status_mac = cose.Mac(key, b"status", device_id)
        self._ack_mac = cose.Mac(key, b"ack", device_id)
        self._command_mac = cose.Mac(key, b"command", device_id)
        self._renew_mac = cose.Mac(key, b"renew", device_id)


class Daemon:
    """Everything that runs, put together from the configuration. check: attach everything, but create, lock and change
    nothing. Raises StonechatError where it can't be."""

    def __init__(self, config: dict, log: Log, check: bool = False) -> None:
        from . import privileges

        self.log = log
        self.troubles = Troubles(log)
        self._verdict_log = VerdictLog(log)
        self.stopping = False
        self._reload_due = False
        self._config = config
        device = config["device"]
        report = config["report"]
        self._where = "broker %s:%d" % (config["mqtt"]["host"], config["mqtt"]["port"])
        key = files.read_key(device["key_file"])
        user = config["collector"]["user"]
        user_id = privileges.user_ids(user)[0] if os.geteuid() == 0 else None
        self._update = None
        self._update_folder: list = []  # none or one
        self._locks: dict = {}  # by folder
        if config["update"]["enabled"]:
            from . import updates  # only here: it costs memory

            self._update = updates.open_updater(config, user_id, check, self._on_update)
            self._update_folder = [os.path.abspath(config["update"]["folder"])]
            if not check:  # before a start is counted
                self._lock(self._update_folder[0])
            model = updates.first_model(self._update, config, key, user_id, check, read_model, log)
        else:
            model = read_model(config["model"]["file"], config["model"]["backend"])
        self._model = model
        credentials = Credentials(config["mqtt"])
        self._connectable = prepare(config)
        self._home = _home_assistant(config, model)
        own, self._slot = (None, None) if check else own_channel(config, model, key, log, self._update)
        collector = open_collector(config, model, key, user_id)
        extra = open_channels(config, model, collector)
        others = [each[0] for each in extra]
        self._switch = Switch(config["monitoring"])
        self._folders = [os.path.dirname(os.path.abspath(device["state_file"]))]
        if report["outbox_dir"] and os.path.abspath(report["outbox_dir"]) not in self._folders:
            self._folders.append(os.path.abspath(report["outbox_dir"]))
        if not check:
            for folder in self._folders:  # before the response is opened: what is in force may be that of another one
                self._lock(folder)
        response, self._responds = open_response(config, self._connectable.resolver, collector, others, log, check)
        self._makes_folders = user_id is not None  # a missing one, as root
        if not check and user_id is not None:
            for folder in self._folders:
                self._try("folder " + folder, files.grant_folder, folder, user_id)
        privileges.drop(user, keep_net_admin=response is not None and response.enforcer is not None)
        if not check:
            self._take_folders()
        state = self._open_state(device["state_file"], check)
        if report["outbox_dir"] and not check:
            outbox: DiskOutbox | MemoryOutbox = DiskOutbox(report["outbox_dir"], report["outbox_bytes"])
        else:
            outbox = MemoryOutbox(report["outbox_bytes"])
        reporter = LinuxDelivery(
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
        self.agent = Agent(
            collector,
            model,
            reporter=reporter,
            state=state,
            firmware=device["firmware"],
            extra=extra,
            own=own,
            on_verdict=self._on_verdict,
            learn_peers_hours=0,  # that channel is among the others
            response=response,
            update=self._update,
        )
        if not check:
            self._look_for_switch()
        self._connect(credentials)
        self._lacks = ""
        self._sleep = Announcements(device["state_file"])
        self._health = HealthFile(device["state_file"])
        self._look_due_ms = ticks_ms()

    def plan(self) -> str:
        meta = self._model.metadata
        lines = ["model %s, version %d, digest %s" % (meta.name, meta.version, self._model.digest.hex())]
        lines.append("schema %s, windows of %g s" % (meta.schema_name, self.agent.window_ms / 1000))
        for group, source, note in self.agent.sources:
            lines.append("%s: %s%s" % (group, source, " (%s)" % note if note else ""))
        for each in self.agent.channels[0].collector.services:
            lines.append("service %s: %s%s" % (each.name, each.path, " (not there yet)" if each.missing else ""))
        if self._responds:
            lines.append("response: " + self._responds)
        if self._switch.off():
            lines.append("monitoring is off: " + self._switch.reason)
        if self._update is not None:
            store = self._update.store
            trial = ", release %d on trial" % store.tried if store.trial else ""
            lines.append("updates: version %d runs%s" % (store.version, trial))
        if self._config["model"]["personalize"]:
            lines.append("own model: of %d windows" % self._config["model"]["personalize_windows"])
        for folder in [*self._folders, *self._update_folder]:
            trouble = files.make_trouble(folder, self._makes_folders)
            if trouble:
                lines.append("%s; until then %s" % (trouble, self._without(folder)))
        return "\n".join(lines)

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then save, say goodbye and return. SIGHUP reads keys and certificates again, or ends
        it where it runs on a terminal that was closed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._stop if os.isatty(0) or os.isatty(2) else self._reload_soon)
        doing = "learning what is normal here" if self.agent.learning else "watching"
        if not self.agent.off:  # else the log has said so
            seconds = self.agent.window_ms / 1000
            self.log("info", "%s with model %s, windows of %g s" % (doing, self.agent.model_name, seconds))
        self._check_folders()
        give_memory_back()
        while not self.stopping:
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next window is another try
                self.agent.errors += 1
                self.troubles.say("unforeseen", describe(error))
                sleep_ms(CONNECTING_MS)
        self.agent.close()
        if self._home and not self.agent.off:
            self._home.goodbye(self.transport)
        self.transport.close()
        self._health.write(self.agent)
        self.log(
            "info",
            "stopped after %d windows, %d reports published" % (self.agent.windows, self.agent.reporter.published),
        )

    def _turn(self) -> None:
        """What is due, and one wait for the broker of at most IDLE_MS."""
        agent = self.agent
        if self._reload_due:
            self._reload_due = False
            self._reload()
        agent.tick()
        idle_ms = IDLE_MS if agent.off else min(IDLE_MS, train(agent))
        was_connected = self.transport.connected
        try:
            if was_connected:
                self.transport.poll(min(agent.due_in_ms, idle_ms) / 1000)
            else:
                self.transport.poll()
                if not self.transport.connected:
                    sleep_ms(min(agent.due_in_ms, CONNECTING_MS))
        except (StonechatError, OSError) as error:
            self.troubles.say(self._where, explain(error, was_connected))
        if ticks_diff(ticks_ms(), self._look_due_ms) >= 0:
            self._look_due_ms = ticks_add(ticks_ms(), min(agent.window_ms, IDLE_MS))
            self._look_round()

    def _look_round(self) -> None:
        """Log what is wrong now, and what works again."""
        agent = self.agent
        self._look_for_switch()
        if agent.off:
            return
        if agent.last_error:
            self.troubles.say("agent", agent.last_error)
            agent.last_error = ""
        else:
            self.troubles.recovered("agent", 3 * agent.window_ms)
        if self.transport.refused:
            text = "not authorized to hear acknowledgements and commands: the broker refuses the subscriptions to %s"
            self.troubles.say("subscriptions", text % " and ".join(agent.reporter.subscriptions))
        elif self.transport.connected:
            self.troubles.over("subscriptions", 2 * agent.window_ms)
        outbox_trouble = getattr(agent.reporter.outbox, "trouble", "")
        if outbox_trouble:
            self.troubles.say("outbox", outbox_trouble + "; reports are held in memory only")
        else:
            self.troubles.recovered("outbox")
        lacks = agent.lacks
        if lacks != self._lacks:
            self._lacks = lacks
            agent.announce()
            if lacks:
                self.troubles.say("sources", "lacking " + lacks)
            else:
                self.troubles.recovered("sources", 0)
        if self._home:
            try:
                self._home.turn(self.transport)
            except (StonechatError, OSError) as error:
                self.troubles.say("Home Assistant", str(error))
        try:
            self._sleep.turn(agent, self.transport)
        except (StonechatError, OSError) as error:
            self.troubles.say("planned sleep", str(error))
        self._health.turn(agent)

    def _look_for_switch(self) -> None:
        """The user's switch as it is now."""
        agent = self.agent
        off = self._switch.off()
        if self._switch.trouble:
            self.troubles.say("monitoring", "%s; monitoring goes on" % self._switch.trouble)
        else:
            self.troubles.over("monitoring")
        if off != agent.off:
            if off and self._home and hasattr(self, "transport"):
                self._home.goodbye(self.transport)
            agent.monitoring(not off)
            self.log("warning", "monitoring is %s" % ("off: " + self._switch.reason if off else "on again"))
            if self._home and not off:
                self._home.connected()

    def _stop(self, number, frame) -> None:
        self.stopping = True

    def _reload_soon(self, number, frame) -> None:
        self._reload_due = True

    def _reload(self) -> None:
        """Read keys and certificates again and connect with them; what can't be read leaves those in use."""
        try:
            key = files.read_key(self._config["device"]["key_file"])
            credentials = Credentials(self._config["mqtt"])
        except (StonechatError, OSError) as error:
            self.log("error", "SIGHUP: the old keys and certificates stay in use: %s" % error)
            return
        self.transport.close()
        self.agent.reporter.use_key(key)
        if self._update is not None:
            self._update.use_key(key)
        if self._slot is not None:
            self._slot.use_key(key)
        self._connect(credentials)
        self.troubles.over(self._where)
        self.log("info", "SIGHUP: keys and certificates read again")

    def _try(self, subject: str, call, *arguments):
        """-> what call(*arguments) returns, None after an OSError, which is logged."""
        try:
            return call(*arguments)
        except OSError as error:
            self.troubles.say(subject, error.strerror or str(error))

    def _take_folders(self) -> None:
        for folder in self._folders:
            try:
                files.make_folder(folder)
            except OSError:
                pass  # _check_folders logs it, with the fix
            self._lock(folder)

    def _lock(self, folder: str) -> None:
        """Raises ConfigError where another agent uses it."""
        if self._locks.get(folder, -1) < 0:
            self._locks[folder] = files.lock_folder(folder)

    def _check_folders(self) -> None:
        for folder in [*self._folders, *self._update_folder]:
            trouble = files.make_trouble(folder, False)
            if trouble:
                self.troubles.say(
                    "folder" if folder in self._folders else "updates",
                    "%s; until then %s" % (trouble, self._without(folder)),
                )

    def _without(self, folder: str) -> str:
        """What is not possible while a folder can't be written."""
        is_state = folder in self._folders
        return "nothing that is learned outlives the agent" if is_state else "no release is taken"

    def _open_state(self, path: str, check: bool) -> State:
        try:
            state = State(path) if not os.path.exists(path) or os.path.isfile(path) else None
        except OSError as error:
            state = None
            self.log("warning", "%s: %s; starting afresh" % (path, error))
        if state is None:
            self.log("warning", "%s is not a file; starting afresh, and nothing that is learned is saved" % path)
            return State(None)
        damaged = state.damaged or files.unreadable(path)
        if damaged:
            self.log("warning", "%s: %s; set aside as %s.bad, starting afresh" % (path, damaged, path))
            if not check:
                try:
                    replace(path, path + ".bad")
                except OSError:
                    pass  # then the next save writes over it
        return state

    def _connect(self, credentials: Credentials) -> None:
        self.transport = self.agent.connect(self._connectable(credentials))
        self.transport.on_connect = self._on_connect
        if self._home:
            self.transport.subscribe(self._home.status_topic, 0)
            self.transport.on_message = self._on_message

    def _on_connect(self) -> None:
        self.log("info", "connected to " + self._where[len("broker ") :])
        self.troubles.over(self._where)
        self.agent.connected()
        self._sleep.connected()
        if self._home and not self.agent.off:
            self._home.connected()

    def _on_message(self, topic: str, payload: bytes) -> None:
        if not self._home.on_message(topic, payload):
            self.agent.on_message(topic, payload)

    def _on_verdict(self, verdict, agent) -> None:
        self._verdict_log.observe(verdict, agent)
        if self._home:
            self._home.observe(verdict, agent)

    def _on_update(self, update) -> None:
        from . import updates

        if self._slot is not None and not update.store.trial:
            self._slot.bind(self.agent.channels[0].scorer.model.digest)
        self.log(*updates.text(update))


def _home_assistant(config: dict, model):
    """None where it is off: then it costs no memory."""
    if config["homeassistant"]["discovery"] is False:
        return None
    from .homeassistant import open_home

    return open_home(config, model.metadata.window_ms)


def main(config_fd: int) -> int:
    """config_fd: an open file that holds the checked configuration, marshalled (cli.become_service) -> the exit
    status."""
    keep_standard_files()
    with open(config_fd, "rb") as file:
        config = marshal.loads(file.read())
    log = Log(config["log"]["level"])
    try:
        with open("/proc/self/comm", "w") as file:  # what ps and top call it
            file.write("stonechat-agent")
        Daemon(config, log).run()
    except (StonechatError, OSError) as error:
        log("error", str(error))
        return exit_status(error)
    except Exception as error:  # noqa: BLE001 - one line, and systemd starts it again
        log("error", describe(error))
        return EXIT_UNFORESEEN
    return 0
