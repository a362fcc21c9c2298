"""What is computed once of a picture or a caption, kept under a name made of everything that it depends on."""

import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from diffusion.data.source import Picture
from diffusion.pixels import View

Entry = dict[str, Tensor]


@dataclass(frozen=True)
class Cache:
    """A folder with one small file an entry; processes fill it together, and stopping one loses at most a batch.

    The name of an entry hashes what it was made of and ``encoder``, a digest of the weights that made it: an edited
    picture or caption, another size or another encoder is never mistaken for this one.
    """

    folder: Path
    encoder: str
    quiet: bool = False  # no bar

    def path(self, content: bytes, how: str) -> Path:
        """Where the entry of ``content``, encoded in the way that ``how`` says, is kept."""
        digest = hashlib.sha256(f"{self.encoder} {how} fp32\0".encode() + content)
        name = digest.hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.safetensors"

    def picture_path(self, picture: Picture, view: View) -> Path:
        """Where what was made of one view of a picture is kept."""
        content = picture.file.read_bytes() if picture.content is None else picture.content
        return self.path(content, repr(view))

    def fill(
        self,
        paths: Sequence[Path],
        make: Callable[[list[int]], Iterable[Entry]],
        kinds: Sequence[Hashable] | None = None,
        what: str = "pictures",
        batch_size: int = 32,
    ) -> "Kept":
        """Make what is missing or cut: ``make`` gets the places of a batch, which is of one of the ``kinds``."""
        first = {path: place for place, path in reversed(list(enumerate(paths)))}  # what comes twice is made once
        _clear(first)
        missing = [place for path, place in first.items() if not path.is_file()]
        missing.sort(key=lambda place: (repr(kinds[place]) if kinds is not None else "", place))
        start = os.getpid() % len(missing) if missing else 0  # processes begin apart and skip what another has done
        with tqdm(total=len(missing), desc=f"encoding {what}", leave=False, disable=self.quiet or not missing) as bar:
            for batch in _batches(missing[start:] + missing[:start], kinds, batch_size):
                todo = [place for place in batch if not paths[place].is_file()]
                for place, entry in zip(todo, make(todo) if todo else (), strict=True):
                    _write(paths[place], entry)
                bar.update(len(batch))
        return Kept(paths)


class Kept(Sequence[Entry]):
    """Entries by their place, read when they are asked for and held in memory up to ``memory`` bytes."""

    def __init__(self, paths: Sequence[Path], memory: int = 2 << 30) -> None:
        self.paths, self.memory, self.held = paths, memory, 0
        self._entries: OrderedDict[int, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: Any) -> Any:  # a Sequence takes slices as well, which nobody asks for here
        if (entry := self._entries.get(place)) is None:
            entry = self._entries[place] = _read(self.paths[place])
            self.held += _size(entry)
            while self.held > self.memory and len(self._entries) > 1:
                self.held -= _size(self._entries.popitem(last=False)[1])
        return entry


def _size(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _batches(places: Sequence[int], kinds: Sequence[Hashable] | None, batch_size: int) -> Iterator[list[int]]:
    """Runs of one kind, of at most ``batch_size``."""
    batch: list[int] = []
    for place in places:
        if batch and (len(batch) == batch_size or (kinds is not None and kinds[batch[0]] != kinds[place])):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _read(path: Path) -> Entry:
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); the same command makes it again") from None


def _write(path: Path, entry: Entry) -> None:
    """An entry is on the disk before it has its name: after a power cut it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as stream:
        stream.write(save({name: tensor.float().cpu().contiguous() for name, tensor in entry.items()}))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def _clear(paths: Iterable[Path]) -> None:
    """Remove entries that something has cut, so that they are made again."""
    broken = [path for path in paths if path.is_file() and not _is_whole(path)]
    for path in broken:
        path.unlink(missing_ok=True)  # another process may have been faster
    if broken:
        print(f"{len(broken)} cut entries of the cache are made again, first {broken[0]}", file=sys.stderr)


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of the header's length, header, numbers."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length) if length < size else b""
        ends = [facts["data_offsets"][1] for name, facts in json.loads(header).items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return size == 8 + length + max(ends, default=0)
