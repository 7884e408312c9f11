"""Tables and versions of the database, for both engines. A change adds a version and the step that leads to it; a step
keeps all data. {integer}, {real}, {blob} and {key} are the engine's types.

What is looked for has a column; the rest of a report stays in `body`, as the device signed it, and is decoded when it
is read.
"""

from collections.abc import Callable

from .base import Db, Engine

REPORTS = """
CREATE TABLE reports (
    id {key},
    device {integer} NOT NULL,
    stream {integer} NOT NULL,
    sequence {integer} NOT NULL,
    variant {integer} NOT NULL,
    at_s {integer} NOT NULL,
    at_known {integer} NOT NULL,
    uptime_s {integer},
    received_s {real} NOT NULL,
    late_s {integer},
    level {integer} NOT NULL,
    flags {integer} NOT NULL,
    windows {integer} NOT NULL,
    score_q8 {integer},
    score_max_q8 {integer},
    body {blob} NOT NULL
);
CREATE UNIQUE INDEX reports_by_name ON reports (stream, sequence, variant);
CREATE INDEX reports_by_time ON reports (device, at_s);
"""
REPORT_COLUMNS = (
    "device",
    "stream",
    "sequence",
    "variant",
    "at_s",
    "at_known",
    "uptime_s",
    "received_s",
    "late_s",
    "level",
    "flags",
    "windows",
    "score_q8",
    "score_max_q8",
    "body",
)
ROLLUPS = """
CREATE TABLE hourly (
    device {integer} NOT NULL,
    at_s {integer} NOT NULL,
    reports {integer} NOT NULL,
    windows {integer} NOT NULL,
    level {integer} NOT NULL,
    alarms {integer} NOT NULL,
    score_sum_q8 {integer} NOT NULL,
    scored {integer} NOT NULL,
    score_max_q8 {integer},
    PRIMARY KEY (device, at_s)
);
CREATE TABLE daily (
    device {integer} NOT NULL,
    at_s {integer} NOT NULL,
    reports {integer} NOT NULL,
    windows {integer} NOT NULL,
    level {integer} NOT NULL,
    alarms {integer} NOT NULL,
    score_sum_q8 {integer} NOT NULL,
    scored {integer} NOT NULL,
    score_max_q8 {integer},
    PRIMARY KEY (device, at_s)
);
CREATE TABLE rolled (
    id {integer} PRIMARY KEY,
    report {integer} NOT NULL
);
INSERT INTO rolled VALUES (1, 0);
"""
LISTENING = """
CREATE TABLE listening (
    collector TEXT PRIMARY KEY,
    since_s {real} NOT NULL,
    until_s {real} NOT NULL
);
"""
NOTES = """
CREATE TABLE notes (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (kind, name)
);
"""
DECISIONS = """
CREATE TABLE decisions (
    device {integer} NOT NULL,
    stream {integer} NOT NULL,
    sequence {integer} NOT NULL,
    at_s {real} NOT NULL,
    lease {integer} NOT NULL,
    kind {integer} NOT NULL,
    facts TEXT NOT NULL,
    PRIMARY KEY (device, stream, sequence)
);
CREATE INDEX decisions_by_time ON decisions (at_s);
"""

