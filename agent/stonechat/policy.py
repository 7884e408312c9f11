"""What to do about an alarm: rules and what has happened lately -> what is due. Pure: no clock, no network, no file.

A rule is a tuple (action, level, families, windows, seconds, most_seconds):

    action        ALERT: a decision of its own in the record; THROTTLE: limit what is sent to whom is not on the
                  allow-list; QUARANTINE: stop it; HOOK: call the vendor's own
    level         WATCH or ALARM (detection.py): the least level
    families      of the features that carry the verdict, added up: NETWORK, PROGRAMS, FILES, MACHINE; 0: any
    windows       how many windows the level must have lasted before
    seconds       of a lease (lease.py); each further one within a day lasts twice as long,
    most_seconds  but no longer than this

What is decided is done in the mode ON only. In DRY_RUN, the default, it is recorded as what would have been done.
"""

from .compat import const
from .errors import ConfigError

OBSERVE = const(0)
ALERT = const(1)
THROTTLE = const(2)
QUARANTINE = const(3)
HOOK = const(4)
ACTIONS = ("observe", "alert", "throttle", "quarantine", "hook")

OFF = const(0)
DRY_RUN = const(1)
ON = const(2)
MODES = ("off", "dry-run", "on")

NETWORK = const(1)
PROGRAMS = const(2)
FILES = const(4)
MACHINE = const(8)

T1_S = const(120)
MOST_S = const(3600)  # no lease is longer, whatever a rule says
MOST_RULES = const(16)
_MOST_WINDOWS = const(1000)
_SHARE = const(25)  # percent of the score that a family must carry
_DAY_S = const(86_400)

# First slow down, then stop, and let the vendor do what no response on the network can do.
RULES = (
    (THROTTLE, 2, NETWORK, 0, T1_S, 4 * T1_S),
    (QUARANTINE, 2, NETWORK, 3, T1_S, 4 * T1_S),
    (HOOK, 2, 0, 0, 0, 0),
)


def check(rules) -> None:
    """Raises ConfigError for what is no tuple of rules."""
    if len(rules) > MOST_RULES:
        raise ConfigError("%d rules, at most %d" % (len(rules), MOST_RULES))
    for i in range(len(rules)):
        action, level, families, windows, seconds, most_seconds = rules[i]
        leases = THROTTLE <= action <= QUARANTINE
        if not (
            ALERT <= action <= HOOK
            and 1 <= level <= 2
            and 0 <= families <= 15
            and 0 <= windows <= _MOST_WINDOWS
            and (1 <= seconds <= most_seconds <= MOST_S or not leases)
        ):
            raise ConfigError("rule %d is out of range: %r" % (i + 1, rules[i]))


def families_of(explanation, table) -> int:
    """explanation: as Verdict.explain() gives it; table: bytes, the family of each feature -> the families that carry a
    quarter of the score or more, added up."""
    found = 0
    for family in (NETWORK, PROGRAMS, FILES, MACHINE):
        share = 0
        for index, _, percent in explanation:
            if index < len(table) and table[index] == family:
                share += percent
        if share >= _SHARE:
            found |= family
    return found


class History:
    """What decide() must know of the past, for each rule: `lasted`, the windows in a row at its level; `named`, whether
    its families have carried one of them; `done`, whether it was carried out in this alarm; `leases` within a day, and
    when the last one began."""

    def __init__(self, rules) -> None:
        n = len(rules)
        self.lasted = [0] * n
        self.named = [False] * n
        self.done = [False] * n
        self.leases = [0] * n
        self.last_s = [0] * n

    def carried_out(self, rule: int, now_s: int) -> None:
        """Rule number `rule` was carried out, at now_s (seconds of uptime)."""
        self.done[rule] = True
        self.leases[rule] = self.leases[rule] + 1 if now_s - self.last_s[rule] < _DAY_S else 1
        self.last_s[rule] = now_s


def decide(rules, history, level: int, families: int) -> list:
    """Take one window's level and families into `history` -> the numbers of the rules that are due, the strongest
    action first. One that was carried out is due again only after its level has ended."""
    due = []
    for i in range(len(rules)):
        rule = rules[i]
        if level < rule[1]:
            history.lasted[i] = 0
            history.named[i] = history.done[i] = False
            continue
        history.lasted[i] += 1
        history.named[i] = history.named[i] or not rule[2] or bool(rule[2] & families)
        if history.named[i] and not history.done[i] and history.lasted[i] > rule[3]:
            due.append(i)
    return sorted(due, key=lambda i: -rules[i][0])


def seconds_of(rule, leases: int, ago_s: int) -> int:
    """How long the next lease of a rule lasts after `leases` of them, the last one ago_s seconds ago."""
    seconds: int = rule[4]
    for _ in range(leases if ago_s < _DAY_S else 0):
        if seconds >= rule[5]:
            break
        seconds *= 2
    return min(seconds, rule[5], MOST_S)
