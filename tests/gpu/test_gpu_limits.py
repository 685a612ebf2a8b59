"""What the device refuses, what it holds in memory, and sizes beyond 2^31 elements."""

import time

import pytest
import torch
from on_device import own
from op_cases import NAMES, ODD, case
from op_inputs import expert_indices, floats, moe_inputs
from test_moe_ffn import NEED

import ummrm
from ummrm import ops
from ummrm.ops import library, reference

raw = torch.ops.ummrm


def refused(error, function, **arguments):
    """The message of the refusal, which names expectation, value and remedy."""
    with pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    assert message.startswith("ummrm.") and "must" in message and "got" in message and "; " in message, message
    return message


@pytest.mark.compiled_only
@pytest.mark.cuda_only
def test_the_build_has_kernels(device):
    info = library.build_info()
    assert info["cuda_archs"], info
    assert {row["arch"] for row in library.tile_table()} >= {"any"}
    assert ops.activation(floats(4, 8).to(device)).device.type == "cuda"


@pytest.mark.compiled_only
@pytest.mark.cuda_only
@pytest.mark.parametrize("name", [n for n in NAMES if n != "sort_slots"])
def test_double_precision_is_refused(device, name):
    op, arguments = case(name, ODD, torch.float64)
    message = refused(TypeError, op, **own(arguments, device))
    assert "float64" in message and (".float()" in message or "CPU" in message)


@pytest.mark.compiled_only
@pytest.mark.cuda_only
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda d: ops.route(torch.randn(5, 257, device=d), top_k=2), "256"),
        (lambda d: ops.route(torch.randn(5, 20, device=d), top_k=17), "16"),
        (lambda d: ops.sort_slots(torch.zeros(5, 2, dtype=torch.int32, device=d), 257), "256"),
    ],
)
def test_too_many_experts_are_refused(device, function, words):
    message = refused(ValueError, lambda: function(device))
    assert words in message and "CPU" in message


@pytest.mark.cuda_only
@pytest.mark.parametrize("name", NAMES)
def test_mixed_devices_are_refused(device, name):
    """Every tensor but the first in turn stays on the CPU."""
    op, arguments = case(name, ODD)
    on_gpu, tensors = own(arguments, device), [n for n, v in arguments.items() if isinstance(v, torch.Tensor)]
    for left_behind in tensors[1:]:
        refused(ValueError, op, **on_gpu | {left_behind: arguments[left_behind]})


@pytest.fixture
def checked(device):
    """Index values are checked, as on the CPU they always are."""
    ummrm.check(True)
    yield
    ummrm.check(False)


def bad_indices():
    """(operator, argument, how its values go wrong), on otherwise good arguments."""
    return [
        ("sort_slots", "expert_indices", lambda v: v.fill_(99)),
        ("sort_slots", "expert_indices", lambda v: v.fill_(-2)),
        ("permute", "sorted_to_slot", lambda v: v[3:4].fill_(10**6)),
        ("permute", "sorted_to_slot", lambda v: v[:1].fill_(-1)),
        ("permute", "expert_offsets", lambda v: v[-1:].fill_(10**6)),
        ("unpermute", "slot_to_sorted", lambda v: v[-1:].fill_(10**6)),
        ("expert_gemm", "expert_offsets", lambda v: v[1:2].fill_(-1)),
        ("moe_ffn", "expert_indices", lambda v: v[-1:].fill_(99)),
    ]


@pytest.mark.parametrize(("name", "argument", "spoil"), bad_indices())
def test_bad_indices_raise_when_checked(device, checked, name, argument, spoil):
    op, arguments = case(name, ODD, kind="random")
    arguments = own(arguments, device)
    op(**arguments)
    spoil(arguments[argument])
    assert f"`{argument}`" in refused(IndexError, op, **arguments)


@pytest.mark.cuda_only
def test_unchecked_indices_raise_nothing_and_harm_nothing(device):
    """Without `ummrm.check` an expert index out of range counts as -1: its slots come last."""
    indices = expert_indices(40, 5, 2)
    indices[3, 1], indices[17, 0] = 77, -9
    got = ops.sort_slots(indices.to(device), 5)
    indices[3, 1] = indices[17, 0] = -1
    for a, b in zip(got, reference.sort_slots(indices, 5), strict=True):
        assert torch.equal(a.cpu(), b)


# Memory. `requested_bytes` counts what tensors asked for, where `memory_allocated` counts blocks of 512 bytes or more.


def requested():
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("glu", [True, False], ids=["gated", "plain"])
def test_activation_memory_is_the_docstring_formula(device, dtype, glu):
    """What lies between forward and backward, beside the output, and the inputs that the formula counts with it."""
    t, h, i, e, k, s = 210, 128, 96, 5, 3, 2
    arguments = own(moe_inputs(t, h, i, e, k, s, glu, dtype=dtype), device)
    leaves = [arguments[n] for n in NEED]
    out = ops.moe_ffn(**arguments, glu=glu)
    grad = torch.randn_like(out)
    torch.autograd.grad(out, leaves, grad)  # what libraries allocate once stays
    del out
    torch.cuda.synchronize()
    before = requested()
    out = ops.moe_ffn(**arguments, glu=glu)
    held = requested() - before - out.numel() * out.element_size()
    inputs = ("x", "shared_weight", "routed_weights", "expert_indices")
    counted = sum(arguments[n].numel() * arguments[n].element_size() for n in inputs)
    b, w = dtype.itemsize, 2 * i if glu else i
    assert held + counted == b * (t * h + (s * t + t * k) * w) + 4 * (t + t * k) + 4 * (3 * t * k + e + 1)
    grads = torch.autograd.grad(out, leaves, grad)
    del out, grads
    for _ in range(100):  # autograd's own thread may let go of the last of it a moment later
        if requested() == before:
            break
        time.sleep(0.01)
    assert requested() == before  # backward leaves nothing behind


