"""Search for the files of a folder that match a glob, each of them once, with counts of skipped files."""

from __future__ import annotations

import collections
import errno
import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from restomod.utils.errors import UserError
from restomod.utils.files import require_regular


def find_files(path: Path, glob: str, skipped: collections.Counter[str] | None = None) -> Iterator[Path]:
    """Yield the files of a folder that match ``glob``, sorted by path.

    Links to files and folders are followed. A file with several paths is yielded once: with the first path without
    links, otherwise with the first path. Hidden and empty files, broken links, link loops and special files are
    skipped.

    Args:
        path: folder, or a single file that is yielded regardless of ``glob``.
        glob: pattern of `*`, `?` and `[…]` within a name, and `**` for any number of folders.
        skipped: counter of skipped files and folders by reason, which is updated.

    Raises:
        UserError: no file matches, all matching files are empty, ``glob`` is not a pattern, or ``path`` is a device,
            FIFO or socket.
    """
    if not path.is_dir():
        require_regular(path)
        yield path
        return
    if glob.startswith("/"):
        raise UserError(f"the glob {glob!r} starts with /; give a pattern relative to {path}, for example '**/*.txt'")
    pattern = [part for part in glob.split("/") if part not in ("", ".")]
    if not pattern or any("**" in part and part != "**" for part in pattern):
        raise UserError(f"the glob {glob!r} is not a pattern: ** must be a complete path part, for example '**/*.txt'")
    counts: collections.Counter[str] = collections.Counter()
    first: dict[tuple[object, ...], Path] = {}  # (device, inode) -> path by which the file is read
    for _, file, status in sorted(_walk(path, pattern, counts), key=lambda found: found[:2]):
        # some systems have no inodes
        key = (status.st_dev, status.st_ino) if status.st_ino else (os.path.realpath(file),)
        if status.st_size == 0:
            counts["empty"] += 1
        elif key in first:
            counts["duplicate path"] += 1
        else:
            first[key] = file
    if skipped is not None:
        skipped.update(counts)
    if not first:
        empty = counts["empty"]
        all_empty = "its only file is empty" if empty == 1 else f"its {empty} files are all empty"
        raise UserError(f"{path} has no text: {all_empty if empty else f'no file matches the glob {glob!r}'}")
    yield from sorted(first.values())


def _walk(
    root: Path, pattern: list[str], counts: collections.Counter[str]
) -> Iterator[tuple[bool, Path, os.stat_result]]:
    """Yield the regular files below ``root`` that match: (whether the path contains a link, path, status).

    Folders are visited before links to folders. No folder is visited twice at the same positions of the pattern, so
    link loops and folders linked with each other do not multiply the work.
    """
    start = _closed(pattern, {0})
    folders, links = collections.deque([(root, False, start)]), collections.deque[tuple[Path, bool, frozenset[int]]]()
    walked: set[tuple[int, int, frozenset[int]]] = set()
    while folders or links:
        folder, linked, places = (folders or links).popleft()
        status = folder.stat()
        if (key := (status.st_dev, status.st_ino, places)) in walked:
            loop = Path(os.path.realpath(folder.parent)).is_relative_to(os.path.realpath(folder))
            counts["link loop" if loop else "duplicate path"] += 1
            continue
        walked.add(key)
        try:
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError:
            counts["unreadable folder"] += 1
            continue
        for entry in entries:
            file = folder / entry.name
            here = _after(pattern, places, entry.name)
            try:
                status = entry.stat()
            except OSError as e:
                if here:
                    counts["link loop" if e.errno == errno.ELOOP else "broken link"] += 1
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if not (here - {len(pattern)} if is_folder else len(pattern) in here):
                counts["not matching the glob"] += 1
            elif entry.name.startswith("."):
                counts["hidden"] += 1
            elif is_folder:
                is_link = linked or entry.is_symlink()
                (links if is_link else folders).append((file, is_link, here - {len(pattern)}))
            elif stat.S_ISREG(status.st_mode):
                yield linked or entry.is_symlink(), file, status
            else:
                counts["not a regular file"] += 1


def matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a pattern matches a path, both as lists of parts; `**` matches any number of parts."""
    places = _closed(pattern, {0})
    for name in path:
        places = _after(pattern, places, name)
    return len(pattern) in places


def _after(pattern: Sequence[str], places: frozenset[int], name: str) -> frozenset[int]:
    """Return the positions in the pattern after one more part of the path."""
    reached = set()
    for place in places:
        if place < len(pattern) and pattern[place] == "**":
            reached.add(place)
        elif place < len(pattern) and fnmatch.fnmatchcase(name, pattern[place]):
            reached.add(place + 1)
    return _closed(pattern, reached)


def _closed(pattern: Sequence[str], places: set[int]) -> frozenset[int]:
    """Add the positions after each `**`, which can match zero parts."""
    for place in range(len(pattern)):
        if place in places and pattern[place] == "**":
            places.add(place + 1)
    return frozenset(places)
