"""Compiles a Triton launch for a GPU that is not here, and says what the compiler made of it.

A launch is recorded on meta tensors (`triton_kernels.launch.recording`), so that it is compiled as it would be on such
a GPU: the same constants, and integers specialised as Triton specialises them (1, multiples of 16). Registers and
spills come from the binary, since metadata does not know them; too much shared memory is no compile error, so that
the limit is checked here.
"""

import contextlib
import io
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Name: (target, shared memory of a block in bytes, multiprocessors, the matrix instructions).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912, 108, r"\bmma\.sync"),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448, 132, r"\bwgmma\.mma_async"),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448, 148, r"\btcgen05\.mma"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536, 304, r"\bv_mfma_"),
}
_TMEM_COLUMNS = 512
_CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Report:
    """What a compiled kernel uses. `matrix`: whether it has the target's matrix instructions; `descriptors`: whether it
    reads tiles through tensor descriptors."""

    registers: int
    spilled: int
    shared: int
    matrix: bool
    descriptors: bool


def _type_of(value):
    """Triton's name for an argument's type, and whether it is known to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], True
    if isinstance(value, int) and value != 1:
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return "constexpr", False  # None, and 1


def _source(launch):
    names, constants, options = launch.kernel.arg_names, {}, {}
    for name, value in launch.options.items():
        (constants if name in names else options)[name] = value
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        signature[name], multiple = _type_of(value)
        if signature[name] == "constexpr":
            constants[name] = value
        if multiple:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in names}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes), options


def compile_launch(launch, name):
    """Compiles a recorded launch for TARGETS[name]."""
    source, options = _source(launch)
    target, _, _, matrix = TARGETS[name]
    if target.backend == "cuda" and launch.options.get("BLOCK_M", 64) < 64:
        matrix = TARGETS["sm_80"][3]  # the newer instructions have 64 rows at least
    with contextlib.redirect_stdout(io.StringIO()):  # ptxas prints the whole PTX with an error
        kernel = triton.compile(source, target=target, options=options)
    assert (getattr(kernel.metadata, "tmem_size", None) or 0) <= _TMEM_COLUMNS
    if target.backend == "cuda":
        registers, spilled = _resources(kernel.asm["cubin"])
        assembly = kernel.asm["ptx"]
    else:
        assembly = kernel.asm["amdgcn"]
        numbers = {n: int(v) for n, v in re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s+(\d+)", assembly)}
        registers, spilled = numbers["vgpr_count"], numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    found = (re.search(pattern, assembly) is not None for pattern in (matrix, r"cp\.async\.bulk\.tensor"))
    return Report(registers, spilled, kernel.metadata.shared, *found)


def _resources(cubin):
    """Registers, and bytes of stack and local memory, of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


# A call of every operator's wrapper on meta tensors, at sizes of a real layer. `h` and `i` are the hidden and the
# intermediate size: multiples of 16 or not, which decides how memory is read.

T, E, K, S = 4096, 8, 2, 2
R = T * K


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _routing(kernels, dtype, h, i):
    acc, mask, indices = _acc(dtype), empty(T, dtype=torch.bool), empty(T, K, dtype=torch.int32)
    logits = empty(T, E, dtype=dtype)
    grads = [empty(*shape, dtype=acc) for shape in ((T,), (T, K), (E,), ())]
    counts = empty(E, dtype=torch.int32)
    for clean, live, gate in ((None, mask, "shared_complement"), (logits, None, "fixed")):
        kernels["route"](logits, live, clean, K, gate, 0.5)
        kernels["route_backward"](*grads, logits, live, clean, indices, counts, gate, 0.5)
    kernels["sort_slots"](indices, E)


def _permute(kernels, dtype, h, i):
    slots, offsets = empty(R, dtype=torch.int32), empty(E + 1, dtype=torch.int32)
    weights = empty(T, dtype=_acc(dtype)), empty(T, K, dtype=_acc(dtype))
    x, rows = empty(T, h, dtype=dtype), empty(S * T + R, h, dtype=dtype)
    kernels["permute"](x, slots, offsets, K)
    for pair in (weights, (None, None)):
        kernels["unpermute"](rows, slots, offsets, *pair, S, K)
        kernels["unpermute_backward"](x, rows, slots, offsets, *pair, S, K)


