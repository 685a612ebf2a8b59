"""Memory, communication and compute of a training step of a reward model's mixture on many GPUs, as a model on paper.

    python -m bench.scaling                  the table of docs/scaling.md
    python -m bench.scaling 70b --experts 8 --gpus 64 --tensor 2 --parted 8

It follows transformers' distributed engine with ummrm's plans: FSDP2 gathers a layer before it is used and reduces its
gradients, expert parallelism exchanges tokens, tensor parallelism cuts attention. Bytes and parameters are counted, and
tests/build/test_scaling_model.py holds them against what 2 and 4 processes really moved; times are what they would take
on the machine that `MACHINE` describes. Nothing of it has been measured on such a machine.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """A gated reward model of the Llama kind, upcycled.

    Attributes:
        name: for the table.
        hidden: H.
        intermediate: I of an expert.
        layers: how many; all have experts.
        key_width: width of keys, and of values: heads of keys times their size.
        vocabulary: rows of the embeddings.
        experts: E; 0 is the dense model.
        active: K, routed experts per token.
        shared: S.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    key_width: int
    vocabulary: int
    experts: int = 8
    active: int = 2
    shared: int = 1

    @property
    def expert(self) -> int:
        """Parameters of one expert of a layer."""
        return 3 * self.hidden * self.intermediate

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention."""
        return 2 * self.hidden * (self.hidden + self.key_width)

    @property
    def rest_of_layer(self) -> int:
        """Of a layer, beside attention and routed experts: two norms, shared experts and the router."""
        return 2 * self.hidden + self.shared * self.expert + self.experts * self.hidden

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings; the last norm and the head are as good as none."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Parameters of the last norm and of the head, which stay gathered."""
        return 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        layer = self.attention + self.rest_of_layer + self.experts * self.expert
        return self.layers * layer + self.embeddings + self.root

    @property
    def active_parameters(self) -> int:
        """Of the linear layers that a token goes through."""
        return self.layers * (self.attention + (self.active + self.shared) * self.expert + self.experts * self.hidden)


