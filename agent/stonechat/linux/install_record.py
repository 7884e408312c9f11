"""The record of what install made, in a file; uninstall takes nothing else back."""

import hashlib
import json
import os

from ..errors import ConfigError
from . import bundle
from .tree import Tree
from .unit import ETC, UNIT

STATE = "/var/lib/stonechat"
RECORD = ETC + "/installed.json"
PATHS = [ETC + "/" + name for name in bundle.FILES] + [UNIT]  # the only files that are ever written or removed


class Record:
    """What install made: read back by the next install and by uninstall."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        data = tree.read(RECORD)
        self.there = data is not None
        self.user = self.group = False  # made by install?
        self.folders: list = []
        self.files: dict = {}  # path: SHA-256 of what was written
        if data is None:
            return
        try:
            found = json.loads(data)
            self.user, self.group = bool(found["user"]), bool(found["group"])
            self.folders = [path for path in (ETC, STATE) if path in list(found["folders"])]
            self.files = {path: str(digest) for path, digest in found["files"].items() if path in PATHS}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError("%s is damaged; remove by hand: %s" % (RECORD, ", ".join([*PATHS, STATE])))

    def save(self) -> None:
        facts = {"user": self.user, "group": self.group, "folders": sorted(self.folders), "files": self.files}
        self._tree.write(
            RECORD, (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode(), 0o600, os.geteuid(), os.getegid()
        )

    def remove(self) -> None:
        if self._tree.stat(RECORD) is not None:
            self._tree.remove(RECORD)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