def _activation(kernels, dtype, h, i):
    grad, weights = empty(R, i, dtype=dtype), empty(R, dtype=_acc(dtype))
    for kind, glu in (("silu", True), ("gelu", True), ("gelu_tanh", False), ("relu", False), ("relu2", True)):
        z = empty(R, 2 * i if glu else i, dtype=dtype)
        kernels["activation"](z, kind, glu)
        kernels["activation_backward"](grad, z, weights, kind, glu)
    kernels["activation_backward"](grad, z, None, kind, glu)


def _merge_experts(kernels, dtype, h, i):
    shared, routed, grad = empty(S, i, h, dtype=dtype), empty(E, i, h, dtype=dtype), empty(i, h, dtype=dtype)
    kernels["merge_experts"]([shared], [routed], empty(1, S + E, dtype=_acc(dtype)))
    kernels["merge_experts_dots"]([grad], [shared], [routed])


def _expert_gemm(kernels, dtype, h, i):
    offsets, proj = empty(E + 1, dtype=torch.int32), (empty(S, i, h, dtype=dtype), empty(E, i, h, dtype=dtype))
    rows, shared_rows = empty(R, h, dtype=dtype), empty(T, h, dtype=dtype)
    grads = empty(S * T, i, dtype=dtype), empty(R, i, dtype=dtype)
    biases = empty(S, i, dtype=dtype), empty(E, i, dtype=dtype)
    kernels["expert_gemm"](shared_rows, rows, *proj, offsets, T, *biases, False)
    kernels["expert_gemm"](*grads, *proj, offsets, T, None, None, True)
    kernels["expert_gemm_wgrad"](*grads, shared_rows, rows, offsets, T, S, True, True)
    kernels["expert_gemm_wgrad"](*grads, shared_rows, rows, offsets, T, S, True, True, _acc(dtype))


def _bias_grad(kernels, dtype, h, i):
    offsets, weights = empty(E + 1, dtype=torch.int32), empty(S * T + R, dtype=_acc(dtype))
    for row_weights in (weights, None):
        rows = empty(S * T, h, dtype=dtype), empty(R, h, dtype=dtype)
        kernels["expert_bias_grad"](*rows, row_weights, offsets, T, S, True, True)


def _parameters(dtype, h, i, glu, biases):
    up = 2 * i if glu else i
    of = [(S, up, h), (E, up, h), (S, h, i), (E, h, i)]
    of_biases = [(S, up), (E, up), (S, h), (E, h)]
    return [empty(*s, dtype=dtype) for s in of] + [empty(*s, dtype=dtype) if biases else None for s in of_biases]


# Of the composed operator: kind, and whether gated; every second without biases and without what backward needs.
ACTIVATIONS = [("silu", True), ("gelu_tanh", False), ("gelu", True), ("relu", False), ("relu2", True)]


def _moe_ffn(kernels, dtype, h, i):
    acc, x, indices = _acc(dtype), empty(T, h, dtype=dtype), empty(T, K, dtype=torch.int32)
    routing = empty(T, dtype=acc), empty(T, K, dtype=acc), indices
    maps = empty(R, dtype=torch.int32), empty(R, dtype=torch.int32), empty(E + 1, dtype=torch.int32)
    for n, (kind, glu) in enumerate(ACTIVATIONS):
        experts = _parameters(dtype, h, i, glu, biases=n % 2 == 0)
        kernels["moe_ffn" if n % 2 else "moe_ffn_forward"](x, *routing, *experts, kind, glu)
        need = [t is not None for t in (x, *routing[:2], *experts)]
        pre_activation = empty(S * T + R, 2 * i if glu else i, dtype=dtype)
        kernels["moe_ffn_backward"](x, x, *routing, *experts, pre_activation, *maps, kind, glu, need)


CASES = {
    "routing": _routing,
    "permute": _permute,
    "activation": _activation,
    "merge_experts": _merge_experts,
    "expert_gemm": _expert_gemm,
    "expert_bias_grad": _bias_grad,
    "moe_ffn": _moe_ffn,
}
