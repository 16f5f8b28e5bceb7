"""Text of Hopper matrix-product kernels: a spec of one kernel in, a Gluon source file out.

Every kernel has one producer warp, which fills a ring of shared-memory stages through TMA, and two consumer
warpgroups with their own barriers and accumulators. The consumers run out of phase, so one promotes its partial
sums with FMAs while the other keeps the tensor cores busy.
"""

from __future__ import annotations

from dsv3c.targets._gluon_spec import GemmSpec, arguments


def _indent(lines: list[str], depth: int) -> list[str]:
    return ["    " * depth + line if line else "" for line in lines]


def _tiles(spec: GemmSpec, body: list[str]) -> list[str]:
    """`body` once per tile of this block, with row, column, expert and the range of K in scope."""
    step_m = spec.bm * (1 + (spec.pair == "b"))
    step_n = spec.bn * (1 + (spec.pair == "a"))
    place = [
        f"band = {spec.raster} * tiles_n",
        f"first_m = (t // band) * {spec.raster}",
        f"height = gl.minimum(tiles_m - first_m, {spec.raster})",
        "within = t % band",
        f"row = (first_m + within % height) * {step_m}" + (f" + rank * {spec.bm}" if spec.pair == "b" else ""),
        f"column = (within // height) * {step_n}" + (f" + rank * {spec.bn}" if spec.pair == "a" else ""),
    ]
    if spec.pair:
        begin = ["rank = gl.program_id(0) % 2", "mine = gl.program_id(0) // 2", "workers = gl.num_programs(0) // 2"]
    else:
        begin = ["mine = gl.program_id(0)", "workers = gl.num_programs(0)"]
    tiles_m, tiles_n = f"tiles_m = gl.cdiv(M, {step_m})", f"tiles_n = gl.cdiv(N, {step_n})"
    if spec.kind == "dense":
        loop = ["for t in range(mine, tiles_m * tiles_n, workers):"]
        bounds = ["start_k = 0", "blocks = gl.cdiv(K, BLOCK_K)", "b_row = column", "stop = M"]
        return [*begin, tiles_m, tiles_n, *loop, *_indent([*place, *bounds, *body], 1)]
    if spec.kind == "grouped_k":
        loop = ["count = tiles_m * tiles_n", "for item in range(mine, experts * count, workers):"]
        bounds = [
            "expert = item // count",
            "t = item % count",
            "start_k = gl.load(offsets + expert)",
            "blocks = (gl.load(offsets + expert + 1) - start_k) // BLOCK_K",
        ]
        return [*begin, tiles_m, tiles_n, *loop, *_indent([*bounds, *place, "b_row = column", *body], 1)]
    loop = ["first = mine", "for expert in range(0, experts):"]
    count = [
        "start = gl.load(offsets + expert)",
        "stop = gl.load(offsets + expert + 1)",
        f"tiles_m = gl.cdiv(stop - start, {step_m})",
        "count = tiles_m * tiles_n",
        "for t in range(first, count, workers):",
    ]
    bounds = ["row += start", "start_k = 0", "blocks = gl.cdiv(K, BLOCK_K)", "b_row = expert * N + column"]
    # Tiles of all experts are dealt to the workers in turn; `first` is this worker's next one, counted in this expert.
    after = ["first = first + gl.cdiv(gl.maximum(count - first, 0), workers) * workers - count"]
    return [*begin, tiles_n, *loop, *_indent(count, 1), *_indent([*place, *bounds, *body], 2), *_indent(after, 1)]


def _parameters(spec: GemmSpec, names: tuple[str, ...]) -> list[str]:
    extra = ["offsets", "experts"] if spec.grouped else []
    return [*names, *extra, "M", "N", "K"]


