from stonechat.agent import Agent
from stonechat.commands import CALIBRATE, WAS_NORMAL, Commands
from stonechat.custom_counters import CounterCollector
from stonechat.detection import ALARM, NORMAL, Verdict
from stonechat.errors import CollectorError, ModelError
from stonechat.features import RATE
from stonechat.metadata import Metadata
from stonechat.model_file import RESIDUAL, pack_normalization
from stonechat.replay import Replay
from stonechat.schema import Schema
from stonechat.state import State

SCHEMA = Schema("test-agent", (("a", "1", RATE), ("b", "1", RATE)))
WINDOW_MS = 1000
QUIET = (WINDOW_MS, (100, 100))
LOUD = (WINDOW_MS, (100, 100000))


class EchoModel:
    """A network whose output is its input: the residual is the normalized feature itself."""

    def __init__(self, schema=SCHEMA, learn_windows=0):
        meta = self.metadata = Metadata()
        meta.name = "echo"
        meta.version = 1
        meta.schema_name = schema.name
        meta.schema_id = schema.id
        meta.window_ms = WINDOW_MS
        meta.normalization = pack_normalization((1701, 1701), (64, 64))
        meta.kind = RESIDUAL
        meta.knots = ((0, 0), (2048, 512))
        meta.tail_q8 = 64
        meta.alarm_rules = ((256, 1024, 1536),)
        meta.learn_windows = learn_windows
        self.input_size = self.output_size = 2
        self.digest = b"12345678"

    def run(self, x):
        return x


class Reporter:
    subscriptions = ("acks", "commands")

    def __init__(self):
        self.levels = []
        self.pumps = 0
        self.statuses = []
        self.topics = []
        self.status_topic = "status"
        self.commands = Commands(None)
        self.on_published = None

    def save(self, state):
        pass

    def reconnected(self):
        pass

    def status(self, **facts):
        self.statuses.append(facts)
        return b"status"

    def send_status(self, publish, make):
        publish(self.status_topic, make(), 1, True)
        return True

    def on_message(self, topic, payload):
        self.topics.append(topic)

    def observe(self, verdict, now_ms):
        self.levels.append(verdict.level)

    def pump(self, publish, now_ms):
        self.pumps += 1


def publish(topic, payload, qos, retain):
    pass


def play(windows, state=None, model=None, on_verdict=None):
    replay = Replay(SCHEMA, windows)
    agent = Agent(
        replay,
        model or EchoModel(),
        publish=publish,
        reporter=Reporter(),
        state=state or State(),
        on_verdict=on_verdict,
    )
    for now_ms in replay:
        agent.end_window(now_ms)
    return agent


def test_quiet_windows_stay_normal_and_loud_ones_alarm():
    agent = play([QUIET] * 20 + [LOUD] * 3)
    assert agent.windows == 23
    assert agent.reporter.levels[:20] == [NORMAL] * 20
    assert agent.reporter.levels[-1] == ALARM


def test_the_explanation_names_the_feature():
    seen = []
    play([QUIET, LOUD], on_verdict=lambda verdict, agent: seen.append(verdict.explain(1)))
    assert seen[-1][0][0] == 1
    assert seen[-1][0][1] > 0


def test_a_restart_only_primes():
    state = State()
    first = play([QUIET] * 5, state=state)
    first.close()
    again = play([QUIET], state=state)
    assert again.windows == 1
    assert again.reporter.levels == [NORMAL]


def test_a_failing_collector_is_counted_and_the_next_window_tried():
    class Flaky(Replay):
        failing = False

        def read(self, values):
            if self.failing:
                raise CollectorError("no source")
            Replay.read(self, values)

    replay = Flaky(SCHEMA, [QUIET] * 5)
    agent = Agent(replay, EchoModel(), publish=publish, reporter=Reporter(), state=State())
    for now_ms in replay:
        replay.failing = now_ms == 3 * WINDOW_MS
        agent.end_window(now_ms)
    assert agent.errors == 1
    assert "no source" in agent.last_error
    # window 3 was not read and window 4 would have covered two: it is dropped, never scored as one
    assert agent.windows == 3
    assert agent.channels[0].window.dropped == 1


