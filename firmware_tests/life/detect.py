"""Does a fresh board stay quiet while it is well, and say so when it is not? On MicroPython, with virtual time:

    micropython detect.py MODEL PORT WINDOWS SEED

It learns, lives WINDOWS benign windows, then gets each infection in turn, recovering in between. Prints a line a fact.
"""

import sys

from stonechat_tools.lab.firmware import sensor as fw


class Product(fw.Firmware):
    """One that goes on where a call fails, as a product does: a slow line loses an answer, and lwIP's memory is full
    after a burst. It connects to its broker again then; an infection is at it again in the next turn."""

    lost = 0

    def publish(self):
        try:
            fw.Firmware.publish(self)
        except OSError:
            self.lost += 1
            if self._broker is not None:
                self._broker.close()
                self._broker = None

    def infected(self):
        try:
            getattr(self, self.name)()
        except OSError:
            pass

    def infect(self, name):
        self.name = name
        self.infection = name and "infected"


def main(arguments):
    from stonechat.board import hooks

    counter = hooks.install()
    import socket

    from stonechat.board.schema import COLUMNS
    from stonechat.model import load_model
    from stonechat.scorer import Scorer

    path, port, count, seed = arguments
    collector = counter
    collector.secret = b"secret"
    scorer = Scorer(load_model(open(path, "rb")), collector.schema)
    firmware = Product(socket, int(port), int(seed), counter.beat)
    learned = 0
    alarms = 0
    highest = 0
    for elapsed_ms, deltas in fw.windows(firmware, collector, 100000):
        verdict = scorer.score(deltas, elapsed_ms)
        collector.hold_peers(verdict.level > 0)
        if verdict.learning:
            learned += 1
            continue
        count = int(count) - 1
        highest = max(highest, verdict.evidence_q8)
        if verdict.changed and verdict.level == 2:
            alarms += 1
        if count <= 0:
            break
    print("learned %d" % learned)
    print("benign %s alarms %d highest_evidence_q8 %d" % (arguments[2], alarms, highest))
    names = [column[0] for column in COLUMNS]
    for infection in fw.INFECTIONS:
        for elapsed_ms, deltas in fw.windows(firmware, collector, 400):  # recover
            verdict = scorer.score(deltas, elapsed_ms)
            collector.hold_peers(verdict.level > 0)
            if verdict.evidence_q8 == 0 and verdict.level == 0:
                break
        firmware.infect(infection)
        alarm = 0
        for elapsed_ms, deltas in fw.windows(firmware, collector, 12):
            alarm += 1
            verdict = scorer.score(deltas, elapsed_ms)
            collector.hold_peers(verdict.level > 0)
            if verdict.level == 2:
                break
        else:
            alarm = -1
        said = " ".join(["%s=%d" % (names[i], share) for i, _, share in verdict.explain(3)])
        print("infection %s alarm_after %d because %s" % (infection, alarm, said))
        firmware.infect(None)
    print("lost %d" % firmware.lost)
    firmware.close()


if __name__ == "__main__":
    main(sys.argv[1:])
