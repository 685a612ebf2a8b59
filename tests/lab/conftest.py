"""Puts the checkout on the path before a test here imports `lab`: this folder, of that name, would be found instead."""

import checkout  # noqa: F401
