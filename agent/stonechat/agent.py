"""The agent: the loop of loop.py with several channels, and with what the collector sends back.

agent = open_agent("sensor-7", KEY, collector, "model.tflite", "stonechat-data")
agent.connect(Client("sensor-7", "broker.lan"))
while True:
    agent.tick()            # from any main loop; or: asyncio.create_task(agent.run())
    agent.poll(0.1)
"""

from struct import pack, unpack

from .commands import CALIBRATE, OWN_MODEL, WAS_NORMAL, WrongArguments
from .compat import const, epoch_s, sleep_ms, ticks_add, ticks_diff, ticks_ms
from .delivery import Delivery
from .errors import StonechatError
from .loop import Loop
from .model import open_model
from .outbox import Outbox
from .state import open_state
from .steady import SteadyChannel

_LOOK_EVERY_MS = const(1000)  # while monitoring is off
_OFF = b"off"  # section of the state: the user has switched monitoring off; since when, Unix seconds or 0
_RESPONSE_KEY = const(4)  # in Reporter.more
_OFF_KEY = const(5)


class Agent(Loop):
    """collector, model: what is watched and what scores it, of one schema. extra: more channels, fused at the
    evidence: (collector, model) of a vendor's own counters, (collector, model, name) where several have the same
    schema, as services do, or (channel, None), which needs no model and takes the state by open().
    learn_peers_hours: how long a device's own peers are learned, for the channel of lasting_peers.py, where the
    collector knows peers; 0: without that channel. `channel_names`: of all but the first. on_verdict(verdict,
    agent) is called after every scored window. reporter: a Delivery. own(collector, model, state): what makes the
    device's own channel in place of Channel, with a model that the device trains itself (own_model.OwnChannel).
    response: a Response (response.py), None: nothing is decided. update: an Updater (updater.py) that takes
    releases, None: this device takes none. The rest is as in Loop. Raises ModelError where a model is not for its
    collector's schema."""

    def __init__(
        self,
        collector,
        model,
        *,
        reporter,
        state,
        extra=(),
        own=None,
        on_verdict=None,
        publish=None,
        firmware="",
        learn_peers_hours=24,
        response=None,
        update=None,
    ) -> None:
        make = own or SteadyChannel
        channels: list = [
            make(collector, model, state) if update is None else update.channel(make, collector, model, state)
        ]
        self.own = getattr(channels[0], "own", None)
        if learn_peers_hours and hasattr(collector, "hold_peers") and getattr(collector, "contacts", ()) is not None:
            from .lasting_peers import LastingPeers

            window_ms = channels[0].scorer.window_ms
            most = getattr(collector, "most_peers", 64)
            channels.append(LastingPeers(collector, window_ms, state, learn_peers_hours, most))
        self._fused = None
        if extra or len(channels) > 1:
            from . import fusion  # a board has it only where it was built --with counters

            self._fuse = fusion.fuse
            self._fused = fusion.FusedVerdict(0)
            channels += [
                fusion.SideChannel(each[0], each[1], state, *each[2:]) if each[1] else each[0].open(state)
                for each in extra
            ]
        self.channel_names = [channel.name for channel in channels[1:]]
        # Keys 18 to 25 of the status: steady, own model, one made there, planned sleep, three of the response and of
        # updates, names of the channels.
        reporter.more = [None, None, None, None, None, None, None, self.channel_names or None]
        ids = [collector.schema.id] + [channel.id for channel in channels[1:]]
        for section in list(state.sections):  # of a schema that is no longer in use
            if len(section) > 8 and section[-8:] not in ids:
                del state.sections[section]
        reporter.commands.actions = {CALIBRATE: self._calibrate, WAS_NORMAL: self._was_normal}
        if own:
            reporter.commands.actions[OWN_MODEL] = self._own_model
        self.on_verdict = on_verdict
        self._steady = False
        self.response = response
        self.update = update
        self.off = False
        self.on_switch = None  # called with whether monitoring is on: a board stops counting then
        self._off_s = 0  # seconds of uptime at which that began; negative: before this start
        Loop.__init__(self, channels, reporter, state, publish=publish, firmware=firmware)
        if response is not None:
            response.attach(self)
        if update is not None:
            update.attach(self)
        packed = state.get(_OFF)
        if packed is not None:
            self._switch_off(unpack("<I", packed)[0])

    def connect(self, client):
        """Let `client` carry everything: last will, status, reports, acknowledgements and commands; to be called before
        it connects. client: mqtt.Client or another Transport (protocols.pyi) -> the client."""
        self._client = Loop.connect(self, client)
        client.resend = False  # the reporter sends again what is not acknowledged, within its byte budget
        client.on_message = self.on_message
        client.on_published = self.reporter.on_published
        for topic in self.reporter.subscriptions:
            client.subscribe(topic, 1)
        if self.update is not None:
            self.update.connect(client)
        return client

    def poll(self, wait_s: float = 0) -> None:
        """Let the connected client send, receive and reconnect, waiting at most wait_s or until something is due. Does
        not raise for what the network does: `offline` says why there is no connection."""
        client = self._client
        wait_s = min(wait_s, self.due_in_ms / 1000)
        try:
            client.poll(wait_s if client.connected else 0)
        except (StonechatError, OSError) as error:
            self.offline = repr(error)
        if not client.connected:
            sleep_ms(int(min(wait_s, 0.1) * 1000))

    @property
    def due_in_ms(self) -> int:
        """Milliseconds until tick() has something to do; never negative."""
        now_ms = ticks_ms()
        return max(0, min(ticks_diff(self.due_ms, now_ms), ticks_diff(self.pump_due_ms, now_ms)))

    def tick(self):
        """As Loop does. While the user has switched monitoring off, one status for each connection and nothing else."""
        if self.response is not None:
            self.reporter.pass_time(ticks_ms())  # whatever the collectors and the broker do: leases end by it
            self._try(self.response.turn)
        if not self.off:
            verdict = Loop.tick(self)
            if self.update is not None:
                self.update.turn()
            return verdict
        now_ms = ticks_ms()
        if ticks_diff(now_ms, self.pump_due_ms) >= 0:
            self.reporter.pass_time(now_ms)
            self.due_ms = self.pump_due_ms = ticks_add(now_ms, _LOOK_EVERY_MS)
            try:
                if self._status_due:
                    self._status_due = not self.reporter.send_status(self.publish, self.status)
            except (StonechatError, OSError) as error:
                self.offline = repr(error)
        return None

    def monitoring(self, on: bool) -> None:
        """The user's own switch, which holds across restarts. Off: no counter is read and nothing is reported but one
        status; a lease of the response ends. On: what was learned is still there. An operator's command can't move
        it."""
        if on != self.off:
            return
        if on:
            self.off = False
            if self.on_switch is not None:
                self.on_switch(True)
            if _OFF in self.state.sections:
                del self.state.sections[_OFF]
            self.due_ms = ticks_ms()
            for channel in self.channels:
                channel.hold_peers(True)  # until the first verdict: whom it met meanwhile is not looked at
                channel.window.primed = False
            channel = self.channels[0]
            try:
                channel.collector.read(channel.values)  # what was counted meanwhile is dropped
            except (StonechatError, OSError) as error:
                self._failed(error)
        else:
            self.state.put(_OFF, pack("<I", epoch_s()))
            self._switch_off(epoch_s())
        self.announce()
        self._try_to_save()

    def _switch_off(self, since_s: int) -> None:
        now_s = epoch_s()
        uptime_s = self.reporter.uptime_s
        self._off_s = uptime_s - max(0, now_s - since_s) if since_s and now_s else uptime_s
        self.off = True
        if self.response is not None:
            self._try(self.response.switch_off)  # first: the enforcer may ask the collector
        if self.on_switch is not None:
            self.on_switch(False)

    async def run(self) -> None:
        """tick() for ever under asyncio; cancel the task to stop."""
        from asyncio import sleep

        while True:
            self.tick()
            await sleep(self.due_in_ms / 1000)

    def end_window(self, now_ms: int):
        verdict = Loop.end_window(self, now_ms)
        if self.update is not None and verdict is not None:
            self.update.keep()
        if self.own is not None and self.own.news:
            self._status_due = True
            self._try_to_save()
        if verdict is not None and getattr(verdict, "steady", False):  # of whichever channel or model
            for channel in self.channels:
                channel.hold_peers(True)
        if verdict is not None and getattr(verdict, "steady", False) != self._steady:
            self._steady = not self._steady
            self.announce()
            self._try_to_save()
        if verdict is not None and self.response is not None:
            self._try(self.response.window, verdict)
        if verdict is not None and self.on_verdict is not None:
            self.on_verdict(verdict, self)
        return verdict

    def _score(self, now_ms: int):
        if not self._fused:
            return Loop._score(self, now_ms)
        verdicts = [self.channels[0].end_window(now_ms)]
        for channel in self.channels[1:]:
            try:
                verdict = channel.end_window(now_ms)
            except Exception as error:  # noqa: BLE001 - a vendor's; the device's own channel goes on without it
                self._failed(error)
                channel.window.primed = False
                verdict = None
            verdicts.append(verdict)
        return self._fuse(verdicts, self._fused) if verdicts[0] else None

    @property
    def model_name(self) -> str:
        return self.channels[0].scorer.meta.name

    @property
    def sources(self) -> tuple:
        """(group, source, note) of the device's own counters."""
        return self.channels[0].collector.sources

    @property
    def columns(self) -> list:
        """Names of the features, as explain() of the last verdict counts them: those of the channel that leads."""
        lead = self._fused.channel if self._fused else 0
        return [column[0] for column in self.channels[lead].collector.schema.columns]

    @property
    def learning(self) -> bool:
        """True while a scorer still learns what is normal on this device. One whose service is not there is left out:
        it may never come."""
        for channel in self.channels:  # noqa: SIM110 - a generator would allocate
            if channel.scorer.learning and not getattr(channel, "absent", False):
                return True
        return False

    @property
    def lacks(self) -> str:
        """What the collectors can't read at present, "" where nothing is missing."""
        return "; ".join(
            [channel.collector.lacks for channel in self.channels if getattr(channel.collector, "lacks", "")]
        )

    def announce(self) -> None:
        """Send the status again: something in it has changed."""
        self._status_due = True
        self.pump_due_ms = ticks_ms()

    def announce_sleep(self, seconds: int) -> bool:
        """Send a status: the device sleeps now, and the next one follows within `seconds`. Let the client send it
        (in_flight empty), save() and sleep -> False where the byte budget does not allow it. Raises what publish
        raises. A sleep longer than two heartbeats that is not announced makes the device silent."""
        self.reporter.more[3] = seconds
        try:
            return self.reporter.send_status(self.publish, self.status)
        finally:
            self.reporter.more[3] = None

    def on_message(self, topic, payload: bytes) -> None:
        """Take a message from the broker: acknowledgements and commands that authenticate are carried out, none while
        monitoring is off."""
        if self.off:
            return
        if self.update is not None and self.update.on_message(topic, payload):
            return
        self.pump_due_ms = ticks_ms()  # an acknowledgement frees space for what waits
        self.reporter.on_message(topic, payload)

    def _calibrate(self, arguments) -> None:
        self.recalibrate()

    def recalibrate(self) -> None:
        Loop.recalibrate(self)
        if self.own is not None:
            self.own.restart()

    def _was_normal(self, arguments) -> None:
        if self.response is not None:
            self.response.was_normal()
        for channel in self.channels:
            channel.scorer.clear_evidence()
        if self.own is not None:
            self.own.clear_evidence()

    def _own_model(self, arguments) -> None:
        """[1] makes the device's own model again, [0] forbids it."""
        own = self.own
        if own is None or arguments not in ([0], [1]):
            raise WrongArguments
        if arguments[0]:
            own.allow()
        else:
            own.forbid()
        self._status_due = True
        self.save()

    def status(self) -> bytearray:
        longest_s = None
        for scorer in [channel.scorer for channel in self.channels] + [self.own.scorer if self.own else None]:
            if getattr(scorer, "steady", False):
                longest_s = max(longest_s or 0, scorer.age * self.window_ms // 1000)
        self.reporter.more[0] = longest_s
        more = self.reporter.more
        if self.own is not None:
            more[1] = self.own.status
        if self.response is not None:
            more[_RESPONSE_KEY] = self.response.status
        more[_OFF_KEY] = max(0, self.reporter.uptime_s - self._off_s) if self.off else None
        return Loop.status(self)

    def save(self) -> None:
        Loop.save(self)
        if self.own is not None:  # last: where its file can't be written, the state is safe
            self.own.save()

    def _try(self, call, *arguments) -> None:
        """Whatever goes wrong in the response, the detector goes on."""
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001 - also a vendor's
            self._failed(error)

    def _try_to_save(self) -> None:
        try:
            self.save()
        except (StonechatError, OSError) as error:
            self._failed(error)

    def close(self) -> None:
        """Save and let go of the collectors; errors are counted, not raised."""
        if self.response is not None:
            self._try(self.response.close)
        self._try_to_save()
        for channel in self.channels:
            channel.collector.close()


def open_agent(
    device_id: str,
    key: bytes,
    collector,
    model,
    folder: str,
    *,
    fleet: str = "fleet",
    prefix: str = "stonechat/1",
    firmware: str = "",
    heartbeat_windows: int = 30,
    bytes_per_day: int = 40_000,
    outbox_bytes: int = 32_768,
    free_on_publish: bool = False,
    extra=(),
    on_verdict=None,
    publish=None,
    learn_peers_hours: int = 24,
    response=None,
    update=None,
) -> Agent:
    """An Agent with everything that it needs: model: the path of a .tflite, or what load_model gave; folder: for what
    was learned and for reports that wait, made where it is missing; the rest as in Delivery and Agent. Raises
    ModelError, OutboxError or OSError."""
    state = open_state(folder)
    if update is not None:
        model = update.open(model, open_model, collector.schema.id, key)
    elif isinstance(model, str):
        model = open_model(model)
    reporter = Delivery(
        device_id,
        key,
        Outbox(folder + "/outbox", outbox_bytes),
        prefix=prefix + "/" + fleet,
        heartbeat_windows=heartbeat_windows,
        bytes_per_day=bytes_per_day,
        state=state,
        free_on_publish=free_on_publish,
    )
    return Agent(
        collector,
        model,
        reporter=reporter,
        state=state,
        extra=extra,
        on_verdict=on_verdict,
        publish=publish,
        firmware=firmware,
        learn_peers_hours=learn_peers_hours,
        response=response,
        update=update,
    )
