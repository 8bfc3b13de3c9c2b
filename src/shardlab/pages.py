"""HTML and other texts from the jinja2 templates in `templates/`."""

from __future__ import annotations

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
    """A plain table in HTML."""
    return page("table.html", head=head, rows=rows)
