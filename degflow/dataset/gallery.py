"""preview.html: what is in a dataset, on one page: crops in the order of their scales, and histograms.

One static file without scripts, that asks no other file or host for anything. Equal datasets get equal bytes.
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from degflow.dataset.card import Sample, Tile, read_rows, totals
from degflow.dataset.layout import Record
from degflow.images import encode_png
from degflow.storage import Place

PARTS = 8  # data parts whose scales are counted
BINS = 12  # of a histogram
_WIDTH, _HEIGHT = 340, 160  # of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 8, 24  # around its bars

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 1480px; margin: 0 auto; padding: 16px 20px 40px; background: #f1f1ef; color: #222;
  font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; }}
h1 {{ margin: 4px 0 12px; font-size: 22px; }}
h2 {{ margin: 26px 0 4px; font-size: 18px; }}
p {{ margin: 0 0 10px; color: #555; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 10px; margin: 0; }}
dl div, section.chart, article {{ padding: 8px 12px; border: 1px solid #cfcfcb; border-radius: 6px; background: #fff; }}
dt {{ color: #555; font-size: 13px; }}
dd {{ margin: 0; font-weight: 600; overflow-wrap: anywhere; }}
.charts, .photographs {{ display: flex; flex-wrap: wrap; gap: 12px; }}
section.chart {{ flex: 1 1 340px; max-width: 480px; min-width: 0; }}
section.chart h3, article h3 {{ margin: 0 0 4px; font-size: 14px; overflow-wrap: anywhere; }}
section.chart p {{ margin: 2px 0 0; font-size: 13px; }}
svg {{ display: block; width: 100%; }}
svg rect {{ fill: #2b4c7e; }}
svg circle {{ fill: #c2374a; fill-opacity: 0.75; }}
svg line {{ stroke: #ccc; }}
svg text {{ fill: #555; font-size: 11px; }}
article {{ max-width: 100%; box-sizing: border-box; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 8px; }}
figure {{ margin: 0; }}
figure img {{ display: block; image-rendering: pixelated; }}
figcaption {{ padding-top: 2px; font-size: 13px; }}
figcaption span {{ color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
<dl>
{facts}
</dl>
<h2>Scales and PSNR</h2>
<div class="charts">
{charts}
</div>
<h2>From weak to strong</h2>
<p>{about}</p>
<div class="photographs">
{photographs}
</div>
</body>
</html>
"""


def gallery(
    output: Place,
    shown: Sequence[Sample],
    records: Mapping[int, Record],
    rejects: int,
    recipe: Mapping[str, Any],
    scales: str,
) -> str:
    """preview.html of a finished dataset.

    Args:
        output: the dataset.
        shown: photographs to show.
        records: of all shards.
        rejects: number of files without rows.
        recipe: the resolved configuration.
        scales: how they were drawn; see `ScaleConfig.in_words`.
    """
    rows, used, psnr, size = totals(records, recipe)
    facts = {
        "LR images": f"{rows:,}",
        "photographs used / rejected": f"{used:,} / {rejects:,}",
        "scales": scales,
        "mean PSNR of LR against HR": f"{psnr:.2f} dB",
        "size": f"{size / 1e6:,.1f} MB",
        "parts": f"{len(records):,}",
        "seed / spread": f"{recipe['seed']} / {recipe['spread']:g}",
        "model": recipe["model_sha256"][:12],
    }
    order = sorted(shown, key=lambda sample: sample.tiles[0].scale)
    drawn = "its LR image" if recipe["scale"]["per_image"] == 1 else "LR images of it in the order of their scales"
    return _PAGE.format(
        title=f"{rows:,} LR images of {used:,} photographs",
        facts="\n".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts.items()),
        charts="\n".join(_charts(output, shown, records)),
        about=f"The most detailed crop of each of {len(shown)} photographs: HR, then {drawn}. A pixel of a crop is a "
        "pixel of the page.",
        photographs="\n".join(map(_article, order)),
    )


