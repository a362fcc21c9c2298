"""What has come of the rows of a list, one line each in ``manifest.jsonl``, and who is at work on which of them.

A row is known by a key: a hash of what it asks for. A picture belongs to the row that was the last to write it: one
that another row has drawn over is done no more. A line is appended whole and settled on disk before the next row
begins. A process claims a row by a lock that the system takes back when the process ends, however it ends: nothing has
to be cleaned up after one that was killed.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME, LOCKS = "manifest.jsonl", ".manifest.lock"
DONE = "done"
AT_WORK, APPENDING, ROWS = 0, 1, 2  # bytes of the lock file; those from ROWS on stand for keys


class Told:
    """What lines tell of rows, and in the end of each."""

    def __init__(self, data: bytes = b"") -> None:
        self._lines = dict[str, dict[str, Any]]()
        self._owners = dict[str, str]()  # file -> the row that it is the picture of
        self.add(data)

    def add(self, data: bytes) -> set[str]:
        """Read on, and say of which rows."""
        news = list(_lines(data))
        for line in news:
            self._lines[line["key"]] = line
            self._owners |= dict.fromkeys(_files(line), line["key"])
        return {line["key"] for line in news}

    def line_of(self, key: str) -> dict[str, Any] | None:
        """The last that was told of a row."""
        return self._lines.get(key)

    def is_done(self, key: str) -> bool:
        """Whether a row has pictures that are still there, and still its own."""
        line = self.line_of(key)
        return (
            line is not None
            and line["status"] == DONE
            and all(self._owners[file] == key and Path(file).is_file() for file in _files(line))
        )

    def done(self) -> set[str]:
        """The rows that are."""
        return {key for key in self._lines if self.is_done(key)}


class Manifest:
    """The manifest of a folder, for one call. Several processes may work on the same list at once.

    Without ``resume`` only what was done since this call began counts. A process that finds others at work joins them.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._locks = os.open(folder / LOCKS, os.O_RDWR | os.O_CREAT, 0o666)
        self._read = self._begin()
        self._told = Told(os.pread(self._file, self._read, 0) if resume else b"")
        self._fresh = set[str]()

    def close(self) -> None:
        """Leave the list to others."""
        os.close(self._locks)
        os.close(self._file)

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line_of(self, key: str) -> dict[str, Any] | None:
        """The last that was told of a row."""
        self._read_on()
        return self._told.line_of(key)

    def is_done(self, key: str) -> bool:
        """Whether a row has its pictures, whoever drew them."""
        self._read_on()
        return self._told.is_done(key)

    def is_settled(self, key: str) -> bool:
        """Whether a row has come to an end, whoever drew or refused it; one that failed before this call may yet be."""
        line = self.line_of(key)
        return self.is_done(key) or key in self._fresh or (line is not None and line["status"] == "refused")

    def wait(self) -> None:
        """Until nobody else is at work."""
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, AT_WORK)
        self._lock(AT_WORK, wait=True)

    @contextmanager
    def claim(self, key: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether the row is ours to draw: nobody has done it, and nobody is at it. ``wait`` until nobody is."""
        byte = ROWS + int(key[:12], 16)
        if not self._lock(byte, wait=wait):
            yield False
            return
        try:
            yield not self.is_done(key)
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, byte)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write what has come of a row, whole or not at all; a line that was torn before stays apart from it."""
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        self._lock(APPENDING, wait=True)
        try:
            end = os.fstat(self._file).st_size
            torn = end > 0 and os.pread(self._file, 1, end - 1) != b"\n"
            data = b"\n" * torn + data
            if os.write(self._file, data) != len(data):
                raise OSError("the manifest cannot be written: is the disk full?")
            os.fsync(self._file)
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, APPENDING)

    def _begin(self) -> int:
        """Where the lines of this call begin: of one process, or of all that are at work or were launched together."""
        alone, launch, rank = self._lock(AT_WORK), _launch(), os.environ.get("RANK", "0")
        if not alone:
            fcntl.lockf(self._locks, fcntl.LOCK_SH, 1, AT_WORK)
        self._lock(APPENDING, wait=True)
        size, told = os.fstat(self._file).st_size, self._left()
        began, ranks = told.get("began", size), told.get("ranks", [])
        if alone and (not launch or told.get("launch") != launch or rank in ranks or began > size):
            began, ranks = size, []
        text = json.dumps({"began": began, "launch": launch, "ranks": [*ranks, rank]}).encode()
        os.ftruncate(self._locks, len(text))
        os.pwrite(self._locks, text, 0)
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, APPENDING)
        if alone:
            fcntl.lockf(self._locks, fcntl.LOCK_SH, 1, AT_WORK)
        return int(began)

    def _left(self) -> dict[str, Any]:
        """What those that began before us have left in the file of locks."""
        with suppress(ValueError):
            found = json.loads(os.pread(self._locks, os.fstat(self._locks).st_size, 0))
            if isinstance(found, dict):
                return found
        return {}

    def _lock(self, byte: int, *, wait: bool = False) -> bool:
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):  # somebody has it; which of the two is said depends on the system
            return False
        return True

    def _read_on(self) -> None:
        """Take in what was not yet read, as far as its lines are whole."""
        data = os.pread(self._file, max(0, os.fstat(self._file).st_size - self._read), self._read)
        whole = data.rfind(b"\n") + 1
        self._read += whole
        self._fresh |= self._told.add(data[:whole])


def _launch() -> str:
    """What the processes of one launcher have in common, and no other has; nothing where there is none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    import psutil

    return f"{os.getppid()} {psutil.Process(os.getppid()).create_time()}"


def finished(folder: Path) -> set[str]:
    """The keys of the rows that a folder holds as done; nothing is written."""
    file = folder / NAME
    return Told(file.read_bytes()).done() if file.is_file() else set()


def _files(line: Mapping[str, Any]) -> list[str]:
    """The pictures of a row that is done, each under one name however it was written."""
    return [os.path.abspath(one["path"]) for one in line["images"]] if line["status"] == DONE else []


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    """Those that tell of a row; one that was torn, by a power cut or a full disk, or damaged, tells nothing."""
    for text in data.split(b"\n"):
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if _is_whole(line):
                yield line


def _is_whole(line: Any) -> bool:
    """Whether a line has what is read of it."""
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in ("key", "status")):
        return False
    images, withheld = (line.get(name, []) for name in ("images", "withheld"))
    return (
        isinstance(images, list)
        and isinstance(withheld, list)
        and all(isinstance(one, dict) and isinstance(one.get("path"), str) for one in images)
        and (line["status"] != DONE or "images" in line)
    )
