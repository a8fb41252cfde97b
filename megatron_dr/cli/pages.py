"""Templates of the pages that the commands write."""

from collections.abc import Callable

import jinja2


def template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """One of ours, with filters of its own; all that is put into it is escaped."""
    folder = jinja2.PackageLoader("megatron_dr.cli", "templates")
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True)
    environment.filters |= filters
    return environment.get_template(f"{name}.html.jinja")
