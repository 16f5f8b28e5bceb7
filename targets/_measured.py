"""What was measured of each implementation of a matrix product: a table shipped beside this file, with the rows that
`dsv3c tune` wrote on this machine in their place."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3c.errors import InputError
from dsv3c.files import read_text, write_text
from dsv3c.target import Product
from dsv3c.targets._tvm_build import cache_folder

SHIPPED = Path(__file__).parent / "measured"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One product and the TFLOP/s of each implementation that was tried and right."""

    product: Product
    tflops: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Table:
    """Measured rows, and on what. `name` says which files they come from."""

    name: str
    device: str
    versions: Mapping[str, str]
    rows: tuple[Row, ...]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the rows, in hexadecimal."""
        return hashlib.sha256("\n".join(map(_line, sorted(self.rows, key=_key))).encode()).hexdigest()

    @functools.cached_property
    def _by_kind(self) -> dict[tuple[str, str, bool], list[Row]]:
        found: dict[tuple[str, str, bool], list[Row]] = {}
        for row in self.rows:
            found.setdefault(_kind(row.product), []).append(row)
        return found

    def nearest(self, p: Product) -> Row | None:
        """The row of this product, or of the most similar one measured: columns count twice, as tiles must fit them."""

        def distance(row: Row) -> float:
            q = row.product
            pairs = ((p.n, q.n), (p.n, q.n), (p.k, q.k), (p.rows, q.rows), (p.groups, q.groups))
            return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)

        return min(self._by_kind.get(_kind(p), ()), key=distance, default=None)


def _kind(p: Product) -> tuple[str, str, bool]:
    return p.op, p.dtype, p.adds


def _key(row: Row) -> Product:
    return row.product


def _line(row: Row) -> str:
    p = row.product
    sizes = {"op": p.op, "dtype": p.dtype, "rows": p.rows, "n": p.n, "k": p.k, "groups": p.groups, "adds": p.adds}
    return json.dumps(sizes | {"tflops": dict(row.tflops)})


def show_table(table: Table) -> str:
    """The file: a line for each product."""
    head = {"format": FORMAT, "device": table.device, "versions": dict(sorted(table.versions.items()))}
    lines = ",\n  ".join(map(_line, sorted(table.rows, key=_key)))
    return f'{json.dumps(head, indent=1)[:-2]},\n "products": [\n  {lines}\n ]\n}}\n'


def read_table(text: str, name: str) -> Table:
    """The table in a file's text. Raises InputError if it is none."""
    try:
        data = json.loads(text)
        if data["format"] > FORMAT:
            raise InputError(f"{name}: was written by a newer dsv3c; remove it, or update dsv3c")
        rows = tuple(_row(dict(line)) for line in data["products"])
        return Table(name, str(data["device"]), {str(k): str(v) for k, v in data["versions"].items()}, rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: is no table that 'dsv3c tune' wrote ({error}); remove it and tune again") from None


def _row(line: dict[str, object]) -> Row:
    rates = line.pop("tflops")
    if not isinstance(rates, dict):
        raise TypeError("tflops are missing")
    return Row(Product(**line), tuple((str(k), float(v)) for k, v in rates.items()))  # type: ignore[arg-type]


def tuned_path(target: str) -> Path:
    """Where `dsv3c tune` keeps what it measured for a target."""
    return cache_folder() / f"measured-{target}.json"


def shipped(target: str = "h100") -> Table:
    """The table that comes with the program."""
    path = SHIPPED / f"{target}.json"
    return read_table(read_text(path, "the measured table of the target"), f"measured/{target}.json")


def table_of(target: str, base: str = "h100") -> Table:
    """What is known for a target: its tuned rows, and the shipped ones of `base` for everything else."""
    return _table_of(tuned_path(target), _stamp(tuned_path(target)), target, base)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=8)
def _table_of(path: Path, stamp: tuple[int, int] | None, target: str, base: str) -> Table:
    """`stamp`: of the tuned file, so that a new one is read."""
    below = shipped(base)
    if stamp is None:
        return below
    own = read_table(read_text(path, "a table of dsv3c tune"), str(path))
    return Table(f"{below.name} tuned for {target}", own.device, own.versions, merged(below.rows, own.rows))


def merged(old: Sequence[Row], new: Sequence[Row]) -> tuple[Row, ...]:
    """All rows, the new ones in the place of old ones of the same product."""
    by_product = {row.product: row for row in (*old, *new)}
    return tuple(by_product[p] for p in sorted(by_product))


def keep(target: str, device: str, versions: Mapping[str, str], rows: Sequence[Row]) -> Path:
    """Write rows into the tuned table of a target, beside those it has if they come from the same device and versions;
    gives the file."""
    path = tuned_path(target)
    old: tuple[Row, ...] = ()
    if path.exists():
        before = read_table(read_text(path, "a table of dsv3c tune"), str(path))
        old = before.rows if (before.device, dict(before.versions)) == (device, dict(versions)) else ()
    write_text(path, show_table(Table(path.name, device, versions, merged(old, rows))))
    return path
