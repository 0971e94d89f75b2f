"""A figure with its words: as inline SVG whose marks say what they are, and as files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from coembed.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_LONGEST = 34
# What XML 1.0 cannot hold, and what would break a line.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u2028\u2029]")


@dataclass
class Picture:
    """A figure of the report.

    Attributes:
        name: of its files.
        title: for people.
        caption: what is drawn, and how.
        alt: the same for those who do not see it.
        figure: matplotlib's.
        hovers: group id -> a text per mark in it, or one text for the group.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    hovers: dict[str, list[str]] = field(default_factory=dict)

    def hover(self, texts: Sequence[str]) -> str:
        """Return the id that a matplotlib artist must take (`gid`) to have these texts."""
        name = f"h{len(self.hovers)}"
        self.hovers[name] = list(texts)
        return name

    def save(self, folder: Path, formats: Sequence[str]) -> None:
        """Write `<name>.<format>` to `folder`, each atomically. Raises OutputError."""
        for kind in formats:
            write_atomically(folder / f"{self.name}.{kind}", partial(self._draw, kind))

    def svg(self) -> str:
        """Return an `<svg>` element: ids unique in the page, and a `<title>` on every mark."""
        content = io.BytesIO()
        self._draw("svg", content)
        ElementTree.register_namespace("", _SVG)
        ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
        root = ElementTree.fromstring(content.getvalue())
        for child in list(root):
            if child.tag == f"{{{_SVG}}}metadata":
                root.remove(child)
        for parent in root.iter(f"{{{_SVG}}}defs"):
            for child in list(parent):
                if child.tag == f"{{{_SVG}}}style":
                    parent.remove(child)
        for element in root.iter():
            self._hover(element)
            self._rename(element)
        for size in ("width", "height"):
            root.attrib.pop(size, None)
        root.set("style", "stroke-linejoin:round;stroke-linecap:butt")
        root.set("role", "img")
        root.set("aria-label", self.alt)
        return ElementTree.tostring(root, encoding="unicode")

    def _draw(self, kind: str, target: Path | io.BytesIO) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_pdf import FigureCanvasPdf
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        with style():
            layout = self.figure.get_layout_engine()
            if isinstance(layout, ConstrainedLayoutEngine):
                # Once for all its files: it takes as long as drawing.
                layout.execute(self.figure)
                self.figure.set_layout_engine("none")
            # Not by `savefig`, which draws everything twice. No dates: the same study gives the
            # same files.
            if kind == "png":
                FigureCanvasAgg(self.figure).print_png(target)
            elif kind == "pdf":
                FigureCanvasPdf(self.figure).print_pdf(target, metadata={"CreationDate": None})
            else:
                FigureCanvasSVG(self.figure).print_svg(target, metadata={"Date": None})

    def _hover(self, element: ElementTree.Element) -> None:
        texts = self.hovers.get(element.get("id", ""))
        if texts is None:
            return
        marks = list(element.iter(f"{{{_SVG}}}use")) or [element]
        if len(marks) != len(texts):
            raise AssertionError(f"{self.name}: {len(marks)} marks have {len(texts)} texts")
        for mark, text in zip(marks, texts, strict=True):
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = _UNPRINTABLE.sub(" ", text)
            mark.insert(0, title)

    def _rename(self, element: ElementTree.Element) -> None:
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{self.name}-{value}")
            elif name == _LINK and value.startswith("#"):
                element.set(name, f"#{self.name}-{value[1:]}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{self.name}-"))


@contextmanager
def style() -> Iterator[None]:
    """Draw as the report does: quiet axes, text as text, and no formulas in anybody's names."""
    import matplotlib as mpl

    settings = {
        "axes.edgecolor": "#9aa3ad",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelcolor": "#3b4550",
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.unicode_minus": True,
        "figure.facecolor": "white",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "grid.color": "#e8ebee",
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "svg.hashsalt": "coembed",
        "text.color": "#1d252c",
        "text.parse_math": False,
        "xtick.color": "#5b6670",
        "xtick.labelsize": 8,
        "ytick.color": "#5b6670",
        "ytick.labelsize": 8,
    }
    with mpl.rc_context(settings):
        yield


def printable(text: str) -> str:
    """Return a name as a figure can show it: on one line, not too long.

    matplotlib leaves names with a leading underscore out of legends, so these get a space.
    """
    text = _UNPRINTABLE.sub(" ", text)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return f" {text}" if text.startswith("_") else text
