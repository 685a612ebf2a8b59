"""Every size zero in turn, for every operator: kernels and reference agree on what is left, forward and backward."""

import pytest
import torch
from op_cases import NAMES, case, plain_of
from tolerances import compare

SIZES = {"T": 5, "H": 4, "I": 3, "E": 3, "K": 2, "S": 2}
ZEROS = ("T", "H", "I", "E", "S", "TE", "TS", "TH", "HI")
CASES = [(n, z) for n in NAMES for z in ZEROS if n != "route" or "E" not in z]  # a token is routed to some expert


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "zero"), CASES)
def test_against_reference(backend, name, zero):
    shape = tuple(0 if size in zero else number for size, number in SIZES.items())
    op, arguments = case(name, shape, torch.float32)
    compare(op, plain_of(name), arguments, roundings=4)
