"""One recorded trace through the whole agent, on any runtime: parity.py MODEL TRACE.csv

Prints a digest of all verdicts and one of all reports, byte for byte; every runtime must print the same two.
"""

import sys

from stonechat import delivery as delivery_room
from stonechat import loop as loop_room
from stonechat import report as report_room
from stonechat.agent import Agent
from stonechat.board.schema import MICROPYTHON_1
from stonechat.compat import sha256
from stonechat.delivery import Delivery
from stonechat.model import load_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.replay import Replay
from stonechat.state import State

NOW_S = 1_800_000_000


def rows(path):
    """(elapsed_ms, deltas) of each window of a trace in CSV."""
    with open(path) as file:
        for line in file:
            if line[0] == "#" or line[0] == "t":
                continue
            words = line.strip().split(",")
            yield int(words[1]), [int(word) for word in words[3:]]


def main(arguments):
    model, trace = arguments
    for room in (report_room, delivery_room):
        setattr(room, "epoch_s", lambda: NOW_S)  # noqa: B010
    reports = sha256()
    verdicts = sha256()
    told = [0, 0, 0]  # windows, alarms, reports

    def publish(topic, payload, qos, retain):
        told[2] += 1
        reports.update(topic.encode() + bytes(payload))

    def judged(verdict, agent):
        told[0] += 1
        told[1] += verdict.changed and verdict.level == 2
        facts = (verdict.score_q8, verdict.surprise_q8, verdict.evidence_q8, verdict.level, verdict.learning)
        verdicts.update(repr((facts, verdict.explain(3))).encode())

    with open(model, "rb") as file:
        data = file.read()
    state = State()
    outbox = MemoryOutbox(4096)
    outbox.stream = b"same"  # on every runtime
    reporter = Delivery("sensor-7", bytes(range(32)), outbox, state=state, heartbeat_windows=5, bytes_per_day=0)
    replay = Replay(MICROPYTHON_1, rows(trace))
    agent = Agent(replay, load_model(data), publish=publish, reporter=reporter, state=state, on_verdict=judged)
    clock = [0]
    setattr(loop_room, "ticks_ms", lambda: clock[0])  # noqa: B010
    for now_ms in replay:
        clock[0] = now_ms
        agent.end_window(now_ms)
        reporter.pump(publish, now_ms)
    publish("status", agent.status(), 1, True)
    print("windows %d alarms %d reports %d errors %d" % (told[0], told[1], told[2], agent.errors))
    print("verdicts", "".join(["%02x" % byte for byte in verdicts.digest()]))
    print("reports", "".join(["%02x" % byte for byte in reports.digest()]))


if __name__ == "__main__":
    main(sys.argv[1:])
