"""What an operator says of devices: a name to show, class, site, tags, and which are removed. In the database.

The judgements of the fleet (causes.py, sense.py) group by site and class. Whoever changes something counts up CHANGED,
which a running collector looks at.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .causes import Label
from .store import Store

KIND = "label"
CHANGED = "changed"
MAX_TEXT = 64
MAX_TAGS = 16


@dataclass(frozen=True, slots=True)
class Labels:
    """name: to be shown; removed_s: since when the device is hidden, until it reports again."""

    name: str = ""
    group: str = ""  # its class
    site: str = ""
    tags: tuple[str, ...] = ()
    removed_s: float | None = None

    @property
    def all(self) -> tuple[Label, ...]:
        found: list[Label] = []
        if self.site:
            found.append(("site", self.site))
        if self.group:
            found.append(("class", self.group))
        return (*found, *[("tag", tag) for tag in self.tags])

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "Labels":
        known = {name: saved[name] for name in cls.__dataclass_fields__ if name in saved}
        tags = tuple(str(tag) for tag in saved.get("tags", ()))
        made = cls(**known | {"tags": tags})
        texts = (made.name, made.group, made.site)
        if not all(isinstance(text, str) for text in texts) or not isinstance(made.removed_s, float | int | None):
            raise TypeError("labels are texts")
        return made


NONE = Labels()
Found = TypeVar("Found")


def readable(load: Callable[..., Found], *values: Any) -> Found | None:
    """load(*values); None for a note that somebody else wrote: a newer version, or a hand. One such note must not keep
    the others from being read."""
    try:
        return load(*values)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        return None


def read(store: Store) -> dict[str, Labels]:
    """By device."""
    found = {name: readable(Labels.load, value) for name, value in store.notes(KIND).items()}
    return {name: value for name, value in found.items() if value is not None}


class Known:
    """The labels of all devices, read again where somebody has changed one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed: Any = None
        self._labels: dict[str, Labels] = {}

    def __call__(self) -> dict[str, Labels]:
        changed = self._store.notes(CHANGED)
        if changed != self._changed:
            self._changed, self._labels = changed, read(self._store)
        return self._labels


def write(store: Store, labels: dict[str, Labels]) -> None:
    store.note(KIND, {name: None if value == NONE else asdict(value) for name, value in labels.items()})
    touch(store)


def touch(store: Store) -> None:
    """Let a running collector look at labels, silences and requests."""
    store.note(CHANGED, {"at": time.time_ns()})


def checked(text: str, what: str) -> str:
    """A text that a table and a page may show. Raises ValueError with the fix."""
    if not text.isprintable() or len(text) > MAX_TEXT or "=" in text or "," in text:
        raise ValueError(f"{what} {text[:70]!r}: at most {MAX_TEXT} printable characters, without = and ,")
    return text


def changed_tags(tags: Iterable[str], add: Iterable[str], drop: Iterable[str]) -> tuple[str, ...]:
    """Raises ValueError."""
    found = sorted((set(tags) | {checked(tag, "tag") for tag in add}) - set(drop))
    if len(found) > MAX_TAGS:
        raise ValueError(f"{len(found)} tags: at most {MAX_TAGS} for one device")
    return tuple(found)
