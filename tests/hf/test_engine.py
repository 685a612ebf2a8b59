"""Under transformers' distributed engine (FSDP2, tensor and expert parallelism) a step is that of one process."""

import pytest
import torch
from engine import WITHOUT_DROPOUT, Case, batch_of, make_model, run_cases, save_models, spawn, step
from tiny_models import MODEL_TYPES

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.24 has it")
pytestmark = pytest.mark.full

TWO = ({"fsdp_size": 2}, {"tp_size": 2})
TWO_EP = (
    {"fsdp_size": 2, "ep_size": 2},
    {"tp_size": 2, "ep_size": 2},
    {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
)
FOUR = ({"fsdp_size": 4}, {"fsdp_size": 2, "tp_size": 2}, {"fsdp_size": 2, "dp_replicate_size": 2})
FOUR_EP = (
    {"fsdp_size": 4, "ep_size": 2},
    {"fsdp_size": 4, "ep_size": 4},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2},
)
# whose dense class has a plan; phi's and gemma's tiny models have heads that two processes can't share
TENSOR_PARALLEL = (
    *("mistral", "qwen3", "gemma2", "gemma3_text", "olmo2"),
    *("granite", "phi3", "starcoder2", "lfm2", "seed_oss"),
)


def cases(plain, parted):
    found = []
    for family in WITHOUT_DROPOUT:
        for kind in ("token", "token-8", "sequence", "sequence-shared"):
            found += [Case(family, kind, settings) for settings in plain + parted]
        # attention's experts leave tensor parallelism nothing to cut
        found += [Case(family, "sequence-all", s) for s in plain + parted if "tp_size" not in s]
        found += [Case(family, "merging", settings) for settings in plain]
        found += [Case(family, "merging-all", settings) for settings in plain if "tp_size" not in settings]
    for settings in parted:
        found.append(Case("llama", "token", settings, lopsided=True))
        found.append(Case("llama", "token", settings, lengths=(9, 2, 7, 1, 0, 0, 0, 0)))
    return found


EACH = [
    Case(family, "token", {"fsdp_size": 2, "ep_size": 2}) for family in MODEL_TYPES if family not in WITHOUT_DROPOUT
]
EACH += [Case(family, "token", {"tp_size": 2}) for family in TENSOR_PARALLEL]
CASES = {2: cases(TWO, TWO_EP) + EACH, 4: cases(FOUR, FOUR_EP)}


@pytest.fixture(scope="module", params=[2, 4])
def ran(request, tmp_path_factory):
    processes = request.param
    folder = tmp_path_factory.mktemp(f"engine-{processes}")
    save_models(CASES[processes], folder)
    spawn(processes, run_cases, (CASES[processes], str(folder)), folder)
    return processes, folder


@pytest.fixture(scope="module")
def whole():
    """One process's steps, each computed once."""
    made = {}

    def of(case):
        key = (case.folder, case.lengths)
        if key not in made:
            model = make_model(case)
            loss, logits, reports = step(model, batch_of(case), case)
            made[key] = loss, logits, reports, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return made[key]

    return of


def test_each_combination_equals_one_process(ran, whole):
    processes, folder = ran
    for case in CASES[processes]:
        loss, logits, reports, gradients = whole(case)
        read = [torch.load(folder / f"{case}.{rank}.pt") for rank in range(processes)]
        said = {"rtol": 1e-5, "atol": 1e-6, "msg": lambda text, case=case: f"{case}: {text}"}
        torch.testing.assert_close(torch.stack([r[0] for r in read]).mean(), loss, **said)
        tp = case.settings.get("tp_size", 1)
        difference = (torch.cat([r[1] for r in read[::tp]]) - logits).abs().max()
        assert difference <= 1e-5 * logits.abs().max(), f"{case}: logits differ by {difference}"
        for name, report in reports.items():
            for key, value in report.items():
                for other in read:
                    got = other[2][name][key] / (tp if key == "live_tokens" else 1)
                    torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6, msg=f"{case}: {name} {key}")
        assert gradients.keys() == read[0][3].keys(), case
        for name, gradient in gradients.items():
            size = gradient.abs().max()
            difference = (read[0][3][name] - gradient).abs().max()
            assert size > 0 or case.lopsided, f"{case}: {name}"
            assert difference <= 2e-5 * size + 1e-7, f"{case}: {name} differs by {difference} of {size}"
