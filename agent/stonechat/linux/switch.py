"""The user's own switch: while a file is there, monitoring is off.

The file must be one that neither the agent's account nor an ordinary user can make: it and its folder belong to root,
no link leads there, and nobody else may write to any of them. Anything else is no switch, and monitoring goes on.
"""

import os
import stat


class Switch:
    """section: [monitoring] of the configuration. `trouble`: why a file that is there does not count."""

    def __init__(self, section: dict) -> None:
        self._on = section["on"]
        self._path = section["off_file"]
        self.trouble = ""

    @property
    def reason(self) -> str:
        """For the log, while monitoring is off."""
        return "[monitoring] on = false" if not self._on else self._path + " is there"

    def off(self) -> bool:
        """Whether the user has switched monitoring off, as it is now."""
        self.trouble = ""
        if not self._on:
            return True
        if not self._path:
            return False
        try:
            os.lstat(self._path)
        except PermissionError:
            self.trouble = "%s can't be looked for: the agent's user may not enter its folder" % self._path
            return False
        except OSError:
            return False
        self.trouble = distrust(self._path)
        return not self.trouble


def distrust(path: str) -> str:
    """Why somebody else than root could have made the file at an absolute `path`; "" where nobody could."""
    part = ""
    words = [word for word in path.split("/") if word]
    for place in range(len(words) + 1):
        part = "/" + "/".join(words[:place])
        try:
            found = os.lstat(part)
        except OSError as error:
            return "%s: %s" % (part, error.strerror)
        is_last = place == len(words)
        if stat.S_ISLNK(found.st_mode):
            return part + " is a link"
        if not (stat.S_ISREG if is_last else stat.S_ISDIR)(found.st_mode):
            return part + (" is not a file" if is_last else " is not a folder")
        if found.st_uid:
            return "%s belongs to user %d, not to root" % (part, found.st_uid)
        # in a sticky folder further up, others can make names, but not replace this one
        sticky = place < len(words) - 1 and found.st_mode & stat.S_ISVTX
        if found.st_mode & 0o022 and not sticky:
            return "%s can be written by others (mode %03o)" % (part, found.st_mode & 0o777)
    return ""
