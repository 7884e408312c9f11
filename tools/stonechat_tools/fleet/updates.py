"""The collector's half of updates: offers releases to devices whose turn it is, serves chunks, confirms, withdraws.

rollout_judge.py decides whose turn it is; here is what then happens to each device of this collector. What a device
has done is in the database (`updates`, from its status, and `rollout_devices`), so a restart goes on where it was. In
memory are the devices that take a release now, at most MAX_OPEN a roll-out.

A device is confirmed only after it is back on the new version: its status has it on trial, and a report made since has
a score. A roll-out that is paused gives nobody a turn and serves nothing, but confirms; one that halted does not
even confirm, and devices on trial go back by themselves.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from stonechat import slots
from stonechat.errors import ConfigError

from ..console import counted
from . import keyring, wire, wire_release
from .chunks import RATE_BYTES, Chunks, Where
from .incidents import Alert
from .labels import NONE, Known, Labels
from .presence import AWAY, Device
from .rollout_judge import Judge, halts, superseded
from .shards import Shard
from .store import STORED, Store, releases, rollouts
from .store.base import next_number
from .store.rollouts import DONE, HALTED, LEFT, LIVE, OFF, OPEN, PAUSED, RUNNING, WITHDRAWN, Member, RolloutRow
from .withdrawals import Withdrawals

LOOK_S = 2.0  # how often the database is asked what has changed
OFFER_AGAIN_S = 30.0  # to a device that says something, and asks for nothing
CONFIRM_AGAIN_S = 5.0
RETRY_S = 600.0  # after a refusal that may pass: of the clock, of the medium
DUE_S = 86_400.0  # to ask for what was offered
TAKE_S = 7 * 86_400.0  # to have all of it: a slow link, a small budget
WATCH_S = 86_400.0  # after the confirmation, or half of the stage where that is shorter
JUMP_S = 300.0  # of the clock
AWAY_S = 600.0  # without a collector or its broker: devices begin to wait anew
GONE_S = 60.0  # a restart is no failure
PAGE = 500
PASSING = (slots.EARLY, slots.CLOCK, slots.DIGEST, slots.STORAGE)

Publish = tuple[str, bytes]
Outgoing = tuple[Where, str, bytes]  # its topic and message
Wanted = tuple[wire_release.Want, keyring.DeviceKeys]  # and what it verified with


class _Active:
    """What is remembered of a device that takes a release now."""

    __slots__ = ("confirmed_s", "member", "offered_s", "row", "scored", "stream", "wanted_s")

    def __init__(self, member: Member, row: RolloutRow) -> None:
        self.member = member
        self.row = row
        self.stream = member.stream  # of the start that the offer went to
        self.offered_s = self.wanted_s = self.confirmed_s = 0.0
        self.scored = 0  # reports with a score, since the status that has it on trial


class Updates:
    """presence(name): what is known of a device's presence, None where nobody judges that. labels(): those of all
    devices; None: they are read from the database. steady: seconds that no change of the clock moves; None: the clock
    is never wrong. rate_bytes: of chunks a second. step() and took() give what is to be
    sent: (connection, topic, message)."""

    def __init__(
        self,
        store: Store,
        keys: keyring.Keys,
        *,
        prefix: str = wire.PREFIX,
        shard: Shard | None = None,
        presence: Callable[[str], Device | None] = lambda name: None,
        labels: Callable[[], Mapping[str, Labels]] | None = None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] | None = None,
        rate_bytes: float = RATE_BYTES,
        judge_s: float = 5.0,
    ) -> None:
        self._store = store
        self._keys = keys
        self._prefix = prefix.rstrip("/") + "/"
        self._shard = shard or Shard()
        self._presence = presence
        self._clock = clock
        self._steady = steady or clock
        self._ahead_s = clock() - self._steady()  # by how much the clock is ahead of the steady one
        listened_s = store.listened_until(self._shard.name)
        was_here = listened_s is not None and clock() - listened_s < AWAY_S
        self._since_s = 0.0 if was_here else clock()  # before that, no device had anybody to ask
        self._labels = labels or Known(store)
        self._judge = Judge(store, self._labels, clock=clock, every_s=judge_s)
        self._manifests = releases.Manifests(store)
        self._rows: dict[int, RolloutRow] = {}  # that go on, or are withdrawn
        self._active: dict[str, _Active] = {}
        self._chunks = Chunks(store, clock, rate_bytes)
        self._changed: dict[tuple[int, int], Member] = {}
        self._offered: dict[int, Member] = {}
        self._withdrawals = Withdrawals(store, self._shard)
        self._pages: dict[int, tuple[float, int]] = {}
        self._looked_s = -1e18
        self.counts = {"offers": 0, "chunks": 0, "confirmations": 0, "withdrawals": 0}

    # --- what arrives -----------------------------------------------------------------------------------------------

    def took(
        self,
        reports: Sequence[wire.Report],
        results: Sequence[str],
        statuses: Iterable[wire.Status],
        wants: Iterable[Wanted] = (),
        where: Where = None,
    ) -> list[Outgoing]:
        """What was committed. Raises StoreError; then it comes again with the device's next message."""
        now_s = self._clock()
        self._follow_clock(now_s)
        spoke: dict[str, None] = {}
        if self._active:
            spoke = {status.device: None for status in statuses if status.device in self._active}
            if spoke:
                self._look(now_s)
                self._follow(spoke, now_s)
            for report, result in zip(reports, results, strict=True):
                found = self._active.get(report.device)
                if found is not None and result == STORED:
                    spoke[report.device] = None
                    on_time = report.late_s is None and report.windows > 0 and report.score_q8 is not None
                    found.scored += on_time and report.stream == found.member.stream
        sent: list[Outgoing] = []
        for want, signer in wants:
            sent += self._want(want, signer, where, now_s)
        self._follow(spoke, now_s)
        for name in spoke:
            found = self._active.get(name)
            sent += [] if found is None else [(where, *each) for each in self._due(found, now_s, True)]
        self._flush()
        return sent + self.serve()

    def _follow(self, names: Iterable[str], now_s: float) -> None:
        for name in names:
            found = self._active.get(name)
            if found is not None:
                self._move(found, now_s)

    def _want(self, want: wire_release.Want, signer: keyring.DeviceKeys, where: Where, now_s: float) -> list[Outgoing]:
        name = signer.device
        found = self._active.get(name)
        if found is None or found.row.release.version != want.version:
            return self._unwanted(want, signer, where, now_s)
        known = found.member.stream
        if known and known != want.stream or found.row.state not in (RUNNING, DONE):
            return []  # of an earlier start, or nothing is served now
        found.wanted_s = now_s
        if found.member.state == "due":
            self._to(found, "pulling", now_s)
        self._chunks.ask(found.row.release.id, want, signer, where)
        return []

    def _unwanted(
        self, want: wire_release.Want, signer: keyring.DeviceKeys, where: Where, now_s: float
    ) -> list[Outgoing]:
        """A device goes on asking for what has been withdrawn meanwhile."""
        for row in self._rows.values():
            wanted = row.state == WITHDRAWN and row.release.version == want.version
            if wanted and self._withdrawals.again(signer.device, want.stream, row, now_s):
                message = wire_release.seal_withdraw(signer, want.version, want.stream)
                self.counts["withdrawals"] += 1
                return [(where, self._topic(signer.device), message)]
        return []

    # --- about once a second ----------------------------------------------------------------------------------------

    def step(self) -> list[Outgoing]:
        """Raises StoreError; the next step is another try."""
        now_s = self._clock()
        self._follow_clock(now_s)
        sent: list[Outgoing] = []
        if not 0 <= now_s - self._looked_s < LOOK_S:
            self._judge.step()
            self._look(now_s)
            for found in list(self._active.values()):
                self._move(found, now_s)
                sent += [(None, *each) for each in self._due(found, now_s, False)]
            for row in self._rows.values():
                if row.state == WITHDRAWN:
                    for member in self._withdrawals.due(row, now_s):
                        message = self._sealed(member, "withdrawals", wire_release.seal_withdraw, row)
                        sent += [(None, *each) for each in message]
                else:
                    self._watch(row, now_s)
            self._flush()
        return sent + self.serve()

    def _look(self, now_s: float) -> None:
        self._looked_s = now_s
        listened_s = self._store.listened_until(self._shard.name)
        if listened_s is not None and now_s - listened_s > AWAY_S:  # the broker is away
            self._since_s = now_s
        every = rollouts.rollouts(self._store)
        rotating = self._manifests.rotating(row.release.id for row in every)
        self._rows = {
            row.id: row
            for row in every
            if row.state in (*LIVE, WITHDRAWN) or row.state == DONE and not superseded(row, every, rotating)
        }
        for row in self._rows.values():
            if row.state in (RUNNING, DONE) and self._manifests.expired(row.release.id, now_s):
                row.state = PAUSED  # every device would refuse it
        before, self._active = self._active, {}
        for row in self._rows.values():
            if row.state == WITHDRAWN:
                continue
            for member in chain(*(rollouts.members(self._store, row.id, states) for states in (OPEN, (OFF,)))):
                if member.name not in self._shard or member.state == OFF and self._still_off(member):
                    continue
                found = before.get(member.name)
                if found is None or found.row.id != row.id:
                    found = _Active(member, row)
                if found.member.stream != member.stream:
                    found.scored = 0
                found.member, found.row = member, row
                self._active[member.name] = found
                if member.state == OFF:
                    self._to(found, "due", now_s)
        self._chunks.only(self._active.keys())

    def _still_off(self, member: Member) -> bool:
        seen = self._presence(member.name)
        return seen is not None and seen.state in ("off", "unknown")

    def _follow_clock(self, now_s: float) -> None:
        """Where the clock was set, nobody has waited for so long."""
        ahead_s, self._ahead_s = self._ahead_s, now_s - self._steady()
        if abs(self._ahead_s - ahead_s) > JUMP_S:
            self._since_s = now_s

    # --- one device -------------------------------------------------------------------------------------------------

    def _to(self, found: _Active, state: str, now_s: float, result: str = "") -> None:
        member = found.member
        if member.state == "due":
            member.lost = self._lost(member.name)
        member.state, member.since_s, member.result = state, now_s, result
        if state in ("trial", "confirmed") and member.taken_s is None:
            member.taken_s = now_s
        if state == "confirmed":
            member.until_s = now_s + min(WATCH_S, found.row.stages[found.row.stage].soak_s / 2)
        self._changed[member.rollout, member.id] = member
        if state not in OPEN:
            self._active.pop(member.name, None)
            self._chunks.drop(member.name)

    def _flush(self) -> None:
        if self._changed or self._offered:
            rollouts.keep(self._store, self._changed.values(), self._offered.values())
            self._changed.clear()
            self._offered.clear()

    def _lost(self, name: str) -> int:
        seen = self._presence(name)
        return 0 if seen is None else seen.lost_announced + seen.unexplained

    def _away(self, name: str, now_s: float) -> str:
        """Why a device counts as silent, or ""."""
        seen = self._presence(name)
        if seen is None or seen.state not in AWAY:
            return ""
        patience_s = 0.0 if seen.state == "silent" else max(GONE_S, 2 * seen.interval_s)
        return f"{seen.state}: {seen.why}" if now_s - seen.since_s > patience_s else ""

    def _left(self, found: _Active, now_s: float) -> bool:
        """Pass over a device that an operator has removed, or put into another class -> whether it is one."""
        label = self._labels().get(found.member.name, NONE)
        left = label.removed_s is not None or label.group != found.row.release.device_class
        if left:
            self._to(found, "passed", now_s, LEFT)
        return left

    def _move(self, found: _Active, now_s: float) -> None:
        """Follow what the device's last status reports, and what it does not."""
        member, version = found.member, found.row.release.version
        update = member.update
        if self._left(found, now_s):
            return
        if update is not None:
            if update.version == version:
                self._to(found, "confirmed", now_s)
                return
            if update.version > version:
                self._to(found, "passed", now_s, f"runs version {update.version}")
                return
            if update.trial and update.tried == version:
                if member.state != "trial":
                    found.scored = 0
                    self._to(found, "trial", now_s)
            elif update.tried == version and update.failed and not self._passes(found, update):
                nothing = (
                    update.result == slots.NOTHING
                )  # such as a policy, and it has no response: not the release's fault
                self._to(found, "passed" if nothing else "failed", now_s, update.reason)
                return
            elif member.state == "trial":  # its folder of updates is not the one that it had
                self._to(found, "failed", now_s, "does not know of its trial any more")
                return
        seen = self._presence(member.name)
        if seen is not None and seen.state == "off":  # no sign of the release
            self._to(found, OFF, now_s, seen.why)
            return
        away = self._away(member.name, now_s)
        waited_s = now_s - max(member.since_s, self._since_s) if found.row.state in (RUNNING, DONE) else 0.0
        if member.state in ("pulled", "trial") and away:
            self._to(found, "failed", now_s, away)
        elif member.state == "due" and waited_s > DUE_S:
            if away:
                rollouts.leave(self._store, [member])
                self._active.pop(member.name, None)
            else:
                self._to(found, "failed", now_s, "did not ask for what was offered")
        elif member.state in ("pulling", "pulled") and waited_s > TAKE_S:
            passing = update is not None and update.tried == version and update.failed
            self._to(found, "failed", now_s, update.reason if update and passing else "did not take it in time")

    @staticmethod
    def _passes(found: _Active, update: wire_release.UpdateState) -> bool:
        """Whether the device takes the release again although it has ended."""
        if update.result == slots.UNCONFIRMED:  # of a trial before a halt and a `resume`, until it has begun anew
            return found.member.state in ("due", "pulling")
        return update.result in PASSING

    def _due(self, found: _Active, now_s: float, spoke: bool) -> list[Publish]:
        """What is to be sent to a device, which has said something or not."""
        member, row = found.member, found.row
        update = member.update
        if update is None or member.state not in OPEN:
            return []
        if member.state == "trial":
            # where the model was changed without a start, the first report may still be of the one before
            ready = found.scored > (found.stream == member.stream) and row.state != HALTED
            if ready and not 0 <= now_s - found.confirmed_s < CONFIRM_AGAIN_S:
                found.confirmed_s = now_s
                return self._sealed(member, "confirmations", wire_release.seal_confirm, row)
            return []
        if row.state not in (RUNNING, DONE) or self._manifests.expired(row.release.id, now_s):
            return []
        if found.stream != member.stream:  # a start that knows of no offer
            found.stream, found.offered_s, found.wanted_s = member.stream, 0.0, 0.0
        refused = update.tried == row.release.version and update.failed
        quiet_s = RETRY_S if refused else OFFER_AGAIN_S
        last_s = max(found.offered_s, found.wanted_s)
        if last_s and (not spoke or 0 <= now_s - last_s < quiet_s):
            return []
        found.offered_s = now_s
        number = member.offer = next_number(member.offer, now_s)
        self._offered[member.id] = member  # on the disk before the offer leaves
        content = self._chunks.content(row.release.id)[0]

        def offer(keys: keyring.DeviceKeys, version: int, stream: bytes) -> bytes:
            return wire_release.seal_offer(keys, version, content, stream, number)

        return self._sealed(member, "offers", offer, row)

    def _sealed(
        self,
        member: Member,
        what: str,
        seal: Callable[[keyring.DeviceKeys, int, bytes], bytes],  # of version and stream
        row: RolloutRow,
    ) -> list[Publish]:
        """One message under each key that the device may hold: while its key is rotated, two."""
        topic, version = self._topic(member.name), row.release.version
        try:
            made = [(topic, seal(keys, version, member.stream)) for keys in self._keys.held(member.name)]
        except (keyring.Rejected, ConfigError) as error:  # it has left the fleet, or this key file can't offer
            if what != "withdrawals":
                self._to(_Active(member, row), "passed", self._clock(), f"no update: {error}")
            return []
        self.counts[what] += 1
        return made

    def _topic(self, name: str) -> str:
        return f"{self._prefix}{name}/{wire_release.MODEL_TOPIC}"

    def serve(self) -> list[Outgoing]:
        """The chunks that are due. Raises StoreError."""
        sent: list[Outgoing] = []
        for chunk in self._chunks.due():
            found = self._active.get(chunk.device)
            if chunk.last and found is not None and found.member.state == "pulling":
                self._to(found, "pulled", self._clock())
            self.counts["chunks"] += 1
            sent.append((chunk.where, self._topic(chunk.device), chunk.message))
        self._flush()
        return sent

    # --- after the confirmation, and back -----------------------------------------------------------------------------

    def _watch(self, row: RolloutRow, now_s: float) -> None:
        """Devices whose time is over: each was good for it, or failed."""
        page = rollouts.watched(self._store, row.id, now_s, self._pages.get(row.id, (0.0, -1)), PAGE)
        if len(page) == PAGE:
            self._pages[row.id] = (page[-1].until_s or 0.0, page[-1].id)
        else:
            self._pages.pop(row.id, None)
        for member in page:
            if member.name not in self._shard:
                continue
            found = _Active(member, row)
            update, seen = member.update, self._presence(member.name)
            lost = self._lost(member.name) - member.lost
            if self._left(found, now_s):
                continue
            if update is None or update.version < row.release.version:
                self._to(found, "failed", now_s, update.reason if update else "its status has no version")
            elif away := self._away(member.name, now_s):
                self._to(found, "failed", now_s, away)
            elif lost > 0:
                self._to(found, "failed", now_s, f"lost {counted(lost, 'report')}")
            elif seen is None or seen.state not in (*AWAY, "unknown"):
                self._to(found, "good", now_s)
            elif now_s - (member.until_s or now_s) > WATCH_S:  # nobody can say whether it is there
                self._to(found, "passed", now_s, f"its presence is {seen.state}")

    # --- for the monitor ----------------------------------------------------------------------------------------------

    def alerts(self, now_s: float) -> list[Alert]:
        """Roll-outs that halted, by the first of several collectors."""
        return halts(self._rows.values()) if self._shard.number == 1 else []

    def close(self) -> None:
        """Write down what is known. Raises StoreError."""
        self._flush()
