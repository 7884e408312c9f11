"""Lets an agent take releases: carries the messages of update.py at a bounded rate, keeps the device's own last windows
for the proof of a new model, and changes the model that runs.

    watch = full.start("sensor-7", KEY, host="broker.lan", update=Updater("pump", KEYS))

A board needs it `stonechat build --with updater`. What the device has learned goes over to a model of the same schema:
its centres as they are, location and scale of the score from the last windows; and back when the model goes.
"""

from array import array

from . import cbor, manifest, slots
from .budget import Budget
from .compat import const, ticks_add, ticks_diff, ticks_ms
from .cose import Mac
from .cose_open import fields_of
from .errors import ModelError, StonechatError, WireError
from .update import CHUNK_BYTES, CONFIRM, OFFER, Update

_NORMAL = const(0)  # levels of detection.py
_ALARM = const(2)
_OWN_MODEL = const(8)  # of commands.py
_GAP_MS = const(200)  # between two wants, at least
_AGAIN_MS = const(15_000)  # the same want again; twice that after each
_AGAIN_MOST_MS = const(900_000)
_WANT_BYTES = const(64)  # a want, sealed
_FRAME_BYTES = const(46)  # around a chunk
_PACKET_BYTES = const(448)  # a sealed chunk in its PUBLISH, without the topic
_TIME_MS = const(3000)  # that a proof may take before the next window
_DAY_MS = const(86_400_000)
_PATIENCE_S = const(86_400)  # of a release that waits for the end of an alarm
_LEARNED = (b"norm", b"cal", b"new")  # sections of the state that belong to a model,
_KEPT = (b"", b"old", b"older")  # and what is in front of their names: of the one that runs, of the ones before


