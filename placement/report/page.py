"""Renders the HTML templates, with the functions of `formatting` as filters."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tandem.placement.report import formatting
from tandem.placement.report.style import css_variables


def render(template: str, **values: object) -> str:
    """The HTML of a template of this folder. Values other than Markup are escaped; a missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        formatting.count,
        formatting.number,
        formatting.seconds,
        formatting.percent,
        formatting.rate,
        formatting.interval,
        formatting.plural,
        formatting.term_name,
    )
    environment.filters.update({function.__name__: function for function in filters})
    return environment.get_template(template).render(css_variables=css_variables(), **values)
