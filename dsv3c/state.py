"""What flows through the pipeline: the state of a compilation, a pass that maps it, and the notes a pass takes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypeVar

from dsv3c.capacity import capacity
from dsv3c.ir import IRError, Program
from dsv3c.job import Job, Mesh
from dsv3c.op import Registry
from dsv3c.schedule import Schedule
from dsv3c.target import Machine, Target

if TYPE_CHECKING:
    from dsv3c.arena import BufferPlan
    from dsv3c.interleave import Overlap

SHOWN_GRAPHS = 4
"""How many changed graphs a pass's line names before it only counts."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a pass did to a node, or left alone, and why. `node` is a path in plain words such as `moe.router`."""

    pass_name: str
    action: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.action} {self.node}: {self.reason}"


TakeNote: TypeAlias = Callable[[str, str, str], None]
"""`note(action, node, reason)`, as a pass calls it."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass cost and changed; seconds are neither compared nor stored.

    `changed` names graphs that are new or different, `removed` those gone; `notes` counts its notes.
    """

    name: str
    nodes_before: int
    nodes_after: int
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    notes: int
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        names = [*self.changed, *(f"-{g}" for g in self.removed)]
        more = f", and {len(names) - SHOWN_GRAPHS} more graphs" if len(names) > SHOWN_GRAPHS else ""
        moved = ", ".join(names[:SHOWN_GRAPHS]) + more if names else "nothing changed"
        return f"{self.name:<14}{self.seconds:7.3f} s  {self.nodes_before:>6} -> {self.nodes_after:<6} nodes  {moved}"


@dataclass(frozen=True, slots=True)
class Cut:
    """How `cut` split one joint graph: the graphs it made (None if that part is empty) and what each hands on.

    The three lists name values: made in F and read in B, made in F and read in W, made in B and read in W.
    """

    graph: str
    forward: str | None
    backward: str | None
    weight: str | None
    f_to_b: tuple[str, ...]
    f_to_w: tuple[str, ...]
    b_to_w: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """Everything known about a compilation so far. A pass gives a new one, or the same object if nothing changed.

    `job` and `target` are None when a pass runs on bare text. `symbol_sizes` are sizes given by hand, which win
    over the job's.
    """

    program: Program
    registry: Registry
    job: Job | None = None
    target: Target | None = None
    symbol_sizes: tuple[tuple[str, int], ...] = ()
    cut: tuple[Cut, ...] | None = None
    schedule: Schedule | None = None
    overlap: Overlap | None = None
    buffers: BufferPlan | None = None

    @property
    def machine(self) -> Machine | None:
        """The target's machine."""
        return self.target.machine if self.target else None

    @property
    def mesh(self) -> Mesh:
        """The job's mesh; one rank without a job."""
        return self.job.mesh if self.job else Mesh()

    @property
    def sizes(self) -> dict[str, int]:
        """The value of each dimension symbol that has one; rows of experts at balanced load."""
        given = {**(self.job.sizes if self.job else {}), **dict(self.symbol_sizes)}
        return {**capacity(self.program, given), **given}

    def but(self, **changes: object) -> State:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def with_program(self, program: Program) -> State:
        """A copy with another program; the same object if it is the same object."""
        return self if program is self.program else replace(self, program=program)


class Pass(ABC):
    """One step of the pipeline: a frozen dataclass whose fields are its options, each with a default.

    The first line of its docstring is its help. Options are int, float, bool, str, Literal strings, or one of
    them or None.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, state: State, note: TakeNote) -> State:
        """The state after this pass: pure, and the same object when nothing changed.

        Calls `note` for what it did and for what it left alone.
        """

    @classmethod
    def help(cls) -> str:
        """What the pass does, in one line."""
        return (cls.__doc__ or "").strip().splitlines()[0]


P = TypeVar("P", bound=type[Pass])


def check_pass(pass_class: P) -> P:
    """Return the class if it keeps the rules of a pass.

    Raises IRError naming the rule: a frozen dataclass, a lower-case name, a docstring of its own, defaults.
    """
    title = f"the pass {pass_class.__qualname__}"
    name = getattr(pass_class, "name", "")
    parameters = getattr(pass_class, "__dataclass_params__", None)
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise IRError(f"{title} needs a lower-case name, as in: name: ClassVar[str] = 'fuse'")
    if "__dataclass_params__" not in vars(pass_class) or parameters is None or not parameters.frozen:
        raise IRError(f"{title} must be a frozen dataclass: put @dataclass(frozen=True) above it")
    if not vars(pass_class).get("__doc__") or pass_class.help().startswith(f"{pass_class.__name__}("):
        raise IRError(f"{title} needs a docstring; its first line is its help")
    missing = dataclasses.MISSING
    for f in dataclasses.fields(pass_class):  # type: ignore[arg-type]
        if f.default is missing and f.default_factory is missing:
            raise IRError(f"{title}: the option '{f.name}' needs a default")
    return pass_class
