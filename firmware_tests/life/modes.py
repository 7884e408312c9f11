"""Does a fresh board with the shipped model stay silent, whatever it has to do? On MicroPython, with virtual time:

    micropython modes.py MODEL PORT WINDOWS SEED MODE

MODE: idle (nothing but the agent), rare (a reading a minute), ordinary (sensor.Firmware), busy (ten times as much), or
roomy (ordinary, on a board with much free heap). It learns, lives WINDOWS windows, is infected,
and prints one line of facts.
"""

import sys

from stonechat_tools.lab.firmware import sensor as fw


class Device(fw.Firmware):
    mode = "ordinary"

    def turn(self):
        if self.mode == "idle" or self.mode == "rare" and self.seconds % 60:
            if self.beat is not None:
                self.beat(self.now_ms)
            if self.infection is not None:
                getattr(self, self.infection)()
            self.seconds += 1
            self.now_ms = self.now_ms + fw.TURN_MS + self.dice.upto(3) & 0x3FFFFFFF
            return
        if self.mode == "busy":
            for _ in range(9):
                self.publish()
            self.fetch()
        fw.Firmware.turn(self)


def main(arguments):
    from stonechat.board import hooks

    counter = hooks.install()
    import socket

    from stonechat.board.schema import COLUMNS
    from stonechat.model import load_model
    from stonechat.scorer import Scorer

    path, port, count, seed, mode = arguments
    counter.secret = b"secret"
    scorer = Scorer(load_model(open(path, "rb")), counter.schema)
    firmware = Device(socket, int(port), int(seed), counter.beat)
    firmware.mode = mode
    left = int(count)
    learned = alarms = highest = unfit = 0
    first = ""
    names = [column[0] for column in COLUMNS]
    heap = names.index("heap_free")
    for elapsed_ms, deltas in fw.windows(firmware, counter, 100000):
        if mode == "roomy":
            deltas[heap] = 24_000 + deltas[heap] // 20
        verdict = scorer.score(deltas, elapsed_ms)
        counter.hold_peers(verdict.level > 0)
        unfit += verdict.unfit
        if verdict.learning:
            learned += 1
            if learned > 1000:
                break
            continue
        left -= 1
        highest = max(highest, verdict.evidence_q8)
        if verdict.level == 2:
            alarms += 1
            if not first:
                first = " ".join(["%s%+d" % (names[i], z // 16) for i, z, _ in verdict.explain(3)])
        if left <= 0:
            break
    firmware.mode = "ordinary" if mode == "busy" else mode
    firmware.infection = "telnet_scan"
    infected = 0
    for elapsed_ms, deltas in fw.windows(firmware, counter, 12):
        infected += 1
        if scorer.score(deltas, elapsed_ms).level == 2:
            break
    print(
        "%s learned %d unfit %d windows %d alarm_windows %d highest %d infected %d %s"
        % (mode, learned, unfit, int(count) - left, alarms, highest, infected, first)
    )
    firmware.close()


if __name__ == "__main__":
    main(sys.argv[1:])