@dataclass(frozen=True)
class Setup:
    """How a step is spread.

    Attributes:
        gpus: how many; `data` times `tensor`.
        tensor: `tp_size`.
        parted: `ep_size`, 1 without expert parallelism.
        rows: sequences of a batch, for each of `data` ranks.
        length: tokens of a sequence.
        compute_bytes: of an element of weights and activations in use: 2 is bf16.
        held_bytes: of an element of the weights that FSDP2 holds: 4 with `fsdp_mixed_precision`.
        reduce_bytes: of an element of a gradient that is reduced.
        optimizer_bytes: of AdamW's state of a parameter.
        checkpointing: whether activations are computed again in backward, and with them gathered and exchanged.
    """

    gpus: int
    tensor: int = 1
    parted: int = 1
    rows: int = 8
    length: int = 1024
    compute_bytes: int = 2
    held_bytes: int = 4
    reduce_bytes: int = 4
    optimizer_bytes: int = 8
    checkpointing: bool = True

    @property
    def data(self) -> int:
        """Ranks with a batch of their own: `fsdp_size`."""
        return self.gpus // self.tensor

    @property
    def copies(self) -> int:
        """Ranks that share the same experts between them: the engine's `efsdp_size`."""
        return self.gpus // self.parted

    @property
    def tokens(self) -> int:
        """Of a rank's batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class Machine:
    """A cluster: what times are computed by.

    Attributes:
        flops: a GPU's dense bf16 peak, a second.
        utilisation: how much of it a training step reaches.
        memory: bytes of a GPU.
        node: GPUs of a node.
        within: bytes a second that a GPU sends to others of its node.
        between: bytes a second that a GPU sends to other nodes.
    """

    flops: float = 989e12
    utilisation: float = 0.4
    memory: float = 80e9
    node: int = 8
    within: float = 450e9
    between: float = 50e9


MACHINE = Machine()


@dataclass(frozen=True)
class Step:
    """What one step takes on each GPU.

    Attributes:
        held: parameters that it holds.
        state: bytes of weights, gradients and optimiser state.
        working: bytes of the layers that are gathered at once, and of activations.
        gathered: bytes that FSDP2's gathers bring in.
        reduced: bytes that its reductions of gradients send.
        exchanged: bytes that experts' exchanges send; all ranks' experts are taken to be used alike.
        summed: bytes that tensor parallelism sends.
        compute: seconds.
        sharding: seconds of FSDP2's traffic, which runs beside compute.
        waiting: seconds of exchanges and sums, which do not.
    """

    held: float
    state: float
    working: float
    gathered: float
    reduced: float
    exchanged: float
    summed: float
    compute: float
    sharding: float
    waiting: float

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.state + self.working

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.compute, self.sharding) + self.waiting


def share(ranks: int) -> float:
    """Of a tensor that `ranks` ranks have in equal parts, what one of them lacks."""
    return (ranks - 1) / ranks


def step(sizes: Sizes, setup: Setup, machine: Machine = MACHINE) -> Step:
    """What one step takes on each GPU.

    Raises:
        ValueError: the engine can't spread it so.
    """
    check(sizes, setup)
    data, tensor, parted, copies = setup.data, setup.tensor, setup.parted, setup.copies
    routed = sizes.experts * sizes.expert
    # what a rank's FSDP2 group of a layer holds in all, beside the routed experts where those have a group of their own
    layer = sizes.attention / tensor + sizes.rest_of_layer
    own = routed / parted if parted > 1 else 0.0
    layer += 0 if parted > 1 else routed
    embeddings, root = sizes.embeddings / tensor, sizes.root
    held = (sizes.layers * layer + embeddings + root) / data + sizes.layers * own / copies

    # forward and backward gather each layer and the embeddings, what checkpointing computes again once more
    times = 2  # the gather of a recomputation is backward's
    brought = share(data) * (times * (sizes.layers * layer + embeddings) + root)
    brought += share(copies) * times * sizes.layers * own
    reduced = share(data) * (sizes.layers * layer + embeddings + root) + share(copies) * sizes.layers * own

    slots = setup.tokens / tensor * sizes.active
    runs = 3 if setup.checkpointing else 2  # of each exchange: forward, its recomputation, backward
    exchanged = 0.0
    if parted > 1:
        exchanged = 2 * runs * sizes.layers * slots * sizes.hidden * setup.compute_bytes * share(parted)
    states = setup.tokens * sizes.hidden * setup.compute_bytes
    # attention's output once in each run of forward, its three inputs' gradients in backward, and the embeddings
    summed = 2 * share(tensor) * states * (sizes.layers * (runs - 1 + 3) + 1)
    if parted > 1:  # the slices of a batch: outputs gathered in forward, gradients of states in backward
        summed += share(tensor) * states * sizes.layers * runs

    flops = 6 * setup.tokens * sizes.active_parameters * (4 / 3 if setup.checkpointing else 1)
    attended = 12 * sizes.layers * setup.tokens * setup.length * sizes.hidden / 2
    of_attention = sizes.layers * sizes.attention * 6 * setup.tokens * (1 - 1 / tensor)
    shared_batch = sizes.layers * (sizes.experts and sizes.active) * sizes.expert * 6 * setup.tokens
    saved = of_attention + (shared_batch * (1 - 1 / tensor) if parted > 1 else 0)
    compute = (flops + attended / tensor - saved) / (machine.flops * machine.utilisation)

    gathered, sent = brought * setup.compute_bytes, reduced * setup.reduce_bytes
    state = held * (setup.held_bytes + setup.reduce_bytes + setup.optimizer_bytes)
    width = sizes.hidden + 2 * (sizes.active + sizes.shared) * sizes.intermediate
    per_layer = setup.tokens * (12 * sizes.hidden + width + sizes.active * sizes.hidden) * setup.compute_bytes
    kept = sizes.layers * states + per_layer if setup.checkpointing else sizes.layers * per_layer
    working = 2 * (layer + own) * setup.compute_bytes + (layer + own) * setup.reduce_bytes + kept
    return Step(
        held=held,
        state=state,
        working=working,
        gathered=gathered,
        reduced=sent,
        exchanged=exchanged,
        summed=summed,
        compute=compute,
        sharding=(gathered + sent) / _speed(data * tensor, machine),
        waiting=exchanged / _speed(parted, machine) + summed / _speed(tensor, machine),
    )


def check(sizes: Sizes, setup: Setup) -> None:
    """Raises ValueError unless the engine can spread the step so."""
    if setup.gpus % setup.tensor or setup.gpus % setup.parted or setup.parted % setup.tensor and setup.parted > 1:
        raise ValueError(
            f"`gpus` must be a multiple of `tensor` and of `parted`, and `parted` of `tensor`, got {setup.gpus}, "
            f"{setup.tensor} and {setup.parted}."
        )
    if setup.parted > 1 and sizes.experts % setup.parted:
        raise ValueError(f"`parted` must divide the {sizes.experts} experts, got {setup.parted}.")


def _speed(ranks: int, machine: Machine) -> float:
    """Of a rank's traffic in a group of neighbouring ranks."""
    return machine.within if ranks <= machine.node else machine.between


