"""The API reference builds, without a warning, and says something of every public name."""

import importlib
import importlib.util
import inspect
import re
import warnings

import pytest
from checkout import ROOT

PUBLIC = ("ummrm", "ummrm.ops", "ummrm.nn", "ummrm.trainer")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The HTML of every page by its module, and pdoc's warnings."""
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "tools/api_reference.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folder = tmp_path_factory.mktemp("reference")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tool.build(folder)
    assert [str(warning.message) for warning in seen if "pdoc" in warning.filename] == []
    return {
        path.relative_to(folder).with_suffix("").as_posix().replace("/", "."): path.read_text()
        for path in folder.rglob("*.html")
    }


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_its_place_and_its_text(pages, module):
    names = importlib.import_module(module).__all__
    sections = set(re.findall(r'<section id="(\w+)"', pages[module]))
    assert set(names) == sections
    silent = [name for name in names if not inspect.getdoc(getattr(importlib.import_module(module), name))]
    assert silent == []


def test_what_a_function_takes_gives_and_raises_is_set_apart(pages):
    without_sources = re.sub(r"<pre>.*?</pre>", "", pages["ummrm.ops"], flags=re.S)
    page = re.sub(r"<[^>]+>", "", without_sources)
    assert "Arguments:" in page and "Returns:" in page and "Args:" not in page
    assert "[S*T + R, ...]" in page, "a shape's products are taken for emphasis"


def test_the_front_page_is_the_packages(pages):
    assert "./ummrm.html" in pages["index"] and set(PUBLIC) < set(pages)
