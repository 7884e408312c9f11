"""A simulated voice assistant: it counts wake words, intents, and commands that sound exactly like an earlier one."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from simulated import Product, main
from stonechat.features import RATE, SHARE

# Commands an hour, by the hour of the day.
USUAL = (0.05,) * 6 + (3, 5, 3, 1, 1, 1, 3, 1, 1, 2, 3, 5, 6, 6, 5, 4, 2, 0.5)


class Assistant(Product):
    """A simulated voice assistant of a household."""

    SCHEMA = "voice-assistant-1"
    COUNTERS = (
        ("wake_words", "words", RATE),
        ("intents", "intents", RATE),
        ("failed", "intents", RATE),  # heard, and not understood
        ("replays", "commands", RATE),  # with the sound of an earlier one, to the sample: no human does that
        ("orders", "orders", RATE),  # doors, purchases: what costs something
        ("muted", "%", SHARE),
    )
    SCENARIOS = {
        "party": (18, 5, False, "guests: four times as many commands, many not understood"),
        "replayed_commands": (13, 1, True, "a recording of the owner is played through the window"),
        "silent_commands": (3, 2, True, "commands by ultrasound: intents without a wake word"),
    }

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.wake = self.intents = self.failed = self.replays = self.orders = 0
        self.muted = 0.0
        self.guests = False

    def begin_day(self):
        """Now and then there are guests."""
        self.guests = self.dice.random() < 0.2

    def minute(self, hour, what):
        party = what == "party" or self.guests and 18 <= hour < 23
        if self.dice.random() < min(0.9, USUAL[hour] * (4 if party else 1) / 60):
            self.command(failing=0.3 if party else 0.12)
        if self.dice.random() < 0.01:
            self.wake += 1  # the television said something like it
        if what == "replayed_commands" and self.dice.random() < 0.5:
            self.command(failing=0.05)
            self.replays += 1
            self.orders += self.dice.random() < 0.3
        if what == "silent_commands" and self.dice.random() < 0.4:
            self.intents += 1
            self.orders += self.dice.random() < 0.3
        self.muted += 0.02 * ((60.0 if hour < 6 else 5.0) - self.muted)

    def command(self, failing):
        self.wake += 1
        if self.dice.random() < failing:
            self.failed += 1
        else:
            self.intents += 1
            self.orders += self.dice.random() < 0.04

    def read(self):
        return self.wake, self.intents, self.failed, self.replays, self.orders, self.muted


if __name__ == "__main__":
    sys.exit(main(Assistant))
