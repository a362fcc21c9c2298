"""The manifest by itself: what it tells of rows, and how processes share one."""

import json
import os
import subprocess
import sys
import threading

import pytest

from commands import environment
from diffusion import manifest

KEY, OTHER = "ab" * 32, "ac" * 32  # that begin alike


def line(key, status="done", *paths):
    return {"row": 1, "key": key, "status": status, "images": [{"path": str(path)} for path in paths]}


def test_a_manifest_tells_what_has_come_of_a_row_and_to_whom_it_matters(tmp_path):
    file = tmp_path / "x.png"
    file.touch()
    with manifest.Manifest(tmp_path, resume=False) as before:
        for key, status in ((KEY, "failed"), (OTHER, "refused"), ("ad" * 32, "done")):
            before.append(line(key, status, file))
    with manifest.Manifest(tmp_path, resume=True) as book:
        assert [book.is_settled(key) for key in (KEY, OTHER, "ad" * 32)] == [False, True, True]
        book.append(line(KEY, "failed"))
        assert book.is_settled(KEY), "it has failed in this call"
        assert manifest.finished(tmp_path) == {"ad" * 32}
        file.unlink()
        assert not book.is_settled("ad" * 32), "its picture is gone"
        assert manifest.finished(tmp_path) == set()
    with manifest.Manifest(tmp_path, resume=False) as book:
        assert book.line_of(KEY) is None, "what was before this call does not count"


def test_a_picture_is_the_row_s_that_has_written_it_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.png"
    file.touch()
    with manifest.Manifest(tmp_path, resume=False) as before:
        before.append(line(KEY, "done", "a.png"))
        assert before.is_done(KEY)
        before.append(line(OTHER, "done", file))
        assert not before.is_done(KEY), "under another name of the same file"
        assert before.is_done(OTHER)
    assert manifest.finished(tmp_path) == {OTHER}
    with manifest.Manifest(tmp_path, resume=True) as book:
        assert (book.is_done(KEY), book.is_done(OTHER)) == (False, True)
        with book.claim(KEY) as ours:
            assert ours
        book.append(line(KEY, "done", "./a.png"))
        assert (book.is_done(KEY), book.is_done(OTHER)) == (True, False)


DAMAGED = [
    {"key": ["x"], "status": "done", "images": []},
    {"key": KEY, "status": {}},
    {"key": KEY, "status": "done"},
    {"key": KEY, "status": "done", "images": "a.png"},
    {"key": KEY, "status": "done", "images": ["a.png"]},
    {"key": KEY, "status": "done", "images": [{"path": None}]},
    {"key": KEY, "status": "done", "images": [], "withheld": 1},
    {"key": KEY, "status": "failed", "images": None},
]


def test_a_line_that_is_damaged_tells_nothing(tmp_path):
    lines = [json.dumps(one) for one in [line(OTHER, "refused"), *DAMAGED, line(OTHER, "done")]]
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, "[" * 100_000, ""]))
    with manifest.Manifest(tmp_path, resume=True) as book:
        assert book.line_of(KEY) is None
        assert book.is_done(OTHER)
    assert manifest.finished(tmp_path) == {OTHER}


def test_what_is_not_whole_or_is_no_line_of_a_row_is_not_read_yet(tmp_path):
    with manifest.Manifest(tmp_path, resume=True) as book:
        whole = json.dumps(line(KEY, "failed")).encode()
        with (tmp_path / "manifest.jsonl").open("ab", buffering=0) as stream:
            stream.write(b'[1]\n{"key": 1}\n{torn\n' + whole[:20])
            assert book.line_of(KEY) is None
            stream.write(whole[20:] + b"\n")
        assert book.line_of(KEY)["status"] == "failed", "its first half was left for later"


def test_a_line_is_on_disk_before_the_next_row_and_a_full_disk_is_told(tmp_path, monkeypatch):
    settled, write = [], os.write
    monkeypatch.setattr(os, "fsync", settled.append)
    with manifest.Manifest(tmp_path, resume=False) as book:
        book.append(line(KEY, "failed"))
        assert settled == [book._file]
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
        with pytest.raises(OSError, match="is the disk full"):
            book.append(line(OTHER, "failed"))


def test_what_a_dead_process_had_claimed_falls_to_the_others(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from diffusion.manifest import Manifest\n"
        "book = Manifest(Path(sys.argv[1]), resume=False)\n"
        "with book.claim('ab' * 32) as ours:\n"
        "    print(ours, flush=True)\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
    assert other.stdout.readline() == "True\n"
    with manifest.Manifest(tmp_path, resume=False) as book:
        with book.claim("ab" * 32) as ours:
            assert not ours
        with book.claim("cd" * 32) as ours:
            assert ours
        other.kill()
        with book.claim("ab" * 32, wait=True) as ours:
            assert ours
    other.communicate()


OTHERS = """
import fcntl
import sys
from pathlib import Path
from diffusion.manifest import APPENDING, Manifest
book = Manifest(Path(sys.argv[1]), resume=False)
for word in map(str.strip, sys.stdin):
    if word == "claim":
        claim = book.claim("ab" * 32)
        said = claim.__enter__()
    elif word == "free":
        said = claim.__exit__(None, None, None) or None
    elif word == "done":
        said = book.append({"key": "ab" * 32, "status": "done", "images": []})
    elif word == "fail":
        said = book.append({"key": "ac" * 32, "status": "failed"})
    elif word == "try":
        with book.claim("ac" * 32) as said:
            pass
    elif word == "hold":
        said = book._lock(APPENDING)
    elif word == "loose":
        said = fcntl.lockf(book._locks, fcntl.LOCK_UN, 1, APPENDING)
    elif word == "wait":
        said = book.wait() or book.close()  # either of two that wait may be the first
    else:
        said = book._read
    print(said, flush=True)
"""


@pytest.fixture
def another(tmp_path):
    """Another process at work on the list, that does what it is told, and says what comes of it."""
    words = [sys.executable, "-c", OTHERS, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, env=environment(), **pipes)

    def ask(word):
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    yield ask
    process.kill()
    process.communicate()


def test_processes_at_work_share_a_beginning_and_rows_and_wait_for_each_other(another, tmp_path):
    with manifest.Manifest(tmp_path, resume=False) as early:
        early.append(line(OTHER, "failed"))
    (tmp_path / ".manifest.lock").write_text("99999999")  # of a call that has ended
    began = another("began")
    assert another("claim") == "True"
    assert another("fail") == "None"
    with manifest.Manifest(tmp_path, resume=False) as book:
        assert book._read == int(began) == (tmp_path / "manifest.jsonl").read_bytes().find(b"\n") + 1
        with book.claim(KEY) as ours, book.claim(OTHER) as free:
            assert (ours, free) == (False, True)
            assert another("try") == "False"
        assert another("try") == "True"
        assert another("done") == "None"
        assert another("free") == "None"
        with book.claim(KEY) as ours:
            assert not ours, "it is done"
        with book.claim(OTHER) as ours:
            assert ours
        assert another("hold") == "True"
        appending = started(lambda: book.append(line(OTHER, "refused")))
        assert appending.is_alive(), "two lines at once could mix"
        assert another("loose") == "None"
        appending.join()
        waiting = started(book.wait)
        assert waiting.is_alive(), "somebody else is at work"
        answers = []
        other = started(lambda: answers.append(another("wait")))
        waiting.join(60)
        assert not waiting.is_alive(), "who waits is not at work"
    other.join(60)
    assert answers == ["None"]


def started(work):
    """A thread that has had the time to do what nobody hinders."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(0.2)
    return thread
