"""Graphs and programs as text in Python syntax, read with `ast` and never executed; printing and parsing agree exactly.

    def router(x: bf16[T, 7168], *, w: bf16[256, 7168]):
        s = linear(x, w)             # bf16[T, 256] @F:moe.router
        return s

Parameters after `*` are weights. Trailing comments give types, and after `@` phase and path; left out they are
inferred, wrong they are an error. A program has several functions, and `name`, `weights`, `sequences` literals.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Mapping

from dsv3c.dims import parse as parse_dim
from dsv3c.ir import DTYPES, Attr, Graph, IRError, Layer, Node, Phase, Program, Sequence, Type, Value, Weight
from dsv3c.op import Registry
from dsv3c.verify import node_types, show_node, verify_program


def show_graph(graph: Graph) -> str:
    """The text of a graph."""
    head = [f"{v.name}: {v.type}" for v in graph.inputs]
    if graph.weights:
        head += ["*", *(f"{v.name}: {v.type}" for v in graph.weights)]
    rows = [(f"    {show_node(n)}", _comment(n)) for n in graph.nodes]
    width = min(88, max((len(code) for code, _ in rows), default=0))
    lines = [f"def {graph.name}({', '.join(head)}):"]
    lines += [f"{code:<{width}}  # {comment}" for code, comment in rows]
    return "\n".join([*lines, f"    return {', '.join(v.name for v in graph.results)}".rstrip(), ""])


def _comment(node: Node) -> str:
    types = ", ".join(str(v.type) for v in node.outputs)
    if not node.path and node.phase is Phase.F:
        return types
    return f"{types} @{node.phase.value}{':' + node.path if node.path else ''}"


def show_program(program: Program) -> str:
    """The text of a program; of one that is a single graph, the text of that graph."""
    parts = [show_graph(g) for g in program.graphs]
    if program.sequences or program.weights or [g.name for g in program.graphs] != [program.name]:
        parts.insert(0, f"name = {program.name!r}\n")
    if program.weights:
        rows = [(w.name, str(w.type), w.init, w.std, w.group, *([w.parts] if w.parts > 1 else []))
                for w in program.weights]  # fmt: skip
        parts.append("weights = [\n" + "".join(f"    {row!r},\n" for row in rows) + "]\n")
    if program.sequences:
        parts.append("sequences = [\n" + "".join(map(_show_sequence, program.sequences)) + "]\n")
    return "\n".join(parts)


def _show_sequence(s: Sequence) -> str:
    rows = [(y.phase.value, y.name, y.graph, y.inputs, y.weights, y.outputs) for y in s.layers]
    layers = "".join(f"        {row!r},\n" for row in rows)
    return f"    ({s.name!r}, {s.inputs!r}, {s.results!r}, {s.losses!r}, {s.gradients!r}, [\n{layers}    ]),\n"


def parse_program(text: str, registry: Registry, file: str = "<text>") -> Program:
    """The program that `text` describes, verified.

    Raises IRError with file, line and a caret on anything that is not the syntax or does not type-check.
    """
    return _Parser(text, registry, file).program()


def parse_graph(text: str, registry: Registry, file: str = "<text>") -> Graph:
    """The only graph in `text`; see `parse_program`."""
    program = parse_program(text, registry, file)
    if len(program.graphs) != 1:
        raise IRError(f"{file}: expected one graph, found {len(program.graphs)}")
    return program.graphs[0]


_COMMENT = re.compile(r"^(?P<types>[^@]*?)\s*(?:@(?P<phase>[FBW])(?::(?P<path>\S+))?)?$")


def _parts(rest: list[Attr]) -> int:
    """Among how many ranks a weight is divided, by what follows its group; 0 if that is no such number."""
    if not rest:
        return 1
    return rest[0] if len(rest) == 1 and isinstance(rest[0], int) else 0


class _Parser:
    def __init__(self, text: str, registry: Registry, file: str) -> None:
        self.file, self.registry = file, registry
        self.lines = text.splitlines()
        try:
            self.tree = ast.parse(text, file)
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            self.comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
        except (SyntaxError, tokenize.TokenError, ValueError) as error:
            line, column = getattr(error, "lineno", None) or 1, getattr(error, "offset", None) or 1
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise self.error_at(line, column - 1, reason) from None
        self.graphs: dict[str, Graph] = {}

    def error_at(self, line: int, column: int, reason: str) -> IRError:
        source = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        return IRError(f"{self.file}:{line}:{column + 1}: {reason}\n  {source}\n  {' ' * column}^")

    def error(self, tree: ast.AST, reason: str) -> IRError:
        line, column = getattr(tree, "lineno", 1), getattr(tree, "col_offset", 0)
        before = self.lines[line - 1].encode()[:column] if line <= len(self.lines) else b""
        return self.error_at(line, len(before.decode(errors="ignore")), reason)

    def program(self) -> Program:
        name, weights, sequences = "", (), ()  # type: tuple[str, tuple[Weight, ...], tuple[Sequence, ...]]
        for statement in self.tree.body:
            match statement:
                case ast.FunctionDef():
                    graph = self.graph(statement)
                    self.graphs[graph.name] = graph
                case ast.Assign(targets=[ast.Name(id="name")], value=value):
                    name = str(self.literal(value))
                case ast.Assign(targets=[ast.Name(id="weights")], value=ast.List(elts=rows)):
                    weights = tuple(map(self.weight, rows))
                case ast.Assign(targets=[ast.Name(id="sequences")], value=ast.List(elts=rows)):
                    sequences = tuple(map(self.sequence, rows))
                case _:
                    raise self.error(statement, "expected 'def graph(...):', 'name =', 'weights =' or 'sequences ='")
        if not self.graphs:
            raise self.error_at(1, 0, "no graph here; expected 'def name(x: f32[4]):'")
        name = name or (next(iter(self.graphs)) if len(self.graphs) == 1 else "program")
        program = Program(name, tuple(self.graphs.values()), sequences, weights)
        verify_program(program, self.registry)
        return program

    def literal(self, tree: ast.expr) -> Attr:
        try:
            return _frozen(ast.literal_eval(tree))
        except (ValueError, TypeError, SyntaxError):
            raise self.error(tree, "expected a literal: a number, a string, True, False, None or a tuple") from None

    def weight(self, tree: ast.expr) -> Weight:
        match self.literal(tree):
            case (str(name), str(text), str(init), (float() | int()) as std, str(group), *rest) if _parts(rest) >= 1:
                try:
                    type_tree = ast.parse(text, mode="eval").body
                except (SyntaxError, ValueError):
                    raise self.error(tree, f"expected a type such as bf16[B, S, 256], got {text!r}") from None
                return Weight(name, self.type(type_tree, tree), init, float(std), group, _parts(rest))
        raise self.error(tree, "expected (name, type, init, std, group) and perhaps among how many ranks it is divided")

    def sequence(self, tree: ast.expr) -> Sequence:
        match self.literal(tree):
            case (str(name), tuple(inputs), tuple(results), tuple(losses), tuple(gradients), tuple(rows)):
                pairs = tuple(self.names(tree, pair, 2) for pair in gradients)
                reads, gives, scalars = (self.names(tree, group) for group in (inputs, results, losses))
                layers = tuple(self.layer(tree, row) for row in rows)
                return Sequence(name, reads, layers, gives, scalars, pairs)  # type: ignore[arg-type]
        raise self.error(tree, "expected (name, inputs, results, losses, gradients, [layers])")

    def layer(self, tree: ast.expr, row: Attr) -> Layer:
        match row:
            case (("F" | "B" | "W") as phase, str(name), str(graph), tuple(inputs), tuple(weights), tuple(outputs)):
                reads, binds, writes = (self.names(tree, g) for g in (inputs, weights, outputs))
                return Layer(name, graph, reads, binds, writes, Phase(phase))
        raise self.error(tree, "expected a layer (phase, name, graph, inputs, weights, outputs)")

    def names(self, tree: ast.expr, value: Attr, count: int | None = None) -> tuple[str, ...]:
        if not isinstance(value, tuple) or (count is not None and len(value) != count):
            raise self.error(tree, f"expected {'names' if count is None else f'{count} names'}, got {value!r}")
        for name in value:
            if not isinstance(name, str):
                raise self.error(tree, f"expected a name, got {name!r}")
        return tuple(map(str, value))

    def type(self, tree: ast.expr, at: ast.AST | None = None) -> Type:
        match tree:
            case ast.Subscript(value=ast.Name(id=dtype), slice=inner):
                if dtype not in DTYPES:
                    raise self.error(at or tree, f"unknown element type '{dtype}'; known: {', '.join(DTYPES)}")
                dims = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                try:
                    shape = tuple(map(parse_dim, dims))
                except ValueError as error:
                    raise self.error(at or tree, str(error)) from None
                for dim in shape:
                    if isinstance(dim, int) and dim < 0:
                        raise self.error(at or tree, f"the dimension {dim} is negative")
                return Type(DTYPES[dtype], shape)
        raise self.error(at or tree, "expected a type such as bf16[B, S, 256]")

    def graph(self, tree: ast.FunctionDef) -> Graph:
        if tree.name in self.graphs:
            raise self.error(tree, f"the graph '{tree.name}' is defined twice")
        a = tree.args
        if a.vararg or a.kwarg or a.defaults or any(a.kw_defaults) or tree.decorator_list or tree.returns:
            raise self.error(tree, "a graph has typed parameters only: no defaults, decorators or '-> type'")
        env: dict[str, Value] = {}
        inputs = tuple(self.param(a, env) for a in (*tree.args.posonlyargs, *tree.args.args))
        weights = tuple(self.param(a, env) for a in tree.args.kwonlyargs)
        nodes: list[Node] = []
        results: tuple[Value, ...] | None = None
        for statement in tree.body:
            if results is not None:
                raise self.error(statement, "nothing may follow 'return'")
            match statement:
                case ast.Assign(targets=[target], value=ast.Call(func=ast.Name(id=op)) as call):
                    nodes.append(self.node(statement, target, op, call, env))
                case ast.Return(value=value):
                    results = tuple(self.use(e, env) for e in _elements(value))
                case ast.Expr(value=ast.Constant(value=str())):
                    pass
                case _:
                    raise self.error(statement, "expected 'a, b = op(x, y, k=v)' or 'return a, b'")
        if results is None:
            raise self.error(tree, f"the graph '{tree.name}' has no 'return'")
        return Graph(tree.name, inputs, weights, tuple(nodes), results)

    def param(self, tree: ast.arg, env: dict[str, Value]) -> Value:
        if tree.annotation is None:
            raise self.error(tree, f"the parameter '{tree.arg}' needs a type, as in '{tree.arg}: f32[4]'")
        return self.define(tree.arg, self.type(tree.annotation), tree, env)

    def define(self, name: str, type: Type, at: ast.AST, env: dict[str, Value]) -> Value:
        if name in env:
            raise self.error(at, f"'{name}' is defined twice")
        env[name] = Value(name, type)
        return env[name]

    def use(self, tree: ast.expr, env: Mapping[str, Value]) -> Value:
        if not isinstance(tree, ast.Name):
            raise self.error(tree, "expected the name of a value")
        if tree.id not in env:
            raise self.error(tree, f"'{tree.id}' is not defined")
        return env[tree.id]

    def node(self, statement: ast.Assign, target: ast.expr, op: str, call: ast.Call, env: dict[str, Value]) -> Node:
        inputs = tuple(self.use(a, env) for a in call.args)
        attrs = tuple((k.arg or "", self.literal(k.value)) for k in call.keywords)
        token = self.comments.get(statement.end_lineno or statement.lineno)
        declared, phase, path = self.comment(token) if token else (None, Phase.F, "")
        line = f"{self.file}:{statement.lineno}"
        bare = Node(op, inputs, attrs, (), path, phase, line)
        try:
            types = node_types(op, tuple(v.type for v in inputs), bare, self.registry, self.graphs)
        except IRError as error:
            raise self.error(call, f"{op}: {error}") from None
        targets = _elements(target)
        if len(targets) != len(types):
            raise self.error(target, f"{op} has {len(types)} results, {len(targets)} are named")
        if declared is not None and token is not None and declared != types:
            wrong, right = (", ".join(map(str, side)) for side in (declared, types))
            raise self.error_at(*token.start, f"declared {wrong} but {op} gives {right}")
        outputs = []
        for e, t in zip(targets, types, strict=True):
            if not isinstance(e, ast.Name):
                raise self.error(e, "expected a name")
            outputs.append(self.define(e.id, t, e, env))
        return Node(op, inputs, attrs, tuple(outputs), path, phase, line)

    def comment(self, token: tokenize.TokenInfo) -> tuple[tuple[Type, ...] | None, Phase, str]:
        match_ = _COMMENT.match(token.string.lstrip("# ").rstrip())
        if match_ is None:
            raise self.error_at(*token.start, "expected types and '@F:path' after '#'")
        phase, path = Phase(match_["phase"] or "F"), match_["path"] or ""
        if not match_["types"]:
            return None, phase, path
        at = ast.Name("", lineno=token.start[0], col_offset=token.start[1])
        try:
            tree = ast.parse(f"({match_['types']},)", mode="eval").body
        except SyntaxError:
            raise self.error(at, "expected types after '#', as in '# bf16[B, S, 256]'") from None
        return tuple(self.type(e, at) for e in _elements(tree)), phase, path


def _elements(tree: ast.expr | None) -> list[ast.expr]:
    if tree is None:
        return []
    return list(tree.elts) if isinstance(tree, ast.Tuple) else [tree]


def _frozen(value: object) -> Attr:
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    return value  # type: ignore[return-value]
