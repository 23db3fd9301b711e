"""Plots as SVG: panels of horizontal bars, and of curves on logarithmic axes.

On a white ground of their own, so that they read the same on light and dark pages.
"""

import math
import statistics
from html import escape

FONT = "font-family='Helvetica, Arial, sans-serif'"
INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"


class Canvas:
    def __init__(self, width, height, title, note):
        self.width, self.height = width, height
        self.parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
            f"viewBox='0 0 {width} {height}' role='img' {FONT} font-size='12'>",
            f"<title>{escape(title)}</title>",
            f"<rect width='{width}' height='{height}' rx='6' fill='#ffffff'/>",
        ]
        self.text(16, 26, title, size=16, weight="bold")
        self.text(16, 44, note, size=11, color=FAINT)

    def text(self, x, y, words, anchor="start", size=12, color=INK, weight="normal", turn=None):
        turned = f" transform='rotate({turn} {x:.1f} {y:.1f})'" if turn else ""
        self.parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' "
            f"fill='{color}' font-weight='{weight}'{turned}>{escape(words)}</text>"
        )

    def line(self, x1, y1, x2, y2, color=GRID, width=1.0):
        self.parts.append(
            f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{color}' "
            f"stroke-width='{width}'/>"
        )

    def rect(self, x, y, width, height, color):
        self.parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(width, 0.5):.1f}' height='{height:.1f}' "
            f"rx='1.5' fill='{color}'/>"
        )

    def path(self, points, style):
        way = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = f" stroke-dasharray='{style.dash}'" if style.dash else ""
        self.parts.append(
            f"<path d='M{way}' fill='none' stroke='{style.color}' stroke-width='{style.width}' "
            f"stroke-linejoin='round'{dash}/>"
        )
        for x, y in points:
            self.parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{style.color}'/>")

    def band(self, upper, lower, color):
        """The area between the smallest and the largest round."""
        way = " L".join(f"{x:.1f} {y:.1f}" for x, y in upper + lower[::-1])
        self.parts.append(f"<path d='M{way} Z' fill='{color}' fill-opacity='0.12'/>")

    def finish(self):
        return "\n".join([*self.parts, "</svg>"]) + "\n"


# --- Bars -------------------------------------------------------------------------------------

# A row this many times as long as the usual one is cut, somewhat behind the longest other.
OUTLIER, CUT = 6, 1.25
ROW, BAR, LABELS, VALUES, PANEL, GAP, HEAD = 19, 12, 150, 62, 470, 20, 60


def bars_height(panel):
    return 34 + ROW * len(panel["rows"])


def bars(title, note, panels):
    """Panels in two columns. A panel is a title, a unit and rows: (label, color, median, low, high,
    text); a row without median shows its text only."""
    columns, heights = ([], []), [HEAD, HEAD]
    for panel in panels:
        side = 0 if heights[0] <= heights[1] else 1
        columns[side].append((heights[side], panel))
        heights[side] += bars_height(panel) + 12
    canvas = Canvas(2 * PANEL + GAP + 32, max(heights) + 4, title, note)
    for side, column in enumerate(columns):
        for top, panel in column:
            bars_panel(canvas, 16 + side * (PANEL + GAP), top, panel)
    return canvas.finish()


def bars_panel(canvas, left, top, panel):
    canvas.text(left, top + 14, panel["title"], size=13, weight="bold")
    canvas.text(left + PANEL, top + 14, panel["unit"], anchor="end", size=11, color=FAINT)
    most = longest(panel["rows"])
    room = PANEL - LABELS - VALUES
    start = left + LABELS
    canvas.line(start, top + 22, start, top + 24 + ROW * len(panel["rows"]), FAINT)
    for index, (label, color, median, low, high, text) in enumerate(panel["rows"]):
        y = top + 24 + ROW * index
        strong = "bold" if label.startswith("nsplice") else "normal"
        canvas.text(start - 6, y + 11, label, anchor="end", weight=strong, size=11.5)
        end = start
        if median is not None:
            end, low_x, high_x = (start + room * min(x / most, 1) for x in (median, low, high))
            canvas.rect(start, y + 2, end - start, BAR, color)
            if median > most:  # it goes on: a gap says so
                for x in (end - 26, end - 20):
                    canvas.line(x, y + BAR + 4, x + 5, y, "#ffffff", 2.5)
            else:
                middle = y + 2 + BAR / 2
                canvas.line(low_x, middle, high_x, middle, INK, 1.2)
                for x in (low_x, high_x):
                    canvas.line(x, middle - 3, x, middle + 3, INK, 1.2)
            end = max(end, high_x)
        canvas.text(end + 6, y + 12, text, size=11, color=INK if median is not None else FAINT)


