"""DeepSeek-V3: the program of training and serving, one graph per kind of layer, and the list of its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv3c.build import Builder
from dsv3c.dims import symbol
from dsv3c.ir import DType, Graph, Layer, Program, Sequence, Type, Value, Weight
from dsv3c.job import LANE, Job
from dsv3c.models._blocks import B, C, Rope, S, Style, attention, dense_mlp, moe_mlp, rope_table
from dsv3c.models._model import Model
from dsv3c.models.checkpoint import parts
from dsv3c.models.config import ModelConfig
from dsv3c.models.presets import PRESETS
from dsv3c.ops import REGISTRY

TOKENS = Type(DType.i64, (B, S))
SCALAR = Type(DType.i32, ())


def positions_graph(config: ModelConfig, style: Style, name: str, mtp: int = 0, started: bool = False) -> Graph:
    """Rotary table of the tokens' positions; for training also the labels (next tokens, -1 past the end), and for
    each MTP module its input tokens and labels, one further on; the documents last, if they are kept apart."""
    b = Builder(REGISTRY, name)
    tokens = b.input("tokens", TOKENS)
    with b.path("positions"):
        positions = b.positions_from(tokens, b.input("start", SCALAR)) if started else b.positions(tokens)
        results = list(rope_table(b, positions, config, style.wide))
        if name == "positions":
            results.append(b.shift(tokens, out="labels", by=1, fill=-1))
        for k in range(1, mtp + 1):
            results.append(b.shift(tokens, out=f"mtp{k}_tokens", by=k, fill=0))
            results.append(b.shift(tokens, out=f"mtp{k}_labels", by=k + 1, fill=-1))
        if style.document_end is not None:
            results.append(b.documents(tokens, end=style.document_end))
    return b.graph(results)


def embedding_graph(config: ModelConfig, style: Style, name: str) -> Graph:
    """tokens -> residual."""
    b = Builder(REGISTRY, name)
    tokens = b.input("tokens", TOKENS)
    with b.path("embedding"):
        w = style.weight(b, "embedding", config.vocab_size, config.hidden_size)
        return b.graph([b.embedding(tokens, w, out="residual", dtype=str(style.dtype))])


def block_graph(config: ModelConfig, style: Style, name: str, moe: bool, first: bool) -> Graph:
    """One transformer layer, (residual, delta) -> (residual, delta): the sum is the hidden state, and adding it up is
    left to the next layer, where it fuses with the norm. The `first` layer takes the residual alone."""
    b = Builder(REGISTRY, name)
    hidden = b.input("residual", style.activation(config.hidden_size))
    delta = None if first else b.input("delta", style.activation(config.hidden_size))
    half = config.qk_rope_head_dim // 2
    table = Type(style.wide, (B, S, half))
    rope = Rope(b.input("cos", table), b.input("sin", table))
    cache = start = None
    if style.cache != "none":
        cache = b.input("cache", Type(style.dtype, (B, C, config.kv_lora_rank + config.qk_rope_head_dim)))
        start = b.input("start", SCALAR)
    documents = b.input("documents", Type(DType.i32, (B, S))) if style.document_end is not None else None
    bias = b.input("bias", Type(style.wide, (config.n_routed_experts,))) if moe else None
    with b.path("attention.norm"):
        if delta is not None:
            hidden = b.add(hidden, delta, out="hidden")
        norm = b.weight("attention_norm", style.vector(config.hidden_size))
        x = b.rms_norm(hidden, norm, out="x", eps=config.rms_norm_eps)
    attended, cache = attention(b, x, rope, config, style, cache, start, documents)
    with b.path("mlp.norm"):
        hidden = b.add(hidden, attended, out="residual_next")
        norm = b.weight("mlp_norm", style.vector(config.hidden_size))
        y = b.rms_norm(hidden, norm, out="y", eps=config.rms_norm_eps)
    extra: list[Value] = [] if cache is None else [cache]
    if bias is not None:
        experts = moe_mlp(b, y, bias, config, style)
        output = experts.output
        extra += [v for v in (experts.balance, experts.load) if v is not None]
    else:
        with b.path("mlp"):
            output = dense_mlp(b, y, config.intermediate_size, style)
    return b.graph([hidden, output, *extra])


def head_graph(config: ModelConfig, style: Style, name: str, loss: bool, hidden_result: bool = False,
               last: bool = False) -> Graph:  # fmt: skip
    """(residual, delta) -> loss (with labels) or logits; for an MTP module to follow, also the normed hidden state.

    The report leaves open whether that state is normed; serving the released weights takes it after the norm.
    """
    b = Builder(REGISTRY, name)
    residual = b.input("residual", style.activation(config.hidden_size))
    delta = b.input("delta", style.activation(config.hidden_size))
    labels = b.input("labels", TOKENS) if loss else None
    with b.path("head.norm"):
        hidden = b.add(residual, delta, out="hidden")
        kept = b.last_position(hidden) if last else hidden
        x = b.rms_norm(kept, b.weight("norm", style.vector(config.hidden_size)), eps=config.rms_norm_eps)
    with b.path("head"):
        w = style.weight(b, "head", config.vocab_size, config.hidden_size)
        logits = b.linear(x, w, out="logits")
        if labels is None:
            return b.graph([logits])
        value, _lse = b.cross_entropy(logits, labels, out=("loss", "loss_lse"))
    return b.graph([value, x] if hidden_result else [value])


def mtp_entry_graph(config: ModelConfig, style: Style) -> Graph:
    """The start of an MTP module (section 2.2): projection of [enorm(embedding of the later token); hnorm(hidden)]."""
    b = Builder(REGISTRY, "mtp_entry")
    hidden = b.input("hidden", style.activation(config.hidden_size))
    tokens = b.input("tokens", TOKENS)
    d = config.hidden_size
    with b.path("mtp.embedding"):
        w = style.weight(b, "embedding", config.vocab_size, d)
        e = b.embedding(tokens, w, dtype=str(style.dtype))
    with b.path("mtp.norm"):
        e = b.rms_norm(e, b.weight("enorm", style.vector(d)), eps=config.rms_norm_eps)
        h = b.rms_norm(hidden, b.weight("hnorm", style.vector(d)), eps=config.rms_norm_eps)
    with b.path("mtp.projection"):
        w = style.weight(b, "eh_proj", d, 2 * d)
        return b.graph([b.linear(b.join_last(e, h), w, out="residual_out")])


def attention_weights(config: ModelConfig, layer: str) -> tuple[str, ...]:
    """Names of a layer's attention weights, in the order in which `block_graph` declares them."""
    q = (
        ("q_proj.weight",)
        if config.q_lora_rank is None
        else ("q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight")
    )
    rest = ("kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight")
    return (f"{layer}.input_layernorm.weight", *(f"{layer}.self_attn.{n}" for n in (*q, *rest)))