MODELS = {
    "7b": Sizes("7B", 4096, 14336, 32, 1024, 128256),
    "70b": Sizes("70B", 8192, 28672, 80, 1024, 128256),
}
GPUS = (8, 32, 64, 128, 512)
EXPERTS = (4, 8, 32)  # fewer than the GPUs of a node, as many, and more


def choices(sizes: Sizes, gpus: int) -> list[Setup]:
    """The ways that are compared: FSDP2 alone, with expert parallelism in a node and beyond it, with attention cut."""
    found = []
    for tensor in (1, 4, 8):
        for parted in sorted({1, *(size for size in (tensor, 4, 8, 16, 32) if size > 1)}):
            setup = Setup(gpus, tensor, parted)
            try:
                check(sizes, setup)
            except ValueError:
                continue
            if tensor == 1 or parted > 1:
                found.append(setup)
    return found


def best(sizes: Sizes, gpus: int, machine: Machine = MACHINE) -> tuple[Setup, Step] | None:
    """The fastest way, by the tokens of all GPUs a second, that fits into memory; None: nothing does."""
    made = [(setup, step(sizes, setup, machine)) for setup in choices(sizes, gpus)]
    fits = [(setup, taken) for setup, taken in made if taken.memory < 0.9 * machine.memory]
    return max(fits, key=lambda one: one[0].tokens * one[0].data / one[1].seconds, default=None)


def row(sizes: Sizes, gpus: int) -> list[str]:
    """One line of the table."""
    head = [sizes.name, str(sizes.experts), f"{sizes.parameters / 1e9:.0f}B", str(gpus)]
    found = best(sizes, gpus)
    if found is None:
        least = min(step(sizes, setup).memory for setup in choices(sizes, gpus))
        return [*head, "does not fit", f"{least / 1e9:.0f}", "", "", "", ""]
    setup, made = found
    ways = {"fsdp": setup.data, "tp": setup.tensor, "ep": setup.parted}
    how = ", ".join(f"{name} {size}" for name, size in ways.items() if size > 1)
    times = (f"{1e3 * value:.0f}" for value in (made.compute, made.sharding, made.waiting))
    return [*head, how, f"{made.memory / 1e9:.0f}", *times, f"{setup.tokens * setup.data / made.seconds / 1e3:.0f}"]


HEAD = ["model", "E", "parameters", "GPUs", "fastest that fits", "GB a GPU", "compute", "FSDP2", "exchange, sums"]
HEAD += ["1000 tokens/s"]


def table() -> str:
    """Markdown: each model on each number of GPUs."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for sizes in MODELS.values():
        for experts in EXPERTS:
            lines += [row(replace(sizes, experts=experts), gpus) for gpus in GPUS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory, communication and compute of a step on many GPUs.")
    parser.add_argument("model", nargs="?", choices=MODELS, help="one way of one model; without it the table")
    for name, default in (("experts", 8), ("active", 2), ("gpus", 64), ("tensor", 1), ("parted", 1), ("rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--length", type=int, default=1024)
    given = parser.parse_args()
    if given.model is None:
        print(table())
        return
    sizes = replace(MODELS[given.model], experts=given.experts, active=given.active)
    made = step(sizes, Setup(given.gpus, given.tensor, given.parted, given.rows, given.length))
    for name, value in vars(made).items():
        print(f"{name:>10} {value:.4g}")
    print(f"{'memory':>10} {made.memory:.4g}\n{'seconds':>10} {made.seconds:.4g}")


if __name__ == "__main__":
    main()
