"""The daemon: everything that runs, put together from a checked configuration.

The program that reads the command line and the configuration (cli.py) replaces itself by this one, so that the resident
process never holds argparse, tomllib and re (3.5 MB).
"""

import _signal as signal  # type: ignore[import-not-found]  # signal itself loads enum and collections, 0.7 MB
import gc
import marshal
import os
import sys

from .. import __version__, cose
from ..agent import Agent
from ..compat import epoch_s, replace, sleep_ms, ticks_add, ticks_diff, ticks_ms
from ..delivery import Delivery
from ..detection import ALARM, NORMAL, WATCH
from ..errors import StonechatError
from ..outbox_memory import MemoryOutbox
from ..state import State
from . import files
from .broker import Credentials, prepare
from .broker_errors import explain
from .channels import open_channels, open_collector, own_channel, read_model, train
from .disk_outbox import DiskOutbox
from .log import Log, Troubles
from .planned_sleep import Announcements
from .respond import open_response
from .switch import Switch

LEVEL_NAMES = {NORMAL: "normal", WATCH: "watch", ALARM: "alarm"}
IDLE_MS = 1000  # the longest nap while connected: a message ends it at once, a signal does not
CONNECTING_MS = 100  # and while a connection is being made
HEALTH_EVERY_MS = 60_000  # at most, for the counts; what is lacking is written at once
NEWS_Q8 = 768  # surprise, 1 in 1,000 windows, from which on a new cause of an alarm that goes on is logged,
NEWS_WINDOWS = 60  # where it has not led the explanation for that long: a decoy does not hide what comes after it

