"""Small hand-written kernels for the tests of the interpreter: a body of PTX between a fixed prologue and ``ret``.

The prologue declares registers ``%r``, ``%rd``, ``%f``, ``%rs``, ``%p`` by number, and sets: ``t`` to %tid.x; ``at2``,
``at4``, ``at8`` and ``at16`` to so many bytes a thread; ``a0``, ``a1``, ... to the pointers, ``n0``, ``n1``, ... to the
numbers among the arguments.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from . import Program, Report

LINES = """.version 7.4
.target sm_80
.address_size 64
"""
WIDTHS = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}


@cache
def program(body: str, kinds: tuple[str, ...] = ("u64",), module: str = "", hints: str = "") -> Program:
    """The program whose one kernel ``k`` has this body and parameters of these types."""
    parameters = ",\n".join(f".param .{kind} p{at}" for at, kind in enumerate(kinds))
    names, loads = {"u64": 0, "u32": 0}, []
    for at, kind in enumerate(kinds):
        name = f"{'a' if kind == 'u64' else 'n'}{names[kind]}"
        names[kind] += 1
        loads.append(f".reg .{kind} {name}; ld.param.{kind} {name}, [p{at}];")
    return Program(
        f"""{LINES}{module}
.visible .entry k(
{parameters}
) {hints}
{{
.reg .b16 %rs<40>; .reg .b32 %r<80>; .reg .f32 %f<40>; .reg .b64 %rd<40>; .reg .pred %p<20>;
.reg .b32 t; .reg .b64 at2, at4, at8, at16;
mov.u32 t, %tid.x;
mul.wide.u32 at2, t, 2; mul.wide.u32 at4, t, 4; mul.wide.u32 at8, t, 8; mul.wide.u32 at16, t, 16;
{" ".join(loads)}
{body}
ret;
}}"""
    )


def run(
    body: str, *arguments: Any, block: int = 32, grid: int = 1, module: str = "", hints: str = "", **settings: Any
) -> Report:
    """Run a body on arguments: numbers are u32, everything else is a pointer."""
    kinds = tuple("u32" if isinstance(argument, int) else "u64" for argument in arguments)
    kernel = program(body, kinds, module, hints)
    return kernel.run("k", arguments, grid=(grid, 1, 1), block=(block, 1, 1), **settings)


def compute(line: str, out: Any, *columns: Any) -> Any:
    """``line`` on a thread for each element: sources ``x``, ``y``, ``z`` from the columns, destination ``d``."""
    sources: Sequence[Any] = [np.ascontiguousarray(column) for column in columns]
    result = np.zeros(len(sources[0]), dtype=out)
    kind = WIDTHS[result.itemsize]
    body = f".reg .b{max(16, 8 * result.itemsize)} d; .reg .b64 at; mov.u64 at, 0;"
    for at, source in enumerate(sources):
        name = "xyz"[at]
        width = source.itemsize
        body += (
            f".reg .b{8 * width} {name}; mad.wide.u32 at, t, {width}, a{at}; ld.global.{WIDTHS[width]} {name}, [at];"
        )
    body += f"{line}\nmad.wide.u32 at, t, {result.itemsize}, a{len(sources)}; st.global.{kind} [at], d;"
    run(body, *sources, result, block=len(result))
    return result
