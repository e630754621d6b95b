"""Mutants of a PTX text: each with one mistake that a person could make in the source."""

import re
from collections.abc import Iterator

# What is wrong, where it can be, and what stands there instead.
MISTAKES: dict[str, tuple[str, str]] = {
    "a barrier removed": (r"\tbar\.sync[^;]*;\n", ""),
    # A wait for all, behind the last step, meets nothing that is still on its way.
    "a wait that waits for one group less": (r"cp\.async\.wait_group ([1-9]\d*);", "cp.async.wait_group {next};"),
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
# Those of blocks that share their work.
CLUSTERED: dict[str, tuple[str, str]] = {
    "no arrival at the cluster": (r"\tbarrier\.cluster\.arrive[^;]*;", ""),
    "no wait for the cluster": (r"\tbarrier\.cluster\.wait[^;]*;", ""),
    "a sum that goes to its own block": (r"mapa\.shared::cluster\.u32 (%r\d+), (%r\d+), %r\d+;", "mov.u32 {0}, {1};"),
    "a sum that is not sent": (r"\tst\.shared::cluster[^;]*;", ""),
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
