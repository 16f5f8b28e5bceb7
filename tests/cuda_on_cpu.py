"""Generated CUDA source run on a CPU: compiled as C++, each block a team of threads that meet at its barriers."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from dsv3c.targets._triton_interpreter import Launch
from dsv3c.targets._triton_launcher import Bound

COMPILER = shutil.which("g++")

HEAD = """#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>
struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static std::barrier<> *meeting;
static float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
#define __global__
#define __launch_bounds__(n)
#define __syncthreads() meeting->arrive_and_wait()
"""


def _runner(name: str, parameters: list[str]) -> str:
    """A C function that runs all blocks of kernel `name`; its arguments come as an array of pointers to them."""
    types = [p.replace("__restrict__ ", "").rsplit(" ", 1)[0] for p in parameters]
    given = ", ".join(f"*({t} *)a[{i}]" for i, t in enumerate(types))
    return f"""extern "C" void run_{name}(int blocks, int threads, void **a) {{
  std::barrier<> barrier(threads);
  meeting = &barrier;
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) team.emplace_back([=, &barrier] {{
    threadIdx.x = t;
    for (int b = 0; b < blocks; ++b) {{ blockIdx.x = b; {name}({given}); barrier.arrive_and_wait(); }}
  }});
  for (auto &t : team) t.join();
}}
"""


def build(text: str, folder: Path) -> ctypes.CDLL:
    """The library of CUDA text; one for equal texts."""
    assert COMPILER is not None
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        found = {m[1]: m[2].split(", ") for m in re.finditer(r"__launch_bounds__\(\d+\) (\w+)\(([^)]*)\)", text)}
        source = path.with_suffix(".cpp")
        runners = "".join(_runner(n, p) for n, p in found.items())
        source.write_text(HEAD + text.replace("__shared__ alignas(64)", "static") + runners)
        flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([COMPILER, *flags, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def execute(library: ctypes.CDLL, bound: Bound, threads: dict[str, int], types: dict[str, list[str]]) -> None:
    """What a launcher bound, on the CPU. `threads` and parameter `types` by kernel."""
    for call in bound.before:
        call()
    for launch in bound.launches:
        _start(library, launch, bound, threads[launch.entry], types[launch.entry])
    for call in bound.after:
        call()


def _start(library: ctypes.CDLL, launch: Launch, bound: Bound, threads: int, types: list[str]) -> None:
    values = [
        ctypes.c_void_p(bound.tensors[a[0]].data_ptr()) if not isinstance(a, int)
        else ctypes.c_int64(a) if t == "i64" else ctypes.c_int32(a)
        for a, t in zip(launch.arguments, types, strict=True)
    ]  # fmt: skip
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
    getattr(library, f"run_{launch.entry}")(launch.grid[0], threads, pointers)