UPDATES = """
CREATE TABLE updates (
    device {integer} PRIMARY KEY,
    version {integer} NOT NULL,
    slot {integer} NOT NULL,
    trial {integer} NOT NULL,
    tried {integer} NOT NULL,
    result {integer} NOT NULL,
    refusals {integer} NOT NULL,
    stream {blob} NOT NULL,
    schema_id TEXT NOT NULL,
    at_s {real} NOT NULL
);
CREATE TABLE releases (
    id {key},
    class TEXT NOT NULL,
    version {integer} NOT NULL,
    schema_id TEXT NOT NULL,
    digest {blob} NOT NULL,
    manifest {blob} NOT NULL,
    model {blob},
    published_s {real} NOT NULL,
    published_by TEXT NOT NULL,
    UNIQUE (class, version)
);
CREATE TABLE rollouts (
    id {key},
    release {integer} NOT NULL,
    site TEXT NOT NULL,
    state TEXT NOT NULL,
    stages TEXT NOT NULL,
    stage {integer} NOT NULL,
    began_s {real} NOT NULL,
    since_s {real} NOT NULL,
    tested_s {real} NOT NULL,
    judged_s {real} NOT NULL,
    tests TEXT NOT NULL,
    evidence TEXT NOT NULL
);
CREATE TABLE rollout_devices (
    rollout {integer} NOT NULL,
    device {integer} NOT NULL,
    state TEXT NOT NULL,
    since_s {real} NOT NULL,
    taken_s {real},
    until_s {real},
    lost {integer} NOT NULL DEFAULT 0,
    result TEXT NOT NULL DEFAULT '',
    counted {integer} NOT NULL DEFAULT 0,
    PRIMARY KEY (rollout, device)
);
CREATE INDEX rollout_devices_by_state ON rollout_devices (rollout, state, until_s);
CREATE TABLE rollout_log (
    id {key},
    rollout {integer} NOT NULL,
    at_s {real} NOT NULL,
    actor TEXT NOT NULL,
    what TEXT NOT NULL,
    evidence TEXT NOT NULL
);
"""
FIRST = (
    """
CREATE TABLE devices (
    id {key},
    name TEXT NOT NULL UNIQUE,
    first_seen_s {real} NOT NULL,
    last_seen_s {real} NOT NULL,
    key TEXT NOT NULL DEFAULT '',
    online {integer},
    online_since_s {real},
    conflict_s {real},
    heartbeat_windows {integer} NOT NULL DEFAULT 0,
    status_stream {integer},
    reports {integer} NOT NULL DEFAULT 0,
    conflicts {integer} NOT NULL DEFAULT 0,
    newest_s {integer},
    newest_sequence {integer} NOT NULL DEFAULT 0,
    level {integer} NOT NULL DEFAULT 0,
    score_q8 {integer},
    evidence_q8 {integer},
    lost {integer} NOT NULL DEFAULT 0,
    refused {integer} NOT NULL DEFAULT 0,
    last_command {integer} NOT NULL DEFAULT 0
);
CREATE TABLE statuses (
    device {integer} PRIMARY KEY,
    facts TEXT NOT NULL
);
CREATE TABLE streams (
    id {key},
    device {integer} NOT NULL,
    stream {blob} NOT NULL,
    boot {integer} NOT NULL,
    first_seen_s {real} NOT NULL,
    began_s {integer},
    behind_s {integer},
    status_number {integer} NOT NULL DEFAULT 0,
    lost {integer} NOT NULL DEFAULT 0,
    forgotten {integer} NOT NULL DEFAULT -1,
    UNIQUE (device, stream)
);
CREATE TABLE commands (
    device {integer} NOT NULL,
    sequence {integer} NOT NULL,
    sent_s {real},
    code {integer},
    arguments TEXT NOT NULL DEFAULT '[]',
    result {integer},
    answered_s {real},
    PRIMARY KEY (device, sequence)
);
CREATE TABLE rejections (
    device TEXT NOT NULL,
    reason TEXT NOT NULL,
    count {integer} NOT NULL,
    last_s {real} NOT NULL,
    PRIMARY KEY (device, reason)
);
"""
    + LISTENING
    + REPORTS
    + ROLLUPS
)
ACCOUNTS = """
CREATE TABLE accounts (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL,
    secret TEXT NOT NULL,
    changed_s {real} NOT NULL
);
CREATE TABLE audit (
    sequence {integer} PRIMARY KEY,
    at_ms {integer} NOT NULL,
    who TEXT NOT NULL,
    what TEXT NOT NULL,
    facts TEXT NOT NULL,
    digest TEXT NOT NULL
);
"""


def _script(engine: Engine, db: Db, text: str) -> None:
    types = {"integer": engine.integer, "real": engine.real, "blob": engine.blob, "key": engine.key}
    for statement in text.format(**types).split(";"):
        if statement.strip():
            db.execute(statement)


def _to_4(engine: Engine, db: Db) -> None:
    """Reports in the order of their arrival, without what their bodies have; statuses in a table of their own."""
    _script(engine, db, "ALTER TABLE reports RENAME TO old_reports; DROP INDEX reports_by_time;" + REPORTS)
    columns = ", ".join(REPORT_COLUMNS)
    db.execute(
        f"INSERT INTO reports ({columns}) SELECT {columns} FROM old_reports ORDER BY received_s, stream, sequence"
    )
    _script(
        engine,
        db,
        "DROP TABLE old_reports;"
        "CREATE TABLE statuses (device {integer} PRIMARY KEY, facts TEXT NOT NULL);"
        "INSERT INTO statuses SELECT id, status_json FROM devices WHERE status_json <> '{{}}';"
        "ALTER TABLE devices DROP COLUMN status_json;"
        "ALTER TABLE streams ADD COLUMN forgotten {integer} NOT NULL DEFAULT -1;"
        "ALTER TABLE listening RENAME TO old_listening;" + LISTENING + "INSERT INTO listening SELECT '', since_s,"
        " until_s FROM old_listening; DROP TABLE old_listening;" + ROLLUPS,
    )


def _to_6(engine: Engine, db: Db) -> None:
    """The flags of a device's newest report, beside its level."""
    _script(engine, db, "ALTER TABLE devices ADD COLUMN flags {integer} NOT NULL DEFAULT 0")


def _to_10(engine: Engine, db: Db) -> None:
    """The number of the last offer to a device."""
    _script(engine, db, "ALTER TABLE updates ADD COLUMN offer {integer} NOT NULL DEFAULT 0")


OLDEST = 3  # the first version that a step leads on from
STEPS: dict[int, Callable[[Engine, Db], None]] = {  # by the version that it leads to
    4: _to_4,
    5: lambda engine, db: _script(engine, db, NOTES),
    6: _to_6,
    7: lambda engine, db: _script(engine, db, UPDATES),
    8: lambda engine, db: _script(engine, db, DECISIONS),
    9: lambda engine, db: _script(engine, db, ACCOUNTS),  # of the dashboard
    10: _to_10,
}
VERSION = max(STEPS)
BORN = 4  # the version that FIRST makes; the steps after it follow at once


def bring_up(engine: Engine, db: Db, version: int) -> None:
    """In one transaction: from `version` (0: nothing is there) to VERSION."""
    if version == 0:
        _script(engine, db, FIRST)
        version = BORN
    for step in range(version + 1, VERSION + 1):
        STEPS[step](engine, db)
