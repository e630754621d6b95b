"""A whole PTX text, ready to run: blocks of closures, the branches between them, and the launch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import access, floating, integer, matrix, mbarrier, warp
from .group import LANES, Block, Group, Launch
from .machine import Machine
from .memory import Buffer, GlobalMemory, buffer_of, pointer_of
from .operands import Builder, Step
from .parse import Entry, Instruction, Module, Variable, parse, type_size
from .report import Fault, Report
from .transactions import tracked
from .values import STORAGE, U8, U32, Array, constant, type_dtype

FAMILIES = (access, floating, integer, matrix, mbarrier, warp)  # imported for the instructions that they register
ENDS = ("bra", "brx", "ret", "exit", "trap", "bar", "barrier", "call")
MAX_SHARED = 232448  # 227 KB, the most that any GPU of today lets a CTA have
MAX_LANES = 1 << 14  # more make a step no cheaper for a lane
MAX_REGISTERS = 1 << 25  # words of all lanes of a chunk, 128 MB
MAX_SHARED_TOTAL = 1 << 27

End = Callable[[Group], int]


def is_end(ins: Instruction) -> bool:
    """Whether control may go elsewhere after an instruction."""
    if mbarrier.is_wait(ins):
        return True
    return ins.parts[0] in ENDS and ins.parts[1:2] not in (["warp"], ["cluster"])


class Compiled:
    """An entry as blocks, by the place of their first instruction."""

    def __init__(self, entry: Entry, addresses: dict[str, int]) -> None:
        self.entry = entry
        self.addresses = addresses
        code = entry.instructions
        leaders = {0, *entry.labels.values()} | {ins.pc + 1 for ins in code if is_end(ins)}
        leaders |= {ins.pc for ins in code if mbarrier.is_wait(ins)}  # to come back to
        self.blocks: dict[int, Block] = {}
        starts = sorted(leader for leader in leaders if leader < len(code))
        for start, stop in zip(starts, [*starts[1:], len(code)], strict=True):
            self.blocks[start] = self.block(code[start:stop], stop)
        # after the last instruction there is nothing: the threads end, as at a ret
        self.blocks[len(code)] = Block([], lambda group: leave(group, None), [])
        barriers = [ins for ins in code if ins.parts[0] in ("bar", "barrier") and is_end(ins)]
        self.precise = any(ins.operands != ["0"] for ins in barriers if not mbarrier.is_wait(ins))
        self.tracked = tracked(code)

    def builder(self, ins: Instruction) -> Builder:
        """Builder of one instruction."""
        return Builder(self.entry, ins, self.addresses)

    def block(self, code: list[Instruction], after: int) -> Block:
        """A block of instructions without a branch between."""
        *body, last = code
        if not is_end(last):
            return Block([self.step(ins) for ins in code], lambda group: after, code)
        return Block([self.step(ins) for ins in body], self.end(last, after), code)

    def step(self, ins: Instruction) -> Step:
        """The closure of an instruction, guard included."""
        inner = self.builder(ins).build()
        if ins.guard is None:
            return inner
        guard = self.guard(ins)

        def step(group: Group) -> None:
            chosen = guard(group)
            active = int(np.count_nonzero(chosen))
            if active == 0:
                return
            if active == group.active:
                inner(group)
                return
            outer = group.mask, group.active
            group.enter(chosen, active)
            inner(group)
            group.enter(*outer)

        return step

    def guard(self, ins: Instruction) -> Callable[[Group], Array]:
        """Active lanes for which the guard of an instruction holds."""
        assert ins.guard is not None
        negated, name = ins.guard
        read = self.builder(ins).read(name, STORAGE[1])

        def chosen(group: Group) -> Array:
            flags = read(group)
            flags = ~flags if negated else flags
            return flags if group.mask is None else flags & group.mask

        return chosen

    def end(self, ins: Instruction, after: int) -> End:
        """The closure that ends a block and says where the group goes on."""
        name = ins.parts[0]
        if name == "bra":
            if ins.operands[0] not in self.entry.labels:
                raise ins.unsupported(f"goes to {ins.operands[0]}, which is no label of {self.entry.name}")
            target = self.entry.labels[ins.operands[0]]
            if ins.guard is None:
                return lambda group: target
            return self.branch(ins, target, after)
        if name in ("ret", "exit"):
            inner: End = lambda group: leave(group, None)  # noqa: E731
            if ins.guard is None:
                return inner
            guard = self.guard(ins)
            return lambda group: leave(group, guard(group), after)
        if name == "trap":
            guard_or_none = None if ins.guard is None else self.guard(ins)
            return lambda group: trap(group, ins, guard_or_none, after)
        if mbarrier.is_wait(ins):
            return mbarrier.wait(self.builder(ins), after)
        if name in ("bar", "barrier"):
            return self.barrier(ins, after)
        if name == "brx":
            return self.branch_indexed(ins)
        raise ins.unsupported("is not supported: kernels are to inline what they call")

    def branch(self, ins: Instruction, target: int, after: int) -> End:
        """A branch that some lanes take."""
        guard = self.guard(ins)
        same = "uni" in ins.parts

        def end(group: Group) -> int:
            taken = guard(group)
            count = int(np.count_nonzero(taken))
            if count == 0:
                return after
            if count == group.active:
                return target
            rest = ~taken if group.mask is None else group.mask & ~taken
            if same and (taken.reshape(-1, 32).any(axis=1) & rest.reshape(-1, 32).any(axis=1)).any():
                raise ins.fault("bra.uni is taken by some threads of a warp only")
            group.go(target, taken)
            group.go(after, rest)
            return -1

        return end

    def branch_indexed(self, ins: Instruction) -> End:
        """``brx.idx``: a branch through a table of labels."""
        read = self.builder(ins).read(0, U32)
        targets = [self.entry.labels[label] for label in self.entry.targets[ins.operands[1]]]
        if ins.guard is not None:
            raise ins.unsupported("has a guard")

        def end(group: Group) -> int:
            index = np.broadcast_to(read(group), group.lanes)
            mask = group.current()
            if (index[mask] >= len(targets)).any():
                raise ins.fault(f"brx.idx beyond its {len(targets)} labels")
            for number in np.unique(index[mask]).tolist():
                group.go(targets[number], mask & (index == number))
            return -1

        return end

    def barrier(self, ins: Instruction, after: int) -> End:
        """``bar.sync`` and ``barrier.sync``: by number, and count of threads."""
        if "sync" not in ins.parts or ins.guard is not None or "red" in ins.parts:
            raise ins.unsupported("is a barrier that this interpreter does not know")
        reads: list[Any] = [self.builder(ins).read(at, U32) for at in range(len(ins.operands))]

        def nought(group: Group) -> Any:
            return U32(0)

        def end(group: Group) -> int:
            number, count = (np.asarray(read(group)) for read in [*reads, nought, nought][:2])
            if number.shape == () and count.shape == ():
                return group.arrive(ins, int(number), int(count), after)
            return group.arrive_each(ins, number, count, after)

        return end


def leave(group: Group, chosen: Array | None, after: int = -1) -> int:
    """Threads end; the others, if any, go on."""
    if chosen is None:
        group.exit(group.mask)
        return -1
    count = int(np.count_nonzero(chosen))
    if count == 0:
        return after
    rest = ~chosen if group.mask is None else group.mask & ~chosen
    group.exit(chosen)
    if count == group.active:
        return -1
    group.enter(rest)
    return after


def trap(group: Group, ins: Instruction, guard: Callable[[Group], Array] | None, after: int) -> int:
    """A trap that is reached is a fault."""
    chosen = group.current() if guard is None else guard(group)
    if chosen.any():
        raise ins.fault(f"{group.describe(int(chosen.argmax()))}: trap")
    return after


class Program:
    """The kernels of a PTX text.

    Raises:
        SyntaxError: at text that is not understood, with its line.
    """

    def __init__(self, text: str) -> None:
        self.module: Module = parse(text)
        self.version = self.module.version
        self.target = self.module.target
        self.entries = self.module.entries
        self._compiled: dict[str, Compiled] = {}
        self._variables = {variable.name: _place(variable) for variable in self.module.variables}

    def compiled(self, name: str) -> Compiled:
        """An entry as closures, made at its first use.

        Raises:
            NotImplementedError: at an instruction that the interpreter has no rule for, with its line.
        """
        if name not in self._compiled:
            addresses = {key: buffer.base for key, buffer in self._variables.items()}
            self._compiled[name] = Compiled(self.entries[name], addresses)
        return self._compiled[name]

    def run(
        self,
        entry: str,
        arguments: Sequence[Any],
        *,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int = 0,
        schedule: str = "lockstep",
        seed: int = 0,
        races: bool = True,
        max_instructions: int = 5_000_000,
    ) -> Report:
        """Run a kernel over a grid, on the memory of the arrays themselves.

        Args:
            entry: name of the kernel.
            arguments: one for each parameter: an array or CPU tensor for a pointer, None for a null pointer, a number.
            grid, block: extents in CTAs and threads, up to three.
            shared: bytes of dynamic shared memory.
            schedule: "lockstep", all warps of a CTA together; "warps", each alone to its next barrier, in random order.
            seed: of that order.
            races: whether accesses to shared memory by several warps with no barrier between are a fault.
            max_instructions: of one chunk of CTAs, each instruction counted once for all of them.

        Raises:
            Fault: at the first mistake of the kernel.
        """
        kernel = self.entries[entry]
        blocks = self.compiled(entry)
        grid_dims, block_dims = three(grid), three(block)
        check_launch(kernel, grid_dims, block_dims, shared)
        if schedule not in ("lockstep", "warps"):
            raise ValueError(f"schedule={schedule!r}: one of 'lockstep' and 'warps'.")
        parameters, buffers = bind(kernel, arguments)
        align = max((found.align for found in dynamic_variables(kernel)), default=1)
        static = -(-kernel.shared_bytes // align) * align
        launch = Launch(
            grid=grid_dims,
            block=block_dims,
            memory=GlobalMemory([*buffers, *self._variables.values()]),
            parameters=parameters,
            report=Report(),
            shared_bytes=static + shared,
            dynamic_bytes=shared,
            cluster=kernel.cluster,
            races=races,
            precise=blocks.precise,
            tracked=blocks.tracked,
            registers=len(kernel.registers),
            local_bytes=-(-kernel.local_bytes // 16) * 16,
            budget=max_instructions,
        )
        rng = np.random.default_rng(seed)
        limit = min(MAX_LANES, MAX_REGISTERS // max(1, launch.registers))
        for ctas in chunks(grid_dims, kernel.cluster, launch.warps, launch.shared_bytes, limit, MAX_SHARED_TOTAL):
            Machine(launch, ctas, schedule, rng).run(blocks.blocks)
        return launch.report


def chunks(
    grid: Sequence[int], cluster: int, warps: int, cta_bytes: int, limit_lanes: int, limit_bytes: int
) -> list[Array]:
    """Numbers of the CTAs of each chunk: whole clusters, and neither lanes nor shared memory exceed their limits."""
    total = int(np.prod(grid))
    size = min(limit_lanes // (warps * LANES), limit_bytes // max(1, cta_bytes)) // cluster * cluster
    size = max(cluster, size)
    return [np.arange(start, min(total, start + size)) for start in range(0, total, size)]


def dynamic_variables(entry: Entry) -> list[Variable]:
    """Shared variables that the launch sizes, as far as instructions can name them."""
    found: dict[str, Variable] = {}
    for scope in {id(ins.scope): ins.scope for ins in entry.instructions}.values():
        outer = scope
        while outer is not None:
            for name, variable in outer.names.items():
                if isinstance(variable, Variable) and variable.dynamic:
                    found[name] = variable
            outer = outer.outer  # type: ignore[assignment]
    return list(found.values())


def _place(variable: Variable) -> Buffer:
    """Memory for a variable of the module."""
    store = np.zeros(variable.size + variable.align, dtype=U8)
    start = -pointer_of(store) % variable.align
    if variable.values is not None:
        store[start : start + variable.size] = np.frombuffer(variable.values, dtype=U8)
    base = pointer_of(store) + start
    return Buffer(variable.name, base, base + variable.size, store, base, variable.space != "const")


def three(extents: Sequence[int]) -> tuple[int, int, int]:
    """Extents in three dimensions, the missing ones 1."""
    x, y, z = [*(int(extent) for extent in extents), 1, 1][:3]
    return x, y, z


def check_launch(entry: Entry, grid: Sequence[int], block: Sequence[int], shared: int) -> None:
    """Refuse a launch that the driver would refuse.

    Raises:
        Fault: with the number that is too large.
    """
    threads = int(np.prod(block))
    if threads > 1024 or threads < 1 or min(grid) < 1:
        raise Fault(f"{entry.name}: grid {tuple(grid)}, block {tuple(block)}: 1 to 1024 threads, at least one CTA")
    if entry.max_threads is not None and threads > entry.max_threads:
        raise Fault(f"{entry.name}: {threads} threads a CTA, but it was compiled for at most {entry.max_threads}")
    if entry.exact_block is not None and tuple(block) != entry.exact_block:
        raise Fault(f"{entry.name}: block {tuple(block)}, but it was compiled for {entry.exact_block}")
    if grid[0] % entry.cluster:
        raise Fault(f"{entry.name}: grid {tuple(grid)} along x is no multiple of its clusters of {entry.cluster} CTAs")
    if entry.shared_bytes + shared > MAX_SHARED:
        raise Fault(f"{entry.name}: {entry.shared_bytes + shared} bytes of shared memory; a CTA has {MAX_SHARED}")


def bind(entry: Entry, arguments: Sequence[Any]) -> tuple[dict[str, Array], list[Buffer]]:
    """Bytes of each parameter, and the memory that pointers among the arguments give access to.

    Raises:
        TypeError, ValueError: for arguments that do not fit the parameters.
    """
    if len(arguments) != len(entry.parameters):
        raise ValueError(f"{entry.name}: {len(arguments)} arguments for {len(entry.parameters)} parameters.")
    parameters, buffers = {}, []
    for (name, kind, size), argument in zip(entry.parameters, arguments, strict=True):
        if isinstance(argument, bytes):
            if len(argument) != size:
                raise ValueError(f"{name}: {len(argument)} bytes for a parameter of {size}.")
            parameters[name] = np.frombuffer(argument, dtype=U8)
            continue
        dtype = type_dtype(kind)
        if argument is None or isinstance(argument, int | float | np.number):
            if dtype.kind == "f":
                value = dtype.type(argument)
            else:
                number = int(argument or 0)
                if argument is not None and not -(1 << (8 * size - 1)) <= number < 1 << 8 * size:
                    raise ValueError(f"{name}: {number} does not fit the type {kind}.")
                value = constant(number, dtype)
        else:
            if type_size(kind) != 8 or size != 8:
                raise TypeError(f"{name}: an array for a parameter of type {kind}. A pointer is 64 bits.")
            buffers.append(buffer_of(argument, name))
            value = constant(pointer_of(argument), dtype)
        parameters[name] = np.frombuffer(np.asarray(value).tobytes(), dtype=U8)
    return parameters, buffers