def _charts(output: Place, shown: Sequence[Sample], records: Mapping[int, Record]) -> list[str]:
    scales, parts = _scales(output, records)
    full = sum(1 for record in records.values() if record.rows)
    which = "all LR images" if parts == full else f"the LR images of {parts} of {full:,} parts"
    charts = [_chart("Scales", f"Scale of {which}.", _bars(scales, "×{:.3g}"))]
    points = [(tile.scale, tile.psnr) for sample in shown for tile in sample.tiles if tile.psnr is not None]
    if points:
        what = f"the {len(points)} LR images below, against HR"
        charts.append(_chart("PSNR", f"PSNR in dB of {what}.", _bars([psnr for _, psnr in points], "{:.3g}")))
        charts.append(_chart("PSNR by scale", f"PSNR in dB upwards, scale to the right, of {what}.", _dots(points)))
    means = [record.psnr for record in records.values() if record.psnr is not None]
    if len(means) >= PARTS:
        text = f"Mean PSNR in dB of each of the {len(means):,} parts, from manifest.parquet."
        charts.append(_chart("PSNR of the parts", text, _bars(means, "{:.3g}")))
    return charts


def _scales(output: Place, records: Mapping[int, Record]) -> tuple[list[float], int]:
    """The scales of all rows of some parts, evenly spread over the dataset; and the number of those parts."""
    full = [records[number].part for number in sorted(records) if records[number].rows]
    picked = list(islice(full, 0, None, max(1, math.ceil(len(full) / PARTS))))
    return [row["scale"] for part in picked for row in read_rows(output, part, ("scale",))], len(picked)


def _chart(title: str, text: str, marks: str) -> str:
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{marks}</svg>'
    return f'<section class="chart"><h3>{title}</h3>{svg}<p>{text}</p></section>'


def _bars(values: Sequence[float], label: str) -> str:
    """A histogram: the bins are equal, and the axis names their ends."""
    low, high = _range(values)
    counts, edges = np.histogram(values, BINS, (low, high))
    most, marks = int(counts.max()), []
    for count, begin, end in zip(counts.tolist(), edges, edges[1:], strict=False):
        left, right = _across(begin, low, high), _across(end, low, high)
        top = _up(count, 0, most)
        marks.append(
            f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - top:.1f}"><title>{begin:.3g} to {end:.3g}: {count}</title></rect>'
        )
    return _axes(low, high, label, 0, most) + "".join(marks)


def _dots(points: Sequence[tuple[float, float]]) -> str:
    (low, high), (least, most) = (_range(values) for values in zip(*points, strict=True))
    marks = (
        f'<circle cx="{_across(x, low, high):.1f}" cy="{_up(y, least, most):.1f}" r="4">'
        f"<title>×{x:.3g}: {y:.2f} dB</title></circle>"
        for x, y in points
    )
    return _axes(low, high, "×{:.3g}", least, most) + "".join(marks)


def _axes(low: float, high: float, label: str, least: float, most: float) -> str:
    """Lines and numbers at the ends and in the middle."""
    marks = []
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = _across(low + share * (high - low), low, high)
        text = label.format(low + share * (high - low))
        marks.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}">{text}</text>')
        if share != 0.5:
            value, y = least + share * (most - least), _up(share, 0, 1)
            marks.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            marks.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    return "".join(marks)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value, apart from each other."""
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def _across(value: float, low: float, high: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)


def _up(value: float, low: float, high: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * (value - low) / (high - low)


def _article(sample: Sample) -> str:
    tiles = "".join([_figure("HR", sample.hr), *(_figure(_caption(tile), tile.pixels) for tile in sample.tiles)])
    return f'<article><h3>{html.escape(sample.key)}</h3><div class="tiles">{tiles}</div></article>'


def _caption(tile: Tile) -> str:
    return f"×{tile.scale:.2f}" + (f" <span>{tile.psnr:.1f} dB</span>" if tile.psnr is not None else "")


def _figure(caption: str, pixels: np.ndarray) -> str:
    data = base64.b64encode(encode_png(pixels, compress_level=9)).decode()
    height, width = pixels.shape[:2]
    image = f'<img width="{width}" height="{height}" alt="" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
