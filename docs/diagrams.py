"""`python -m docs.diagrams --write` draws the architecture's diagrams into docs/images.

The layers come from the import contract in pyproject.toml, so the picture shows what `make lint`
enforces. All words stand on filled boxes or in a middle grey: one file serves light and dark pages.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"

GREY = "#7d8590"
COLOURS = {
    "commands": "#5b4a9e",
    "training": "#2f6f9f",
    "reading": "#4b6584",
    "model": "#1f7a6d",
    "engine": "#2d7d46",
    "ops": "#a0521c",
    "maths": "#8a3b5c",
}
# Package: its colour group, and what it holds.
PACKAGES = {
    "__main__": ("commands", "python -m fastperturb"),
    "cli": ("commands", "the command line and the doctor"),
    "study": ("commands", "trains every method, judges gains"),
    "rank": ("commands", "ask, measure, combine, learn"),
    "eval": ("commands", "likelihood and continuations"),
    "demo": ("commands", "the synthetic language"),
    "integrations": ("training", "PerturbTrainer and other frameworks"),
    "train": ("training", "options, methods, the loop, its state, processes"),
    "data": ("reading", "from files to packed blocks"),
    "report": ("reading", "figures and bootstrap"),
    "runs": ("reading", "folders, option files, provenance"),
    "model": ("model", "what wrap() returns: the public methods"),
    "checkpoint": ("model", "save, load, atomic files"),
    "diagnostics": ("model", "score, gradient noise, errors"),
    "engine": ("engine", "inside one call: batch, samples, plans, loss, generate"),
    "ops": ("ops", "the registered ops, and which implementation runs"),
    "kernels": ("ops", "Triton for GPUs; csrc holds C++ for CPUs"),
    "estimators": ("maths", "from log-probs to value and weights"),
    "transforms": ("maths", "T(e, z)"),
    "noise": ("maths", "the contract: z of (seed, sample, row, position)"),
    "config": ("maths", "PerturbConfig"),
    "version": ("maths", "the version"),
}
# A step: colour group, name, what happens, the file that does it, the shape of what goes on.
STAGES = (
    ("maths", "token ids, labels", "seed, row ids, positions", "model/wrapper.py", "[B, T]"),
    ("engine", "embedding", "the model's own E(x), once", "engine/inputs.py", "[B, T, D]"),
    ("ops", "ops.perturb_embed", "T(E(x), z)", "engine/continuous.py", "[M, B, T, D]"),
    ("engine", "trunk", "the model's own layers", "engine/trunk.py", "[M, B, T, D]"),
    ("ops", "ops.linear_logprob", "logits by blocks", "engine/forward.py", "l [M, B, T], fp32"),
    ("ops", "ops.combine", "value, weights, effective samples", "engine/loss.py", "loss"),
    ("model", "PerturbedOutput", "loss, log_marginal, ess, shift", "engine/forward.py", ""),
)
PLANS = (
    *("The plan", "(engine/plans.py)", "repeats this part.", "", "batched: all M at once"),
    *("", "chunked: some at a time,", "each again in the", "backward", ""),
    *("resample: all M without", "gradient, then K of", "them with it"),
)
BACKWARD = (
    "One ordinary backward.",
    "Only l outlives a chunk.",
    "z is made again",
    "from its keys.",
)
# What the picture leaves out: nothing to learn from them.
HIDDEN = ("__main__", "version")


# The lines of a box: a name, what it is, and the file.
_STYLES = (
    'font-weight="700" font-size="15"',
    'font-size="12.5"',
    'font-size="11.5" font-family="ui-monospace, monospace" fill-opacity="0.85"',
)


class Drawing:
    """An SVG that grows by boxes, arrows and words."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(
        self, x: int, y: int, width: int, height: int, colour: str, lines: Sequence[str]
    ) -> None:
        """A filled box: its first line is bold, the others are smaller."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}"/>'
        )
        middle = y + height / 2 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            style = _STYLES[number]
            self.parts.append(
                f'<text x="{x + width / 2:g}" y="{middle + 18 * number + 5:g}" fill="#ffffff" '
                f'text-anchor="middle" {style}>{escape(line)}</text>'
            )

    def words(self, x: int, y: int, line: str, *, anchor: str = "start") -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" fill="{GREY}" font-size="12.5" text-anchor="{anchor}">'
            f"{escape(line)}</text>"
        )

    def arrow(self, x1: int, y1: int, x2: int, y2: int, *, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{GREY}" stroke-width="2"'
            f'{dash} marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker>'
            "</defs>"
        )
        return "\n".join(
            [head, f"<title>{escape(self.title)}</title>", marker, *self.parts, "</svg>", ""]
        )


def layers() -> list[list[str]]:
    """Return the packages of each layer, top first, as the import contract names them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    [contract] = [rule for rule in contracts if rule["type"] == "layers"]
    named = [
        [name.strip(" ()") for name in layer.replace(":", "|").split("|")]
        for layer in contract["layers"]
    ]
    return [shown for layer in named if (shown := [name for name in layer if name not in HIDDEN])]