def block_weights(config: ModelConfig, layer: str, moe: bool) -> tuple[str, ...]:
    """Names of a layer's weights, in the order in which `block_graph` declares them."""
    names = (*attention_weights(config, layer), f"{layer}.post_attention_layernorm.weight")
    if not moe:
        return (*names, f"{layer}.mlp.gate_up_proj.weight", f"{layer}.mlp.down_proj.weight")
    names += (f"{layer}.mlp.gate.weight", f"{layer}.mlp.experts.gate_up_proj", f"{layer}.mlp.experts.down_proj")
    if config.n_shared_experts:
        names += (f"{layer}.mlp.shared_experts.gate_up_proj.weight", f"{layer}.mlp.shared_experts.down_proj.weight")
    return names


def bias_name(layer: str) -> str:
    """The router bias of a layer: state, updated after each step, never trained by gradient."""
    return f"{layer}.mlp.gate.e_score_correction_bias"


EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass
class _Chain:
    """Collects the layers of one sequence."""

    config: ModelConfig
    suffix: str
    train: bool = False
    cached: bool = False
    documents: tuple[str, ...] = ()
    layers: list[Layer] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    balances: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def add(self, name: str, graph: str, inputs: tuple[str, ...], weights: tuple[str, ...], *outputs: str) -> None:
        self.layers.append(Layer(name, graph, inputs, weights, outputs))

    def block(self, index: int, moe: bool, first: bool, carry: tuple[str, ...]) -> tuple[str, str]:
        """Append transformer layer `index`; gives the names of its residual and delta."""
        name = f"model.layers.{index}"
        inputs = (*carry, "cos", "sin", *self.documents)
        outputs = [f"residual.{index}", f"delta.{index}"]
        if self.cached:
            inputs += (f"cache.{index}", "start")
            outputs.append(f"cache.{index}.next")
            self.caches.append(f"cache.{index}")
        if moe:
            inputs += (bias_name(name),)
            if self.train:
                self.balances.append(f"balance.{index}")
                self.loads.append(f"load.{index}")
                outputs += [self.balances[-1], self.loads[-1]]
        kind = f"{'moe' if moe else 'dense'}_block{'_first' if first else ''}{self.suffix}"
        self.add(name, kind, inputs, block_weights(self.config, name, moe), *outputs)
        return outputs[0], outputs[1]

    def blocks(self) -> tuple[str, str]:
        """Append every layer of the main model."""
        carry: tuple[str, ...] = ("embedded",)
        for index in range(self.config.num_hidden_layers):
            carry = self.block(index, index >= self.config.first_k_dense_replace, index == 0, carry)
        return carry[0], carry[1]


