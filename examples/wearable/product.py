"""A simulated wearable: it counts steps, and measures how its wearer walks (gait) and how fast (step rate)."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from simulated import Product, main
from stonechat.features import LEVEL, RATE, SHARE

# The share of its minutes in which the wearer walks, by the hour of the day.
WALKS = (0.0,) * 7 + (0.25, 0.35, 0.1, 0.1, 0.15, 0.35, 0.15, 0.1, 0.1, 0.15, 0.35, 0.35, 0.2, 0.1, 0.08, 0.05, 0.0)


class Wearable(Product):
    """A simulated wearable."""

    SCHEMA = "wearable-1"
    COUNTERS = (
        ("steps", "steps", RATE),
        ("step_rate", "steps/min", LEVEL),  # of the last walk; so are the next three
        ("step_time", "ms", LEVEL),
        ("step_jitter", "ms", LEVEL),  # how much one step's time differs from the next's
        ("symmetry", "%", SHARE),  # left foot against right
        ("heart_rate", "beats/min", LEVEL),
    )
    SCENARIOS = {
        "hike": (9, 6, False, "a day in the hills: hours of walking"),
        "other_wearer": (8, 12, True, "somebody else wears it"),
        "shaker": (10, 3, True, "a machine shakes it, to earn a bonus for steps"),
    }

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.rate = self.dice.gauss(106, 3)  # this wearer's own gait
        self.even = self.dice.gauss(95.5, 0.5)
        self.jitter = self.dice.gauss(26, 2)
        self.steps = 0
        self.last_rate, self.last_jitter, self.last_even = self.rate, self.jitter, self.even
        self.heart = 60.0
        self.walk_minutes = 0

    def minute(self, hour, what):
        walks = 0.75 if what == "hike" else WALKS[hour]
        if self.walk_minutes == 0 and self.dice.random() < walks / 6:
            self.walk_minutes = self.dice.randrange(2, 12)
        rate, jitter, even, rest = self.rate, self.jitter, self.even, 60
        if what == "other_wearer":
            rate, jitter, even, rest = rate - 16, jitter + 22, even - 6, 74
        if what == "shaker":
            self.walk_minutes = 1
            rate, jitter, even = 132, 1, 99.9
        effort = 0
        if self.walk_minutes:
            self.walk_minutes -= 1
            noise = 0 if what == "shaker" else 1
            self.last_rate = rate + noise * self.dice.gauss(0, 3)
            self.last_jitter = max(1, jitter + noise * self.dice.gauss(0, 3))
            self.last_even = min(100, even + noise * self.dice.gauss(0, 0.8))
            self.steps += round(self.last_rate)
            effort = 0 if what == "shaker" else 38
        self.heart += 0.4 * (rest + effort - self.heart) + self.dice.gauss(0, 1.5)

    def read(self):
        return (
            self.steps,
            round(self.last_rate),
            round(60_000 / self.last_rate),
            round(self.last_jitter),
            self.last_even,
            round(self.heart),
        )


if __name__ == "__main__":
    sys.exit(main(Wearable))