def packages() -> str:
    """Draw the layers: imports point down only."""
    rows = layers()
    left, wide, high, gap = 70, 660, 48, 8
    drawing = Drawing(left + wide, len(rows) * (high + gap), "The packages of FastPerturb")
    for number, layer in enumerate(rows):
        y, width = number * (high + gap), (wide - gap * (len(layer) - 1)) // len(layer)
        for column, name in enumerate(layer):
            group, about = PACKAGES[name]
            x = left + column * (width + gap)
            drawing.box(x, y, width, high, COLOURS[group], [name, about])
    bottom = len(rows) * (high + gap) - gap
    drawing.arrow(28, 16, 28, bottom - 4)
    drawing.parts.append(
        f'<text x="18" y="{bottom / 2:g}" fill="{GREY}" font-size="12.5" text-anchor="middle" '
        f'transform="rotate(-90 18 {bottom / 2:g})">imports point down</text>'
    )
    return drawing.svg()


def step() -> str:
    """Draw one training step, from token ids to the gradient."""
    drawing = Drawing(760, 766, "One training step")
    x, wide, high, pitch = 190, 350, 72, 112
    middle, right = x + wide // 2, x + wide + 40
    tops = [10 + pitch * number for number in range(len(STAGES))]
    for top, (group, *lines, shape) in zip(tops, STAGES, strict=True):
        drawing.box(x, top, wide, high, COLOURS[group], lines)
        if shape:
            drawing.arrow(middle, top + high, middle, top + pitch - 2)
            drawing.words(middle + 10, top + high + (32 if shape.startswith("l ") else 17), shape)
    first, last = tops[2] - 14, tops[4] + high + 14
    drawing.parts.append(
        f'<rect x="{x - 16}" y="{first}" width="{wide + 32}" height="{last - first}" rx="10" '
        f'fill="none" stroke="{GREY}" stroke-width="1.5" stroke-dasharray="6 4"/>'
    )
    drawing.arrow(right, tops[6] + high // 2, right, tops[1] + high // 2, dashed=True)
    for number, line in enumerate(PLANS):
        drawing.words(4, first + 16 + 19 * number, line)
    for number, line in enumerate(BACKWARD):
        drawing.words(right + 12, tops[3] + 19 * number, line)
    return drawing.svg()


DIAGRAMS = {"packages.svg": packages, "step.svg": step}


def outdated() -> list[str]:
    """Return the diagrams that are not what this script draws."""
    return [
        name
        for name, draw in DIAGRAMS.items()
        if not (IMAGES / name).is_file() or (IMAGES / name).read_text(encoding="utf-8") != draw()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.diagrams")
    parser.add_argument("--write", action="store_true", help="draw the diagrams that differ")
    options = parser.parse_args()
    names = outdated()
    for name in names:
        if options.write:
            (IMAGES / name).write_text(DIAGRAMS[name](), encoding="utf-8")
        print(f"{'drew' if options.write else 'differs from the code:'} docs/images/{name}")
    if names and not options.write:
        print("draw them again by: python -m docs.diagrams --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
