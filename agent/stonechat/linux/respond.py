"""The response on Linux, put together from the checked configuration: rules by the names of features, the packet
filter where the mode is "on", and the vendor's hook as a program of its own.
"""

import os
import signal

from ..compat import ticks_add, ticks_diff, ticks_ms
from ..errors import ConfigError
from ..lease import FAILED
from ..policy import (
    ACTIONS,
    ALERT,
    DRY_RUN,
    FILES,
    HOOK,
    MACHINE,
    MODES,
    MOST_RULES,
    MOST_S,
    NETWORK,
    ON,
    PROGRAMS,
    QUARANTINE,
    THROTTLE,
)
from ..policy import check as check_rules
from ..response import Response

_LEVELS = {"watch": 1, "alarm": 2}
_FAMILIES = {"any": 0, "network": NETWORK, "programs": PROGRAMS, "files": FILES, "machine": MACHINE}
_NAMES = {family: name for name, family in _FAMILIES.items() if family}
_WORDS = ("action", "level", "features", "windows", "seconds", "most_seconds")
_FORM = 'a list like [{action = "quarantine", level = "alarm", features = "network", windows = 3}]'
_STEP_MS = 1000  # how often a hook that runs is looked at
_OUTPUT = "/dev/null"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# By the beginnings of their names; what is not here is of the machine.
_BEGINNINGS = {
    NETWORK: "conn_ rst_ retrans udp_ icmp_ ip_out_ estab listen_ bytes_ pkts_ mean_out_ sys_sock sys_netio sys_net"
    " syn_ peers new_peer dports top_peer_ accepted login_ lasting_peer sent_to_peer",
    PROGRAMS: "forks execs sys_proc sys_priv sys_exec",
    FILES: "sys_open sys_read sys_write sys_fmeta sys_fmod sys_file sys_dir pages_dirtied disk_",
}


def family_of(name: str) -> int:
    """Of a feature, by its name."""
    for family, beginnings in _BEGINNINGS.items():
        if name.startswith(tuple(beginnings.split())):
            return family
    return MACHINE


def rules_of(rows: list, lease_s: int) -> tuple:
    """The configuration's rows, or the rules of the package where there are none -> policy.py's rules."""
    if not rows:
        rows = [
            {"action": "throttle", "features": "network"},
            {"action": "quarantine", "features": "network", "windows": 3},
            {"action": "hook"},
        ]
    return tuple([_rule(row, lease_s) for row in rows])


def _rule(row: dict, lease_s: int) -> tuple:
    action = ACTIONS.index(row["action"])
    families = 0
    for word in row.get("features", "any").split("+"):
        families |= _FAMILIES[word.strip()]
    seconds = row.get("seconds", lease_s) if action in (THROTTLE, QUARANTINE) else 0
    most = row.get("most_seconds", min(4 * seconds, MOST_S)) if seconds else 0
    return (action, _LEVELS[row.get("level", "alarm")], families, row.get("windows", 0), seconds, most)


def check(value) -> "str | None":
    """For config_keys.KEYS: the rules -> None, or what they must be."""
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return _FORM
    if len(value) > MOST_RULES:
        return "a list of at most %d rules" % MOST_RULES
    for number, row in enumerate(value, 1):
        wrong = _wrong(row)
        if wrong:
            return "%s; rule %d: %s" % (_FORM, number, wrong)
    return None


def check_together(rows: list, lease_s: int, self_renew_s: int = 0, hook=()) -> str:
    """Rules that check() has taken, with the keys beside them -> "", or what is wrong."""
    for number, row in enumerate(rows, 1):
        most_s = row.get("most_seconds", lease_s)
        if "seconds" not in row and most_s < lease_s:
            text = "rule %d: most_seconds %d is below lease_s %d: give the rule seconds = %d, or a larger most_seconds"
            return text % (number, most_s, lease_s, most_s)
    rules = rules_of(rows, lease_s)
    least_s = min([rule[4] for rule in rules if rule[4]], default=0)
    if 0 < self_renew_s < 2 * least_s:
        return "self_renew_s %d renews nothing: want 0, or two leases, %d" % (self_renew_s, 2 * least_s)
    if hook and not any([rule[0] == HOOK for rule in rules]):
        return 'hook is never called: no rule has action = "hook"'
    return ""


