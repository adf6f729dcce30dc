"""One HTML page that needs nothing else: its style, its frame and its tables. For phones too, and for the dark."""

from collections.abc import Collection, Sequence
from html import escape

_STYLE = """:root{color-scheme:light dark;--ink:#222;--dim:#6b6b6b;--line:#e2e2e2;--paper:#fff;--mark:#4a7;--best:#eaf6ef}
@media(prefers-color-scheme:dark){:root{--ink:#ddd;--dim:#999;--line:#383838;--paper:#161616;--best:#1d3327}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:var(--ink);background:var(--paper)}
h1{font-size:1.6em;line-height:1.2;margin:0 0 .6em}h2{font-size:1.15em;margin:2em 0 .5em}
p{margin:.4em 0;max-width:46em}.dim,small{color:var(--dim)}
small{display:block;font-size:80%;line-height:1.35;font-weight:normal}
.wide{overflow-x:auto;margin:0 -1em;padding:0 1em}
table{border-collapse:collapse}
td,th{padding:.2em 1.2em .2em 0;vertical-align:top;text-align:left}
td:first-child{color:var(--dim);white-space:nowrap}
table.pairs td:last-child{overflow-wrap:anywhere}
table.grid td,table.grid th{padding:.4em .9em;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums;
white-space:nowrap}
table.grid th{font-weight:600;vertical-align:bottom;border-bottom:2px solid var(--line);white-space:normal;
overflow-wrap:anywhere;min-width:8em}
table.grid td:first-child,table.grid th:first-child{position:sticky;left:0;background:var(--paper);padding-left:0;
color:var(--ink);white-space:normal;min-width:8em}
table.grid td.best{background:var(--best);font-weight:700}.best .dim{font-weight:normal}
img{image-rendering:auto;max-width:100%}.bar{background:var(--mark);height:1em;display:inline-block}
code{font-size:90%}pre{overflow-x:auto;padding:.6em .8em;border:1px solid var(--line);border-radius:4px;font-size:85%;
white-space:pre-wrap;overflow-wrap:anywhere}"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of these pieces of HTML under a heading."""
    head = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    start = f"<!doctype html><html lang=en><head>{head}<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    return "\n".join([start, f"<h1>{escape(title)}</h1>", *parts, "</body></html>"]) + "\n"


def pairs(rows: Sequence[tuple[str, str]], *, plain: bool = True) -> str:
    """A table of (what, value); values are text, or HTML where ``plain`` is false."""
    cells = (f"<tr><td>{escape(name)}<td>{escape(value) if plain else value}" for name, value in rows)
    return f"<table class=pairs>{''.join(cells)}</table>"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, best: Sequence[Collection[int]]) -> str:
    """A table of HTML cells under a header, in each row some columns marked as the best; a wide one is scrolled."""

    def line(cells: Sequence[str], marked: Collection[int]) -> str:
        return "<tr>" + "".join(
            f"<td class=best>{cell}" if place in marked else f"<td>{cell}" for place, cell in enumerate(cells)
        )

    head = "<thead><tr>" + "".join(f"<th>{cell}" for cell in header) + "</thead>"
    body = "".join(line(cells, marked) for cells, marked in zip(rows, best, strict=True))
    return f"<div class=wide><table class=grid>{head}<tbody>{body}</table></div>"
