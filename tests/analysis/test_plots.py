"""What the figures show, read back from their axes."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from mopd_nemo.analysis import plots
from mopd_nemo.analysis.plots import save_figure, to_svg
from mopd_nemo.run.display import PHASES

STEPS = [{"step": s, "ever_solved": 10 * s, "loss": 1 / s, **{f"seconds/{p}": 1.0 for p in PHASES}} for s in (1, 2, 3)]
OTHERS = [row | {"loss": 2.0} for row in STEPS]
EVALS = [{"step": s, "mean@4": 0.5, "mean@4/low": 0.4, "mean@4/high": 0.6, "pass@4": 0.9, "maj@4": 0.7} for s in (0, 2)]


def labels(figure: plots.Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_one_run_is_not_named_and_several_are() -> None:
    alone = plots.curve({"a": STEPS}, "loss", "nats", {"loss": "divergence"})
    both = plots.curve({"a": STEPS, "b": OTHERS}, "loss", "nats", {"loss": "divergence"})
    assert labels(alone) == [] and labels(both) == ["a", "b"]
    two = plots.curve({"a": STEPS, "b": OTHERS}, "x", "y", {"loss": "divergence", "ever_solved": "solved"})
    assert labels(two) == ["a, divergence", "b, divergence", "a = b, solved"]


def test_equal_curves_do_not_hide_each_other() -> None:
    three = plots.curve({"a": STEPS, "b": OTHERS, "c": STEPS}, "loss", "nats", {"loss": "divergence"})
    assert labels(three) == ["a = c", "b"]
    assert three is not None
    first, second = three.axes[0].get_lines()
    assert first.get_color() != second.get_color() and first.get_linestyle() != second.get_linestyle()
    assert labels(plots.held_out({"a": EVALS, "b": EVALS, "c": EVALS[:1]})) == ["a = b, mean@4", "c, mean@4"]


def test_legend_leaves_the_axes_their_room() -> None:
    runs = {
        f"a run with quite a long name, number {i}": [{"step": 1, "loss": i}, {"step": 2, "loss": i}] for i in range(12)
    }
    figure = plots.curve(runs, "loss", "nats", {"loss": "loss"})
    assert figure is not None and len(labels(figure)) == 12
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().height * figure.get_figheight() > 2.0
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width and legend.y1 <= figure.axes[0].get_window_extent().y0


def test_held_out_shows_all_metrics_of_one_run_and_the_mean_of_several() -> None:
    assert labels(plots.held_out({"a": EVALS})) == ["95 % interval of the mean", "mean@4", "pass@4", "maj@4"]
    assert labels(plots.held_out({"a": EVALS, "b": EVALS[:1], "none yet": []})) == ["a, mean@4", "b, mean@4"]


def test_without_data_there_is_no_figure() -> None:
    assert plots.held_out({"a": []}) is None
    assert plots.phase_seconds({"a": []}) is None
    assert plots.curve({"a": STEPS}, "t", "u", {"unknown": "u"}) is None
    assert plots.ever_solved({"a": [{"step": 1}]}) is None


def test_ever_solved_has_what_was_tried_as_its_limit() -> None:
    figure = plots.ever_solved({"a": STEPS}, plots.problems_tried(last_step=3, per_step=16, total=40))
    assert labels(figure) == ["solved", "tried"]
    assert figure is not None
    assert np.asarray(figure.axes[0].get_lines()[1].get_xydata()).tolist() == [[1, 16], [2.5, 40], [3, 40]]
    assert plots.problems_tried(2, 16, 40) == [(1.0, 16.0), (2.0, 32.0)]


def test_phase_seconds_stacks_one_run_and_bars_several() -> None:
    one, two = plots.phase_seconds({"a": STEPS}), plots.phase_seconds({"a": STEPS, "b": STEPS[:1]})
    assert one is not None and len(one.axes[0].collections) == len(PHASES)
    assert two is not None and [t.get_text() for t in two.axes[0].get_yticklabels()] == ["a", "b"]
    assert max(
        bar.get_x() + bar.get_width() for bar in two.axes[0].patches if isinstance(bar, Rectangle)
    ) == pytest.approx(len(PHASES))
    single = plots.phase_seconds({"a": STEPS[:1]})
    assert single is not None and single.axes[0].get_yticklabels()[0].get_text() == "step 1"


def cell(mean: float | None) -> dict[str, float | None]:
    return {"mean": mean, "low": None if mean is None else mean - 0.1, "high": None if mean is None else mean + 0.1}


def test_metric_grid_and_bars_leave_out_what_is_not_there() -> None:
    table = {"x": {"m": cell(0.5), "n": cell(None)}, "y": {"m": cell(0.7), "n": cell(None)}}
    assert plots.metric_grid(table, {"m": "M", "n": "N"}, {"x": "X", "y": "Y"}, {}, ["y"], "t") is None
    figure = plots.metric_grid(
        {name: {"m": row["m"], "k": row["m"]} for name, row in table.items()},
        {"m": "M", "k": "K"}, {"x": "X", "y": "Y"}, {"m": 0.5, "k": -9.0}, ["y"], "t",
    )  # fmt: skip
    assert figure is not None and [axes.get_title(loc="left") for axes in figure.axes] == ["M", "K"]
    dotted = [any(line.get_linestyle() == ":" for line in axes.get_lines()) for axes in figure.axes]
    assert dotted == [True, False], "a chance level far from the data would squeeze it"
    shown = plots.bars(table, {"m": "M", "n": "N"}, "t")
    assert shown is not None
    assert [axes.get_title(loc="left") for axes in shown.axes if axes.get_visible()] == ["M"]


def test_figures_are_written_as_vectors_and_pixels_and_share_a_page(tmp_path: Path) -> None:
    figure = plots.curve({"a": STEPS}, "loss", "nats", {"loss": "divergence"})
    assert figure is not None
    vector, pixels = save_figure(figure, tmp_path / "loss.v1")
    assert (vector.name, pixels.name) == ("loss.v1.pdf", "loss.v1.png")
    assert vector.read_bytes()[:5] == b"%PDF-" and pixels.read_bytes()[1:4] == b"PNG"
    one, two = to_svg(figure), to_svg(figure)
    ids = [{part.split('"')[0] for part in text.split('id="')[1:]} for text in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    used = {part.split('"')[0] for part in one.split('href="#')[1:]}
    assert used <= ids[0]