def head_name(config: ModelConfig) -> str:
    return EMBEDDING if config.tie_word_embeddings else HEAD


def train_sequence(config: ModelConfig, documents: bool) -> Sequence:
    """One micro-batch forward: losses of the main model, of each MTP module, and of balance."""
    modules = config.num_nextn_predict_layers
    shifted = [n for k in range(1, modules + 1) for n in (f"mtp{k}_tokens", f"mtp{k}_labels")]
    chain = _Chain(config, "", train=True, documents=("documents",) if documents else ())
    chain.add("positions", "positions", ("tokens",), (), "cos", "sin", "labels", *shifted, *chain.documents)
    chain.add("embedding", "embedding", ("tokens",), (EMBEDDING,), "embedded")
    residual, delta = chain.blocks()
    outputs = ("loss.main", "hidden.0") if modules else ("loss.main",)
    graph = "head_mtp" if modules else "head"
    chain.add("head", graph, (residual, delta, "labels"), (NORM, head_name(config)), *outputs)
    for k in range(1, modules + 1):
        index = config.num_hidden_layers + k - 1
        name = f"model.layers.{index}"
        weights = (EMBEDDING, *(f"{name}.{n}.weight" for n in ("enorm", "hnorm", "eh_proj")))
        chain.add(f"{name}.entry", "mtp_entry", (f"hidden.{k - 1}", f"mtp{k}_tokens"), weights, f"entry.{k}")
        residual, delta = chain.block(index, moe=True, first=True, carry=(f"entry.{k}",))
        outputs = (f"loss.mtp.{k}", f"hidden.{k}") if k < modules else (f"loss.mtp.{k}",)
        weights = (f"{name}.shared_head.norm.weight", head_name(config))
        graph = "head_mtp" if k < modules else "head"
        chain.add(f"{name}.head", graph, (residual, delta, f"mtp{k}_labels"), weights, *outputs)
    losses = ("loss.main", *(f"loss.mtp.{k}" for k in range(1, modules + 1)), *chain.balances)
    return Sequence("train", ("tokens",), tuple(chain.layers), (*losses, *chain.loads), losses)


def inference_sequence(config: ModelConfig, name: str) -> Sequence:
    """`forward`: logits of all positions. `prefill`, `decode`: logits of the last, and the caches written to."""
    cached = name != "forward"
    chain = _Chain(config, f"_{name}", cached=cached)
    start = ("start",) if cached else ()
    chain.add("positions", f"positions_{name}", ("tokens", *start), (), "cos", "sin")
    chain.add("embedding", f"embedding_{name}", ("tokens",), (EMBEDDING,), "embedded")
    residual, delta = chain.blocks()
    chain.add("head", f"head_{name}", (residual, delta), (NORM, head_name(config)), "logits")
    inputs = ("tokens", *start, *chain.caches)
    return Sequence(name, inputs, tuple(chain.layers), ("logits", *(f"{c}.next" for c in chain.caches)))


def kinds(config: ModelConfig) -> tuple[tuple[bool, bool], ...]:
    """The kinds of block that occur, as (moe, first)."""
    found = [(i >= config.first_k_dense_replace, i == 0) for i in range(config.num_hidden_layers)]
    return tuple(dict.fromkeys(found))


def block_name(moe: bool, first: bool, suffix: str = "") -> str:
    return f"{'moe' if moe else 'dense'}_block{'_first' if first else ''}{suffix}"


def train_graphs(config: ModelConfig, style: Style) -> list[Graph]:
    """The graphs of `train_sequence`."""
    modules = config.num_nextn_predict_layers
    wanted = dict.fromkeys([*kinds(config), *([(True, True)] if modules else [])])
    graphs = [positions_graph(config, style, "positions", modules), embedding_graph(config, style, "embedding")]
    graphs += [block_graph(config, style, block_name(*kind), *kind) for kind in wanted]
    if modules != 0:
        graphs.append(head_graph(config, style, "head_mtp", loss=True, hidden_result=True))
        graphs.append(mtp_entry_graph(config, style))
    graphs.append(head_graph(config, style, "head", loss=True))
    return graphs


