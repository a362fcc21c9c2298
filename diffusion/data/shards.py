"""WebDataset shards, for sets larger than a disk: read as streams, in an order that is a function like any other.

A batch is filled by ``lanes``, each of which reads whole shards, one after the other. Which shards these are is a
function of (seed, epoch) and not of who reads them: one process reads all lanes, or several read some each. So the
samples of a step do not depend on the number of processes, nothing is read twice, and where a lane stands is two
numbers.
"""

import glob
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion import rng
from diffusion.data.dataset import Batch
from diffusion.data.feed import Share, ahead, write_lines
from diffusion.data.scan import SUFFIXES
from diffusion.data.source import Picture, check_text, lines_of


def find_shards(path: str) -> list[str]:
    """``a-{000..009}.tar`` or ``a-*.tar`` as paths or URLs. ValueError if a local one is not there."""
    if not path.endswith(".tar"):
        raise ValueError(
            f"data.path {path!r}: shards are plain .tar files, uncompressed: pictures are compressed already"
        )
    urls = list(_webdataset().shardlists.expand_urls(path))
    if any("pipe:" in url for url in urls):
        raise ValueError(f"data.path {path!r} would run a command, which a config must not do: give a path or a URL")
    if "://" in path:
        return urls
    found = [file for pattern in urls for file in sorted(glob.glob(pattern)) or [pattern]]
    missing = [file for file in found if not Path(file).is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: no such shard; data.path names tar files in the WebDataset layout")
    return found


def read_shard(url: str, captioned: bool = True) -> Iterator[tuple[str, Picture | str]]:
    """Name and picture of each sample of a shard, or the reason why it is none. OSError names a broken shard.

    A sample needs no caption if it is not ``captioned``.
    """
    try:
        for sample in _webdataset().tarfile_samples([{"url": url}]):
            name = f"{Path(url).name}/{sample['__key__']}"
            try:
                yield name, _picture(name, sample, captioned)
            except ValueError as error:
                yield name, str(error)
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise OSError(f"{url}: cannot be read as a shard ({_why(url, error)})") from None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture, and where its lane stands after it."""

    picture: Picture
    visit: int
    url: str
    lane: int
    turn: int  # shards that the lane has done
    taken: int  # samples that it has read of the next one
    refused: Mapping[str, str]  # what it left out on the way, and why


@dataclass
class Record:
    """What a lane has done so far."""

    turn: int = 0
    taken: int = 0
    seen: Counter[str] = field(default_factory=Counter)  # samples used of each shard
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class ShardFeed:
    """Batches from shards. ``refuse`` says why a picture cannot be used, ``held_out`` whether it is for measuring.

    Pictures without a caption are left out where they are ``captioned``.
    """

    urls: Sequence[str]
    seed: int
    batch_size: int
    refuse: Callable[[Picture], str | None] = lambda picture: None
    held_out: Callable[[Picture], bool] = lambda picture: False
    captioned: bool = True
    records: dict[int, Record] = field(default_factory=dict)
    _late: dict[int, str] = field(default_factory=dict)

    @property
    def lanes(self) -> int:
        """The largest divisor of the batch size for which there are shards."""
        return max(n for n in range(1, min(self.batch_size, len(self.urls)) + 1) if self.batch_size % n == 0)

    def check(self, processes: int) -> None:
        """ValueError if so many processes cannot read it."""
        if self.lanes % processes:
            raise ValueError(
                f"data.path has {len(self.urls)} shards, read in {self.lanes} lanes for a batch of {self.batch_size}: "
                f"{processes} processes cannot share them evenly; cut it into a multiple of {processes} shards"
            )

    def batches(self, dataset: Any, first_step: int, steps: int, share: Share) -> Iterator[Batch]:
        self.check(share.processes)
        for batch, drawn in ahead(self._made(dataset, steps - first_step, share)):
            self._late = {one.picture.id: str(one.picture.file) for one in drawn}
            for one in drawn:
                record = self.records.setdefault(one.lane, Record())
                record.turn, record.taken = one.turn, one.taken
                record.seen[one.url] += 1
                record.left_out.update(one.refused)
            yield batch

    def files(self, ids: Iterable[int]) -> list[str]:
        return [self._late[one] for one in ids if one in self._late]

    def state(self) -> dict[str, Any]:
        return {str(lane): vars(record) for lane, record in self.records.items()}

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.records = {
            int(lane): Record(**{**record, "seen": Counter(record["seen"])})
            for state in states
            for lane, record in state.items()
        }

    def write_coverage(self, file: Path, position: int, states: Sequence[Mapping[str, Any]]) -> None:
        seen, left_out = Counter(dict.fromkeys(self.urls, 0)), dict[str, str]()
        for record in (record for state in states for record in state.values()):
            seen.update(record["seen"])
            left_out |= record["left_out"]
        write_lines(file, [{"file": url, "visits": count} for url, count in seen.items()], left_out)

    def sample(self, count: int, held_out: bool) -> list[Picture]:
        """The first pictures that may be used, of those trained on or of those held out."""
        found = (
            picture
            for url in self.urls
            for _, picture in read_shard(url, self.captioned)
            if isinstance(picture, Picture)
        )
        usable = (p for p in found if self.held_out(p) == held_out and self.refuse(p) is None)
        return list(islice(usable, count))

    def _made(self, dataset: Any, steps: int, share: Share) -> Iterator[tuple[Batch, list[Drawn]]]:
        width = self.batch_size // self.lanes  # pictures that a lane gives a step
        each = self.lanes // share.processes
        mine = range(share.process * each, (share.process + 1) * each)
        lanes = [self._lane(number, self.records.get(number, Record())) for number in mine]
        with ThreadPoolExecutor(max(1, share.workers)) as pool:
            for _ in range(steps):
                parts = pool.map(lambda lane: list(islice(lane, width)), lanes)
                drawn = [one for part in parts for one in part]
                for start in range(0, len(drawn), share.micro_batch):
                    some = drawn[start : start + share.micro_batch]
                    yield dataset.collate([(one.picture, one.visit) for one in some]), some

    def _lane(self, number: int, record: Record) -> Iterator[Drawn]:
        """What a lane reads from where it stands, for ever."""
        turn, taken = record.turn, record.taken
        refused: dict[str, str] = {}
        idle = 0  # shards in a row that held nothing
        while idle <= len(self.urls):
            epoch, place = divmod(turn * self.lanes + number, len(self.urls))
            url = self.urls[self._shuffled(epoch)[place]]
            idle += 1
            for done, (name, found) in enumerate(islice(read_shard(url, self.captioned), taken, None), taken + 1):
                reason = found if isinstance(found, str) else self.refuse(found)
                if isinstance(found, str) or reason is not None:
                    refused[name] = str(reason)
                elif not self.held_out(found):
                    yield Drawn(
                        picture=found, visit=epoch, url=url, lane=number, turn=turn, taken=done, refused=refused
                    )
                    refused, idle = {}, 0
            turn, taken = turn + 1, 0
        raise ValueError(f"data.path: no picture of {len(self.urls)} shards can be used, {_first(refused)}")

    @lru_cache(maxsize=4)  # noqa: B019 - a feed lives as long as its run
    def _shuffled(self, epoch: int) -> list[int]:
        return rng.permutation(self.seed, "shards", epoch, len(self.urls)).tolist()


def _picture(name: str, sample: Mapping[str, Any], captioned: bool) -> Picture:
    image = next((kind for kind in sample if f".{kind.lower()}" in SUFFIXES), None)
    if image is None:
        raise ValueError(f"holds no picture, only {', '.join(k for k in sample if not k.startswith('__'))}")
    return Picture(
        file=Path(f"{name}.{image}"),
        texts=tuple(_texts(sample)) if captioned else ("",),
        keywords=(),
        group=name,
        weight=1.0,
        id=rng.name_id(name),
        content=sample[image],
    )


def _texts(sample: Mapping[str, Any]) -> list[str]:
    """The captions: lines of ``txt``, or ``text`` or ``caption`` of ``json``."""
    kind = "txt" if "txt" in sample else "json"
    try:
        lines = lines_of(sample.get(kind, b"{}"))
        if kind == "json":
            facts = json.loads("\n".join(lines))
            text = facts.get("text", facts.get("caption")) if isinstance(facts, dict) else None
            lines = text if isinstance(text, list) else [text or ""]
    except ValueError as error:
        raise ValueError(f"has a .{kind} that cannot be read ({error})") from None
    texts = [line.strip() for line in lines if isinstance(line, str) and line.strip()]
    if not texts:
        raise ValueError("has no caption: neither .txt, nor text or caption in .json")
    for text in texts:
        check_text(text)
    return texts


def _why(url: str, error: Exception) -> str:
    """What is wrong with a shard, without what webdataset adds for its own developers."""
    if "://" in url and ("curl" in str(error) or "empty file" in str(error)):
        return "nothing comes from this address"
    said = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(said.partition(" @ ")[0].split())


def _first(refused: Mapping[str, str]) -> str:
    name, reason = next(iter(refused.items()), ("", "all are held out or there are none"))
    return f"first {name}: {reason}"


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise ValueError("data.path names shards, which need webdataset: pip install webdataset") from None
    return webdataset
