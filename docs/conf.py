"""Sphinx configuration; built with -n -W: a warning is an error."""

project = "lightning-lora"
author = "The lightning-lora developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = "lightning-lora"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "code"
nitpick_ignore_regex = [("py:.*", r"(torch|nn|lightning|transformers)\..*"), ("py:.*", r".*Callback.*|CallbackBase")]
