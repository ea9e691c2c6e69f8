import io

from rich.console import Console

from mopd_nemo.run.display import Display

STEP = {"loss": 0.5, "success_rate": 0.25, "signal": 1.0, "response/tokens": 40.0, "seconds/step": 2.0}


def test_plain_output_has_a_line_a_step() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=200), num_steps=4) as display:
        display.step(1, STEP)
        display.step(2, STEP)
        display.evaluation(2, {"mean@8": 0.5, "mean@8/low": 0.4, "mean@8/high": 0.6, "pass@8": 0.9})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 1/4  loss 0.5000  success 25.0%  2.0 s  ") and lines[0].endswith(" left")
    assert lines[2] == "held out, step 2: mean@8 50.0% (40.0% to 60.0%)  pass@8 90.0%"


def test_live_panel_shows_step_loss_success_and_time_left() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, record=True)
    display = Display(console, num_steps=4)
    display.step(1, STEP)
    display.phase("generate")
    display.progress(0.5)
    display.notice("Stopping after this step")
    console.print(display._render())
    text = console.export_text()
    for part in ("step 1/4", "left", "generate 50%", "0.5000", "25.0%", "Stopping after this step"):
        assert part in text


def test_a_high_and_wide_terminal_shows_more_steps_and_more_of_each() -> None:
    more = {"learning_rate": 1e-4, "tokens_per_second": 1234.0, "student/entropy": 0.25}
    shown = {}
    for width, height in ((80, 24), (160, 50)):
        console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, record=True)
        display = Display(console, num_steps=90)
        for step in range(1, 61):
            display.step(step, STEP | more)
        console.print(display._render())
        shown[width] = console.export_text()
        lines = shown[width].splitlines()
        assert len(lines) < height and max(map(len, lines)) <= width
    assert "51 " in shown[80] and " 50 " not in shown[80] and "learning rate" not in shown[80]
    assert "25 " in shown[160] and "0.0001" in shown[160] and "1234" in shown[160] and "0.250" in shown[160]


def test_the_last_steps_stay_on_the_screen() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Display(console, num_steps=20) as display:
        for step in range(1, 13):
            display.step(step, STEP)
    assert isinstance(console.file, io.StringIO)
    left = console.file.getvalue().rpartition("success")[2]
    assert " 5 " in left and " 12 " in left and " 4 " not in left
