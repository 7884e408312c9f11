"""A simulated camera: it counts frames, motion and what it uploads."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from simulated import Product, main
from stonechat.features import RATE

FRAMES = 15 * 60  # a minute
CLIP_KIB = (400, 900)
STREAM_KIB = 5_000  # a minute, while somebody looks
# Motion events an hour, by the hour of the day.
MOTION = (0.2,) * 6 + (2, 5, 6, 3, 2, 3, 4, 3, 3, 4, 5, 6, 5, 4, 3, 2, 1, 0.5)


class Camera(Product):
    """A simulated camera at a front door."""

    SCHEMA = "camera-1"
    COUNTERS = (
        ("frames", "frames", RATE),
        ("same_frames", "frames", RATE),  # equal to the frame before, bit for bit
        ("motion", "events", RATE),
        ("uploads", "uploads", RATE),
        ("clip_kib", "KiB", RATE),
        ("stream_kib", "KiB", RATE),
        ("viewed", "s", RATE),  # while the owner looked, by the login
    )
    SCENARIOS = {
        "storm": (8, 10, False, "a stormy day: branches move, clip after clip is uploaded"),
        "hidden_stream": (2, 2, True, "the picture goes to somebody who does not count as a viewer"),
        "frozen_picture": (22, 1, True, "an intruder replays one frame, so that nothing moves"),
    }

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.frames = self.same = self.motion = self.uploads = self.clip_kib = self.stream_kib = self.viewed_s = 0
        self.wind = 1.0
        self.look_minutes = 0

    def begin_day(self):
        """One day in three is windy."""
        self.wind = self.dice.uniform(2, 8) if self.dice.random() < 0.35 else 1.0

    def minute(self, hour, what):
        wind = 8.0 if what == "storm" else self.wind
        self.frames += FRAMES - self.dice.randrange(4)
        self.same += self.dice.random() < 0.05
        if what == "frozen_picture":
            self.same += FRAMES - 1
        elif self.dice.random() < min(0.9, MOTION[hour] * wind / 60):
            self.motion += 1
            self.upload(self.dice.randrange(*CLIP_KIB))
        if self.dice.random() < 0.1:
            self.upload(4)  # a sign of life
        if self.look_minutes == 0 and 7 <= hour < 23 and self.dice.random() < 5 / (16 * 60):
            self.look_minutes = self.dice.randrange(2, 8)  # the owner looks, five times a day
        if self.look_minutes:
            self.look_minutes -= 1
            self.viewed_s += 60
            self.stream_kib += self.dice.randrange(STREAM_KIB * 9 // 10, STREAM_KIB)
        if what == "hidden_stream":
            self.stream_kib += self.dice.randrange(STREAM_KIB * 9 // 10, STREAM_KIB)

    def upload(self, kib):
        self.uploads += 1
        self.clip_kib += kib

    def read(self):
        return self.frames, self.same, self.motion, self.uploads, self.clip_kib, self.stream_kib, self.viewed_s


if __name__ == "__main__":
    sys.exit(main(Camera))
