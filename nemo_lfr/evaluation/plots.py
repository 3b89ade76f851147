"""Draw the plots of the HTML report as SVG: quality against bit rate, distributions, and spectrograms.

Colors are set by the CSS classes `c0` to `c5` of the page, so the plots follow the dark mode of the page.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from nemo_lfr.evaluation import tables
from nemo_lfr.evaluation.metrics import Metric, NotMeasured
from nemo_lfr.evaluation.results import Evaluation, Result

WIDTH = 340  # width of a plot in units of its view box; on a phone, a unit is about one pixel
LEFT, RIGHT = 50, 12  # margins to the left and right of the axes
ROW = 34  # height of the row of a codec in a plot of distributions
NUM_COLORS = 6
MAX_LABEL = 48  # maximum number of characters of a codec's name that fit into a plot
SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",  # circle
    "M-4 -4h8v8h-8z",  # square
    "M0 -5.5L5.5 0L0 5.5L-5.5 0z",  # diamond
    "M0 -5L5 4h-10z",  # triangle
    "M0 5L5 -4h-10z",  # triangle that points down
)
SPECTROGRAM_SIZE = 512  # samples in a window
SPECTROGRAM_COLUMNS = 480  # approximate maximum, since a plot is at most 430 pixels wide
DECIBELS = (-105, -30)  # range of a spectrogram's colors


def metric_plots(evaluation: Evaluation, keys: Sequence[str], metrics: Mapping[str, Metric]) -> list[dict[str, str]]:
    """Draw a figure for each metric that has values and a direction (higher or lower is better).

    Args:
        evaluation: results to draw.
        keys: keys of the recordings to include.
        metrics: descriptions of the metrics by name.

    Returns:
        For each figure, a dictionary with the keys "title" and "svg". The figures leave out the codec "original".
    """
    codecs = [result for result in evaluation.results if result.name != "original"]
    means = [tables.means(result, keys) for result in codecs]
    figures = []
    for name, metric in metrics.items():
        shown = [index for index, own in enumerate(means) if name in own]
        if metric.better is None or not shown:
            continue
        rates = {index: tables.kilobits(codecs[index], keys) for index in shown}
        drawings = []
        if len({f"{rate:.1f}" for rate in rates.values()}) > 1:
            drawings.append(_rate_plot(name, rates, {index: means[index][name] for index in shown}))
        values = {index: _values(codecs[index], keys, name) for index in shown}
        drawings.append(_distribution(name, {index: codecs[index].name for index in shown}, values))
        unit = f" ({metric.unit})" if metric.unit else ""
        figures.append({"title": f"{name}{unit}, {metric.better} is better", "svg": "\n".join(drawings)})
    return figures


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` evenly spaced round values in a range, for the ticks of an axis.

    Args:
        low: start of the range.
        high: end of the range, greater than `low`.
        count: approximate number of ticks.
    """
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = magnitude * next(factor for factor in (1, 2, 5, 10) if factor * magnitude >= 0.7 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


def _values(result: Result, keys: Sequence[str], name: str) -> list[float]:
    values = (result.values.get(key, {}).get(name, NotMeasured()) for key in keys)
    return [value for value in values if not isinstance(value, NotMeasured)]


def _padded(low: float, high: float) -> tuple[float, float]:
    """Return a range with a margin on both sides, even if `low` and `high` are equal or differ only by rounding."""
    spread = 0.0 if math.isclose(low, high) else high - low
    margin = 0.06 * spread or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _svg(label: str, height: float, content: Sequence[str]) -> str:
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height:g}">{"".join(content)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _marker(index: int, x: float, y: float) -> str:
    return f'<path class="{_color(index)}" transform="translate({x:.1f} {y:.1f})" d="{SHAPES[index % len(SHAPES)]}"/>'


def _color(index: int) -> str:
    return f"c{index % NUM_COLORS}"


