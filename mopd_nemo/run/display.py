"""Progress on the terminal, as a live panel or as plain lines, and the time of each phase."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mopd_nemo.terminal import in_words, plain

PHASES = ("generate", "reward", "context", "score", "update", "other")
"""Parts of a step's time; `other` is the time outside all phases."""
WARM_UP_STEPS = 5
"""First steps, which load and compile. Mean times leave them out, as in the paper's appendix E, if there are more."""
_SHOWN_STEPS = 8
"""Steps in the panel of a low terminal, and of those that stay on the screen at the end."""
_OTHER_LINES = 14
"""Of a high terminal, which are not steps."""
_COLUMNS = (
    ("loss", "loss", ".4f"),
    ("success", "success_rate", ".1%"),
    ("with signal", "signal", ".0%"),
    ("tokens", "response/tokens", ".0f"),
    ("seconds", "seconds/step", ".1f"),
)
_MORE_COLUMNS = (
    ("cut", "response/unfinished", ".1%"),
    ("entropy", "student/entropy", ".3f"),
    ("gradient", "grad_norm", ".3g"),
    ("learning rate", "learning_rate", ".2g"),
    ("tokens/s", "tokens_per_second", ".0f"),
)
"""Heading, metric and form of the steps' table; the second ones where there is room."""
_WIDE = 120


class Display:
    """Shows the progress of a run. Use as a context manager.

    Args:
        num_steps: last step of the run.
    """

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._first_step = self._step = 0
        self._phase = "starting"
        self._fraction: float | None = None
        self._notice = ""
        self._recent: deque[Mapping[str, float]] = deque(maxlen=200)
        self._started = time.monotonic()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def resume(self, step: int) -> None:
        """`step` steps are done already."""
        self._first_step = self._step = step

    def __enter__(self) -> Display:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
            if self._recent:
                self._console.print(self._steps_table(_SHOWN_STEPS))

    def phase(self, name: str) -> None:
        """A phase begins."""
        self._phase, self._fraction = name, None

    def progress(self, fraction: float) -> None:
        """The fraction of the phase that is done."""
        self._fraction = fraction

    def notice(self, text: str) -> None:
        """A line that stays under the panel."""
        self._notice = text
        if not self._console.is_terminal:
            self.say(text)

    def say(self, text: str, style: str = "") -> None:
        """A line that stays on the screen and in the log."""
        self._console.print(plain(in_words(text, self._console), style), soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self._step = step
        self._recent.append({"step": step, **metrics})
        if not self._console.is_terminal:
            loss = f"{metrics['loss']:.4f}" if "loss" in metrics else "-"
            self._console.print(
                f"step {step}/{self._num_steps}  loss {loss}  "
                f"success {metrics['success_rate']:.1%}  {metrics['seconds/step']:.1f} s  {self._time_left()} left"
            )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done; its line stays on the screen."""
        mean = next(name for name in metrics if name.startswith("mean@") and "/" not in name)
        best = mean.replace("mean", "pass")
        interval = f"({metrics[f'{mean}/low']:.1%} to {metrics[f'{mean}/high']:.1%})"
        line = Text.assemble(
            *((f"held out, step {step}", "bold"), f": {mean} {metrics[mean]:.1%} ", (interval, "dim")),
            f"  {best} {metrics[best]:.1%}",
        )
        self._console.print(line)

    def _time_left(self) -> str:
        done = self._step - self._first_step
        if done == 0:
            return "?"
        seconds = (time.monotonic() - self._started) / done * (self._num_steps - self._step)
        return str(timedelta(seconds=round(seconds)))

    def _render(self) -> RenderableType:
        header = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._num_steps, completed=self._step, width=30)
        header.add_row(f"step {self._step}/{self._num_steps}", bar, f"{self._time_left()} left", self._phase_text())
        parts: list[RenderableType] = [header]
        if self._recent:
            parts.append(self._steps_table(max(_SHOWN_STEPS, self._console.height - _OTHER_LINES)))
        if self._notice:
            parts.append(plain(in_words(self._notice, self._console), "yellow"))
        return Group(*parts)

    def _phase_text(self) -> Text:
        done = "" if self._fraction is None else f" {self._fraction:.0%}"
        return Text(f"{self._phase}{done}", style="cyan")

    def _steps_table(self, most: int) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        columns = _COLUMNS + (_MORE_COLUMNS if self._console.width >= _WIDE else ())
        for name in ("step", *(heading for heading, _, _ in columns)):
            table.add_column(name, justify="right")
        for row in list(self._recent)[-most:]:
            cells = (format(row[name], form) if name in row else "-" for _, name, form in columns)
            table.add_row(str(int(row["step"])), *cells)
        return table


class PhaseTimer:
    """Times the phases of one step; the time outside all phases is `other`."""

    def __init__(self, on_phase: Callable[[str], None] = lambda _: None) -> None:
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._on_phase = on_phase

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._on_phase(phase)
        started = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """`seconds/PHASE` for every phase, `seconds/step`, which is their sum, and the CPU time of this process."""
        total = time.perf_counter() - self._started
        seconds = self._seconds | {"other": total - sum(self._seconds.values())}
        cpu = time.process_time() - self._cpu_started
        times = seconds | {"step": total, "cpu": cpu}
        return {f"seconds/{name}": value for name, value in times.items()}