def _wrong(row: dict) -> str:
    for name, text in row.items():
        if name not in _WORDS:
            return "no key %s; known: %s" % (str(name)[:40], ", ".join(_WORDS))
        if name in ("action", "level", "features") and not isinstance(text, str):
            return name + " must be a text"
        if name not in ("action", "level", "features") and (isinstance(text, bool) or not isinstance(text, int)):
            return name + " must be a whole number"
    if row.get("action") not in ACTIONS[ALERT:]:
        return "action must be one of " + ", ".join(ACTIONS[ALERT:])
    if row.get("level", "alarm") not in _LEVELS:
        return "level must be watch or alarm"
    for word in row.get("features", "any").split("+"):
        if word.strip() not in _FAMILIES:
            return 'features must be of %s, or some of them like "network+files"' % ", ".join(_FAMILIES)
    if ACTIONS.index(row["action"]) not in (THROTTLE, QUARANTINE) and ("seconds" in row or "most_seconds" in row):
        return "only throttle and quarantine last for seconds"
    try:
        check_rules((_rule(row, row.get("seconds", 1)),))
    except ConfigError:
        return "windows must be 0 to 1000, and 1 <= seconds <= most_seconds <= %d" % MOST_S
    return ""


class Hook:
    """The vendor's program: argv without a shell, killed after timeout_s, one at a time. ended(exit status or errno) is
    called where it has failed."""

    def __init__(self, argv: list, timeout_s: int, ended) -> None:
        self._argv = argv
        self._timeout_ms = timeout_s * 1000
        self._ended = ended
        self._pid = 0
        self._killed = False  # what its end was is known
        self._due_ms = 0

    def start(self, facts: dict) -> None:
        """facts: what its environment has besides PATH. Raises OSError, also while the last one still runs."""
        if self._pid:
            raise BlockingIOError(11, "the hook still runs")
        environment = {"PATH": _PATH, **facts}
        actions = [(os.POSIX_SPAWN_OPEN, fd, _OUTPUT, os.O_RDWR, 0) for fd in range(3)]
        spawn = os.posix_spawnp if "/" not in self._argv[0] else os.posix_spawn
        defaults = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE]
        self._pid = spawn(self._argv[0], self._argv, environment, file_actions=actions, setpgroup=0, setsigdef=defaults)
        self._killed = False
        self._due_ms = ticks_add(ticks_ms(), self._timeout_ms)

    def turn(self) -> None:
        """To be called about once a second. Never waits."""
        if not self._pid:
            return
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:  # whoever started the agent has it ignore SIGCHLD: the kernel has taken the status
            pid, status = self._pid, 0
        if pid:
            self._pid = 0
            code = os.waitstatus_to_exitcode(status)
            if code and not self._killed:
                self._ended(code if code > 0 else 128 - code)
        elif not self._killed and ticks_diff(ticks_ms(), self._due_ms) >= 0:
            self.kill()
            self._ended(124)  # as timeout(1) does

    def kill(self) -> None:
        """Its process group, without waiting: a program in a system call, or of another user, may take its time. turn()
        takes its status."""
        if self._pid and not self._killed:
            self._killed = True
            try:
                os.killpg(self._pid, signal.SIGKILL)
            except OSError:
                pass


