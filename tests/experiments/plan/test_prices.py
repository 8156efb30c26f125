"""The file of offers: what it may hold, and what is refused."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from restomod.experiments.plan.hardware import find_gpu
from restomod.experiments.plan.prices import SHIPPED, read_offers
from restomod.utils.errors import UserError

WHOLE = 'provider = "X"\ngpu = "a100"\ngpus = 2\nprice = 1.5\ndate = 2026-01-02\nsource = "a page"\n'
OWN = WHOLE.replace("price = 1.5", "watts = 400\nkwh_price = 0.25")


def written(folder: Path, *entries: str) -> Path:
    file = folder / "offers.toml"
    file.write_text("".join(f"[[offer]]\n{entry}" for entry in entries))
    return file


def test_those_shipped_are_whole_and_of_known_gpus() -> None:
    offers = read_offers()
    assert {"Colab", "Lambda", "RunPod", "Vast.ai", "your own"} == {offer.provider for offer in offers}
    for offer in offers:
        assert find_gpu(offer.gpu) is not None
        assert 0 < offer.price < 10
        assert offer.date < datetime.date(2026, 11, 22)
        assert offer.source


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    rented, own = read_offers(written(tmp_path, WHOLE, OWN + 'note = "hot"\n'))
    assert (rented.provider, rented.gpu, rented.gpus, rented.price) == ("X", "a100", 2, 1.5)
    assert rented.date == datetime.date(2026, 1, 2)
    assert own.price == pytest.approx(0.1)  # 0.4 kW at 0.25 an hour
    assert own.note == "hot"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WHOLE.replace("gpus = 2\n", ""), "offer 2 lacks gpus"),
        (WHOLE.replace("price = 1.5", ""), "offer 2 needs a price, or else both watts and kwh_price"),
        (OWN.replace("watts = 400\n", ""), "offer 2 needs a price, or else both"),
        (OWN + "price = 1\n", "offer 2 needs a price, or else both"),
        (WHOLE + "prise = 1\n", "offer 2 has an unknown key 'prise'; did you mean 'price'?"),
        (WHOLE.replace("1.5", '"1.5"'), "offer 2: price should be a valid number, not '1.5'"),
        (WHOLE.replace("1.5", "-1"), "offer 2: price should be greater than or equal to 0, not -1"),
        (WHOLE.replace("1.5", "nan"), "offer 2: price"),
        (WHOLE.replace("gpus = 2", "gpus = 0"), "offer 2: gpus should be greater than or equal to 1, not 0"),
        (WHOLE.replace("gpus = 2", "gpus = true"), "offer 2: gpus should be a valid integer, not True"),
        (WHOLE.replace("2026-01-02", '"today"'), "offer 2: date"),
        ("[[", "not valid TOML"),
        (WHOLE.replace("gpus = 2", "gpus = " + "[" * 100_000), "not valid TOML"),
        (WHOLE.replace("1.5", "9" * 400), "offer 2: price"),
        (OWN.replace("400", "1e308"), "offer 2: watts"),
        (WHOLE.replace("gpus = 2", "gpus = 1000000000000"), "offer 2: gpus"),
        ("#" * 2_000_000, "is too large"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=r"offers\.toml") as caught:
        read_offers(written(tmp_path, WHOLE, text))
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "offer = 1\n", "[[offers]]\n", "[[offer]]\n[more]\n"])
def test_a_file_of_something_else(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"has to hold .*offer.* entries"):
        read_offers(file)


def test_a_device_is_refused() -> None:
    with pytest.raises(UserError, match="/dev/zero is a device"):
        read_offers(Path("/dev/zero"))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the offers") as caught:
        read_offers(tmp_path / "none.toml")
    assert str(SHIPPED) in str(caught.value)
