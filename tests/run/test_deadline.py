from mopd_nemo.run.deadline import REMEMBERED, Deadline


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def work(deadline: Deadline, clock: Clock, name: str, seconds: float) -> None:
    with deadline.timed(name):
        clock.now += seconds


def test_a_step_starts_only_if_it_and_a_save_would_end_in_time() -> None:
    clock = Clock()
    deadline = Deadline(100, clock)
    work(deadline, clock, "step", 30)
    work(deadline, clock, "save", 10)
    work(deadline, clock, "evaluation", 21)  # now 61 of 100
    assert not deadline.leaves_time_for("step") and deadline.leaves_time_for("evaluation")
    clock.now = 60
    assert deadline.leaves_time_for("step")


def test_what_was_never_done_counts_as_nothing_until_the_deadline_is_there() -> None:
    clock = Clock()
    deadline = Deadline(10, clock)
    clock.now = 10
    assert deadline.leaves_time_for("step")
    clock.now = 10.1
    assert not deadline.leaves_time_for("step")


def test_the_longest_of_the_latest_times_counts() -> None:
    clock = Clock()
    deadline = Deadline(3600, clock)
    work(deadline, clock, "step", 600)
    for _ in range(REMEMBERED):
        work(deadline, clock, "step", 10)
    clock.now = 3589
    assert deadline.leaves_time_for("step")
    work(deadline, clock, "step", 12)
    clock.now = 3589
    assert not deadline.leaves_time_for("step")
