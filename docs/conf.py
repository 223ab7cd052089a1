"""The site that `make docs` builds: guides, notebooks with their results, and the reference from the docstrings."""

from advml import __version__

project, author, release = "advml", "the authors of advml", __version__
copyright = author
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["decisions/README.md"]
html_theme, html_title = "furo", f"advml {__version__}"
autodoc_typehints, autodoc_member_order = "description", "bysource"
napoleon_custom_sections = [("Example", "Examples")]
nb_execution_mode, nb_execution_raise_on_error, nb_execution_timeout = "force", True, 300
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing", "myst.header"]  # guides link to sources, which are not part of the site
