"""Where the templates are, and how they are read."""

import jinja2


def environment(escapes: bool) -> jinja2.Environment:
    """The templates of this folder, in which an unknown name is an error.

    Args:
        escapes: Whether texts are escaped as HTML.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader("facecls", "report"),
        autoescape=escapes,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not escapes,
    )
