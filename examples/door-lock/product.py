"""A simulated door lock of a household: it counts openings, wrong codes and how long the door is open."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from simulated import Product, main
from stonechat.features import LEVEL, RATE

# Openings an hour, by the hour of the day: asleep, off to school and work, some at noon, home again.
USUAL = (0.02,) * 6 + (0.6, 3.0, 2.5, 0.6, 0.4, 0.5, 1.0, 0.8, 0.6, 1.5, 2.0, 2.5, 2.0, 1.2, 1.0, 0.8, 0.5, 0.1)


class DoorLock(Product):
    """A simulated door lock."""

    SCHEMA = "door-lock-1"
    WINDOW_S = 1800
    COUNTERS = (
        ("openings", "openings", RATE),
        ("wrong_codes", "attempts", RATE),
        ("remote_openings", "openings", RATE),
        ("night_openings", "openings", RATE),
        ("open_time", "s", RATE),
        ("bolt_time", "ms", LEVEL),  # that the motor took for its last turn
    )
    SCENARIOS = {
        "visitors": (17, 5, False, "a birthday: the door opens four times as often"),
        "guessing": (10, 4, True, "somebody tries a code every minute"),
        "stolen_phone": (1, 3, True, "the door is opened by app at night, again and again"),
    }

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.openings = self.wrong_codes = self.remote = self.night = self.open_s = 0
        self.motor_ms = self.dice.gauss(420, 10)  # this lock's own
        self.bolt_ms = self.motor_ms
        self.visitors = False

    def begin_day(self):
        """Now and then there are visitors."""
        self.visitors = self.dice.random() < 0.15

    def minute(self, hour, what):
        busy = what == "visitors" or self.visitors and 17 <= hour < 22
        rate = USUAL[hour] * (4 if busy else 1) / 60
        if self.dice.random() < rate:
            while self.dice.random() < 0.06:
                self.wrong_codes += 1  # a slip of the finger
            self.open(hour, by_app=self.dice.random() < 0.15)
        if what == "guessing":
            self.wrong_codes += 1
        if what == "stolen_phone" and self.dice.random() < 0.2:
            self.open(hour, by_app=True)

    def open(self, hour, by_app):
        self.openings += 1
        self.remote += by_app
        self.night += hour < 6
        self.open_s += self.dice.randrange(4, 40)
        self.bolt_ms = self.dice.gauss(self.motor_ms, 12)

    def read(self):
        return self.openings, self.wrong_codes, self.remote, self.night, self.open_s, round(self.bolt_ms)


if __name__ == "__main__":
    sys.exit(main(DoorLock))