def _rate_plot(name: str, rates: Mapping[int, float], means: Mapping[int, tables.Mean]) -> str:
    """Draw a metric against the bit rate, which has a logarithmic axis, and return the SVG.

    Args:
        name: name of the metric.
        rates: bit rate in kbit/s by index of the codec.
        means: mean of the metric and its confidence interval by index of the codec.
    """
    top, height = 8, 190
    bottom = height - 34
    low, high = _padded(min(mean.low for mean in means.values()), max(mean.high for mean in means.values()))
    start, end = _padded(*(math.log(limit(rates.values())) for limit in (min, max)))

    def place_x(rate: float) -> float:
        return LEFT + 8 + (math.log(rate) - start) / (end - start) * (WIDTH - LEFT - RIGHT - 16)

    def place_y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    content = []
    for tick in nice_ticks(low, high):
        content += [_line(LEFT, place_y(tick), WIDTH - RIGHT, place_y(tick), "grid")]
        content += [_text(LEFT - 6, place_y(tick) + 4, f"{tick:.4g}", "end")]
    last_label = -math.inf
    for rate in sorted(rates.values()):
        if place_x(rate) - last_label > 30:  # otherwise the labels would overlap
            last_label = place_x(rate)
            content += [_line(last_label, bottom, last_label, bottom + 4, "axis")]
            content += [_text(last_label, bottom + 16, f"{rate:.3g}")]
    content += [_line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"), _text((LEFT + WIDTH) / 2, height - 4, "kbit/s")]
    for index, mean in means.items():
        x = place_x(rates[index])
        content += [_line(x, place_y(mean.low), x, place_y(mean.high), f"bar {_color(index)}")]
        content += [_marker(index, x, place_y(mean.value))]
    return _svg(f"{name} against bit rate", height, content)


def _distribution(name: str, names: Mapping[int, str], values: Mapping[int, Sequence[float]]) -> str:
    """Draw a box plot for each codec."""
    from matplotlib.cbook import boxplot_stats

    height = ROW * len(names) + 28
    bottom = height - 22
    limits = [limit(own) for own in values.values() for limit in (min, max)]
    low, high = _padded(min(limits), max(limits))

    def place(value: float) -> float:
        return RIGHT + (value - low) / (high - low) * (WIDTH - 2 * RIGHT)

    content = []
    for tick in nice_ticks(low, high):
        content += [_line(place(tick), 0, place(tick), bottom, "grid"), _text(place(tick), bottom + 16, f"{tick:.4g}")]
    content += [_line(RIGHT, bottom, WIDTH - RIGHT, bottom, "axis")]
    for row, (index, own) in enumerate(values.items()):
        box = boxplot_stats(own)[0]
        first, third = box["q1"], box["q3"]
        y = ROW * row + 24
        label = tables.shorten_name(names[index], MAX_LABEL)
        content += [_marker(index, RIGHT + 5, y - 15), _text(RIGHT + 15, y - 11, label, "start")]
        content += [_line(place(box["whislo"]), y, place(box["whishi"]), y, f"bar {_color(index)}")]
        content += [
            f'<rect class="box {_color(index)}" x="{place(first):.1f}" y="{y - 5}" '
            f'width="{max(place(third) - place(first), 0.5):.1f}" height="10"/>'
        ]
        content += [_line(place(box["med"]), y - 5, place(box["med"]), y + 5, "median")]
        dots = [place(value) for value in box["fliers"]]
        content += [f'<circle class="{_color(index)}" cx="{x:.1f}" cy="{y}" r="1.8"/>' for x in dots]
    return _svg(f"distribution of {name} over recordings", height, content)


def spectrogram(wave: np.ndarray, rate: int, label: str) -> str:
    """Draw the spectrogram of audio [T] in dB, with axes in seconds and kHz."""
    from matplotlib.image import imsave

    padded = np.pad(wave, (0, max(SPECTROGRAM_SIZE - len(wave), 0)))
    hop = max(SPECTROGRAM_SIZE // 4, -(-len(padded) // SPECTROGRAM_COLUMNS))
    windows = np.lib.stride_tricks.sliding_window_view(padded, SPECTROGRAM_SIZE)[::hop]
    window = np.hanning(SPECTROGRAM_SIZE)
    magnitudes = np.abs(np.fft.rfft(windows * window, axis=1))[:, 1:] / window.sum()  # [frames, bins]
    halved = magnitudes.reshape(len(magnitudes), -1, 2).mean(axis=2)
    decibels = 20 * np.log10(halved + 1e-6)
    picture = io.BytesIO()
    low, high = DECIBELS
    imsave(picture, decibels.T, cmap="magma", vmin=low, vmax=high, origin="lower", format="png")
    left, top, width, height = 30, 8, WIDTH - 34, 150
    data = base64.b64encode(picture.getvalue()).decode()
    content = [
        f'<image x="{left}" y="{top}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
    ]
    duration, bottom = len(padded) / rate, top + height
    content += [
        _text(left - 5, bottom - 2000 * tick / rate * height + 4, f"{tick:g}", "end")
        for tick in nice_ticks(0, rate / 2000, 4)
    ]
    content += [_text(left + tick / duration * width, bottom + 14, f"{tick:.3g}") for tick in nice_ticks(0, duration)]
    content.append(_text(left + width / 2, bottom + 27, "seconds; vertical axis in kHz"))
    return _svg(f"spectrogram of {label}", bottom + 32, content)