@pytest.mark.cuda_only
def test_memory_without_recording(device):
    arguments = own(moe_inputs(210, 128, 96, 5, 3, 2), device)
    with torch.no_grad():
        ops.moe_ffn(**arguments)
        before = requested()
        out = ops.moe_ffn(**arguments)
    assert requested() - before == out.numel() * out.element_size()


# Beyond 2^31 elements; on a CPU at a size that only says that the test itself is right. One process has them all: each
# keeps tens of gigabytes in its allocator.

large = pytest.mark.xdist_group("large")


def rows_for(device, width):
    """So many rows of `width` that they pass 2^31 elements on CUDA."""
    return 2**31 // width + 5 if device.type == "cuda" else 40


def random(device, *shape):
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def ends_and_middle(rows):
    return torch.tensor([0, 1, rows // 3, rows // 2, rows - 2, rows - 1])


@large
def test_activation_of_many_elements(device):
    rows, i = rows_for(device, 1024), 512
    z, probe = random(device, rows, 2 * i), ends_and_middle(rows).to(device)
    out = ops.activation(z)
    assert torch.equal(out[probe], ops.activation(z[probe]))
    grad, weights = random(device, rows, i), torch.rand(rows, device=device)
    got = raw.activation_backward(grad, z, weights, "silu", True)
    want = raw.activation_backward(grad[probe], z[probe], weights[probe], "silu", True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[probe], b)


@large
def test_permute_of_many_elements(device):
    h, e, k = 2048, 16, 16
    t = rows_for(device, h) // k + 5
    slot_to_sorted, sorted_to_slot, offsets = ops.sort_slots(expert_indices(t, e, k).to(device), e)
    x, probe = random(device, t, h), ends_and_middle(t * k).to(device)
    rows = ops.permute(x, sorted_to_slot, offsets, k)
    assert torch.equal(rows[probe], x[(sorted_to_slot[probe] // k).long()])
    weights = torch.full((t, k), 1 / k, device=device)
    out = ops.unpermute(rows, slot_to_sorted, offsets, None, weights, 0, k)
    tokens = ends_and_middle(t).to(device)
    torch.testing.assert_close(out[tokens], x[tokens])
    grad = random(device, t, h)
    back = raw.unpermute_backward(grad, rows, slot_to_sorted, offsets, None, weights, 0, k)[0]
    want = (grad[(sorted_to_slot[probe] // k).long()].float() / k).bfloat16()
    torch.testing.assert_close(back[probe], want)


@large
def test_merge_of_many_elements(device):
    count = rows_for(device, 1) if device.type == "cuda" else 1000
    shared, routed = random(device, 1, count), random(device, 2, count)
    coefficients = torch.tensor([[0.5, 0.25, 0.25]], device=device)
    (out,) = ops.merge_experts([shared], [routed], coefficients)
    probe = ends_and_middle(count).to(device)
    want = ops.merge_experts([shared[:, probe]], [routed[:, probe]], coefficients)[0]
    assert torch.equal(out[probe], want)
    grad = torch.zeros(count, dtype=torch.bfloat16, device=device)
    grad[probe] = 1  # the dot is then a sum of few elements, the last ones among them
    dots = raw.merge_experts_dots([grad], [shared], [routed])
    want = torch.cat([shared[:, probe], routed[:, probe]]).float().sum(-1)
    torch.testing.assert_close(dots[0], want)


@large
def test_expert_gemm_of_many_elements(device):
    """More than 2^31 elements in a result: rows probed at both ends of it, and of a group."""
    n, d = 16384, 64
    t = rows_for(device, n) // 3 + 5
    arguments = {
        "shared_rows": random(device, t, d),
        "routed_rows": random(device, 2 * t, d),
        "shared_proj": random(device, 1, n, d),
        "routed_proj": random(device, 2, n, d),
        "expert_offsets": torch.tensor([0, t + 3, 2 * t], dtype=torch.int32, device=device),
        "num_tokens": t,
    }
    out = ops.expert_gemm(**arguments)
    assert out.numel() > 2**31 or device.type == "cpu"
    places = (0, t - 1), (t, 2 * t + 2), (2 * t + 3, 3 * t - 1)
    weights = arguments["shared_proj"][0], *arguments["routed_proj"]
    rows = torch.cat([arguments["shared_rows"], arguments["routed_rows"]])
    for ends, weight in zip(places, weights, strict=True):
        want = rows[list(ends)].float() @ weight.float().T
        torch.testing.assert_close(out[list(ends)].float(), want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


@large
def test_moe_ffn_of_many_elements(device):
    """A pre-activation of more than 2^31 elements; a few tokens of it against the same tokens alone."""
    h, i, e, k, s = 64, 8192, 2, 1, 1
    t = rows_for(device, 2 * i) // 2 + 5
    with torch.no_grad():
        arguments = own(moe_inputs(1, h, i, e, k, s, biases=False, dtype=torch.bfloat16), device)
        few = ends_and_middle(t).to(device)
        indices = torch.randint(0, e, (t, k), dtype=torch.int32, device=device)
        arguments |= {"x": random(device, t, h), "expert_indices": indices}
        arguments |= {"shared_weight": torch.rand(t, device=device), "routed_weights": torch.rand(t, k, device=device)}
        some = {n: v[few] for n, v in arguments.items() if n in NEED[:3] or n == "expert_indices"}
        out, want = ops.moe_ffn(**arguments)[few].float(), ops.moe_ffn(**arguments | some).float()
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
