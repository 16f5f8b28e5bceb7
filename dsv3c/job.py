"""What is to be run: the job, its mesh, and the training recipe; plain records that every layer may read."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3c.errors import InputError
from dsv3c.ir import DType

LANE = 256
"""Weights lie in flat buffers seen as rows of LANE numbers; each weight begins a row."""

JOBS = ("train", "prefill", "decode", "forward")
PRECISIONS = ("fp8", "bf16", "fp32", "fp64")
COMPUTE_DTYPE = {"fp8": DType.bf16, "bf16": DType.bf16, "fp32": DType.f32, "fp64": DType.f64}


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many ranks share the work along each axis: pipeline, data, expert (inside data), tensor."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        """All ranks: pp·dp·tp."""
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        return ",".join(f"{k}={getattr(self, k)}" for k in ("pp", "dp", "ep", "tp"))


def parse_mesh(text: str) -> Mesh:
    """`pp=16,dp=128,ep=64`: omitted dp is ep, other omitted axes are 1.

    Raises InputError for anything that is not such a list or an ep that does not divide dp.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = part.partition("=")
        if key not in ("pp", "dp", "ep", "tp") or not value.isdecimal() or int(value) < 1 or key in sizes:
            raise InputError(f"--mesh {text}: '{part}' is not an axis; write for example pp=4,dp=2,ep=2")
        sizes[key] = int(value)
    mesh = Mesh(sizes.get("pp", 1), sizes.get("dp", sizes.get("ep", 1)), sizes.get("ep", 1), sizes.get("tp", 1))
    if mesh.dp % mesh.ep:
        raise InputError(f"--mesh {text}: ep={mesh.ep} does not divide dp={mesh.dp}; choose an ep that does")
    return mesh


@dataclass(frozen=True, slots=True)
class Recipe:
    """Optimizer and loss settings (report, section 4.2); the learning rate is what `--lr` replaces.

    `embedding_lr`, `head_lr`: multiples of `lr` for those weights. `warmup`, `final_lr`: fractions of all steps
    and of `lr`. `balance`: weight α of the sequence-wise loss. `mtp`: weight λ. `bias_speed`: γ.
    """

    lr: float = 2.2e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.05
    final_lr: float = 0.1
    embedding_lr: float = 1.0
    head_lr: float = 1.0
    balance: float = 1e-4
    mtp: float = 0.3
    bias_speed: float = 1e-3


@dataclass(frozen=True, slots=True)
class Job:
    """One run. `seq` tokens a sequence; `micro_batch` and `global_batch` count sequences.

    `kernels`: none, source or binary. `implementations`: auto, generated or library. `document_end`: the token that
    ends a document, if training attention is not to cross it (the report packs documents without such a mask).
    """

    kind: str
    target: str
    precision: str
    seq: int
    micro_batch: int
    global_batch: int
    mesh: Mesh = Mesh()
    ranks_per_node: int = 8
    schedule: str = "auto"
    expert_headroom: float = 1.5
    kernels: str = "binary"
    implementations: str = "auto"
    allow_oversize: bool = False
    document_end: int | None = None
    recipe: Recipe = Recipe()

    @property
    def dtype(self) -> DType:
        """The element type of activations in GEMM-free arithmetic."""
        return COMPUTE_DTYPE[self.precision]

    @property
    def sizes(self) -> dict[str, int]:
        """The value of each free symbol of the program: B sequences of S tokens in one micro-batch, C cache rows."""
        return {"B": self.micro_batch, "S": self.seq, "C": self.seq}
