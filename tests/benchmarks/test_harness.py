"""Tests of the harness: order of rounds, absent contenders and their reasons, processes and commands."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.contenders import Absent, Command, Contender, InProcess, Measured, Round, Worker
from benchmarks.harness import BenchPlan, compare, together
from benchmarks.records import Comparison, Metric

SPEED = Metric("speed", "", "higher")


@pytest.fixture
def plan(tmp_path: Path) -> BenchPlan:
    return BenchPlan(tmp_path, say=lambda text: None)


class Diary:
    """Log of the calls of its contenders."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def contender(self, name: str, value: float, fails_at: int | None = None) -> Contender:
        def make() -> Round:
            self.events.append(f"start {name}")
            count = iter(range(100))

            def one_round() -> Measured:
                number = next(count)
                self.events.append(name)
                if number == fails_at:
                    raise RuntimeError("out of luck\nand more")
                return Measured({"speed": value * (number + 1)}, output=number)

            return one_round

        return InProcess(name, make)

    @property
    def rounds(self) -> str:
        return "".join(event for event in self.events if " " not in event)


def test_rounds_alternate_between_forward_and_backward(plan: BenchPlan) -> None:
    diary = Diary()
    compare(plan, "x", [diary.contender(name, 1.0) for name in "ABC"], [SPEED], rounds=3, warmup=1)
    assert diary.rounds == "ABC" + "CBA" + "ABC" + "CBA"


def test_warm_up_rounds_are_not_recorded(plan: BenchPlan) -> None:
    diary = Diary()
    found = compare(plan, "x", [diary.contender("A", 2.0), diary.contender("B", 1.0)], [SPEED], rounds=2, warmup=2)
    assert found.entries[0].values == {"speed": [6.0, 8.0]}  # the third and the fourth round
    assert found.entries[1].values == {"speed": [3.0, 4.0]}
    assert found.entries[1].paired == {"speed": [6.0, 8.0]}
    assert found.entries[0].paired == {}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failing_contender_is_absent_and_the_others_continue(plan: BenchPlan, at: int) -> None:
    diary = Diary()
    contenders = [diary.contender("A", 1.0), diary.contender("B", 1.0, fails_at=at), diary.contender("C", 1.0)]
    found = compare(plan, "x", contenders, [SPEED], rounds=2, warmup=1)
    assert [e.absent for e in found.entries] == [None, "RuntimeError: out of luck", None]
    assert found.entries[1].values == {}
    assert len(found.entries[2].values["speed"]) == 2
    assert diary.rounds.count("B") == at + 1, "no round after the failure"


def test_the_first_contender_can_be_absent(plan: BenchPlan) -> None:
    diary = Diary()
    found = compare(plan, "x", [diary.contender("A", 1.0, 0), diary.contender("B", 1.0)], [SPEED], 2)
    assert found.entries[0].absent
    assert len(found.entries[1].values["speed"]) == 2
    assert found.entries[1].paired == {}


def test_every_group_has_the_first_contender_and_pairs_with_it(plan: BenchPlan) -> None:
    diary = Diary()
    contenders = [diary.contender("A", 1.0), *(diary.contender(name, 1.0) for name in "BCD")]
    found = compare(plan, "x", contenders, [SPEED], rounds=2, warmup=0, together=3)
    assert diary.rounds == "ABC" + "CBA" + "AD" + "DA"
    assert len(found.entries[0].values["speed"]) == 4
    assert [e.name for e in found.entries] == ["A", "B", "C", "D"]
    assert all(len(e.paired["speed"]) == 2 for e in found.entries[1:])


def test_after_the_deadline_one_round_runs(plan: BenchPlan) -> None:
    plan.deadline = time.monotonic() - 1
    diary = Diary()
    found = compare(plan, "x", [diary.contender("A", 1.0), diary.contender("B", 1.0)], [SPEED], rounds=5)
    assert found.rounds == 1
    assert diary.rounds == "ABBA"  # warm-up and one round
    assert any("time limit" in note for note in found.notes)


def test_outputs_are_compared(plan: BenchPlan) -> None:
    def agree(a: int, b: int) -> float:
        return float(a == b)

    diary = Diary()
    found = compare(plan, "x", [diary.contender("A", 1.0), diary.contender("B", 1.0)], [SPEED], 2, agree=agree)
    assert found.entries[1].agreement == [1.0, 1.0]
    other = InProcess("C", lambda: lambda: Measured({"speed": 1.0}, -1))
    found = compare(plan, "x", [diary.contender("A", 1.0), other], [SPEED], 2, agree=agree)
    assert found.entries[1].agreement == [0.0, 0.0]


def test_an_absent_contender_is_stopped_before_the_others_continue(plan: BenchPlan) -> None:
    events: list[str] = []

    class Stubborn(InProcess):
        def round(self) -> Measured:
            raise Absent("no answer")

        def stop(self) -> None:
            events.append("stopped")

    def note() -> Measured:
        events.append("round")
        return Measured({"speed": 1.0})

    compare(plan, "x", [Stubborn("A", lambda: note), InProcess("B", lambda: note)], [SPEED], rounds=2, warmup=0)
    assert events[:3] == ["stopped", "round", "round"]


