"""agent/stonechat/steady.py in numpy: what follows an alarm that does not end. Part of device_path.Replay."""

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat import steady
from stonechat.detection import ALARM, NORMAL, WATCH

Ints = npt.NDArray[np.int64]


class SecondReference:
    """replay: the device_path.Replay that it belongs to."""

    def __init__(self, replay: Any) -> None:
        self.stated = max(steady._STATED_LEAST, steady._HOUR_MS // replay.meta.window_ms)
        self.moved: Ints = np.zeros(len(replay.meta), dtype=np.int64)
        self.forget(replay)

    def forget(self, replay: Any) -> None:
        self.age = self.alarmed = self.tries = 0
        self.rows: list[Ints] = []
        self.evidence, self.level = [0] * len(replay.meta.alarm_rules), NORMAL

    def fork(self) -> "SecondReference":
        other = copy.copy(self)
        other.rows, other.evidence = list(self.rows), list(self.evidence)
        return other

    @property
    def steady(self) -> bool:
        return bool(self.age > self.stated)

    def step(self, replay: Any, f_q8: Ints, surprise: int, share: int) -> tuple[int, int, int, int] | None:
        """After the first reference has weighed a window -> (score, surprise, evidence, level) of the second where the
        device is changed and steady, else None: the first one's count."""
        if (share == 0) if self.steady else replay.level < ALARM:
            if self.age or self.tries:
                self.forget(replay)
            return None
        result = None
        if self.age < steady._COLLECT:
            self.rows.append(f_q8)
        else:
            if self.age == steady._COLLECT:
                self._move(replay)
            result = self._score(replay, f_q8, surprise, share)
            if not self.steady and self.level >= WATCH:
                tries = self.tries + 1
                self.forget(replay)
                self.tries = tries
                return None
        self.age += 1
        if not self.steady or result is None:
            return None
        self.alarmed = self.alarmed + 1 if result[2] >= steady._THRESHOLD_Q8 else 0
        if self.alarmed > self.stated:
            self.forget(replay)
            return None
        return result

    def _move(self, replay: Any) -> None:
        rows = np.sort(np.array(self.rows), axis=0)
        moved = rows[len(rows) >> 1] - replay.centre - replay.offset
        far = (np.abs(moved) * replay.inv) >> replay.shift > max(
            steady._LEAST_STEPS, steady._FAR_STEPS - 8 * self.tries
        )
        self.moved = np.where(far, moved, 0)
        self.rows = []

    def _score(self, replay: Any, f_q8: Ints, surprise: int, share: int) -> tuple[int, int, int, int]:
        steps = replay.steps(f_q8 - self.moved)
        score = int(replay.scores(steps[None])[0])
        least = replay.surprise(score)
        if self.steady:
            least = min(surprise, least)
        on_top, self.level = replay.weighed(self.evidence, self.level, least)
        if self.steady and share >= steady._HELD_FROM_Q8:
            replay.follow(steps, on_top)
        return score, least, on_top, self.level