class Updater:
    """device_class: as manifests name it. keys: ((role, public key), ...), at most four, that verify a release. folder:
    for the slots, made where it is missing. most_bytes: the largest model that is taken. bytes_per_day: what wants and
    chunks take together in any day, beside the agent's own; at least 1,000. windows: how many of the device's own last
    windows a new model has to score in silence. restart(): called where another model is to run, such as machine.reset;
    where it is None or returns, the model is changed in the running agent. on_change(updater): the state is another.

    open() gives the model to run; then it is the Agent's `update`."""

    def __init__(
        self,
        device_class: str,
        keys,
        folder: str = "stonechat-update",
        most_bytes: int = 32_768,
        bytes_per_day: int = 400_000,
        windows: int = 64,
        restart=None,
        on_change=None,
    ) -> None:
        self.store = slots.Slots(folder)
        self.topic = ""
        self.on_change = on_change
        self._class = device_class
        self._keys = [list(key) for key in keys]
        self._most_bytes = most_bytes
        self._bytes_per_day = bytes_per_day
        self._windows = windows
        self._restart = restart
        self._seen = 0  # windows kept since this start
        self._key = b""
        self._ready: tuple | None = None  # (path, model) that was read last
        self._learned: tuple | None = None  # (digest, {section: bytes}) of the one that is proven
        self._wanted = None  # the chunk last asked for
        self._asked_ms = self._last_ms = ticks_ms()
        self._wait_ms = 0
        self._whole_s = -1  # uptime at which a proof was first put off
        self._passed_ms = 0  # that the byte budget has not been credited with

    # --- which model runs -------------------------------------------------------------------------------------------

    def open(self, factory: str, read, schema_id: bytes, key: bytes, count: bool = True):
        """factory: path of the model that the device came with; read(path): Model; schema_id: of the device's
        collector, so that a model made for an older firmware does not run; key: the device's secret; count: this is a
        start -> the model to run. Raises what read() raises for the factory's model."""
        self._key = key
        self._factory = factory
        self._read = read
        self._schema_id = schema_id
        if count:
            try:
                self.store.start()
            except OSError:
                pass  # what is final runs
        if not count and self.running:
            try:
                return self._open(self.running)
            except (StonechatError, OSError, MemoryError):
                return read(factory)
        return self._build(_same)

    def _build(self, make):
        """-> make(model) with the model of the slot that is due; a slot whose model can't be used is given up."""
        while True:
            slot = self.running
            try:
                return make(self._open(slot))
            except (StonechatError, OSError, MemoryError):
                if slot == slots.FACTORY:
                    raise
            self._ready = None
            try:
                self.store.broken()
            except OSError:
                pass  # it is given up until the next start

    def channel(self, make, collector, model, state):
        """make(collector, model, state) -> the device's own channel, with another model where this one is of no use."""

        def made(model):
            self.carry_over(state, model)
            return make(collector, model, state)

        try:
            return made(model)
        except ModelError:
            if not self.running:
                raise
        return self._build(made)

    def _open(self, slot):
        if slot == slots.FACTORY:
            return self._read(self._factory)
        path = self.store.path(slot) + ".model"
        if self._ready is not None and self._ready[0] == path:
            return self._ready[1]
        return self._load(path, self.store.settings(slot)[0], None)

    def _load(self, path, rules, golden):
        model = self._read(path)
        meta = model.metadata
        if meta is None or self._schema_id and meta.schema_id != self._schema_id:
            raise ModelError("schema")
        if golden and (not meta.golden or golden != manifest.golden_digest(meta)):
            raise ModelError("golden vectors")
        if rules:
            meta.alarm_rules = tuple([tuple(rule) for rule in rules])
        self._ready = (path, model)
        return model

    @property
    def running(self) -> int:
        """The slot that runs."""
        return self.store.trial or self.store.slot

    @property
    def policy(self) -> bytes:
        """The response's policy that is in force; b"": none came with a release."""
        return self.store.settings(self.running)[1]

    @property
    def own_model(self) -> bool:
        """Whether the vendor lets the device train a model of its own."""
        return self.store.settings(self.running)[2]

    @property
    def final_path(self) -> str:
        """Of the model that is final: beside which the device's own model works."""
        store = self.store
        return store.path(store.slot) + ".model" if store.slot else self._factory

    @property
    def status(self) -> list:
        """The status's key 24."""
        store = self.store
        return [store.version, store.slot, store.trial, store.tried, store.result, self.update.refusals]

    def carry_over(self, state, model) -> None:
        """To be called before a scorer of `model` is made: what was learned under another model is kept aside, and what
        was learned under this one is taken up again."""
        schema_id = model.metadata.schema_id
        digest = model.digest
        sets = [[state.get(kept + name + schema_id, b"") for name in _LEARNED] for kept in _KEPT]
        if sets[0][1][:8] == digest:
            return
        if self._learned is not None and self._learned[0] == digest:
            sets.insert(0, [self._learned[1].get(name + schema_id, b"") for name in _LEARNED])
        else:
            found = [one for one in sets if one[1][:8] == digest]
            sets = (found or sets)[:1] + [one for one in sets if one[1][:8] != digest]
        for i in range(len(_KEPT)):
            for j in range(len(_LEARNED)):
                state.put(_KEPT[i] + _LEARNED[j] + schema_id, sets[i][j])

    # --- the agent's calls ------------------------------------------------------------------------------------------

    def attach(self, agent) -> None:
        """By the agent that it belongs to, once its channels are there."""
        self._agent = agent
        channel = agent.channels[0]
        reporter = agent.reporter
        n = len(channel.collector.schema)
        self._row = [0] * n
        self._rows = array("H", bytes(2 * n * self._windows))
        self._normal = bytearray(self._windows)
        self.topic = reporter.topic + "model"
        self._want_topic = reporter.topic + "want"
        reporter.subscriptions += (self.topic,)
        self.use_key(self._key)
        self._key = b""
        self._budget = Budget(self._bytes_per_day, _Section(agent.state))
        self.update = Update(
            self.store,
            reporter.stream,
            self._keys,
            self._class,
            channel.collector.schema.id,
            self._most_bytes,
            self._load,
            self._suits,
            slots.find(self._factory),
            self._accepts if agent.response is not None else None,
        )
        self._came_with = agent.response.rules if agent.response is not None else ()
        self._beside = self.store.slot  # the final model beside which the device's own was made
        self._follow()
        self._suspend_own()
        self._told = self.status
        reporter.more[6] = self.status

    def use_key(self, key: bytes) -> None:
        """key: the device's secret, another from now on."""
        device_id = self.topic.split("/")[-2]
        self._mac = Mac(key, b"want", device_id)
        self._offer_mac = Mac(key, b"offer", device_id)

    def connect(self, client) -> None:
        """The client is about to connect."""
        if hasattr(client, "take_up_to"):
            client.take_up_to(_PACKET_BYTES + len(self.topic))

    def on_message(self, topic, payload: bytes) -> bool:
        """Take a message -> whether it was for this."""
        if (topic if isinstance(topic, str) else bytes(topic).decode()) != self.topic:
            return False
        update = self.update
        changed = False
        try:
            fields = fields_of(self._offer_mac, payload)
            if fields.get(2) == OFFER and 4 not in fields:
                self._wait_ms = 0  # the collector is there: what is missing is asked for at once
            confirmed = fields.get(2) == CONFIRM and 4 not in fields and self.store.trial
            changed = update.on_message(fields)
            if confirmed and not self.store.trial:
                self._suspend_own()
        except WireError:
            self._agent.reporter.rejected += 1
        except OSError:
            update.failed()
        self._after(changed)
        due_ms = ticks_add(ticks_ms(), _GAP_MS)
        if ticks_diff(self._agent.pump_due_ms, due_ms) > 0:
            self._agent.pump_due_ms = due_ms  # for the next want
        return True

    def keep(self) -> None:
        """A window has been scored: it becomes one of the last."""
        if not self._windows:
            return
        channel = self._agent.channels[0]
        scorer = channel.scorer
        row = self._row
        n = len(row)
        window = channel.window
        scorer.normalization.fill_q8(window.deltas, window.elapsed_ms, scorer.window_ms, row)
        at = self._seen % self._windows
        for i in range(n):
            self._rows[at * n + i] = row[i]
        verdict = scorer.verdict
        self._normal[at] = verdict.level == _NORMAL and not verdict.learning
        self._seen += 1

    def turn(self) -> None:
        """What is due; at each of the agent's ticks."""
        now_ms = ticks_ms()
        self._passed_ms = min(self._passed_ms + max(0, ticks_diff(now_ms, self._last_ms)), _DAY_MS)
        self._last_ms = now_ms
        update = self.update
        if not update.offered and not self.store.trial:
            return
        changed = False
        agent = self._agent
        try:
            wanted = update.want()
            if wanted:
                self._ask(wanted, now_ms)
            elif ticks_diff(agent.due_ms, now_ms) > min(_TIME_MS, agent.window_ms >> 1) and self._may_prove():
                changed = update.step(agent.reporter.now_s(), agent.reporter.uptime_s)
        except OSError:
            update.failed()
        if not update.offered:
            self._whole_s = -1
            if not changed:  # refused: its model need not stay in memory
                self._ready = self._learned = None
        self._after(changed)

    # --- pulling ----------------------------------------------------------------------------------------------------

    def _ask(self, wanted, now_ms) -> None:
        """Send what is missing, if it is time and the byte budget allows the chunk that comes of it."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._wait_ms = 0
        budget = self._budget
        budget.pass_time(self._passed_ms)  # only now: where nothing is pulled, the state is not written for it
        self._passed_ms = 0
        cost = _WANT_BYTES + _FRAME_BYTES + CHUNK_BYTES
        if ticks_diff(now_ms, self._asked_ms) < max(_GAP_MS, self._wait_ms) or not budget.allows(cost, 0):
            return
        fields = [1, self.update.offered, wanted[0], wanted[1], None, None, None, self._agent.reporter.stream]
        value = bytearray()
        cbor.encode_fields(fields, value)
        try:
            self._agent.publish(self._want_topic, self._mac.seal(value), 1, False)
        except (StonechatError, OSError):
            return  # no connection: the next turn is another try
        budget.spend(cost, 0)
        self._asked_ms = now_ms
        self._wait_ms = min(2 * self._wait_ms or _AGAIN_MS, _AGAIN_MOST_MS)

    # --- proving ----------------------------------------------------------------------------------------------------

    def _may_prove(self) -> bool:
        """Whether it is the time for what is due: a new model is proven once there are enough windows, and not while
        the device alarms, but for a release that has waited for a day."""
        if self.store.trial or not self.update.whole:
            return True
        uptime_s = self._agent.reporter.uptime_s
        if self._whole_s < 0:
            self._whole_s = uptime_s
        verdict = self._agent.channels[0].scorer.verdict
        late = uptime_s - self._whole_s > _PATIENCE_S
        return late or self._seen >= self._windows and verdict.level == _NORMAL

    def _suits(self, model) -> bool:
        """Whether `model` stays silent on the last windows that were normal. It learns from them what it has to."""
        agent = self._agent
        channel = agent.channels[0]
        schema = channel.collector.schema
        meta = model.metadata
        if meta.window_ms != agent.window_ms:
            raise ModelError("windows of %d ms" % meta.window_ms)
        sections = _Copy(agent.state)
        scorer = type(channel.scorer)(model, schema, sections)
        scorer.normalization.fill_q8 = self._recall
        first = max(0, self._seen - self._windows)
        for learning in (True, False):
            for number in range(first, self._seen):
                at = number % self._windows
                if self._normal[at] and scorer.learning >= learning:
                    verdict = scorer.score(at, 0)
                    if verdict.unfit or verdict.level == _ALARM:
                        return False
            if scorer.learning:
                break  # too few windows were normal: it goes on learning
        scorer.clear_evidence()
        scorer.save()
        self._learned = (model.digest, sections.own)
        return True

    def _recall(self, at, elapsed_ms, window_ms, out) -> None:
        """In place of Normalization.fill_q8: the features of the window at `at`."""
        n = len(out)
        for i in range(n):
            out[i] = self._rows[at * n + i]

    # --- another model ----------------------------------------------------------------------------------------------

    def _after(self, changed) -> None:
        """changed: another model is to run."""
        if changed:
            self._change()
        if self.status != self._told:
            self._told = self._agent.reporter.more[6] = self.status
            self._agent.announce()
            if self.on_change is not None:
                self.on_change(self)

    def _change(self) -> None:
        agent = self._agent
        self._save()
        if self._restart is not None:
            if self._ready is not None and self._learned is not None:
                self.carry_over(agent.state, self._ready[1])
                self._save_state()
            self._restart()
        channel = agent.channels[0]
        try:
            self.store.start()
        except OSError:
            pass  # what is final runs

        def made(model):
            self.carry_over(agent.state, model)
            return type(channel.scorer)(model, channel.collector.schema, agent.state)

        channel.scorer = self._build(made)
        self._ready = self._learned = None
        self._suspend_own()
        self._follow()
        self._save()

    def _accepts(self, policy) -> None:
        self._agent.response.follow(manifest.rules_of(policy), True)

    def _follow(self) -> None:
        """The response decides by the policy that is in force, or by the rules that it came with."""
        response = self._agent.response
        if response is not None:
            policy = self.policy
            try:
                response.follow(manifest.rules_of(policy) if policy else self._came_with)
            except StonechatError:
                response.follow(self._came_with)

    def _save(self) -> None:
        agent = self._agent
        try:
            agent.save()
        except (StonechatError, OSError):
            pass  # it is counted at the next regular save

    def _save_state(self) -> None:
        try:
            self._agent.state.save()
        except StonechatError:
            pass  # then the new model learns again

    def _suspend_own(self) -> None:
        """The device's own model decides nothing beside a model on trial, and is made anew where another is final."""
        own = self._agent.own
        if own is None:
            return
        store = self.store
        own.suspended = store.trial > 0
        own.use_reference(self._agent.channels[0].scorer)
        if own.suspended:
            return
        if not self.own_model:  # the vendor forbids it
            self._agent.reporter.commands.actions.pop(_OWN_MODEL, None)
        if self._beside != store.slot:
            self._beside = store.slot
            if self.own_model:
                own.restart()
            else:
                own.forbid()


def _same(model):
    return model


class _Section:
    """A state in which a Budget finds the level of updates."""

    def __init__(self, state) -> None:
        self._state = state
        self.save = state.save

    def get(self, section, default=None):
        return self._state.get(b"update", default)

    def put(self, section, value) -> None:
        self._state.put(b"update", value)


class _Copy:
    """A state that a scorer reads and does not change; `own` has what it would have written."""

    def __init__(self, state) -> None:
        self._state = state
        self.own: dict = {}

    def get(self, section, default=None):
        return self.own.get(section) or self._state.get(section, default)

    def put(self, section, value) -> None:
        self.own[section] = value
