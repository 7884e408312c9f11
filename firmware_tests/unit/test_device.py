"""The board's side of the agent: it never stops the firmware, and leaves its own work uncounted."""

from stonechat.board import device as board
from stonechat.board import hooks
from stonechat.compat import ticks_ms
from stonechat.errors import MQTTError, StonechatError
from stonechat.report import Reporter
from test_mqtt import Broker, settle


class Verdict:
    level = 0


class Agent:
    """What tick() does is the test's to say."""

    due_in_ms = 5

    def __init__(self, work=None):
        self.due_ms = self.pump_due_ms = ticks_ms()
        self.work = work
        self.ticks = 0
        self.saved = 0

    def tick(self):
        self.ticks += 1
        return self.work() if self.work else None

    def save(self):
        self.saved += 1
        if self.work:
            self.work()


class Transport:
    def __init__(self, error=None):
        self.error = error
        self.polls = 0

    def poll(self):
        self.polls += 1
        if self.error:
            raise self.error


def raiser(error):
    def work():
        raise error

    return work


def test_no_exception_of_the_agent_reaches_the_firmware():
    fed = []
    for error in (StonechatError("x"), OSError(5), MemoryError(), KeyError("k"), ValueError("bug")):
        watch = board.Watch(Agent(raiser(error)), None, hooks.FirmwareCollector(), lambda: fed.append(1))
        assert watch.tick() is None
        watch.save()
        assert watch.errors == 2
        assert type(error).__name__ in watch.last_error
        assert not watch.counter.quiet
    assert len(fed) == 5


class Wordless(Exception):
    """Its words need more memory than there is."""

    def __repr__(self):
        raise MemoryError

    __str__ = __repr__


def test_an_error_for_whose_words_the_memory_is_too_little_is_counted():
    fed = []
    watch = board.Watch(Agent(raiser(Wordless())), None, hooks.FirmwareCollector(), lambda: fed.append(1))
    assert watch.tick() is None
    watch.save()
    assert watch.errors == 2 and len(fed) == 1 and not watch.counter.quiet


def test_a_lost_broker_does_not_keep_the_window_from_being_scored():
    verdict = Verdict()
    watch = board.Watch(Agent(lambda: verdict), Transport(MQTTError("closed")), hooks.FirmwareCollector())
    assert watch.tick() is verdict
    assert watch.agent.ticks == watch.transport.polls == 1
    assert watch.errors == 1 and "closed" in watch.last_error


def test_the_agents_own_work_is_not_counted():
    counter = hooks.FirmwareCollector()

    def work():
        counter.add(13, 1000)
        counter.meet(("10.0.0.1", 80))

    watch = board.Watch(Agent(work), None, counter)
    counter.beat(0)  # a turn of the loop before: it has looked at the free heap
    before = list(counter.counts)
    watch.tick()
    assert list(counter.counts) == before and counter.counts[13] == 0 and not counter._peers


def test_a_timer_may_call_it_and_the_loop_is_timed():
    watch = board.Watch(Agent(), None, hooks.FirmwareCollector())
    watch.tick("a timer")
    watch.tick("a timer")
    assert watch.counter._lag_ms >= 0 and watch.counter._beat_ms is not None


def test_run_ticks_under_asyncio():
    import asyncio

    watch = board.Watch(Agent(), None, hooks.FirmwareCollector())

    async def some():
        task = asyncio.create_task(watch.run())
        while watch.agent.ticks < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(some())
    assert watch.agent.ticks >= 3


def test_what_the_broker_holds_for_the_full_profile_does_not_end_the_cores_connections():
    agent = Agent()
    agent.reporter = Reporter("sensor-" * 9 + "7", bytes(32), prefix="stonechat/1/fleet")
    agent.connect = lambda client: client
    broker = Broker()
    try:
        watch = board.begin(
            lambda counter: agent,
            "sensor-" * 9 + "7",
            bytes(32),
            "127.0.0.1",
            broker.port,
            None,
            None,
            None,
            60,
            None,
        )
        client = watch.transport
        broker.welcome(client)
        body = bytes(200)
        topic = (agent.reporter.topic + "command").encode()
        length = 4 + len(topic) + len(body)
        broker.send(bytes((0x32, length & 127 | 128, length >> 7, 0, len(topic))) + topic + b"\x00\x09" + body)
        settle(client, lambda: not client.oversize)
        assert broker.read(4) == b"\x40\x02\x00\x09"
        client.close()
    finally:
        hooks.remove()
        broker.close()
