"""Tests of price files: the file of the package, valid files and damaged ones."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from restomod.experiments.plan.hardware import known_gpu
from restomod.experiments.plan.prices import SHIPPED, read_prices
from restomod.utils.errors import UserError

WHOLE = 'provider = "X"\ngpu = "a100"\ngpus = 2\ndollars_per_gpu_hour = 1.5\ndate = 2026-01-02\nsource = "a page"\n'
OWN = WHOLE.replace("dollars_per_gpu_hour = 1.5", "watts = 400\ndollars_per_kwh = 0.25")


def written(folder: Path, *entries: str) -> Path:
    file = folder / "prices.toml"
    file.write_text("".join(f"[[price]]\n{entry}" for entry in entries))
    return file


def test_the_file_of_the_package_is_complete_and_names_known_gpus() -> None:
    prices = read_prices()
    assert {"Colab", "Lambda", "RunPod", "Vast.ai", "your own"} == {price.provider for price in prices}
    for price in prices:
        assert known_gpu(price.gpu) is not None
        assert 0 < price.dollars_per_gpu_hour < 10
        assert price.date < datetime.date(2026, 11, 22)
        assert price.source


def test_a_users_file(tmp_path: Path) -> None:
    rented, own = read_prices(written(tmp_path, WHOLE, OWN + 'note = "hot"\n'))
    assert (rented.provider, rented.gpu, rented.gpus, rented.dollars_per_gpu_hour) == ("X", "a100", 2, 1.5)
    assert rented.date == datetime.date(2026, 1, 2)
    assert own.dollars_per_gpu_hour == pytest.approx(0.1)  # 0.4 kW at 0.25 an hour
    assert own.note == "hot"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WHOLE.replace("gpus = 2\n", ""), "price 2 lacks gpus"),
        (WHOLE.replace("dollars_per_gpu_hour = 1.5", ""), "price 2 needs dollars_per_gpu_hour"),
        (OWN.replace("watts = 400\n", ""), "price 2 needs dollars_per_gpu_hour"),
        (OWN + "dollars_per_gpu_hour = 1\n", "price 2 needs dollars_per_gpu_hour"),
        (WHOLE + "sauce = 1\n", "price 2 has an unknown key 'sauce'; did you mean 'source'?"),
        (WHOLE.replace("1.5", '"1.5"'), "price 2: dollars_per_gpu_hour should be a valid number"),
        (WHOLE.replace("1.5", "-1"), "price 2: dollars_per_gpu_hour should be greater"),
        (WHOLE.replace("1.5", "nan"), "price 2: dollars_per_gpu_hour"),
        (WHOLE.replace("gpus = 2", "gpus = 0"), "price 2: gpus"),
        (WHOLE.replace("gpus = 2", "gpus = true"), "price 2: gpus"),
        (WHOLE.replace("2026-01-02", '"today"'), "price 2: date"),
        ("[[", "not valid TOML"),
        (WHOLE.replace("gpus = 2", "gpus = " + "[" * 100_000), "not valid TOML"),
        (WHOLE.replace("1.5", "9" * 400), "price 2: dollars_per_gpu_hour"),
        (OWN.replace("400", "1e308"), "price 2: watts"),
        (WHOLE.replace("gpus = 2", "gpus = 1000000000000"), "price 2: gpus"),
        ("#" * 2_000_000, "is too large"),
    ],
)
def test_an_error_names_the_entry_and_the_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=r"prices\.toml") as caught:
        read_prices(written(tmp_path, WHOLE, text))
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "price = 1\n", "[[offer]]\n", "[[price]]\n[more]\n"])
def test_a_file_with_other_tables_is_rejected(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"\[\[price\]\] entries"):
        read_prices(file)


def test_a_device_is_rejected() -> None:
    with pytest.raises(UserError, match="/dev/zero is a device"):
        read_prices(Path("/dev/zero"))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the prices") as caught:
        read_prices(tmp_path / "none.toml")
    assert str(SHIPPED) in str(caught.value)
