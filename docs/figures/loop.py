"""Draw the loop of one training step: `python docs/figures/loop.py` writes its two SVGs, for light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 960, 396


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours of one theme."""

    text: str
    faint: str
    line: str
    box: str
    success: str
    failure: str
    target: str


PALETTES = {
    "light": Palette("#1f2328", "#59636e", "#818b98", "#f6f8fa", "#1a7f37", "#cf222e", "#0969da"),
    "dark": Palette("#e6edf3", "#9198a1", "#7d8590", "#161b22", "#3fb950", "#f85149", "#4493f8"),
}


def draw(palette: Palette) -> str:
    """The figure as SVG."""
    p = palette
    parts = [
        _box(p, 20, 80, 130, 70, "Problem", ["prompt x"]),
        _box(p, 200, 60, 200, 110, "Student", ["samples G rollouts"]),
        _box(p, 450, 60, 200, 110, "Verifier", ["judges each rollout"]),
        _box(p, 700, 60, 240, 110, "Peers of one target", ["successes and a failure, not itself"]),
        _box(p, 700, 280, 240, 78, "Teacher", ["reads problem + peers,", "scores the target: Q at each token"]),
        _box(p, 450, 280, 200, 78, "Divergence", ["D(P, Q) at every token", "of the target"]),
        _box(p, 200, 280, 200, 78, "Update", ["one optimiser step", "on all targets"]),
        *_rollouts(p, 215, 128, [p.line] * 4),
        *_rollouts(p, 465, 128, [p.success, p.failure, p.success, p.success], marks="✓✗✓✓", target=2),
        *_rollouts(p, 758, 128, [p.success, p.success, p.failure], marks="✓✓✗"),
        _arrow(p, "M150 115 H194"),
        _arrow(p, "M400 115 H444"),
        _arrow(p, "M650 115 H694"),
        _arrow(p, "M820 170 V274"),
        _arrow(p, "M700 319 H656"),
        _arrow(p, "M450 319 H406"),
        _arrow(p, "M270 280 V176"),
        _arrow(p, "M360 170 V225 H530 V274"),
        _label(p, 372, 217, "P: student reads the problem alone", anchor="start"),
        _label(p, 262, 250, "new weights", anchor="end"),
        _arrow(p, "M300 358 V384 H820 V364", dashed=True),
        _label(p, 560, 377, "the teacher follows: moving average of the student"),
        _label(p, 480, 28, "One step of MOPD, for one problem", size=16, fill=p.text, weight=600),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        "<title>One step of MOPD: the student samples rollouts, the verifier judges them, the teacher reads peers of a "
        "target and scores it, the student follows.</title>\n"
        f'<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{p.line}"/></marker></defs>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _box(p: Palette, x: int, y: int, width: int, height: int, title: str, lines: list[str]) -> str:
    middle = x + width / 2
    rows = [_label(p, middle, y + 46 + 18 * i, line) for i, line in enumerate(lines)]
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{p.box}" stroke="{p.line}"/>'
        + _label(p, middle, y + 25, title, size=15, fill=p.text, weight=600)
        + "".join(rows)
    )


def _rollouts(p: Palette, x: int, y: int, colours: list[str], marks: str = "", target: int | None = None) -> list[str]:
    """Small responses side by side; the target has a frame."""
    parts = []
    for i, colour in enumerate(colours):
        left = x + 44 * i
        if target == i:
            parts.append(
                f'<rect x="{left - 4}" y="{y - 4}" width="44" height="36" rx="5" fill="none" stroke="{p.target}" '
                'stroke-width="2"/>'
            )
            parts.append(_label(p, left + 18, y + 58, "target", fill=p.target))
        parts += [
            f'<rect x="{left}" y="{y + 3 + 10 * row}" width="{(36, 30, 22)[(row + i) % 3]}" height="4" rx="2" '
            f'fill="{colour}" opacity="{0.35 if marks else 0.9}"/>'
            for row in range(3)
        ]
        if marks:
            parts.append(_label(p, left + 18, y + 21, marks[i], size=18, fill=colour, weight=700))
    return parts


def _arrow(p: Palette, path: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{p.line}" stroke-width="1.5"{dash} marker-end="url(#head)"/>'


def _label(
    p: Palette, x: float, y: float, text: str, size: int = 12, fill: str = "", weight: int = 400, anchor: str = "middle"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{fill or p.faint}" '
        f'text-anchor="{anchor}">{text}</text>'
    )


if __name__ == "__main__":
    for name, palette in PALETTES.items():
        Path(__file__).with_name(f"loop-{name}.svg").write_text(draw(palette), encoding="utf-8")
