"""Draw the accuracy over the distance of a digit from the centre, from the results of shifts.yaml.

    python experiments/shifts.py docs/results.json docs/images/shifts.png

There is a panel for each stem and a line for each mixer, with a band of one standard deviation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg

from translution.apps.experiments.figures import COLOURS, STYLE, legend, line, panels
from translution.utils.files import write_whole

MIXERS = {
    "learned positions": COLOURS["attention"],
    "relative bias": COLOURS["bias"],
    "Translution v, rotary": COLOURS["translution"],
}
STEMS = {"": "patches", ", overlapping": "overlapping patches", ", convolutional": "convolutions"}
PATCH = 12  # pixels


def draw(content: dict[str, Any], file: Path) -> None:
    """Draw the panels from the section "shifts" of results.json."""
    values = {
        (row["row"], int(row["tested"])): row["values"]
        for row in content["rows"]
        if row["tested"].isdigit()
    }
    shifts = sorted({shift for _, shift in values})
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(1, len(STEMS), (11, 3.6), sharey=True)
        for panel, (suffix, title) in zip(axes.flat, STEMS.items(), strict=True):
            for mixer, colour in MIXERS.items():
                by_shift = [values[mixer + suffix, shift] for shift in shifts]
                seeds = min(map(len, by_shift))
                runs = [[seen[i] for seen in by_shift] for i in range(seeds)]
                line(panel, mixer, colour, shifts, runs, marked=True)
            panel.set(title=title, xlabel="distance from the centre, pixels", ylim=(0, 100))
            panel.set_xticks(range(0, max(shifts) + 1, PATCH // 2))
        axes.flat[0].set_ylabel("accuracy, %")
        legend(figure, axes.flat[0])
        FigureCanvasAgg(figure)
        write_whole(file, lambda to: figure.savefig(to, dpi=120, format="png", facecolor="white"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    draw(json.loads(given.results.read_text("utf-8"))["shifts"], given.picture)
