from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import image

from restomod.evals.plots import draw_positions, position_means
from restomod.evals.validation import ValidationLoss
from restomod.utils.errors import UserError


def test_means_cover_every_position_once() -> None:
    losses = [float(t) for t in range(1, 1025)]
    centres, means = position_means(losses)
    assert means == pytest.approx(centres)  # the mean of a straight line is its value in the middle
    assert (centres[0], len(centres) < 60) == (1.0, True)
    assert centres == sorted(centres)
    assert position_means([3.0]) == ([1.0], [3.0])


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    loss = ValidationLoss(4.0, 640, 2000, [6.0 - t / 32 for t in range(64)], {})
    draw_positions(loss, "runs/mine_$x", tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")
    assert pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.05


def test_a_picture_that_cannot_be_written_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png: there is no folder"):
        draw_positions(ValidationLoss(4.0, 1, 1, [4.0], {}), "", tmp_path / "none" / "a.png")
