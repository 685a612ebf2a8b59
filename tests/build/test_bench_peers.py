"""What the benchmarks run beside ummrm: that it computes the same, and that what is not run says why."""

import checkout  # noqa: F401  (for `bench`)
import pytest
import torch

from bench import gpu_peers, harness, merges, record, rivals, timing, workload

CPU = torch.device("cpu")
LAYER = workload.Layer(48, 16, 24, 5, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_the_layers_rivals_compute_what_it_does(routing, dtype):
    """Outputs and every gradient, with the same weights and inputs, as before each timing."""
    layer = workload.Layer(48, 16, 24, 5, 3, 2, routing)
    arguments = workload.layer_inputs(layer, dtype, CPU)
    found = rivals.layers(layer, dtype, CPU, None)
    want = harness.Call(found.pop(record.OURS), arguments, True).results()
    for label in (record.DENSE, record.COMPILED):  # the first computes something else, the second takes a compiler
        del found[label]
    assert len(found) == 5
    for rival in found.values():
        harness.assert_same(harness.Call(rival, arguments, True).results(), want, dtype)


@pytest.mark.full
def test_the_compiled_layer_computes_what_it_does():
    arguments = workload.layer_inputs(LAYER, torch.float32, CPU)
    found = rivals.layers(LAYER, torch.float32, CPU, None)
    want = harness.Call(found[record.OURS], arguments, True).results()
    got = harness.Call(found[record.COMPILED].function, arguments, True).results()
    harness.assert_same(got, want, torch.float32)


def test_a_layer_too_large_for_copies_of_its_weights_says_so():
    layer = workload.Layer(4096, 4096, 14336, 8, 2)
    assert "over a quarter of the memory" in rivals.layers(layer, torch.float32, CPU, None)[record.TRANSFORMERS_BATCHED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ways_to_merge_agree(dtype):
    shapes = (48, 16), (16, 24)
    tensors = [torch.randn(6, *shape).to(dtype) for shape in shapes]
    coefficients = torch.rand(2, 6).softmax(-1)
    want = merges.eager(tensors, coefficients, True)
    ways = {
        "own dtype": lambda: merges.eager(tensors, coefficients, False),
        "einsum": lambda: merges.einsum(tensors, coefficients),
        "XFT": lambda: merges.xft(merges.xft_stacks(tensors), coefficients, shapes, dtype),
    }
    mergekit = merges.mergekit()
    if mergekit != "mergekit is not installed":
        ways["mergekit"] = lambda: mergekit(tensors, coefficients)
    for way in ways.values():
        harness.assert_same(way(), want, dtype)


def peers_on(layer, dtype):
    make = lambda: workload.layer_inputs(layer, dtype, CPU)  # noqa: E731
    return gpu_peers.layers(layer, dtype, CPU, make, rivals.expert_loop, rivals.TransformersExperts)


def test_what_is_for_gpus_is_not_run_without_and_says_why():
    recorder, found = record.Recorder(), peers_on(LAYER, torch.float32)
    case = harness.Case("moe_ffn", LAYER, torch.float32, "forward+backward")
    contest = harness.Contest(CPU, recorder, timing.Deadline(), pytest.fail)
    contest(case, {record.OURS: lambda x: x * 2} | found, lambda: {"x": torch.randn(4, requires_grad=True)})
    outcomes = {entry["label"]: entry["outcome"] for entry in recorder.entries}
    assert outcomes.pop(record.OURS) == "measured" and set(outcomes) == {
        "transformers sonicmoe",
        "transformers deepgemm",
        *gpu_peers.PACKAGES,
    }
    assert all(outcome.startswith("not run: ") and len(outcome) > 12 for outcome in outcomes.values())


@pytest.mark.parametrize("peer", [gpu_peers.ScatterMoE, gpu_peers.MegaBlocks, gpu_peers.TransformerEngine])
def test_a_peers_layout_holds_the_same_weights(peer):
    inputs = workload.layer_inputs(LAYER, torch.float32, CPU)
    want = rivals.expert_loop(**inputs)
    laid_out = gpu_peers._laid_out(peer, lambda: dict(inputs))
    assert all(w.requires_grad and w.is_leaf and w.is_contiguous() for w in laid_out["weights"].values())
    assert torch.equal(gpu_peers._plain(peer, rivals.expert_loop, **laid_out), want)


def scattermoe(module):
    """As scattermoe.mlp.GLUMLP computes it, by its documented formula: value first, gate second."""

    def run(x, gates, experts):
        out = torch.zeros_like(x)
        for k in range(experts.shape[1]):
            up, down = module.up[experts[:, k]], module.down[experts[:, k]]
            value, gate = torch.einsum("td,twd->tw", x, up).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * value
            out = out + gates[:, k, None] * torch.einsum("tw,tdw->td", hidden, down)
        return out

    return run


def test_a_peers_module_gets_what_it_expects(monkeypatch):
    """A stand-in for ScatterMoE's module, through the harness: compared with the loop, gradients and all."""

    class GLUMLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.output_experts = torch.nn.Module(), torch.nn.Module()
            self.experts.weight = torch.nn.Parameter(torch.empty(0))
            self.output_experts.weight = torch.nn.Parameter(torch.empty(0))

        def forward(self, x, gates, experts):
            self.up, self.down = self.experts.weight, self.output_experts.weight
            return scattermoe(self)(x, gates, experts)

    monkeypatch.setattr(gpu_peers.ScatterMoE, "_module", GLUMLP())
    monkeypatch.setattr(gpu_peers.importlib.util, "find_spec", lambda name: name == "scattermoe" or None)
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    recorder = record.Recorder()
    case = harness.Case("moe_ffn", LAYER, torch.float32, "forward+backward")
    harness.Contest(CPU, recorder, timing.Deadline(), pytest.fail)(
        case, {"ScatterMoE": peers_on(LAYER, torch.float32)["ScatterMoE"]}
    )
    assert recorder.entries[0]["outcome"] == "measured" and recorder.entries[0]["compared"]