def test_whatever_a_side_channel_raises_the_devices_own_goes_on():
    """A vendor's function may raise anything; the main loop of a board would end with it."""
    for error in (OSError(5), CollectorError("no source"), ZeroDivisionError("vendor"), AttributeError("vendor")):
        replay = Replay(SCHEMA, [QUIET] * 5 + [LOUD] * 3)

        def fail(error=error):
            raise error

        side = Schema("side", (("a", "1", RATE), ("b", "1", RATE)))
        agent = Agent(
            replay,
            EchoModel(),
            publish=publish,
            reporter=Reporter(),
            state=State(),
            extra=((CounterCollector(side, fail), EchoModel(side)),),
        )
        for now_ms in replay:
            agent.end_window(now_ms)
        assert agent.windows == 8 and agent.reporter.levels[-1] == ALARM
        assert agent.errors == 9 and repr(error) == agent.last_error and "side" in agent.lacks


def test_no_peer_becomes_known_while_any_channel_is_changed_and_steady():
    class Peers(Replay):
        held = None

        def hold_peers(self, hold):
            self.held = hold

        def dump(self):
            return b""

    replay = Peers(SCHEMA, [QUIET] * 4)
    side = Schema("side", (("a", "1", RATE), ("b", "1", RATE)))
    extra = ((CounterCollector(side, lambda: (1, 1)), EchoModel(side)),)
    more = {"extra": extra, "learn_peers_hours": 0}
    agent = Agent(replay, EchoModel(), publish=publish, reporter=Reporter(), state=State(), **more)
    steady = Verdict(2)
    steady.steady = True
    agent.channels[1].end_window = lambda now_ms: steady
    for now_ms in replay:
        agent.end_window(now_ms)
    assert replay.held is True and set(agent.reporter.levels) == {NORMAL}
    steady.steady = False
    agent.channels[0].end_window = lambda now_ms: steady
    agent.end_window(now_ms)
    assert replay.held is False


def test_a_model_for_another_schema_is_refused():
    other = Schema("other", (("x", "1", RATE), ("y", "1", RATE)))
    try:
        Agent(Replay(other, []), EchoModel(), publish=publish, reporter=Reporter(), state=State())
    except ModelError as error:
        assert "test-agent" in str(error)
    else:
        assert False, "a wrong schema was accepted"


def test_tick_returns_at_once_until_a_window_is_due():
    agent = Agent(Replay(SCHEMA, [QUIET] * 3), EchoModel(), publish=publish, reporter=Reporter(), state=State())
    assert agent.tick() is None
    pumped = agent.reporter.pumps
    assert pumped == 1
    assert agent.tick() is None
    assert agent.reporter.pumps == pumped
    assert agent.due_in_ms > 0


def test_commands_reach_the_heads():
    agent = play([QUIET] * 5 + [LOUD] * 3)
    assert agent.channels[0].scorer.verdict.level == ALARM
    assert agent.reporter.commands.carry_out({1: 1, 2: 100, 3: WAS_NORMAL, 4: [7]}, 50, 5) == (1, 0)
    assert agent.channels[0].scorer.verdict.level == NORMAL
    learned = Agent(Replay(SCHEMA, []), EchoModel(learn_windows=4), publish=publish, reporter=Reporter(), state=State())
    learned.channels[0].scorer.seen = 4
    assert not learned.learning
    assert learned.reporter.commands.carry_out({1: 1, 2: 100, 3: CALIBRATE}, 50, 5) == (1, 0)
    assert learned.learning


def test_a_new_firmware_asks_for_a_new_calibration():
    state = State()
    model = EchoModel(learn_windows=4)
    first = Agent(Replay(SCHEMA, []), model, publish=publish, reporter=Reporter(), state=state, firmware="1")
    replay = Replay(SCHEMA, [QUIET] * 4)
    first.channels[0].collector = replay
    for now_ms in replay:
        first.end_window(now_ms)
    assert not first.learning
    first.close()
    same = Agent(Replay(SCHEMA, []), model, publish=publish, reporter=Reporter(), state=state, firmware="1")
    assert not same.learning
    other = Agent(Replay(SCHEMA, []), model, publish=publish, reporter=Reporter(), state=state, firmware="2")
    assert other.learning


def test_a_broker_out_of_reach_is_told_and_does_not_stop_the_windows():
    def unreachable(topic, payload, qos, retain):
        raise OSError(113)

    agent = Agent(Replay(SCHEMA, []), EchoModel(), publish=unreachable, reporter=Reporter(), state=State())
    agent.tick()
    assert "113" in agent.offline
    assert agent.errors == 0


