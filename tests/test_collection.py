"""Every folder of tests is one to pytest, whose own defaults leave out some names."""

import fnmatch
from pathlib import Path


def test_no_folder_of_tests_is_left_out(pytestconfig):
    tests = Path(__file__).parent
    folders = {path.parent for path in tests.rglob("test_*.py")}
    assert len(folders) > 8
    left_out = pytestconfig.getini("norecursedirs")
    names = {part for folder in folders for part in folder.relative_to(tests).parts}
    assert [name for name in names for pattern in left_out if fnmatch.fnmatch(name, pattern)] == []
