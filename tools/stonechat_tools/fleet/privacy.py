"""Every key of a message that leaves a device, and what it reveals. docs/wire-protocol.md has it as a table.

Tests hold it to the CDDL and to that page."""

PRIVACY_REPORT = {
    0: ("version", "nothing"),
    1: ("sequence number", "how many reports the device has made"),
    2: ("boot", "how often it has started"),
    3: ("time", "when the window ended"),
    4: ("uptime", "the same, while the clock is unset"),
    5: ("level", "normal, watch or alarm"),
    6: ("flags", "learning, muted, maintenance"),
    7: ("score", "how unusual the window was"),
    8: ("surprise", "the same as -log10 p"),
    9: ("evidence", "the same over windows"),
    10: ("features", "which three counters were unusual (their indexes in the schema), how far and to what share"),
    11: ("windows", "how many windows a summary covers"),
    12: ("scores", "lowest, median and highest score of a summary"),
    13: ("detail", "only with the operator's opt-in, at changes of level: a text that may hold an address"),
    14: ("lost", "how many reports a full outbox has dropped"),
    15: ("answer", "number of a command and its result"),
    16: ("stream", "which start of the device made the report: a random number"),
    23: ("late", "how old the report was as it was sent"),
}
PRIVACY_STATUS = {
    0: ("version", "nothing"),
    2: ("boot", "how often the device has started"),
    3: ("time", "the device's clock"),
    4: ("uptime", "seconds since it started"),
    5: ("online", "connected or not"),
    6: ("number", "how many statuses since the start"),
    7: ("firmware", "the id that the vendor gave the firmware"),
    8: ("model", "which model scores"),
    9: ("schema", "which counters it sees"),
    10: ("window", "length of a window"),
    11: ("sources", "which kinds of counters work (their names in the package)"),
    12: ("adaptation", "how far the device has adapted"),
    13: ("learning", "whether it is still learning"),
    14: ("agent", "version of the agent"),
    15: ("counters", "messages rejected, reports not written down, changes of level held back, reports refused"),
    16: ("stream", "which start this is: a random number"),
    17: ("unscored", "how many windows were not scored, by cause"),
}