def longest(rows):
    """What the axis ends at: the longest row, unless it would leave the others no room."""
    rows = [row for row in rows if row[2] is not None]
    if not rows:
        return 1
    usual = statistics.median(row[2] for row in rows)
    shown = [row[4] for row in rows if row[2] <= OUTLIER * usual]
    return max(shown) * (1 if len(shown) == len(rows) else CUT) or 1


# --- Curves -----------------------------------------------------------------------------------

WIDE, TALL, AXIS, FOOT = 480, 300, 58, 44


def curves(title, note, panels, legend):
    """Panels side by side. A panel is a title, axis names, ticks of x (value, label) and series:
    (style, points), a point being (x, median, low, high)."""
    width = 16 + len(panels) * (WIDE + GAP)
    places, x, legend_rows = [], 16, 1
    for style in legend:
        room = 48 + 7 * len(style.label)
        if x + room > width:
            x, legend_rows = 16, legend_rows + 1
        places.append((x, HEAD + 20 * (legend_rows - 1)))
        x += room
    canvas = Canvas(width, HEAD + 20 * legend_rows + TALL + 34 + FOOT, title, note)
    for style, (x, y) in zip(legend, places):
        canvas.path([(x, y), (x + 12, y), (x + 24, y)], style)
        weight = "bold" if style.label == "nsplice" else "normal"
        canvas.text(x + 31, y + 4, style.label, weight=weight)
    for index, panel in enumerate(panels):
        curve_panel(canvas, 16 + index * (WIDE + GAP), HEAD + 20 * legend_rows + 6, panel)
    return canvas.finish()


def curve_panel(canvas, left, top, panel):
    canvas.text(left + AXIS, top + 12, panel["title"], size=13, weight="bold")
    top += 22
    xs = [value for value, _ in panel["ticks"]]
    ys = [y for _, points in panel["series"] for point in points for y in point[1:] if y > 0]
    if not ys:
        return
    x_low, x_high = math.log(min(xs)), math.log(max(xs)) + 1e-9
    y_low, y_high = math.log(min(ys)) - 0.1, math.log(max(ys)) + 0.1
    right, bottom = left + WIDE - 12, top + TALL

    def at_x(value):
        return left + AXIS + 10 + (math.log(value) - x_low) / (x_high - x_low) * (
            right - left - AXIS - 20)

    def at_y(value):
        value = max(value, math.exp(y_low))
        return bottom - (math.log(value) - y_low) / (y_high - y_low) * TALL

    for value in steps(math.exp(y_low), math.exp(y_high)):
        canvas.line(left + AXIS, at_y(value), right, at_y(value))
        canvas.text(left + AXIS - 6, at_y(value) + 4, short(value), anchor="end", size=11)
    free = left
    for value, label in panel["ticks"]:
        canvas.line(at_x(value), top, at_x(value), bottom)
        if at_x(value) - 3.5 * len(label) > free:
            canvas.text(at_x(value), bottom + 16, label, anchor="middle", size=11)
            free = at_x(value) + 3.5 * len(label)
    canvas.line(left + AXIS, bottom, right, bottom, FAINT)
    canvas.line(left + AXIS, top, left + AXIS, bottom, FAINT)
    canvas.text((left + AXIS + right) / 2, bottom + 36, panel["x"], anchor="middle", color=FAINT)
    canvas.text(left + 12, (top + bottom) / 2, panel["y"], anchor="middle", color=FAINT, turn=-90)
    for style, points in panel["series"]:
        upper = [(at_x(x), at_y(high)) for x, _, _, high in points]
        lower = [(at_x(x), at_y(low)) for x, _, low, _ in points]
        canvas.band(upper, lower, style.color)
    for style, points in panel["series"]:
        canvas.path([(at_x(x), at_y(median)) for x, median, _, _ in points], style)


def steps(low, high):
    """1, 2 and 5 of each power of ten, or 1 alone where that were too many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.6 else (1,)
    values = [factor * 10.0 ** exponent for exponent in exponents for factor in factors]
    return [value for value in values if low <= value <= high]


def short(value):
    """12k instead of 12,000."""
    for factor, letter in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"