def test_windows_in_which_the_collector_settles_are_not_scored():
    class Settling(Replay):
        warmup_windows = 3

    replay = Settling(SCHEMA, [LOUD] * 3 + [QUIET] * 5)
    agent = Agent(replay, EchoModel(learn_windows=4), publish=publish, reporter=Reporter(), state=State())
    for now_ms in replay:
        agent.end_window(now_ms)
    assert agent.windows == 5
    assert not agent.learning


class Client:
    """A Transport that notes what it is asked."""

    connected = False

    def __init__(self):
        self.published = []
        self.subscribed = []
        self.polls = 0

    def publish(self, topic, payload, qos, retain):
        self.published.append((topic, payload, qos, retain))

    def subscribe(self, topic, qos):
        self.subscribed.append((topic, qos))

    def poll(self, wait_s):
        self.polls += 1
        raise OSError(111)


def test_connect_does_all_that_a_client_needs():
    agent = play([QUIET] * 2)
    client = agent.connect(Client())
    assert client.will == ("status", b"status", 1, True)
    assert agent.reporter.statuses[-1] == {"online": False}
    assert client.subscribed == [("acks", 1), ("commands", 1)]
    assert client.resend is False and client.on_published is agent.reporter.on_published
    client.on_connect()
    agent.tick()
    assert client.published == [("status", b"status", 1, True)]
    client.on_message("acks", b"x")
    assert agent.reporter.topics == ["acks"]
    agent.poll()
    assert client.polls == 1 and "111" in agent.offline and agent.errors == 0


def test_a_planned_sleep_is_in_one_status_only():
    agent = play([QUIET] * 2)
    agent.connect(Client())
    seen = []
    agent.reporter.status = lambda **facts: seen.append(agent.reporter.more[3]) or b"status"
    assert agent.announce_sleep(3600) and agent.reporter.more[3] is None
    agent.reporter.send_status(agent.publish, agent.status)
    assert seen == [3600, None]


def test_windows_that_were_not_scored_are_counted_by_cause_and_reported():
    class Flaky(Replay):
        warmup_windows = 2
        failing = False

        def read(self, values):
            if self.failing:
                raise CollectorError("no source")
            Replay.read(self, values)

    replay = Flaky(SCHEMA, [QUIET] * 60)
    model = EchoModel()
    agent = Agent(replay, model, publish=publish, reporter=Reporter(), state=State())
    for at, now_ms in enumerate(replay, 1):
        agent._status_due = False
        replay.failing = at in (6, 7)
        model.run = None if at == 10 else lambda x: x
        try:
            agent.end_window(now_ms)
        except TypeError:
            assert at == 10
        if at in (6, 7):
            assert agent._status_due is (at == 6)  # at once, and not each time
    assert agent.unscored[:3] == [1, 3, 2]  # the first window after the gap was too long
    agent._status_due = True
    agent.pump_due_ms = agent.due_ms
    agent.tick()
    assert agent.reporter.statuses[-1]["unscored"] is agent.unscored


def test_a_loop_that_stalls_counts_the_windows_that_it_missed():
    agent = Agent(Replay(SCHEMA, []), EchoModel(), publish=publish, reporter=Reporter(), state=State())
    agent.tick()
    assert agent.unscored == [0, 1, 0, 0]
    agent.due_ms -= 5 * WINDOW_MS + WINDOW_MS // 2
    agent.channels[0].window._last_ms -= 5 * WINDOW_MS + WINDOW_MS // 2
    agent.tick()
    assert agent.unscored[0] in (4, 5)


def test_the_state_keeps_nothing_of_models_and_schemas_that_are_gone():
    state = State()
    for digest in (b"model--1", b"model--2", b"model--3"):  # learning is not over in any of them
        model = EchoModel(learn_windows=4)
        model.digest = digest
        play([QUIET] * 2, state=state, model=model).save()
    state.put(b"peers" + b"schema-x", b"gone")
    play([QUIET] * 2, state=state, model=model).save()
    assert sorted(state.sections) == sorted([b"cal" + SCHEMA.id, b"norm" + SCHEMA.id, b"firmware"])


def test_what_an_agent_is_made_of_can_be_asked_from_outside():
    agent = play([QUIET])
    assert agent.model_name == "echo"
    assert agent.columns == ["a", "b"]
    assert [source[0] for source in agent.sources] == ["replay"]
