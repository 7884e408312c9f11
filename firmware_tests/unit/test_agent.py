from stonechat.agent import Agent
from stonechat.delivery import WAS_NORMAL
from stonechat.detection import ALARM, NORMAL
from stonechat.errors import CollectorError, ModelError
from stonechat.features import RATE
from stonechat.metadata import Metadata
from stonechat.model_file import RESIDUAL
from stonechat.replay import Replay
from stonechat.schema import Schema, pack_normalization
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
    def __init__(self):
        self.levels = []
        self.pumps = 0
        self.status_topic = "status"
        self.commands = []

    def save(self, state):
        pass

    def reconnected(self):
        pass

    def status(self, *facts):
        return b"status"

    def on_message(self, topic, payload):
        return self.commands

    def observe(self, verdict, now_ms):
        self.levels.append(verdict.level)

    def pump(self, publish, now_ms):
        self.pumps += 1


def publish(topic, payload, qos):
    pass


def play(windows, state=None, model=None, on_verdict=None):
    replay = Replay(SCHEMA, windows)
    agent = Agent(
        replay, model or EchoModel(), publish, reporter=Reporter(), state=state or State(), on_verdict=on_verdict
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
    agent = Agent(replay, EchoModel(), publish, reporter=Reporter(), state=State())
    for now_ms in replay:
        replay.failing = now_ms == 3 * WINDOW_MS
        agent.end_window(now_ms)
    assert agent.errors == 1
    assert "no source" in agent.last_error
    # window 3 was not read and window 4 would have covered two: it is dropped, never scored as one
    assert agent.windows == 3
    assert agent.channels[0].window.dropped == 1


def test_a_model_for_another_schema_is_refused():
    other = Schema("other", (("x", "1", RATE), ("y", "1", RATE)))
    try:
        Agent(Replay(other, []), EchoModel(), publish, reporter=Reporter(), state=State())
    except ModelError as error:
        assert "test-agent" in str(error)
    else:
        assert False, "a wrong schema was accepted"


def test_tick_returns_at_once_until_a_window_is_due():
    agent = Agent(Replay(SCHEMA, [QUIET] * 3), EchoModel(), publish, reporter=Reporter(), state=State())
    assert agent.tick() is None
    pumped = agent.reporter.pumps
    assert pumped == 1
    assert agent.tick() is None
    assert agent.reporter.pumps == pumped
    assert agent.due_in_ms > 0


def test_commands_reach_the_heads():
    agent = play([QUIET] * 5 + [LOUD] * 3)
    assert agent.channels[0].scorer.verdict.level == ALARM
    agent.reporter.commands = [(WAS_NORMAL, ())]
    agent.on_message("command", b"")
    assert agent.channels[0].scorer.verdict.level == NORMAL


def test_a_new_firmware_asks_for_a_new_calibration():
    state = State()
    model = EchoModel(learn_windows=4)
    first = Agent(Replay(SCHEMA, []), model, publish, reporter=Reporter(), state=state, firmware="1")
    replay = Replay(SCHEMA, [QUIET] * 4)
    first.channels[0].collector = replay
    for now_ms in replay:
        first.end_window(now_ms)
    assert not first.learning
    first.close()
    same = Agent(Replay(SCHEMA, []), model, publish, reporter=Reporter(), state=state, firmware="1")
    assert not same.learning
    other = Agent(Replay(SCHEMA, []), model, publish, reporter=Reporter(), state=state, firmware="2")
    assert other.learning


def test_a_broker_out_of_reach_is_told_and_does_not_stop_the_windows():
    def unreachable(topic, payload, qos):
        raise OSError(113)

    agent = Agent(Replay(SCHEMA, []), EchoModel(), unreachable, reporter=Reporter(), state=State())
    agent.tick()
    assert "113" in agent.offline
    assert agent.errors == 0


def test_windows_in_which_the_collector_settles_are_not_scored():
    class Settling(Replay):
        warmup_windows = 3

    replay = Settling(SCHEMA, [LOUD] * 3 + [QUIET] * 5)
    agent = Agent(replay, EchoModel(learn_windows=4), publish, reporter=Reporter(), state=State())
    for now_ms in replay:
        agent.end_window(now_ms)
    assert agent.windows == 5
    assert not agent.learning
