"""The tensors of a model folder, in whichever of the ecosystem's four ways they were saved.

One safetensors file, several with an index, or the same as pickles (`pytorch_model.bin`). A pickle is read with
`weights_only=True`: it can bring tensors and nothing that runs.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from restomod.utils.errors import UserError, one_line
from restomod.utils.json_files import file_name, read_json
from restomod.utils.locks import SAFE_OPEN

WEIGHTS = "model.safetensors"
WEIGHTS_NAMES = (WEIGHTS, "pytorch_model.bin")  # the safe one first, where a folder holds both
INDEX_SUFFIX = ".index.json"
MAX_HEADER = 8 * 2**20  # bytes of a safetensors file's: one of 37,000 tensors, experts of 94 layers, has 5 MB


class Index(TypedDict):
    """Of weights in several files."""

    weight_map: Annotated[dict[str, Annotated[str, AfterValidator(file_name)]], Field(min_length=1)]


def weights_files(get: Callable[[str], Path | None]) -> list[Path] | None:
    """The files that hold a model's tensors, or None where there are none.

    Args:
        get: gives the path of a file by its name in the folder (downloading it, if need be), or None if it is absent.

    Raises:
        UserError: an index is damaged, or a file that it names is absent.
    """
    for name in WEIGHTS_NAMES:
        whole = get(name)
        if whole is not None:
            return [whole]
        index = get(name + INDEX_SUFFIX)
        if index is not None:
            found = {shard: get(shard) for shard in _shards(index)}
            absent = [shard for shard, path in found.items() if path is None]
            if absent:
                raise UserError(f"{index} names {absent[0]}, which is missing beside it")
            return [path for path in found.values() if path is not None]
    return None


def _shards(index: Path) -> list[str]:
    """The file names in an index's map from tensors to files."""
    return sorted({*read_json(index, "index of the weights", Index)["weight_map"].values()})


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a model folder by name, on the CPU and mapped from the disk where the format allows it.

    Returns:
        The tensors, and the path to name when something about them is wrong.

    Raises:
        UserError: the weights are missing or damaged, or two files hold a tensor of the same name.
    """
    files = weights_files(lambda name: folder / name if (folder / name).is_file() else None)
    if files is None:
        raise UserError(f"{folder / WEIGHTS} is missing: {folder} is not a model folder")
    tensors: dict[str, Tensor] = {}
    for path in files:
        read = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
        twice = sorted(tensors.keys() & read.keys())
        if twice:
            raise UserError(f"{path} repeats {twice[0]}, which another file of {folder} holds too")
        tensors.update(read)
    return tensors, files[0] if len(files) == 1 else folder


def refuse_not_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise UserError where a weight is infinite or not a number: whatever it touches becomes so, too."""
    bad = {name: n for name, value in tensors.items() if (n := int((~torch.isfinite(value)).sum()))}
    if bad:
        first, more = next(iter(bad)), f" and {len(bad) - 1:,} more tensors" if len(bad) > 1 else ""
        raise UserError(
            f"{where}: {sum(bad.values()):,} weights are not finite numbers, in {first}{more}; "
            f"use an earlier checkpoint"
        )


def require_short_header(path: Path) -> None:
    """Raise UserError where a safetensors file may have a million tensors: reading them takes a gigabyte.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
    if size > MAX_HEADER:
        raise UserError(f"{path} is damaged, or has too many tensors: its header has {size:,} bytes")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        require_short_header(path)
        return load_file(path)
    except UserError:
        raise
    except Exception as e:  # of safetensors, of the system, or of torch, for which a header may ask the impossible
        raise UserError(f"{path} is damaged: {one_line(e)}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused, or of no use to a reader
            values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"{path}: cannot read the weights: {e.strerror or e}") from None
    except Exception as e:  # a damaged pickle fails in a dozen ways; torch's own words advise to trust it
        foreign = re.search(r"GLOBAL (\S+)", str(e))
        if foreign:
            raise UserError(f"{path} is refused: it holds {foreign[1]}, which is no tensor") from None
        raise UserError(f"{path} is damaged: it is not a whole pickle of tensors ({type(e).__name__})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} is not a model's weights: it should be a dictionary of tensors")
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.is_meta:
            raise UserError(f"{path} is not a model's weights: {name} should be a plain tensor")
    return values


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors into a safetensors file.

    Raises:
        OSError: it cannot be made.
        SafetensorError: it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | SAFE_OPEN, 0o666)
    mode = os.fstat(fd).st_mode  # of a new file as the user's umask wants it; safetensors makes one of 0600
    os.close(fd)
    save_file(dict(tensors), path, metadata)
    path.chmod(stat.S_IMODE(mode))
