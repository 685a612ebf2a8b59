"""What a gated layer must move and multiply on CUDA, forward and backward, kernel by kernel, and what fusions spare it.

    python -m bench.byte_model [--tokens T] [--hidden H] [--intermediate I] [--experts E] [--top-k K] [--shared S]

A model, no measurement: every kernel takes what its bytes or its FLOPs take at the rates below, divided by the share of
them that it is held to (bench/targets.py). So it says which fusion can pay, and how much at most. Whole tiles, launch
gaps, and what an end of a product costs that the next tile's product does not hide are not in it. bf16 throughout.
"""

import argparse
from dataclasses import dataclass

COPY_BYTES, MM_FLOPS = 4.3e12, 790e12  # a second, read plus written, and cuBLAS in bf16: measured on an H200
REACHED = {"up": 0.90, "down": 0.92, "dAct": 0.80, "dX": 0.90, "dW down": 0.87, "dW up": 0.87}
MEMORY_REACHED = 0.9
ELEMENT = 2


@dataclass(frozen=True)
class Sizes:
    """A layer: tokens, hidden and intermediate size, routed experts, routed experts a token, shared experts."""

    tokens: int = 16384
    hidden: int = 4096
    intermediate: int = 14336
    experts: int = 8
    top_k: int = 2
    shared: int = 1

    @property
    def slots(self):
        return self.tokens * self.top_k

    @property
    def rows(self):
        return self.slots + self.tokens * self.shared


@dataclass(frozen=True)
class Kernel:
    """What an operator reads and writes (bytes), multiplies (FLOPs; 0 where memory bounds it), and launches."""

    name: str
    bytes: float
    flops: float = 0
    launches: int = 1

    @property
    def milliseconds(self):
        if self.flops:
            return self.flops / MM_FLOPS / REACHED[self.name] * 1e3
        return self.bytes / COPY_BYTES / MEMORY_REACHED * 1e3


GLU, GLU_BACKWARD, WEIGHT_SUM = "glu", "glu_backward", "weight_sum"
FUSIONS = {
    GLU: "the gated activation at the end of the up-projection",
    GLU_BACKWARD: "its backward at the end of the down-projection's input gradient",
    WEIGHT_SUM: "weight gradients added to what is there (a micro-batch after the first)",
}


def kernels(sizes, fused=(), accumulating=False):
    """The kernels of a forward and backward, in order; `accumulating`: gradients end up added to earlier ones."""
    n = sizes
    gathered = ELEMENT * n.hidden * (n.tokens + n.slots)
    combined = ELEMENT * n.hidden * (n.rows + n.tokens)
    wide = ELEMENT * n.rows * n.intermediate  # a buffer [rows, I]; the pre-activation is two
    projection = ELEMENT * (n.experts + n.shared) * n.hidden * n.intermediate

    def product(name, columns, other, saved=0, launches=2):  # tables of the groups, then the product
        moved = ELEMENT * n.rows * (columns + other) + projection * columns * other / (n.hidden * n.intermediate)
        return Kernel(name, moved + saved, 2.0 * n.rows * columns * other, launches)

    def weight_gradient(name, columns, other):
        kernel, size = product(name, columns, other), projection * columns * other / (n.hidden * n.intermediate)
        if not accumulating:
            return [kernel]
        if WEIGHT_SUM in fused:
            return [product(name, columns, other, saved=size)]  # it reads what is there
        return [kernel, Kernel(f"{name}, added", 3 * size, launches=2 if n.shared else 1)]

    yield Kernel("permute x", gathered)
    if GLU in fused:
        yield product("up", 2 * n.intermediate, n.hidden, saved=wide)
    else:
        yield product("up", 2 * n.intermediate, n.hidden)
        yield Kernel("activation", 3 * wide)
    yield product("down", n.hidden, n.intermediate)
    yield Kernel("unpermute", combined)
    yield Kernel("permute dO", gathered)
    if GLU_BACKWARD in fused:  # reads the pre-activation, writes its gradient and the activation, not its own result
        yield product("dAct", n.intermediate, n.hidden, saved=4 * wide, launches=3)
    else:
        yield product("dAct", n.intermediate, n.hidden)
        yield Kernel("activation backward", 6 * wide)
    yield from weight_gradient("dW down", n.hidden, n.intermediate)
    yield Kernel("permute x again", gathered)
    yield from weight_gradient("dW up", 2 * n.intermediate, n.hidden)
    yield product("dX", n.hidden, 2 * n.intermediate)
    yield Kernel("sum dX", combined)


def dense_milliseconds(sizes):
    """The dense FFN at equal FLOPs: cuBLAS products at their rate, and the activation's kernels."""
    flops = sum(k.flops for k in kernels(sizes))
    memory = sum(k.milliseconds for k in kernels(sizes) if k.name.startswith("activation"))
    return flops / MM_FLOPS * 1e3 + memory


def totals(sizes, fused=(), accumulating=False):
    """(milliseconds, bytes, launches) of `kernels`."""
    listed = list(kernels(sizes, fused, accumulating))
    return sum(k.milliseconds for k in listed), sum(k.bytes for k in listed), sum(k.launches for k in listed)


def table(sizes):
    """The kernels, then what each fusion and all together make of their sum."""
    n, dense = sizes, dense_milliseconds(sizes)
    lines = [f"T={n.tokens} H={n.hidden} I={n.intermediate} E={n.experts} K={n.top_k} S={n.shared}, bf16, expected:"]
    for k in kernels(n):
        lines.append(f"  {k.name:22} {k.milliseconds:8.2f} ms {k.bytes / 1e9:8.2f} GB {k.launches:3d} launches")
    choices = {"as it is": (), **{f"with {name}": (name,) for name in FUSIONS}, "with all": tuple(FUSIONS)}
    for accumulating in (False, True):
        lines.append("a micro-batch after the first:" if accumulating else "forward and backward:")
        for title, fused in choices.items():
            if WEIGHT_SUM in fused and len(fused) == 1 and not accumulating:
                continue
            ms, moved, launches = totals(n, fused, accumulating)
            share = f", {dense / ms:.3f} of the dense FFN" if not accumulating else ""
            lines.append(f"  {title:22} {ms:8.2f} ms {moved / 1e9:8.2f} GB {launches:3d} launches{share}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = ("tokens", "hidden", "intermediate", "experts", "top-k", "shared")
    for name in flags:
        parser.add_argument(f"--{name}", type=int, default=getattr(Sizes(), name.replace("-", "_")))
    print(table(Sizes(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