def _producer(spec: GemmSpec, parameters: list[str]) -> list[str]:
    rows = {"a": "row", "b": "b_row" if spec.along_k("b") else "column"}
    half = {"a": spec.bm // 2, "b": spec.bn // 2}
    first_k = {"a": "k", "b": "expert * K + k" if spec.kind == "grouped_rows" else "k"}
    loads: list[str] = []
    views: list[str] = []
    # The shared operand is fetched first: the first copy is the one that reaches both blocks of the pair.
    for name in sorted(rows, key=lambda n: n != spec.pair):
        row, slot = rows[name], f"{name}_ring.index(stage)"
        if name == spec.pair:
            shape = f"[2 * STAGES, {', '.join(map(str, spec.block(name)))}]"
            views.append(f"halves = {name}_ring._reinterpret({name}_desc.dtype, {shape}, {name}_desc.layout)")
            row, slot = f"{row} + rank * {half[name]}", "halves.index(2 * stage + rank)"
        at = f"{row}, k" if spec.along_k(name) else f"{first_k[name]}, {row}"
        copy = f"    tma.async_copy_global_to_shared({name}_desc, [{at}], full.index(stage), {slot})"
        if name == "a" and spec.bm == 192:
            views.append("parts = a_ring._reinterpret(a_desc.dtype, [3 * STAGES, 64, BLOCK_K], a_desc.layout)")
            loads += [copy.replace("[row", f"[row + {64 * i}").replace(slot, f"parts.index(3 * stage + {i})")
                      for i in range(3)]  # fmt: skip
        else:
            loads.append(copy)
    if spec.by_column:
        for name, first in (("a", "row"), ("b", "column")):
            at = f"k // 128 * {name}_scale_stride + {first}"
            slot = f"full.index(stage), {name}_scale_ring.index(stage)"
            loads.append(f"    tma.async_copy_global_to_shared({name}_scale, [{at}], {slot})")
    body = [
        "for block in range(0, blocks):",
        "    stage = filled % STAGES",
        "    mbarrier.wait(empty.index(stage), ((filled // STAGES) & 1) ^ 1)",
        f"    mbarrier.expect(full.index(stage), {spec.stage_bytes})",
        "    k = start_k + block * BLOCK_K",
        *loads,
        "    filled += 1",
    ]
    head = ["@gluon.jit", f"def producer({', '.join(parameters)}):"]
    return [*head, *_indent(["filled = 0", *views, *_tiles(spec, body)], 1)]


def _chunks(spec: GemmSpec) -> list[tuple[int, int]]:
    rows = spec.bm // spec.consumers // 64
    return [(i, j) for i in range(rows) for j in range(spec.bn // spec.chunk)]


def _mainloop(spec: GemmSpec) -> list[str]:
    """All blocks of K into acc_i_j.

    What is not arithmetic happens while an instruction runs: the previous stage is given back, the next one awaited,
    the next scales loaded. A scale is first touched a whole block after its load was issued.
    """
    rows, columns, chunks = spec.bm // spec.consumers // 64, spec.bn // spec.chunk, _chunks(spec)

    def operands(i: int, j: int) -> str:
        start = f"WORKER * {64 * rows} + {64 * i}"
        a = f"a_tile.slice({start}, 64)" if spec.bm != 192 else "a_tile"
        if not spec.along_k("a"):
            a = f"a_tile.slice({start}, 64, dim=1).permute((1, 0))"
        b = "b_tile" if columns == 1 else f"b_tile.slice({spec.chunk * j}, {spec.chunk})"
        return f"{a}, {b}.permute((1, 0))" if spec.along_k("b") else f"{a}, {b}"

    lines = [f"acc_{i}_{j} = gl.zeros((64, {spec.chunk}), dtype=gl.float32, layout=ACC)" for i, j in chunks]
    before, shadow = _scales(spec, rows, columns)
    lines += before
    lines.append("mbarrier.wait(full.index(used % STAGES), (used // STAGES) & 1, pred=blocks > 0)")
    a_slot = "3 * (used % STAGES) + WORKER" if spec.bm == 192 else "used % STAGES"
    body = [f"a_tile = a_ring.index({a_slot})", "b_tile = b_ring.index(used % STAGES)"]
    give_back = "mbarrier.arrive(empty.index((used - 1) % STAGES), pred={0})"
    coming = "mbarrier.wait(full.index((used + 1) % STAGES), ((used + 1) // STAGES) & 1, pred=block + 1 < blocks)"
    names = ", ".join(f"acc_{i}_{j}" for i, j in chunks)
    if spec.scaled:
        for i, j in chunks:
            body.append(f"part = warpgroup_mma({operands(i, j)}, part, use_acc=False, is_async=True)")
            if (i, j) == chunks[0]:
                body += [give_back.format("block > 0"), *shadow]
                if spec.by_column:
                    body.append("scale_columns = b_scale_ring.index(used % STAGES).load(COLUMNS)")
            if spec.by_column:
                part = f".slice(WORKER * {64 * rows} + {64 * i}, 64)"
                body.append(f"scale_{i}_0 = a_scale_ring.index(used % STAGES){part}.load(ROWS)")
            if (i, j) == chunks[-1]:
                body.append(coming)
            body.append("part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))")
            body.append(_promote(spec, i, j))
    else:
        body += [f"acc_{i}_{j} = warpgroup_mma({operands(i, j)}, acc_{i}_{j}, is_async=True)" for i, j in chunks]
        body.append(f"{names} = warpgroup_mma_wait(num_outstanding={len(chunks)}, deps=({names},))")
        body += [give_back.format("block > 0"), coming]
    body.append("used += 1")
    lines += ["for block in range(0, blocks):", *_indent(body, 1)]
    if not spec.scaled:
        lines.append(f"{names} = warpgroup_mma_wait(num_outstanding=0, deps=({names},))")
    lines.append(give_back.format("blocks > 0"))
    return lines


# Volatile, so that no compiler moves them past the next matrix instruction: moved, two partial sums live at once and
# the accumulators spill.
FMA = '"fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"'
OUTER_FMA = '"{.reg .f32 t; mul.rn.f32 t, $1, $2; fma.rn.f32 $0, t, $3, $4;}", "=f,f,f,f,f"'
MUL = '"mul.rn.f32 $0, $1, $2;", "=f,f,f"'


def _promote(spec: GemmSpec, i: int, j: int) -> str:
    acc = f"acc_{i}_{j}"
    if spec.by_column:
        given = f"[part, scale_{i}_0[:, None], scale_columns[None, :], {acc}]"
        return f"{acc} = gl.inline_asm_elementwise({OUTER_FMA}, {given}, gl.float32, False, 1)"
    given = f"[part, scale_{i}_{j}[:, None], {acc}]"
    return f"{acc} = gl.inline_asm_elementwise({FMA}, {given}, gl.float32, False, 1)"


def _scales(spec: GemmSpec, rows: int, columns: int) -> tuple[list[str], list[str]]:
    """Lines before the loop over K, and lines that form this block's scales and load the next block's.

    Column scales, and the row scales beside them, come through the ring instead: registers are too few.
    """
    if not spec.scaled or spec.by_column:
        return [], []
    # Of a pair's tiles the last may lie wholly outside N; its results are dropped.
    first = "expert * gl.cdiv(N, 128) + " if spec.grouped else ""
    before = [f"at_{i} = gl.minimum(my_row + {64 * i} + gl.arange(0, 64, layout=ROWS), stop - 1)" for i in range(rows)]
    before += [
        f"b_base_{j} = b_scale + ({first}gl.minimum(column // 128 + {j}, (N - 1) // 128)) * gl.cdiv(K, 128)"
        for j in range(columns)
    ]
    load = [f"next_a_{i} = gl.load(a_scale + ahead * a_scale_stride + at_{i})" for i in range(rows)]
    load += [f"next_b_{j} = gl.load(b_base_{j} + ahead)" for j in range(columns)]
    form = [f"scale_{i}_{j} = gl.inline_asm_elementwise({MUL}, [next_a_{i}, next_b_{j}], gl.float32, False, 1)"
            for i in range(rows) for j in range(columns)]  # fmt: skip
    return [*before, "ahead = 0", *load], [*form, "ahead = gl.minimum(block + 1, blocks - 1)", *load]


def _store(spec: GemmSpec) -> list[str]:
    lines: list[str] = []
    for i, j in _chunks(spec):
        here = [
            f"tile = acc_{i}_{j}",
            f"tile_row = my_row + {64 * i}",
            f"tile_column = column + {spec.chunk * j}",
            *spec.epilogue,
        ]
        write: list[str] = []
        if spec.output == "bf16":
            parts = ["tile.to(gl.bfloat16)"]
        else:
            parts, width = ["tile"], spec.chunk
            while width > spec.staged_columns:
                width //= 2
                here += [f"{n}_0, {n}_1 = {n}.reshape([64, 2, {width}]).permute(0, 2, 1).split()" for n in parts]
                parts = [f"{n}_{half}" for n in parts for half in (0, 1)]
        first_row = "expert * M + tile_row" if spec.kind == "grouped_k" else "tile_row"
        for n, part in enumerate(parts):
            at = f"tile_column + {n * spec.staged_columns}" if n else "tile_column"
            write += [
                "tma.store_wait(pendings=0)",
                f"out.store({part})",
                "fence_async_shared()",
                f"tma.async_copy_shared_to_global(c_desc, [{first_row}, {at}], out)",
            ]
        # A tile may reach past its expert's rows; those belong to the next expert.
        if spec.grouped:
            write = [f"if tile_row < {'M' if spec.kind == 'grouped_k' else 'stop'}:", *_indent(write, 1)]
        lines += [*here, *write]
    return lines


def _consumer(spec: GemmSpec, parameters: list[str]) -> list[str]:
    part = [f"part = gl.zeros((64, {spec.chunk}), dtype=gl.float32, layout=ACC)"] if spec.scaled else []
    my_row = f"my_row = row + WORKER * {spec.bm // spec.consumers}"
    head = ["@gluon.jit", f"def consumer(WORKER: gl.constexpr, {', '.join(parameters)}):"]
    layout = f"[3, 0], warps_per_cta=[4, 1], instr_shape=[16, {spec.chunk}, {32 if spec.scaled else 16}]"
    start = [
        f"ACC: gl.constexpr = gl.NVMMADistributedLayout(version={layout})",
        "ROWS: gl.constexpr = gl.SliceLayout(1, ACC)",
        "COLUMNS: gl.constexpr = gl.SliceLayout(0, ACC)",
        "used = 0",
        "out = staging.index(WORKER)",
        *part,
    ]
    tiles = _tiles(spec, [my_row, *_mainloop(spec), *_store(spec)])
    return [*head, *_indent([*start, *tiles, "tma.store_wait(pendings=0)"], 1)]


def source(spec: GemmSpec) -> str:
    """The kernel's whole source file; its entry point is `kernel`."""
    scales = tuple(n for n, _ in arguments(spec) if "scale" in n)
    ring: tuple[str, ...] = ("full", "empty", "a_ring", "b_ring")
    copied: tuple[str, ...] = ("a_desc", "b_desc")
    if spec.by_column:
        ring, copied, scales = (*ring, "a_scale_ring", "b_scale_ring"), (*copied, *scales), ()
    produce = _parameters(spec, (*copied, *ring))
    consume = _parameters(spec, ("c_desc", "staging", *scales, *ring))
    names = [name for name, _ in arguments(spec)]
    whole_a = (spec.bm, "BLOCK_K") if spec.along_k("a") else ("BLOCK_K", spec.bm)
    whole_b = (spec.bn, "BLOCK_K") if spec.along_k("b") else ("BLOCK_K", spec.bn)
    a_ring = "3 * STAGES, 64, BLOCK_K" if spec.bm == 192 else f"STAGES, {whole_a[0]}, {whole_a[1]}"
    element = "bfloat16" if spec.output == "bf16" else "float32"
    staging = f"[{spec.consumers}, 64, {spec.staged_columns}]"
    shared = [
        f"a_ring = gl.allocate_shared_memory(a_desc.dtype, [{a_ring}], a_desc.layout)",
        f"b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, {whole_b[0]}, {whole_b[1]}], b_desc.layout)",
        "full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
        "empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
    ]
    if spec.by_column:
        shared += [f"{n}_scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, {length}], {n}_scale.layout)"
                   for n, length in (("a", spec.bm), ("b", spec.bn))]  # fmt: skip
    shared.append(f"staging = gl.allocate_shared_memory(gl.{element}, {staging}, c_desc.layout)")
    lines = [
        f'"""{spec.name}: generated, one {spec.bm}×{spec.bn} tile per step of a persistent grid."""',
        "",
        "from triton.experimental import gluon",
        "from triton.experimental.gluon import language as gl",
        "from triton.experimental.gluon.language.nvidia.hopper import (",
        "    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,",
        ")",
        "",
        f"STAGES = gl.constexpr({spec.stages})",
        f"BLOCK_K = gl.constexpr({spec.block_k})",
        "",
        "",
        *_producer(spec, produce),
        "",
        "",
        *_consumer(spec, consume),
        "",
        "",
        "@gluon.jit",
        f"def kernel({', '.join(names)}):",
        *_indent(shared, 1),
        "    for i in gl.static_range(STAGES):",
        "        mbarrier.init(full.index(i), count=1)",
        f"        mbarrier.init(empty.index(i), count={spec.consumers * (2 if spec.pair else 1)})",
        "    gl.warp_specialize([",
        *[f"        (consumer, ({w}, {', '.join(consume)}))," for w in range(spec.consumers)],
        f"        (producer, ({', '.join(produce)})),",
        "    ], [4, 1], [240, 24])" if spec.consumers == 2 else "    ], [4, 4, 1], [160, 160, 32])",
        "",
    ]
    return "\n".join(lines)
