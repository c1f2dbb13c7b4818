"""How Sphinx builds the documentation: `make docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

import plywise  # noqa: E402

project = "plywise"
version = release = plywise.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "written_pages",
]
exclude_patterns = ["_build", "extensions", "notebooks", "generated/gallery/*.ipynb"]

# Docstrings are in Google style. A word in single backquotes is code.
default_role = "code"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Selector": "Selector"}
maximum_signature_line_length = 90
add_module_names = False

# Building needs no network, and so links to the pages of torch are not resolved.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r".*")]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Notebooks are shown with the output that docs/notebooks/make.py has kept in them.
nb_execution_mode = "off"

# The copy button leaves prompts and output out.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "generated/gallery",
    "filename_pattern": r"/plot_",
    "write_computation_times": False,
    "within_subsection_order": "gallery_order.MainFirst",
    "download_all_examples": False,
    "plot_gallery": "True",
}

html_theme = "pydata_sphinx_theme"
html_title = "plywise"
html_theme_options = {"show_prev_next": True, "navigation_with_keys": False, "use_edit_page_button": False}
html_show_sourcelink = False
html_copy_source = False
