"""The model of a layer's bytes, FLOPs and launches (bench/byte_model.py), against the sums done by hand."""

from dataclasses import replace

import pytest

from bench import byte_model
from bench.byte_model import FUSIONS, GLU, GLU_BACKWARD, WEIGHT_SUM, Sizes, kernels, table, totals

SIZES = Sizes(tokens=64, hidden=16, intermediate=48, experts=3, top_k=2, shared=1)
ROWS, PROJECTIONS = 192, 4 * 3 * 48 * 16  # of all experts: gate, up and down


def moved(fused=(), accumulating=False):
    return totals(SIZES, fused, accumulating)[1]


def test_flops_are_those_of_nine_products_a_row():
    assert sum(k.flops for k in kernels(SIZES)) == 18 * ROWS * 16 * 48
    assert sum(k.flops for k in kernels(SIZES, tuple(FUSIONS), True)) == 18 * ROWS * 16 * 48


@pytest.mark.parametrize("fusion", [GLU, GLU_BACKWARD])
def test_a_fused_activation_spares_two_buffers_of_rows(fusion):
    """The pre-activation read again; or the activation's gradient, written and read."""
    assert moved() - moved((fusion,)) == 2 * ROWS * 48 * 2


def test_a_fused_sum_spares_the_gradients_written_and_read():
    """Adding reads both and writes one; added in place, what is there is read."""
    assert moved(accumulating=True) - moved() == 3 * 2 * PROJECTIONS
    assert moved((WEIGHT_SUM,), True) - moved() == 2 * PROJECTIONS


def test_launches():
    """Products are two each; the dots' sum takes the place of the activation's backward."""
    assert totals(SIZES)[2] == 6 * 2 + 7
    assert totals(SIZES, (GLU,))[2] == totals(SIZES)[2] - 1
    assert totals(SIZES, (GLU_BACKWARD,))[2] == totals(SIZES)[2]
    assert totals(SIZES, (), True)[2] == totals(SIZES)[2] + 4 == totals(SIZES, (WEIGHT_SUM,), True)[2] + 4
    assert totals(replace(SIZES, shared=0), (), True)[2] == totals(SIZES)[2] + 2


def test_the_table_names_every_fusion(capsys, monkeypatch):
    text = table(Sizes())
    assert all(f"with {name}" in text for name in FUSIONS) and "of the dense FFN" in text
    monkeypatch.setattr("sys.argv", ["byte_model", "--tokens", "4096"])
    byte_model.main()
    assert "T=4096 H=4096" in capsys.readouterr().out
