"""Files below a root folder, read and written without following any link: for what root does in folders of others."""

import errno
import os
import shutil
import stat

from ..errors import ConfigError

MAX_READ_BYTES = 1 << 20


class Tree:
    """Files below a folder (`/` but for images and tests), each reached without following any link."""

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError("--root %s: %s" % (root, error.strerror))

    def folder(self, path: str, make: "tuple[int, int, int] | None" = None) -> int:
        """An open descriptor of the folder; the last part is made, with (mode, user id, group id), where `make` is
        given. Raises OSError, ConfigError where a part is a link."""
        fd = os.dup(self._fd)
        parts = [part for part in path.split("/") if part]
        for i, part in enumerate(parts):
            try:
                try:
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                except FileNotFoundError:
                    if make is None or i < len(parts) - 1:
                        raise
                    os.mkdir(part, 0o700, dir_fd=fd)
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                    os.fchown(below, make[1], make[2])
                    os.fchmod(below, make[0])
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise ConfigError("/%s is a link or no folder; links are not followed" % "/".join(parts[: i + 1]))
                raise
            finally:
                os.close(fd)
            fd = below
        return fd

    def stat(self, path: str) -> "os.stat_result | None":
        """Of a file, folder or link itself; None where there is nothing."""
        try:
            fd = self.folder(os.path.dirname(path))
        except FileNotFoundError:
            return None
        try:
            return os.stat(os.path.basename(path), dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        finally:
            os.close(fd)

    def is_empty(self, path: str) -> bool:
        fd = self.folder(path)
        try:
            return not os.listdir(fd)
        finally:
            os.close(fd)

    def read(self, path: str) -> "bytes | None":
        """A regular file's bytes, None where there is nothing. Raises ConfigError for anything else."""
        found = self.stat(path)
        if found is None:
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_READ_BYTES:
            raise ConfigError("%s is not a regular file of at most %d bytes; move it away" % (path, MAX_READ_BYTES))
        folder = self.folder(os.path.dirname(path))
        try:
            fd = os.open(os.path.basename(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
        with open(fd, "rb") as file:
            return file.read(MAX_READ_BYTES + 1)

    def write(self, path: str, data: bytes, mode: int, user_id: int, group_id: int) -> None:
        """Replaces the file in one step; it never exists with a wider mode, another owner or half of its bytes."""
        folder = self.folder(os.path.dirname(path))
        name = os.path.basename(path)
        new = name + ".new"
        try:
            try:
                os.unlink(new, dir_fd=folder)
            except FileNotFoundError:
                pass
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
            with open(fd, "wb") as file:
                file.write(data)
                os.fchown(fd, user_id, group_id)
                os.fchmod(fd, mode)
                file.flush()
                os.fsync(fd)
            os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, path: str) -> None:
        folder = self.folder(os.path.dirname(path))
        try:
            os.unlink(os.path.basename(path), dir_fd=folder)
        finally:
            os.close(folder)

    def remove_folder(self, path: str, all_of_it: bool = False) -> bool:
        """-> is it gone? One that is not empty stays unless `all_of_it`."""
        folder = self.folder(os.path.dirname(path))
        try:
            if all_of_it:
                shutil.rmtree(os.path.basename(path), dir_fd=folder)  # follows no link (shutil's documentation)
            else:
                os.rmdir(os.path.basename(path), dir_fd=folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            return False
        finally:
            os.close(folder)
        return True
