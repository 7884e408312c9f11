"""How a model is fitted: the keys of a recipe's [fit] and the options of `stonechat train`."""

from dataclasses import dataclass, fields
from typing import Any

from stonechat.errors import ConfigError

from ..console import clipped

FRACTIONS = {"fit": 0.6, "table": 0.2, "held-out": 0.2}  # of each device's benign windows, in the order of time
FIT_WINDOWS = 100  # that the network must be fitted to
TABLE_WINDOWS = 50  # that the calibration table must be made from
LEAST_WINDOWS = 250  # benign windows in all: then each part has its own
WINDOWS_A_LEARNED_ONE = 5  # a device learns in its table part, a fifth of its recording
LATER_WINDOWS = 200  # beyond its learning that calibrate needs of a later recording
QUANTIZE_WINDOWS = 300
_MOST_JITTER = 100
_MOST_DEVIATIONS = 8
_MOST_EVIDENCE = 1000
_LONGEST_NAME = 200


def check_name(name: str, where: str) -> str:
    """The name that a model carries. Raises ConfigError."""
    if not name.isprintable() or not name.strip() or len(name) > _LONGEST_NAME:
        raise ConfigError(f"{where} {clipped(name)}: a model's name is 1 to {_LONGEST_NAME} printable characters")
    return name


@dataclass(frozen=True)
class Options:
    """How a model is fitted; the keys of a recipe's [fit] and of `stonechat train`.

    seeds: how many draws of the jitter (or of the weights) are tried. units: latents in the bottleneck, 0 tries
    several. network: of fit.fit. learn_windows: what a fresh device learns before it may alarm (even). trim: the share
    of 20-window blocks left out as contaminated. jitter_octaves, jitter_percent: noise added to counts and levels, and
    to shares, while fitting: the tolerance for what varies more elsewhere than in the recording.
    jitter_of: the same for single features, {name = size}.
    latent_range: a latent saturates this many deviations from its centre (0: as fitted, 8), so that what goes further
    than benign windows do along a benign direction is not rebuilt. leave_out: conditions such as "cpu_busy > 75"
    (shares in percent); windows that meet one are not used. busy: the same, but of such windows, in which something
    else than the device kept the machine busy, only the machine_columns are replaced, by those of a random window of
    the same device in which it was not. centre_devices: move each device's windows so that its median is that of the
    class, as the device's own learning will; deviations are then those within a device, not those between them.
    budget: false alarms allowed, COUNT/DAYSd. alarm rules: (allowance, cap, threshold) each, instead of those that the
    budget picks. own_model: whether a device may train a model of its own beside this one."""

    seeds: int = 5
    units: int = 0
    network: str = "linear"
    learn_windows: int = 128
    trim: float = 0.0
    jitter_octaves: float = 0.0
    jitter_percent: float = 0.0
    jitter_of: tuple[tuple[str, float], ...] = ()
    latent_range: float = 0.0
    leave_out: tuple[str, ...] = ()
    busy: tuple[str, ...] = ()
    machine_columns: tuple[str, ...] = ()
    centre_devices: bool = False
    budget: str = "1/30d"
    alarm_rules: tuple[tuple[float, float, float], ...] = ()
    backend: str = "numpy"
    own_model: bool = True

    @property
    def jitters(self) -> bool:
        return bool(self.jitter_octaves or self.jitter_percent or self.jitter_of)

    @classmethod
    def of(cls, table: dict[str, Any], where: str) -> "Options":
        """A recipe's [fit] -> Options. Raises ConfigError."""
        known = {one.name: one for one in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r} (there are {', '.join(known)})")
            kind = type(known[key].default)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            try:
                if key == "alarm_rules" and isinstance(value, list):
                    value = tuple(tuple(float(number) for number in rule) for rule in value)
                if key == "jitter_of" and isinstance(value, dict):
                    value = tuple((str(name), float(number)) for name, number in sorted(value.items()))
            except (TypeError, ValueError, OverflowError):
                raise ConfigError(f"{where}: {key} is {clipped(value)}, want numbers") from None
            if key in ("leave_out", "busy", "machine_columns") and isinstance(value, list):
                value = tuple(str(word) for word in value)
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ConfigError(f"{where}: {key} is {clipped(value)}, want {kind.__name__}")
            values[key] = value
        options = cls(**values)
        options.check(where)
        return options

    def check(self, where: str) -> None:
        if not 1 <= self.seeds <= 1000 or self.units < 0:
            raise ConfigError(f"{where}: seeds {self.seeds} (1 to 1000), units {self.units} (0 or more)")
        if self.learn_windows % 2 or not 0 <= self.learn_windows <= 4096:
            raise ConfigError(f"{where}: learn_windows {self.learn_windows}: an even number up to 4096")
        jitters = (self.jitter_octaves, self.jitter_percent, *(size for _, size in self.jitter_of))
        if not 0 <= self.trim < 0.5 or not all(0 <= size <= _MOST_JITTER for size in jitters):
            raise ConfigError(f"{where}: trim is from 0 to below 0.5, a jitter from 0 to {_MOST_JITTER}")
        if not 0 <= self.latent_range <= _MOST_DEVIATIONS:
            raise ConfigError(f"{where}: latent_range {self.latent_range:g}: from 0 to {_MOST_DEVIATIONS} deviations")
        if any(len(rule) != 3 or not 0 < rule[0] < rule[1] < rule[2] <= _MOST_EVIDENCE for rule in self.alarm_rules):
            raise ConfigError(
                f"{where}: an alarm rule is (allowance, cap, threshold), each above the one before, none above "
                f"{_MOST_EVIDENCE}"
            )
        if self.backend not in ("numpy", "keras"):
            raise ConfigError(f"{where}: backend {self.backend!r}: numpy or keras")
