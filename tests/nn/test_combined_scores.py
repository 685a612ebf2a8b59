"""How members' scores combine: the formulas of Coste et al., and what is refused."""

import pytest
import torch

from ummrm import combine_scores

SCORES = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]]).double()
SCALES = [(3.0, 2.0), (20.0, 10.0)]
NORMAL = torch.tensor([[-1.0, -1.0], [0.0, -1.0], [1.0, 2.0]]).double()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("mean", [-1.0, -0.5, 1.5]), ("worst", [-1.0, -1.0, 1.0]), ("uwo", [-1.0, -0.5 - 0.8 * 0.25, 1.5 - 0.8 * 0.25])],
)
def test_members_are_normalised_and_combined_by_the_rules(rule, expected):
    for scores, scales in ((SCORES, SCALES), (NORMAL, None)):
        assert combine_scores(scores, rule, uncertainty=0.8, scales=scales).tolist() == pytest.approx(expected)
    low = combine_scores(SCORES.bfloat16(), rule, uncertainty=0.8, scales=SCALES)
    assert low.dtype == torch.bfloat16 and low.tolist() == pytest.approx(expected, abs=0.02)


def test_one_member_is_itself_and_nan_goes_through():
    for rule in ("mean", "worst", "uwo"):
        assert torch.equal(combine_scores(SCORES[:, :1], rule), SCORES[:, 0])
        assert combine_scores(torch.tensor([[1.0, float("nan")]]), rule).isnan().all()


def test_misuse_is_a_clear_error():
    with pytest.raises(ValueError, match="`combine` must be one of 'mean', 'worst', 'uwo', got 'median'"):
        combine_scores(SCORES, "median")
    with pytest.raises(ValueError, match="`uncertainty` must be a finite number of at least 0, got -1"):
        combine_scores(SCORES, "uwo", uncertainty=-1)
    with pytest.raises(ValueError, match=r"`scores` must be \[texts, members\] .* got \[3\]"):
        combine_scores(SCORES[:, 0])
    with pytest.raises(ValueError, match="one .mean, std. for each of the 2 members, got 1"):
        combine_scores(SCORES, scales=SCALES[:1])
