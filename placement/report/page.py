"""The page: templates, with the report's numbers and words as filters."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tandem.placement.report import words
from tandem.placement.report.style import css_variables


def render(template: str, **values: object) -> str:
    """The HTML of a template of this folder. Whatever is not Markup is escaped; a missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        words.count,
        words.number,
        words.seconds,
        words.percent,
        words.rate,
        words.interval,
        words.plural,
        words.term_name,
    )
    environment.filters.update({function.__name__: function for function in filters})
    return environment.get_template(template).render(css_variables=css_variables(), **values)