def inference_graphs(config: ModelConfig, style: Style, name: str) -> list[Graph]:
    """The graphs of `inference_sequence(config, name)`."""
    cached = name != "forward"
    graphs = [positions_graph(config, style, f"positions_{name}", started=cached)]
    graphs.append(embedding_graph(config, style, f"embedding_{name}"))
    graphs += [block_graph(config, style, block_name(*kind, suffix=f"_{name}"), *kind) for kind in kinds(config)]
    graphs.append(head_graph(config, style, f"head_{name}", loss=False, last=cached))
    return graphs


def _weights_of(
    graphs: dict[str, Graph], sequences: list[Sequence], config: ModelConfig, wide: DType
) -> tuple[Weight, ...]:
    """Every weight once, in order of first use; stored in float32 (float64 in a float64 program)."""
    found: dict[str, Weight] = {}
    for layer in (layer for s in sequences for layer in s.layers):
        graph = graphs[layer.graph]
        for name, v in zip(layer.weights, graph.weights, strict=True):
            if name not in found:
                found[name] = Weight(name, Type(wide, v.type.shape), *_initial(name, v.type, config))
        for name, v in zip(layer.inputs, graph.inputs, strict=True):
            if name.endswith("e_score_correction_bias") and name not in found:
                found[name] = Weight(name, Type(wide, v.type.shape), "zeros", 0.0, "state")
    return tuple(found.values())


def _initial(name: str, type: Type, config: ModelConfig) -> tuple[str, float, str]:
    """Initial distribution, its standard deviation, and optimizer group."""
    if type.rank == 1:
        return "ones", 0.0, "norm"
    group = {EMBEDDING: "embedding", HEAD: "head"}.get(name, "matrix")
    return "normal", config.initializer_range, group


def step_graphs(config: ModelConfig, style: Style, job: Job) -> list[Graph]:
    """The epilogue of a step, over the flat buffers in which each group of weights lies: N rows of LANE numbers."""
    recipe, wide = job.recipe, style.wide
    n = symbol("N")
    flat, moment, scalar = Type(wide, (n, LANE)), Type(DType.bf16, (n, LANE)), Type(wide, ())
    if wide is DType.f64:
        moment = flat
    graphs = []
    b = Builder(REGISTRY, "gradient_squares")
    with b.path("optimizer"):
        graphs.append(b.graph([b.sum_squares(b.input("gradient", flat), out="squares")]))
    b = Builder(REGISTRY, "clip")
    with b.path("optimizer"):
        graphs.append(b.graph([b.clip_scale(b.input("squares", scalar), out="scale", limit=recipe.clip)]))
    for name, decay in (("update_decayed", recipe.decay), ("update", 0.0)):
        b = Builder(REGISTRY, name)
        with b.path("optimizer"):
            state = [b.input("w", flat), b.input("gradient", flat), b.input("m", moment), b.input("v", moment)]
            scale, lr, step = (b.input(x, scalar) for x in ("scale", "lr", "step"))
            betas = {"beta1": recipe.beta1, "beta2": recipe.beta2}
            factors = b.adamw_factors(lr, step, out=("rate", "root", "keep"), decay=decay, **betas)
            graphs.append(
                b.graph(b.adamw(*state, scale, *factors, out=("w_next", "m_next", "v_next"), eps=recipe.eps, **betas))
            )
    b = Builder(REGISTRY, "update_bias")
    with b.path("moe.router"):
        e = Type(wide, (config.n_routed_experts,))
        graphs.append(
            b.graph([b.update_bias(b.input("bias", e), b.input("load", e), b.input("speed", scalar), out="bias_next")])
        )
    return graphs


def build(config: ModelConfig, job: Job, alignment: int) -> Program:
    """The program of a job: training steps if it trains, and always `forward`, `prefill` and `decode`."""
    style = Style(job.dtype, alignment)
    graphs: list[Graph] = []
    sequences: list[Sequence] = []
    if job.kind == "train":
        trained = Style(job.dtype, alignment, train=True, document_end=job.document_end)
        graphs += train_graphs(config, trained) + step_graphs(config, style, job)
        sequences.append(train_sequence(config, job.document_end is not None))
    for name, cache in (("forward", "none"), ("prefill", "write"), ("decode", "read")):
        graphs += inference_graphs(config, Style(job.dtype, alignment, cache), name)
        sequences.append(inference_sequence(config, name))
    weights = _weights_of({g.name: g for g in graphs}, sequences, config, style.wide)
    return Program("deepseek-v3", tuple(graphs), tuple(sequences), weights)


DEEPSEEK_V3 = Model("deepseek-v3", "DeepSeek-V3 family: MLA, DeepSeekMoE, MTP", "deepseek_v3", PRESETS, build, parts)