class LinuxResponse(Response):
    """Response, with the packet filter looked after and the hook as a program. say(level, text): the log's."""

    def __init__(self, section: dict, enforcer, families: dict, sent: int, names, say) -> None:
        self._program = Hook(section["hook"], section["hook_timeout_s"], self.hook_failed) if section["hook"] else None
        self._names = names
        self._say = say
        Response.__init__(
            self,
            enforcer,
            mode=MODES.index(section["mode"]),
            rules=rules_of(section["rules"], section["lease_s"]),
            families=families,
            sent=sent,
            self_total_s=section["self_renew_s"],
            hook=self._call if self._program else None,
            on_decision=self._log,
        )

    def turn(self) -> None:
        agent = self._agent
        due = agent.reporter.uptime_s != self._turned_s
        Response.turn(self)  # first: whatever the packet filter does, a lease ends
        if due and self._program is not None:
            self._program.turn()
        if due and self.enforcer is not None and not agent.off:
            try:
                trouble = self.enforcer.turn()
            except OSError as error:
                trouble = str(error)
            if trouble:
                self._say("error", "response: " + trouble)
                self._end(self.real, FAILED)

    def switch_off(self) -> None:
        if self._program is not None:
            self._program.kill()
        Response.switch_off(self)

    def close(self) -> None:
        if self._program is not None:
            self._program.kill()
        Response.close(self)

    def _call(self, action: int, families: int, verdict) -> None:
        named = [name for family, name in _NAMES.items() if families & family]
        columns = self._agent.columns
        features = ["%s %+.1f" % (columns[i], z / 16) for i, z, _ in verdict.explain(3)]
        facts = {"LEVEL": "watch" if verdict.level == 1 else "alarm", "FAMILIES": " ".join(named)}
        facts.update({"FEATURES": ", ".join(features), "DEVICE": self._names})
        if self._program is not None:
            self._program.start({"STONECHAT_" + name: text for name, text in facts.items()})

    def _log(self, decision: list) -> None:
        kind, action, done = decision[:3]
        name = ACTIONS[action]
        if kind == 0:
            text = ("%s for %d s" % (name, decision[5])) if decision[4] else name
            self._say("warning", ("response: " if done else "response (dry run): would ") + text)
        elif kind == 1:
            text = "response: %s ended after %d s; %d packets passed, %d stopped"
            if done:
                self._say("info", text % (name, decision[5], decision[8], decision[9]))
        else:
            self._say("error", "response: %s failed: %s" % (name, _reason(action, decision[5])))


def _reason(action: int, code: int) -> str:
    if action == HOOK:
        return "it ran too long" if code == 124 else "exit status or error %d" % code
    return os.strerror(code) if code else "the packet filter refused"


def open_response(config: dict, resolver, collector, channels, say, check=False) -> "tuple[LinuxResponse | None, str]":
    """channels: the other channels' collectors; check: find out what works, and touch nothing -> (the response, None
    where the mode is off; what works). Where the packet filter can't be used, decisions are recorded only. Before the
    change of user."""
    section = config["response"]
    if section["mode"] == "off":
        return None, ""
    families = {}
    for each in [collector, *channels]:
        columns = getattr(each.schema, "columns", ())
        families[each.schema.id] = bytes([family_of(column[0]) for column in columns])
    from ..lasting_peers import LastingPeers

    families[LastingPeers.schema.id] = bytes((NETWORK,))
    missing = _lacking_hook(section["hook"])
    if missing and not check:
        say("warning", "response: " + missing)
    names = [column[0] for column in collector.schema.columns]
    sent, device = names.index("pkts_out"), config["device"]["id"]
    text = section["mode"]
    if section["mode"] == MODES[ON]:
        from . import netfilter

        try:
            enforcer = netfilter.open_response(config, resolver, check)
            text += ", " + enforcer.source
            if not check:  # then another agent's tables stay as they are
                return LinuxResponse(section, enforcer, families, sent, device, say), text
            text += "".join(["\nnever stopped: %s, %s (%s)" % line for line in enforcer.never_stopped()])
            enforcer.detach()
        except OSError as error:
            section = dict(section, mode=MODES[DRY_RUN])
            text = "dry-run, although [response] mode is on: %s" % (error.strerror or error)
            if not check:
                say("error", "response: decisions are recorded only: %s" % (error.strerror or error))
    return LinuxResponse(section, None, families, sent, device, say), text + (missing and "\n" + missing)


def _lacking_hook(argv: list) -> str:
    """Why the vendor's program can't be started, "" where it can."""
    if not argv:
        return ""
    places = [""] if "/" in argv[0] else [folder + "/" for folder in _PATH.split(":")]
    if any([os.path.isfile(place + argv[0]) and os.access(place + argv[0], os.X_OK) for place in places]):
        return ""
    return "[response] hook: %s is no program that can be started; each call of it will fail" % argv[0]
