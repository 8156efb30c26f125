"""Files of output flags such as --json: validated before the work, written after the results are printed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from restomod.utils.errors import UserError, reason
from restomod.utils.files import Destination, resolve_destination
from restomod.utils.temporary import Temporary

# (signs, files): a folder with one of the signs is a run, checkpoint, sweep or prepared data; its files are protected
NEEDED = (
    (
        {"metrics.jsonl", "environment.json", "model.safetensors"},
        {"config.json", "environment.json", "data.json", "metrics.jsonl", "samples.jsonl", "model.safetensors"},
    ),
    ({"journal.jsonl"}, {"plan.json", "journal.jsonl", "sweep.json"}),
    ({"manifest.json"}, {"manifest.json"}),
)


def require_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Check that output files can be written and destroy nothing, before any work is done.

    The check creates and removes a temporary file in each folder. Devices and named pipes are not opened.

    Args:
        outputs: output file by flag; None if the flag is not given.
        inputs: input file by flag; None if the flag is not given.

    Raises:
        UserError: the folder is missing or not writable; the file is a folder, read-only, an input, or part of a run,
            checkpoint, sweep or prepared data; its name is too long; or two outputs are the same file.
    """
    taken = {flag: path for flag, path in (inputs or {}).items() if path is not None}
    for flag, path in outputs.items():
        if path is None:
            continue
        target = _try_destination(flag, path)
        if not target.is_regular:
            continue  # several outputs may go to the same pipe
        for other, before in taken.items():
            if _same_file(path, before):
                raise UserError(f"{other} and {flag} are the same file, {path}; name two different files")
        names: set[str] = set()
        with contextlib.suppress(OSError):  # the folder may be writable but not readable
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
            os.write(target.descriptor, b"")  # fails if it is open for reading only
        elif target.is_regular:
            Temporary(target.real.parent).remove()
    except UserError as e:
        raise UserError(f"{flag} {e}") from None
    except OSError as e:
        raise UserError(f"{flag} {path} cannot be written ({reason(e)}); name another file") from None
    return target


def require_output_folder(flag: str, folder: Path) -> None:
    """Raise UserError if a folder cannot be created or written to. The folder is not created."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder)  # raises OSError for a name that is too long
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
    """Output file and the function that writes it."""

    path: Path
    write: Callable[[Path], None]
    remark: str = ""
    """Remark for the line that reports the written file."""


def write_outputs(outputs: Sequence[Output], say: Callable[[str], None] = print) -> None:
    """Write all output files and report each in a line.

    Args:
        outputs: files to write.
        say: function that prints a line.

    Raises:
        UserError: a file could not be written; the other files are written.
    """
    failed = []
    for path, write, remark in outputs:
        try:
            write(path)
        except BrokenPipeError:  # the reader of standard output has exited
            raise
        except UserError as e:
            failed.append(str(e))
        except OSError as e:
            failed.append(f"{path} cannot be written ({reason(e)})")
        else:
            if resolve_destination(path).descriptor is None:  # a line in /dev/stdout would become part of the file
                say(f"written: {path}{remark}")
    if failed:
        raise UserError("; ".join(failed))


def _same_file(a: Path, b: Path) -> bool:
    """Return whether two paths are the same file; the file need not exist."""
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and a.samefile(b))
