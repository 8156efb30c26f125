"""Files of a folder are found through links, each once, and skipped files are counted."""

from __future__ import annotations

import collections
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restomod.data.find_files import find_files, matches
from restomod.utils.errors import UserError


def found(root: Path, glob: str = "**/*") -> tuple[list[str], dict[str, int]]:
    left_out: collections.Counter[str] = collections.Counter()
    files = [str(file.relative_to(root)) for file in find_files(root, glob, left_out)]
    return files, dict(left_out)


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    return root


def test_links_are_followed_and_each_file_comes_once(tmp_path: Path) -> None:
    make(tmp_path / "real", "1.txt", "2.txt", "deep/3.txt")
    root = make(tmp_path / "root", "own.txt")
    (root / "a.txt").symlink_to("../real/1.txt")
    (root / "sub").symlink_to("../real")
    files, left_out = found(root)
    assert files == ["a.txt", "own.txt", "sub/2.txt", "sub/deep/3.txt"]
    assert left_out == {"duplicate path": 1}


def test_a_file_is_read_by_its_path_without_a_link(tmp_path: Path) -> None:
    root = make(tmp_path, "m/real.txt")
    (root / "a.txt").symlink_to("m/real.txt")
    (root / "b").symlink_to("m")
    os.link(root / "m" / "real.txt", root / "z.txt")
    files, left_out = found(root)
    assert files == ["m/real.txt"]
    assert left_out == {"duplicate path": 3}


def test_loops_broken_links_and_special_files_are_counted(tmp_path: Path) -> None:
    root = make(tmp_path, "a.txt", "b/c.txt", ".hidden", ".git/config")
    (root / "empty").touch()
    (root / "loop").symlink_to(".")
    (root / "b" / "up").symlink_to("..")
    (root / "self").symlink_to("self")
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    files, left_out = found(root)
    assert files == ["a.txt", "b/c.txt"]
    assert left_out == {"hidden": 2, "empty": 1, "link loop": 3, "broken link": 1, "not a regular file": 1}


def test_folders_that_are_linked_with_each_other_are_walked_once(tmp_path: Path) -> None:
    """Otherwise fifteen folders with links to each other have 10^12 paths."""
    for i in range(15):
        make(tmp_path, f"{i:02d}/a.txt")
        for j in range(15):
            (tmp_path / f"{i:02d}" / f"to{j:02d}").symlink_to(f"../{j:02d}")
    files, left_out = found(tmp_path)
    assert files == [f"{i:02d}/a.txt" for i in range(15)]
    assert sum(left_out.values()) == 15 * 15


def test_a_glob_finds_through_a_link_what_another_path_does_not_match(tmp_path: Path) -> None:
    root = make(tmp_path, "a/real/1.txt", "a/2.md")
    (root / "z").symlink_to("a/real")
    assert found(root, "z/*.txt")[0] == ["z/1.txt"]
    make(tmp_path, "m/d/3.txt")
    (root / "m" / "k").symlink_to("d")  # the same folder at another position of the pattern
    assert found(root, "m/**/k/*.txt")[0] == ["m/k/3.txt"]
    assert found(root, "*/*.md") == (["a/2.md"], {"not matching the glob": 4})


@pytest.mark.parametrize(
    "glob", ["**/*", "*.txt", "a/*", "**/b/*.txt", "a/**/*.txt", "*/*", "./*.txt", "a//*", "[ab]/?.*", "**/a/**/b/*"]
)
def test_without_links_a_glob_matches_like_pathlib(tmp_path: Path, glob: str) -> None:
    """The documents of a folder and their fingerprint do not change between releases."""
    chance = random.Random(0)
    for _ in range(60):
        parts = chance.choices(["a", "b", "c.txt.d"], k=chance.randrange(4))
        make(tmp_path, "/".join([*parts, chance.choice(["x.txt", "y.md", "z"])]))
    expected = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob(glob)) if path.is_file()]
    assert expected
    assert found(tmp_path, glob)[0] == expected


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), max_size=5), st.lists(st.sampled_from(["**", "*", "a", "b"]), max_size=5)
)
def test_a_pattern_matches_as_its_definition_says(path: list[str], pattern: list[str]) -> None:
    def means(path: list[str], pattern: list[str]) -> bool:
        if not pattern:
            return not path
        if pattern[0] == "**":
            return means(path, pattern[1:]) or (bool(path) and means(path[1:], pattern))
        return bool(path) and pattern[0] in ("*", path[0]) and means(path[1:], pattern[1:])

    assert matches(path, pattern) == means(path, pattern)


def test_a_device_or_pipe_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            list(find_files(path, "**/*"))


def test_files_come_sorted_by_path(tmp_path: Path) -> None:
    make(tmp_path, "b", "a/z", "c", "a/b/c", "B")
    assert found(tmp_path)[0] == ["B", "a/b/c", "a/z", "b", "c"]


def test_a_folder_below_a_hidden_one_can_be_read(tmp_path: Path) -> None:
    assert found(make(tmp_path / ".cache", "a"))[0] == ["a"]


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("*.md", "its only file is empty"),
        ("*.xml", "no file matches the glob"),
        *((glob, f"the glob {glob!r}") for glob in ("/*.txt", "", "**.txt/a", "a/**b")),
    ],
)
def test_a_folder_without_text_or_a_bad_glob_is_refused(tmp_path: Path, glob: str, said: str) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "a.md").touch()
    with pytest.raises(UserError) as caught:
        found(tmp_path, glob)
    assert said in str(caught.value)
