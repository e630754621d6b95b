"""Mutants of a PTX text: each with one mistake that a person could make in the source."""

import re
from collections.abc import Iterator

# What is wrong, where it can be, and what stands there instead.
MISTAKES: dict[str, tuple[str, str]] = {
    "a barrier removed": (r"\tbar\.sync[^;]*;\n", ""),
    "a wait that waits for one group less": (r"cp\.async\.wait_group (\d+);", "cp.async.wait_group {next};"),
    "a copy that is never committed": (r"\tcp\.async\.commit_group;\n", ""),
    "the other sparsity selector": (r"(mma\.sp[^;]*), 0x([01]);", "{0}, 0x{other};"),
    "a matrix that is not transposed": (r"(ldmatrix[^;]*?)\.trans\.", "{0}."),
    "a swizzle left out": (r"\txor\.b32 ([^,]*), ([^,]*), ([^;]*);", "\tmov.b32 {0}, {1};"),
    "a half that stays where it is": (r"\tshl\.b32\s+(%r\d+), (%r\d+), 16;", "\tmov.b32 {0}, {1};"),
    "a bound that is loosened": (
        r"(\tld\.param\.u32\s+(%r\d+), \[\w+_param_{bound}\];)",
        "{0}\n\tadd.s32 {1}, {1}, 32;",
    ),
}
# Those of blocks that share their input.
CLUSTERED: dict[str, tuple[str, str]] = {
    "an mbarrier that is not waited for": (r"mbarrier\.try_wait\S* (\w+), [^;]*;", "setp.eq.u32 {0}, 0, 0;"),
    "an mbarrier of one arrival more": (r"(\tmbarrier\.init\S* \[%r\d+\], (%r\d+);)", "\tadd.u32 {1}, {1}, 1;\n{0}"),
    "mbarriers that the cluster may not know": (r"\tfence\.mbarrier_init[^;]*;", ""),
    "no arrival at the cluster": (r"\tbarrier\.cluster\.arrive[^;]*;", ""),
    "no wait for the cluster": (r"\tbarrier\.cluster\.wait[^;]*;", ""),
    "16 bytes more expected": (
        r"(\tmbarrier\.arrive\.expect_tx\S* _, \[%r\d+\], (%r\d+);)",
        "\tadd.u32 {1}, {1}, 16;\n{0}",
    ),
    "16 bytes less expected": (
        r"(\tmbarrier\.arrive\.expect_tx\S* _, \[%r\d+\], (%r\d+);)",
        "\tsub.u32 {1}, {1}, 16;\n{0}",
    ),
    "a copy for one block less": (r"(\tcp\.async\.bulk[^;]*), (%rs\d+);", "\tmov.u16 {1}, 7;\n{0}, {1};"),
    "a release that nobody hears of": (r"\tmbarrier\.arrive\.release\.cluster[^;]*;", ""),
    "a release to one block alone": (r"mapa\.shared::cluster\.u32 (%r\d+), (%r\d+), %r\d+;", "mov.u32 {0}, {1};"),
    "a copy that is not made": (r"\tcp\.async\.bulk[^;]*;", ""),
}
MISTAKES |= CLUSTERED


def entry_text(text: str, name: str) -> str:
    """The text with only one of its entries: what comes before the first, and that one."""
    head, *entries = re.split(r"(?=^\.visible \.entry )", text, flags=re.M)
    (own,) = [entry for entry in entries if entry.startswith(f".visible .entry {name}(")]
    return head + own


def mutants(text: str, mistake: str, bound: int = -1) -> Iterator[tuple[int, str]]:
    """Every text with that mistake in one place, and the line of the place; a bound is a parameter, by its place."""
    pattern, replacement = MISTAKES[mistake]
    pattern = pattern.replace("{bound}", str(bound))
    for found in re.finditer(pattern, text):
        groups = [group or "" for group in found.groups()]
        words = {"next": str(int(groups[0]) + 1) if "wait_group" in pattern else "", "other": ""}
        if "selector" in mistake:
            words["other"] = "1" if groups[1] == "0" else "0"
        changed = replacement.format(*groups, **words)
        yield text[: found.start()].count("\n") + 1, text[: found.start()] + changed + text[found.end() :]
