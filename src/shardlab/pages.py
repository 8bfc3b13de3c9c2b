"""HTML and other texts from the jinja2 templates in `templates/`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path


@cache
def _environment():
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(template: str, **values) -> str:
    """A template of that name, filled; in HTML, values are escaped."""
    return _environment().get_template(template).render(**values)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A plain table in HTML: figures to the right, words to the left, where a notebook puts all to the right."""
    figures = [all(FIGURE.fullmatch(row[column]) for row in rows) for column in range(len(head))]
    return page("table.html", head=head, rows=rows, side=["right" if figure else "left" for figure in figures])


FIGURE = re.compile(r"(—|[-+]?[\d.,]+(e[-+]?\d+)?( ?(bytes|[KMGT]i?B|%|×|s|ms))?)?")
"""A number with its unit, or nothing."""
