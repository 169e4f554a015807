"""The documentation as a site: pip install -c constraints.txt '.[docs]' && sphinx-build -W docs build/site"""

project = "fastslots"
author = "The fastslots developers"
html_title = "fastslots"
html_theme = "furo"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["results"]

myst_heading_anchors = 4  # links to headings, as the repository's own pages have them
myst_fence_as_directive = ["mermaid"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
html_theme_options = {"navigation_with_keys": True}


def setup(app):
    """Leaves out the fields of named tuples, which Python itself documents as 'Alias for field number 0'."""
    app.connect(
        "autodoc-skip-member",
        lambda app, what, name, member, skip, options: skip or str(member.__doc__).startswith("Alias for field number"),
    )