def test_number_of_contenders_that_fit_into_memory() -> None:
    assert [together(6, 5e9, held) for held in (None, int(21e9), int(64e9), int(1e9))] == [6, 4, 6, 2]


# functions for a `Worker`


def steady(value: float) -> Round:
    return lambda: Measured({"speed": value, "process": float(os.getpid())})


def misses_a_package() -> Round:
    import a_package_that_nobody_has  # type: ignore[import-not-found]

    return a_package_that_nobody_has


def dies() -> Round:
    def one_round() -> Measured:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")

    return one_round


def sleeps() -> Round:
    time.sleep(60)
    raise AssertionError("not reached")


def test_a_process_can_lack_a_package_die_or_hang(plan: BenchPlan) -> None:
    contenders: list[Contender] = [
        Worker("steady", steady, (2.0,)),
        Worker("lacking", misses_a_package),
        Worker("dying", dies),
        hanging := Worker("hanging", sleeps),
    ]
    found = compare(plan, "x", [*contenders[:3]], [SPEED, Metric("process", "", "lower")], rounds=2)
    steady_one, lacking, dying = found.entries
    assert steady_one.values["speed"] == [2.0, 2.0]
    assert steady_one.values["process"][0] == steady_one.values["process"][1] != os.getpid()
    assert lacking.absent == "a_package_that_nobody_has cannot be imported"
    assert dying.absent == "its process ended with code -9"
    hanging.timeout = 0.2
    with pytest.raises(Absent, match=r"no answer after 0\.2 s"):
        hanging.start() or hanging.round()  # type: ignore[func-returns-value]
    process = hanging._process
    hanging.stop()
    assert process is not None
    assert process.exitcode == -9


def command(name: str, code: str, **more: object) -> Command:
    return Command(name, [sys.executable, "-S", "-c", code], **more)  # type: ignore[arg-type]


def test_commands_have_separate_times_and_peak_memory(plan: BenchPlan) -> None:
    contenders: list[Contender] = [
        command("small", "import time; time.sleep(0.3)"),
        command("large", "b = bytearray(300_000_000)", also=lambda seconds: {"speed": 1 / seconds}),
        command("failing", "import sys; print('first'); sys.exit('last line')"),
        Command("missing", ["a-program-that-nobody-has"]),
        Command("no module", [sys.executable, "-m", "a_package_that_nobody_has"]),
        command("hanging", "import time; time.sleep(60)", timeout=1.0),
    ]
    metrics = [Metric("seconds", "", "lower"), Metric("peak memory", "GB", "lower"), SPEED]
    small, large, failing, missing, no_module, hanging = compare(
        plan, "x", contenders, metrics, rounds=1, warmup=0
    ).entries
    assert small.values["seconds"][0] >= 0.3
    assert small.values["peak memory"][0] < 0.1, "the peak of this process, which has imported torch, is not inherited"
    assert 0.3 < large.values["peak memory"][0] < 0.45
    assert large.values["speed"][0] == pytest.approx(1 / large.values["seconds"][0])
    assert failing.absent == "exit code 1: last line"
    assert missing.absent is not None
    assert "exit code 127" in missing.absent
    assert no_module.absent == "exit code 1: python: No module named a_package_that_nobody_has"
    assert hanging.absent == "still running after 1 s"


def test_preparation_of_a_command_is_not_timed(plan: BenchPlan) -> None:
    calls: list[int] = []
    slow: Callable[[], None] = lambda: (calls.append(1), time.sleep(1.0))[0]  # noqa: E731
    metrics = [Metric("seconds", "", "lower")]
    (entry,) = compare(plan, "x", [command("quick", "pass", before=slow)], metrics, rounds=1, warmup=0).entries
    assert calls == [1]
    assert entry.values["seconds"][0] < 1.0


def test_the_command_line_has_no_paths_of_this_machine(tmp_path: Path) -> None:
    peers, data = {"nanogpt": Path("/home/me/nanoGPT")}, Path("/home/me/data")
    words = ["--peer", "nanogpt=/home/me/nanoGPT", "--data=/home/me/data", "--smoke", "--out", "/tmp/x"]
    plan = BenchPlan(tmp_path, peers=peers, data=data, command=words, out=Path("/tmp/x"))
    expected = "python -m benchmarks.run --peer nanogpt=PATH --data=DATA --smoke --out OUT"
    assert plan.command_line() == expected


def test_reasons_have_no_paths_of_this_machine(plan: BenchPlan) -> None:
    def make() -> Round:
        (plan.scratch / "absent").read_text()
        raise AssertionError("not reached")

    found: Comparison = compare(plan, "x", [InProcess("A", make)], [SPEED], 1)
    assert found.entries[0].absent == "FileNotFoundError: No such file or directory"


def test_sizes_by_device_and_smoke_test(tmp_path: Path) -> None:
    assert BenchPlan(tmp_path).pick(3, 1, 9) == 3
    assert BenchPlan(tmp_path, device="cuda").pick(3, 1, 9) == 9
    assert BenchPlan(tmp_path, device="cuda").pick(3, 1) == 3
    assert BenchPlan(tmp_path, device="cuda", smoke=True).pick(3, 1, 9) == 1
    assert BenchPlan(tmp_path).deadline == math.inf
