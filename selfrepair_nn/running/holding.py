"""A store's locks: two runs never write one store, parts of a run write only what is their own."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from selfrepair_nn.errors import StoreError
from selfrepair_nn.store import explained


class Hold:
    """The locks that a run holds. One whose file was removed, with the directory that it lay in, holds off nobody.

    `alone`: whether nobody else can be writing the store, nor any other part of the run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[tuple[FileLock, os.stat_result]] = []
        self.alone = False

    def take(self, file: Path, wait: bool = False) -> None:
        """Hold a lock. Raises StoreError if somebody else does, unless that one is to be waited for."""
        lock = FileLock(file)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise _busy(self._path) from None
        self._held.append((lock, os.stat(file)))

    def share(self) -> None:
        """Let other parts of the run begin: they write only what is their own."""
        self.alone = False
        _let_go(*self._held.pop(0))

    def close(self) -> None:
        """Let go of all of them."""
        while self._held:
            _let_go(*self._held.pop())

    def require(self) -> None:
        """Raise StoreError if another run may have begun at the store's path, or could."""
        if not self._held:
            raise StoreError(
                f"cannot write in {str(self._path.parent)!r}: a run keeps a lock there, beside its store "
                f"{str(self._path)!r}, which is not finished or not whole. Allow it, or copy the store elsewhere"
            )
        for lock, known in self._held:
            if not _same(lock, known):
                raise StoreError(
                    f"{lock.lock_file!r} was removed while this run was writing {str(self._path)!r}: another run may "
                    "have begun there, so nothing more is written. If none has, the same command resumes this one"
                )


def _busy(path: Path) -> StoreError:
    return StoreError(f"another run is writing {str(path)!r}: wait for it, or choose another --out")


def _same(lock: FileLock, known: os.stat_result) -> bool:
    """Whether a lock's file is still the one that was locked."""
    try:
        return os.path.samestat(known, os.stat(lock.lock_file))
    except OSError:
        return False


def _let_go(lock: FileLock, known: os.stat_result) -> None:
    """Remove a lock's file, then release it. Whoever opened that file meanwhile is told that it is none any more."""
    if _same(lock, known):
        with suppress(OSError):
            os.unlink(lock.lock_file)
    lock.release()


@contextmanager
def only_writer(path: Path, part: tuple[int, int] | None) -> Iterator[Hold]:
    """Hold the store's lock: two runs never write one store.

    A part of a run waits for that lock; it can release it once it writes only what is its own, and holds one of its
    own all along, by which others know of it.
    """
    hold = Hold(path)
    if path.exists() and not os.access(path.parent, os.W_OK):
        yield hold  # a finished store answers all the same; for what is missing there is no room
        return
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            hold.take(_lock_of(path), wait=part is not None)
            hold.alone = not _parts_at_work(path)
            if part:
                hold.take(path.with_name(f".{path.name}.{part[0]}-of-{part[1]}.lock"))
            elif not hold.alone:
                raise _busy(path)
        yield hold
    finally:
        hold.close()


def held(path: Path) -> bool | None:
    """Whether a run, or a part of one, is at work on a store; None where that cannot be told. Nothing is kept from one.

    A lock whose file is gone is held by nobody: a run that has lost its own writes no more.
    """
    files = [file for each in {path, path.resolve()} for file in (_lock_of(each), *_locks_of_parts(each))]
    found = {_is_held(file) for file in files}
    return True if True in found else None if None in found else False


def _is_held(file: Path) -> bool | None:
    """Whether a lock is held: then it cannot be shared, which is tried for an instant."""
    try:
        import fcntl

        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _locks_of_parts(path: Path) -> list[Path]:
    name = rf"\.{re.escape(path.name)}\.\d+-of-\d+\.lock"
    return [each for each in path.parent.iterdir() if re.fullmatch(name, each.name)]


def _parts_at_work(path: Path) -> bool:
    """Whether a part of a run holds its lock; none can begin meanwhile. Locks that nobody holds are removed."""
    found = False
    for each in _locks_of_parts(path):
        found |= not _left_behind(each)
    return found


def _left_behind(file: Path) -> bool:
    """Whether nobody holds a lock; its file is then removed."""
    try:
        lock = FileLock(file)
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _let_go(lock, os.stat(file))
    return True