# Exit statuses; the unit's RestartPreventExitStatus names those after which a restart can't help.
EXIT_CONFIG = 1  # configuration, model or sources: somebody must change something
EXIT_UNFORESEEN = 70  # sysexits.h: EX_SOFTWARE
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL: another instance runs, or the system refused something


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

    _steady: list = []  # noqa: RUF012 - never changed in place; what the log has reported last

    def __init__(self, config: dict, log: Log, check: bool = False) -> None:
        from . import privileges

        self.log = log
        self.troubles = Troubles(log)
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
        self._locks: list = []
        if config["update"]["enabled"]:
            from . import updates  # only here: it costs memory

            self._update = updates.open_updater(config, user_id, check, self._on_update)
            if not check:  # before a start is counted
                self._locks.append(files.lock_folder(config["update"]["folder"]))
            model = updates.first_model(self._update, config, key, user_id, check, read_model, log)
        else:
            model = read_model(config["model"]["file"], config["model"]["backend"])
        self._model = model
        self._unfit: list = []  # names of the models that do not fit
        credentials = Credentials(config["mqtt"])
        self._connectable = prepare(config)
        self._home = _home_assistant(config, model)
        own, self._slot = (None, None) if check else own_channel(config, model, key, log, self._update)
        collector = open_collector(config, model, key, user_id)
        extra = open_channels(config, model, collector)
        others = [each[0] for each in extra]
        self._switch = Switch(config["monitoring"])
        response, self._responds = open_response(config, self._connectable.resolver, collector, others, log, check)
        self._folders = [os.path.dirname(os.path.abspath(device["state_file"]))]
        if report["outbox_dir"] and os.path.abspath(report["outbox_dir"]) not in self._folders:
            self._folders.append(os.path.abspath(report["outbox_dir"]))
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
            learn_peers_hours=config["collector"]["learn_peers_hours"],
            response=response,
            update=self._update,
        )
        if not check:
            self._look_for_switch()
        self._connect(credentials)
        self._lacks = ""
        self._named: dict = {}  # (channel, feature): window in which it last led the explanation of this alarm
        self._sleep = Announcements(device["state_file"])
        self._health: tuple = (None,)
        self._write_due_ms = ticks_ms()
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
        for folder in self._folders:
            trouble = files.make_trouble(folder, self._makes_folders)
            if trouble:
                lines.append(trouble + "; until then nothing that is learned outlives the agent")
        return "\n".join(lines)

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then save, say goodbye and return. SIGHUP reads keys and certificates again, or ends
        it where it runs on a terminal that was closed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._stop if os.isatty(0) or os.isatty(2) else self._reload_soon)
        doing = "learning what is normal here" if self.agent.learning else "watching"
        self.log(
            "info", "%s with model %s, windows of %g s" % (doing, self.agent.model_name, self.agent.window_ms / 1000)
        )
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
        if self._home:
            self._home.goodbye(self.transport)
        self.transport.close()
        self._write_health()
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
        health = (lacks, tuple(agent.unscored), agent.windows // 360)
        now_ms = ticks_ms()
        if health != self._health and (lacks != self._health[0] or ticks_diff(now_ms, self._write_due_ms) >= 0):
            self._health = health
            self._write_due_ms = ticks_add(now_ms, HEALTH_EVERY_MS)
            self._write_health()

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

    def _write_health(self) -> None:
        """For `stonechat doctor`: a few lines of text beside the state file. Lost where the medium refuses."""
        agent = self.agent
        text = "pid %d\nversion %s\ntime %d\nwindows %d\nunscored %s\nlacks %s\n" % (
            os.getpid(),
            __version__,
            epoch_s(),
            agent.windows,
            " ".join([str(count) for count in agent.unscored]),
            agent.lacks,
        )
        path = self._config["device"]["state_file"] + ".health"
        try:
            fd = os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "w") as file:
                file.write(text)
            replace(path + ".tmp", path)
        except OSError:
            pass

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
            self._try("folder " + folder, files.make_folder, folder)
            self._locks.append(files.lock_folder(folder))

    def _check_folders(self) -> None:
        for folder in self._folders:
            trouble = files.folder_trouble(folder)
            if trouble:
                self.troubles.say("folder", trouble + "; until then nothing that is learned outlives this process")

    def _open_state(self, path: str, check: bool) -> State:
        try:
            state = State(path) if not os.path.exists(path) or os.path.isfile(path) else None
        except OSError as error:
            state = None
            self.log("warning", "%s: %s; starting afresh" % (path, error))
        if state is None:
            self.log("warning", "%s is not a file; starting afresh, and nothing that is learned is saved" % path)
            return State(None)
        if state.damaged:
            self.log("warning", "%s: %s; set aside, starting afresh" % (path, state.damaged))
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
        self._log_fit(agent)
        self._log_steady(agent)
        if self._home:
            self._home.observe(verdict, agent)
        if verdict.changed:
            self._named = {}
        lead = getattr(verdict, "channel", 0)
        leading = [(lead, index) for index, _, _ in verdict.explain(1)] if verdict.level == ALARM else []
        new_cause = bool(leading) and verdict.surprise_q8 >= NEWS_Q8 and self._windows_since(leading[0]) >= NEWS_WINDOWS
        for index in leading:
            self._named[index] = agent.windows
        if verdict.changed or new_cause:
            columns = agent.columns
            causes = ["%s %+.1f sd (%d %%)" % (columns[i], z / 16, share) for i, z, share in verdict.explain(3)]
            text = "%s%s%s: score %.2f, 1 in 10^%.1f windows; %s" % (
                LEVEL_NAMES[verdict.level],
                "" if verdict.changed else " goes on",
                " in " + agent.channel_names[lead - 1] if lead else "",
                verdict.score_q8 / 256,
                verdict.surprise_q8 / 256,
                ", ".join(causes),
            )
            self.log("info" if verdict.level == NORMAL else "warning", text)

    def _on_update(self, update) -> None:
        from . import updates

        if self._slot is not None and not update.store.trial:
            self._slot.bind(self.agent.channels[0].scorer.model.digest)
        self.log(*updates.text(update))

    def _log_fit(self, agent) -> None:
        unfit = [each.scorer.meta.name + _of_channel(each) for each in agent.channels if each.scorer.verdict.unfit]
        for name in unfit:
            if name not in self._unfit:
                text = "model %s does not fit this device: nothing can alarm while it learns again; if this goes on,"
                self.log("warning", text % name + " train a model on the device's own recordings (stonechat train)")
        for name in self._unfit:
            if name not in unfit:
                self.log("info", "model %s fits now" % name)
        self._unfit = unfit

    def _log_steady(self, agent) -> None:
        steady = [_of_channel(each) for each in agent.channels if getattr(each.scorer, "steady", False)]
        for name in steady:
            if name not in self._steady:
                text = "changed, and steady%s: an hour of alarm at a constant level; what is new on top still alarms."
                self.log("warning", text % name + " Answer with the command `was-normal` or `calibrate`")
        for name in self._steady:
            if name not in steady:
                self.log("info", "steady no longer%s: it is back, or an operator has answered" % name)
        self._steady = steady

    def _windows_since(self, cause: tuple) -> int:
        """cause: (channel, feature) -> windows since it led an alarm's explanation; NEWS_WINDOWS where it has not in
        this alarm."""
        if cause not in self._named:
            return NEWS_WINDOWS
        return int(self.agent.windows - self._named[cause])


def _home_assistant(config: dict, model):
    """None where it is off: then it costs no memory."""
    if config["homeassistant"]["discovery"] is False:
        return None
    from .homeassistant import open_home

    return open_home(config, model.metadata.window_ms)


def _of_channel(channel) -> str:
    """For a message: of which channel beside the device's own."""
    return " of " + channel.name if hasattr(channel, "name") else ""


def give_memory_back() -> None:
    """What the start has used and freed, where glibc can and ctypes is there anyway."""
    gc.collect()
    trim = "ctypes" in sys.modules and getattr(sys.modules["ctypes"].CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def describe(error: BaseException) -> str:
    """An exception that nothing foresaw, and where it came from, in one line."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        where = "%s:%d" % (os.path.basename(code.co_filename), trace.tb_lineno)
        trace = trace.tb_next
    return "%s at %s (please report it)" % (repr(error)[:300], where)


def exit_status(error: Exception) -> int:
    return (
        EXIT_CONFIG if isinstance(error, StonechatError) and not isinstance(error, files.BusyError) else EXIT_TRY_AGAIN
    )


def keep_standard_files() -> None:
    """Where 0, 1 or 2 is closed, the next file opened would get its number, and the log."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


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
