"""What Gluon cannot say, said in the PTX of a compiled kernel: blocks that share tiles in pairs, and adding stores.

`paired`: Gluon has no multicast before Triton 3.7, and no way to arrive at the other block's barrier in any version,
so the generator writes the kernel as if each block were alone. Here the first copy reaches both blocks of a cluster,
every "stage is empty" is told to both, and the pair meets once before it starts and once before it ends.
`adding`: stores through TMA add to memory instead of overwriting it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from dsv3c.errors import WorkError

_MEET = "\tbarrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;\n"
_INITIALIZED = "\tfence.mbarrier_init.release.cluster;\n"
_ENTRY = re.compile(r"@%p\d+ bra \t?(\$L__BB\d+_\d+);\n(?:\s*//[^\n]*\n)*\s*bra.uni")
_LOAD = re.compile(
    r"cp\.async\.bulk\.tensor\.2d\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes (\[%r\d+\], [^;]+);"
)
_ARRIVE = re.compile(r"(@%p\d+) mbarrier\.arrive\.shared::cta\.b64 _, \[(%r\d+)\];")


def _arrive_at_both(found: re.Match[str]) -> str:
    predicate, barrier = found.groups()
    tell = [
        f"mapa.shared::cluster.u32 there, {barrier}, {rank}; "
        f"{predicate} mbarrier.arrive.shared::cluster.b64 _, [there];"
        for rank in (0, 1)
    ]
    return "{ .reg .b32 there; " + " ".join(tell) + " }"


def _after(text: str, start: int, pattern: str, insert: str) -> str:
    found = re.compile(pattern).search(text, start)
    if found is None:
        raise _unknown(pattern)
    return text[: found.end()] + insert + text[found.end() :]


def _unknown(what: str) -> WorkError:
    return WorkError(f"this version of Triton gives PTX of an unknown form ({what} not found); install triton 3.7")


def adding(ptx: str) -> str:
    """The PTX of a kernel whose TMA stores add float32 to memory. Every element is added to once, so bits repeat."""
    store = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
    if store not in ptx:
        raise _unknown("a store through TMA")
    return ptx.replace(store, "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group")


def paired(ptx: str, copies: int, arrivals: int) -> str:
    """The PTX of the kernel for clusters of two. `copies` and `arrivals` are how many of each it must contain.

    Raises WorkError if Triton's output has another form than expected.
    """
    entry = _ENTRY.search(ptx)
    loads = _LOAD.findall(ptx)
    if entry is None or len(loads) != copies:
        raise _unknown("one branch by warp and its copies")
    ptx, found = _ARRIVE.subn(_arrive_at_both, ptx)
    if found != arrivals:
        raise _unknown("the consumers' arrivals")
    multicast = r"cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
    ptx = _LOAD.sub(lambda m: f"{multicast} {m[1]}, both;", ptx, count=1)
    # Worker warps pass their dispatch loop twice: before their work and after it. They release registers first,
    # because the other warps wait for those before they reach the meeting.
    dispatch = ptx.rfind("setmaxnreg.dec.sync.aligned.u32", 0, ptx.find("brx.idx"))
    if dispatch < 0:
        raise _unknown("the dispatch of worker warps")
    ptx = _after(ptx, dispatch, "\n", _MEET)
    start = ptx.index(f"\n{entry[1]}:")
    begin = re.compile(r"\n\t(barrier\.sync|bar\.sync) \t1").search(ptx, start)
    last = ptx.rfind("setmaxnreg.inc.sync.aligned.u32")
    if begin is None or last < begin.end():
        raise _unknown("start and end of the specialized warps")
    ptx = _after(ptx, last, r"\n", _MEET)
    ptx = ptx[: begin.start() + 1] + _INITIALIZED + _MEET + ptx[begin.start() + 1 :]
    body = ptx.index("{\n", ptx.index(".entry"))
    return ptx[: body + 2] + "\t.reg .b16 \tboth;\n\tmov.b16 \tboth, 3;\n" + ptx[body + 2 :]


def assemble(ptx: str) -> bytes:
    """PTX to an sm_90a cubin with the assembler that Triton carries. Raises WorkError with the assembler's words."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(ptx, encoding="utf-8")
        command = [knobs.nvidia.ptxas.path, "--gpu-name=sm_90a", str(text), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise WorkError(f"ptxas refused the kernel: {done.stderr.strip()[-300:]}")
        return cubin.read_bytes()
