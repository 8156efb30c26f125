"""Files named by output flags such as --json: checked before the work, written after its result is printed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from restomod.utils.errors import UserError, reason
from restomod.utils.files import Destination, resolve_destination
from restomod.utils.temporary import Temporary

# (signs, files): a folder with one of the signs is a run or checkpoint, a sweep, or prepared data, and needs its files
NEEDED = (
    (
        {"metrics.jsonl", "environment.json", "model.safetensors"},
        {"config.json", "environment.json", "data.json", "metrics.jsonl", "samples.jsonl", "model.safetensors"},
    ),
    ({"journal.jsonl"}, {"plan.json", "journal.jsonl", "sweep.json"}),
    ({"manifest.json"}, {"manifest.json"}),
)


def require_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Refuse files that cannot be written, or would destroy something, before any work is done for them.

    Both map flags to files, or to None if the flag is not given. A temporary file is created in each folder; devices
    and named pipes are left alone.

    Raises:
        UserError: the folder is missing or refuses; the file is a folder, read-only, an input, or part of a run, a
            checkpoint, a sweep or prepared data; its name is too long; or two outputs are one file.
    """
    taken = {flag: path for flag, path in (inputs or {}).items() if path is not None}
    for flag, path in outputs.items():
        if path is None:
            continue
        target = _try_destination(flag, path)
        if not target.is_regular:
            continue  # several may be written to one pipe, one after the other
        for other, before in taken.items():
            if _same_file(path, before):
                raise UserError(f"{other} and {flag} are the same file, {path}; name two different files")
        names: set[str] = set()
        with contextlib.suppress(OSError):  # the folder can be written to, but not read
            names = set(os.listdir(target.real.parent))
        if any(names & signs and target.real.name in files & names for signs, files in NEEDED):
            raise UserError(
                f"{flag} {path} would overwrite a file that restomod needs in {target.real.parent}; name another file"
            )
        taken[flag] = path


def _try_destination(flag: str, path: Path) -> Destination:
    try:
        target = resolve_destination(path)
        if target.descriptor is not None:
            os.write(target.descriptor, b"")  # which fails where it is open for reading only
        elif target.is_regular:
            Temporary(target.real.parent).remove()
    except UserError as e:
        raise UserError(f"{flag} {e}") from None
    except OSError as e:
        raise UserError(f"{flag} {path} cannot be written ({reason(e)}); name another file") from None
    return target


def require_output_folder(flag: str, folder: Path) -> None:
    """Raise UserError if a folder for output cannot be made or written to. It is not made yet."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder)  # a name that is too long
        there = Path(os.path.realpath(folder))
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            within = "" if os.path.lexists(folder) else f": {there}"
            raise UserError(f"{flag} {folder}{within} is a file; name a folder")
        if not there.stat().st_mode & 0o222:
            raise UserError(f"{flag} {folder} cannot be written: {there} is read-only; name another folder")
        Temporary(there).remove()
    except OSError as e:
        raise UserError(f"{flag} {folder} cannot be written ({reason(e)}); name another folder") from None


class Output(NamedTuple):
    """A file to write."""

    path: Path
    write: Callable[[Path], None]
    remark: str = ""
    """What to say of it once it is written."""


def write_outputs(outputs: Sequence[Output], say: Callable[[str], None] = print) -> None:
    """Write files, and ``say`` a line for each. If one fails, the others are written, and UserError is raised."""
    failed = []
    for path, write, remark in outputs:
        try:
            write(path)
        except BrokenPipeError:  # of standard output, whose reader has left
            raise
        except UserError as e:
            failed.append(str(e))
        except OSError as e:
            failed.append(f"{path} cannot be written ({reason(e)})")
        else:
            if resolve_destination(path).descriptor is None:  # what follows a page in /dev/stdout would be part of it
                say(f"written: {path}{remark}")
    if failed:
        raise UserError("; ".join(failed))


def _same_file(a: Path, b: Path) -> bool:
    """Whether two paths are one file, which need not exist yet."""
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and a.samefile(b))
