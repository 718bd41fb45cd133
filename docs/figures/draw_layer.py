"""Draw the layer and its exchange over context ranks: `python docs/figures/draw_layer.py` writes layer.svg beside this file.

The SVG is committed. The same versions of matplotlib and its fonts give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY, FAINT = "#24292f", "#8c959f", "#eaeef2"
SLOT, SLOT_LIGHT = "#0f766e", "#a7d7d0"
WINDOW, WINDOW_LIGHT = "#c2570c", "#fbd3a7"
SOFTMAX = "#4c3a8f"

STEP = 0.5  # from one token to the next
SIDE = 0.42  # of a token


def box(axes: Axes, x: float, y: float, width: float, height: float, face: str, edge: str, rounding: float = 0.05) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.2))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0.0, width: float = 1.8) -> None:
    curve = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=curve, arrowstyle="-|>", mutation_scale=13, color=color, linewidth=width, shrinkA=0, shrinkB=0
        )
    )


def text(axes: Axes, x: float, y: float, words: str, color: str = INK, size: float = 10, at: str = "center", bold: bool = False) -> None:
    axes.text(x, y, words, color=color, fontsize=size, ha=at, va="center", fontweight="bold" if bold else "normal", linespacing=1.35)


def draw_layer(axes: Axes) -> None:
    """Above: one KV head reads its slots and its window with one softmax."""
    text(axes, 0.1, 7.05, "One layer: what a query sees", at="left", size=12.5, bold=True)
    tokens, window, first, y = 16, 5, 0.6, 4.55
    start_of_window = tokens - window
    for i in range(tokens):
        in_window = i >= start_of_window
        box(axes, first + i * STEP, y, SIDE, SIDE, WINDOW_LIGHT if in_window else FAINT, WINDOW if in_window else GREY)
    last = first + (tokens - 1) * STEP + SIDE / 2
    text(axes, last, y + SIDE / 2, "t", WINDOW, 10.5, bold=True)
    left, right = first + start_of_window * STEP, last + SIDE / 2
    text(axes, (left + right) / 2, y - 0.28, "window: the last W tokens, exactly", WINDOW, 10)
    text(axes, (first + left) / 2 - 0.05, y - 0.28, "tokens that have left the window", GREY, 10)

    slots, slot_x, slot_y = 4, 2.35, 6.0
    for i in range(slots):
        box(axes, slot_x + i * 0.62, slot_y, 0.54, 0.42, SLOT_LIGHT, SLOT)
    text(axes, slot_x - 0.15, slot_y + 0.21, "M slots", SLOT, 11, at="right", bold=True)
    leaving = first + (start_of_window - 1) * STEP + SIDE / 2
    arrow(axes, (leaving, y + SIDE + 0.04), (slot_x + slots * 0.62 - 0.35, slot_y - 0.06), SLOT, bend=0.22)
    text(axes, 4.9, 5.47, "a token that leaves the window is written\ninto the slots; gates decay what they hold", SLOT, 9.5, at="right")

    soft_x, soft_y, width = 9.4, 5.2, 2.2
    box(axes, soft_x, soft_y, width, 1.1, "#efecfa", SOFTMAX, 0.1)
    text(axes, soft_x + width / 2, soft_y + 0.55, "ONE softmax\nover M + W rows", SOFTMAX, 10.5, bold=True)
    arrow(axes, (slot_x + slots * 0.62 + 0.02, slot_y + 0.25), (soft_x - 0.05, soft_y + 0.85), SLOT, bend=-0.08)
    arrow(axes, (right + 0.08, y + SIDE / 2), (soft_x + 0.6, soft_y - 0.05), WINDOW, bend=0.28)
    arrow(axes, (last, y + SIDE + 0.04), (soft_x - 0.05, soft_y + 0.4), INK, bend=-0.2)
    text(axes, 8.35, 5.42, "query t", INK, 10, at="right")
    arrow(axes, (soft_x + width, soft_y + 0.55), (soft_x + width + 0.5, soft_y + 0.55), SOFTMAX)
    text(axes, soft_x + width + 1.0, soft_y + 0.55, "output\nof token t", INK, 10)


def draw_exchange(axes: Axes) -> None:
    """Below: what one rank tells the others so that each continues from the memory before its shard: slots, and W tokens in front."""
    text(axes, 0.1, 3.5, "Context parallelism: tokens stay in order, each rank hears what came before it", at="left", size=12.5, bold=True)
    y, width, gap, count, window = 1.15, 4.1, 0.25, 6, 2
    step, side = 0.41, 0.34
    edges = [0.4 + rank * (width + gap) for rank in range(3)]
    first_halo, first_token = 0.76, 1.62  # behind the slots, behind the halo
    for rank, x in enumerate(edges):
        box(axes, x, y - 0.18, width, 0.7, "white", GREY, 0.08)
        for column in range(2):
            for row in range(2):
                face, edge = (SLOT_LIGHT, SLOT) if rank else ("white", SLOT_LIGHT)
                box(axes, x + 0.17 + column * 0.24, y - 0.05 + row * 0.24, 0.19, 0.19, face, edge, 0.03)
        for i in range(window if rank else 0):
            box(axes, x + first_halo + i * step, y, side, side, "white", WINDOW)
        for i in range(count):
            kept = i >= count - window
            box(axes, x + first_token + i * step, y, side, side, WINDOW_LIGHT if kept else FAINT, WINDOW if kept else GREY)
        span = ("tokens 0 … L-1", "tokens L … 2L-1", "tokens 2L … 3L-1")[rank]
        text(axes, x + 2.38, y - 0.43, f"rank {rank}: {span}", INK, 10)
        text(axes, x + (0.6 if rank else 0.1), y + 0.72, "slots before the shard" if rank else "slots: empty on rank 0", SLOT, 9, at="left")
    top, bottom = y + 0.56, y - 0.22
    slots = [x + 0.38 for x in edges]
    arrow(axes, (edges[0] + 3.4, top), (slots[1], top), SLOT, -0.28)
    arrow(axes, (edges[0] + 2.5, top), (slots[2] + 0.14, top), SLOT, -0.3)
    arrow(axes, (edges[1] + 3.4, top), (slots[2] - 0.12, top), SLOT, -0.28)
    words = "summary: what a shard did to the slots, to all ranks behind it. Its size does not grow with the context"
    text(axes, 6.8, 3.05, words, SLOT, 10)
    for source in (0, 1):
        sent = edges[source] + first_token + (count - window / 2) * step
        arrow(axes, (sent, bottom), (edges[source + 1] + first_halo + window * step / 2, bottom), WINDOW, 0.42)
    text(axes, 6.8, 0.08, "halo: the last W tokens, to the next rank, which holds them in front of its own", WINDOW, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("layer.svg"), help="SVG or PNG (default: %(default)s)")
    output = parser.parse_args().output
    plt.rcParams.update({"svg.hashsalt": "nha", "svg.fonttype": "path", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(12.6, 6.9))
    axes.set(xlim=(0, 13.6), ylim=(-0.25, 7.35))
    axes.axis("off")
    draw_layer(axes)
    draw_exchange(axes)
    figure.savefig(
        output,
        bbox_inches="tight",
        pad_inches=0.12,
        facecolor="white",
        dpi=110,
        metadata={"Date": None, "Creator": None} if output.suffix == ".svg" else None,
    )
    plt.close(figure)


if __name__ == "__main__":
    main()
