"""Builds the API reference from the docstrings, as HTML pages: what each public function takes, gives and raises.

    python tools/api_reference.py build/docs

The pages are pdoc's; here it is only said which modules are public. Of a package with `__all__` a page shows exactly
those names; a name that stands in no `__all__` is no promise to users.
"""

import argparse
import warnings
from pathlib import Path

import pdoc
from pdoc import render, render_helpers

# What of `ummrm.hf` serves users is handed out by `ummrm`. Two functions have the names of the modules they lie in.
MODULES = ("ummrm", "ummrm.ops", "ummrm.ops.reference", "ummrm.nn", "ummrm.trainer")
LEFT_OUT = ("ummrm.upcycle", "ummrm.merge")


def build(folder):
    """Writes the pages into `folder`; where pdoc cannot render something, it warns or raises."""
    render.configure(docformat="google")
    # "[S*T + R, H]" is a shape, and no word of it is meant to be slanted
    render_helpers.markdown_extensions["middle-word-em"] = False
    with warnings.catch_warnings():
        # the constructor of a named tuple knows nothing of the imports of its module; the fields beside it are right
        warnings.filterwarnings("ignore", r".*ForwardRef\('Tensor'\) for \S+RouteOutput\.__init__")
        pdoc.pdoc(*MODULES, *(f"!{name}" for name in LEFT_OUT), output_directory=Path(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the pages go; build/docs is what `make docs` fills")
    folder = parser.parse_args().folder
    build(folder)
    print(f"the API reference is in {folder}/index.html")


if __name__ == "__main__":
    main()
