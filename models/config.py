"""The shape of a DeepSeek-V3 model: one validated record, read from and written to a Hugging Face config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import NoReturn

from dsv3c.errors import InputError, did_you_mean
from dsv3c.models import config_fields as known_fields
from dsv3c.models.config_values import is_int, show
from dsv3c.models.yarn import Yarn, read_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model of the DeepSeek-V3 family; fields carry their Hugging Face names, defaults are those of transformers.

    Raises InputError, naming every field at fault, for a wrong type, a value or a combination that cannot be built.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    n_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 1
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    informational: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)
    """Fields that change no computation here, as (name, JSON text), kept to be written back."""

    def __post_init__(self) -> None:
        problems = known_fields.problems_of({f.name: getattr(self, f.name) for f in fields(self)})
        if problems:
            raise InputError(f"model configuration: {'; '.join(problems)}")
        for f in fields(self):  # whole numbers are welcome where a real is meant
            if f.type == "float":
                object.__setattr__(self, f.name, float(getattr(self, f.name)))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: without position, then rotary."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What multiplies the attention scores: qk_head_dim^-0.5, with YaRN times mscale squared."""
        mscale = self.rope_scaling.softmax_mscale if self.rope_scaling else 1.0
        return float(self.qk_head_dim**-0.5) * mscale * mscale

    @property
    def num_moe_layers(self) -> int:
        """Expert layers of the main model."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def mtp_layers(self) -> range:
        """Indices of the MTP modules among `model.layers`: they follow the main model's layers."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, object], where: str = "config.json") -> ModelConfig:
        """Read a config.json's mapping; `where` names it in errors. Every field is honoured or refused by name."""
        values: dict[str, object] = {}
        kept: list[tuple[str, str]] = []
        problems: list[str] = []
        known = {
            *known_fields.READERS,
            *known_fields.ALIASES,
            *known_fields.DERIVED,
            *known_fields.KEPT,
            *known_fields.DROPPED,
            *known_fields.ROPE,
            *known_fields.REQUIRED_VALUES,
        }
        for name, value in mapping.items():
            target = known_fields.ALIASES.get(name, name)
            if target in known_fields.READERS:
                if target in values and values[target] != value:
                    problems.append(f"{name} and {target} are the same field and disagree")
                values[target] = 0 if target == "n_shared_experts" and value is None else value
            elif name in known_fields.REQUIRED_VALUES and value not in known_fields.REQUIRED_VALUES[name]:
                problems.append(
                    f"{name} = {show(value)} is not supported, only {show(known_fields.REQUIRED_VALUES[name][0])}"
                )
            elif name in known_fields.KEPT:
                kept.append((name, json.dumps(value, sort_keys=True)))
            elif name not in known:
                problems.append(
                    f"unknown field {name}, {did_you_mean(name, [*known_fields.READERS, *known_fields.ROPE])}"
                )
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            problems.append(f"missing field{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
        problems += known_fields.check_quantization(mapping.get("quantization_config"))
        rope_problems = read_rope(mapping, values)
        defaults = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
        problems += rope_problems + known_fields.problems_of({**defaults, **values})
        for name, formula in known_fields.DERIVED.items():
            sizes = [size for size in map(values.get, formula) if is_int(size)]
            if mapping.get(name) is not None and len(sizes) == len(formula) and mapping[name] != sum(sizes):
                problems.append(f"{name} = {show(mapping[name])} is not supported, it must equal {' + '.join(formula)}")
        if problems:
            raise InputError(f"{where}: {'; '.join(problems)}")
        return cls(**values, informational=tuple(kept))  # type: ignore[arg-type]

    def to_hf_dict(self, dtype: str | None = None) -> dict[str, object]:
        """The config.json that transformers, vLLM and SGLang load; `dtype` is that of the weights beside it."""
        result: dict[str, object] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
        for f in fields(self):
            if f.name != "informational":
                result[f.name] = getattr(self, f.name)
        if isinstance(self.eos_token_id, tuple):
            result["eos_token_id"] = list(self.eos_token_id)
        result["num_key_value_heads"] = self.num_attention_heads
        if yarn := self.rope_scaling:
            scaling: dict[str, object] = {"type": "yarn", "rope_type": "yarn"}
            scaling |= {f.name: getattr(yarn, f.name) for f in fields(yarn)}
            result["rope_scaling"] = {k: v for k, v in scaling.items() if not (k.startswith("mscale") and v == 0)}
        result |= {name: json.loads(text) for name, text in self.informational}
        if dtype is not None:
            result["torch_dtype"] = dtype
        return result

    def override(self, text: str) -> ModelConfig:
        """The same model with `field=value,field=value` applied; `rope_scaling.factor=8` reaches into YaRN."""
        where = f"override '{text}'"
        mapping = {name: value for name, value in self.to_hf_dict().items() if name not in known_fields.DERIVED}
        seen: list[str] = []
        for item in _split(text):
            name, equals, literal = (part.strip() for part in item.partition("="))
            if not (name and equals and literal):
                raise InputError(f"{where}: '{item}' is not of the form field=value")
            if name in seen:
                raise InputError(f"{where}: {name} is given twice")
            seen.append(name)
            head, dot, inner = name.partition(".")
            if dot and head == "rope_scaling":
                scaling = mapping["rope_scaling"] if isinstance(mapping["rope_scaling"], dict) else {"type": "yarn"}
                mapping["rope_scaling"] = {**scaling, inner: _literal(literal)}
            else:
                mapping[name] = _literal(literal)
        return ModelConfig.from_dict(mapping, where)


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a config.json, or the one in a directory."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        mapping = json.loads(file.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except FileNotFoundError:
        hint = "; a model trained there is in its folder hf" if (file.parent / "hf" / file.name).is_file() else ""
        raise InputError(f"{file}: no such file; give a config.json or a directory that holds one{hint}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {error}") from None
    if not isinstance(mapping, dict):
        raise InputError(f"{file}: a model configuration is a JSON object, this holds a {type(mapping).__name__}")
    return ModelConfig.from_dict(mapping, str(file))


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters, router biases included."""

    total: int
    """The main model, MTP apart."""
    active: int
    """What one token uses of the main model: every weight but the experts it does not visit."""
    active_without_embedding: int
    """The same without the input embedding."""
    mtp_own: int
    """The MTP modules, without the embedding and head that they share with the main model."""
    mtp_with_shared: int
    """The MTP modules as a checkpoint holds them, each with its copy of embedding and head."""
    checkpoint: int
    """All of a checkpoint."""


def parameter_count(config: ModelConfig) -> Counts:
    """Exact parameter counts in closed form."""
    c, d = config, config.hidden_size
    query = c.num_attention_heads * c.qk_head_dim
    attention = d * query if c.q_lora_rank is None else c.q_lora_rank * (d + 1 + query)
    attention += d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    attention += c.num_attention_heads * (c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) + c.v_head_dim * d)
    attention += 2 * d  # the norms before attention and MLP
    expert = 3 * d * c.moe_intermediate_size
    moe = attention + c.n_routed_experts * (d + 1) + (c.n_routed_experts + c.n_shared_experts) * expert
    dense = attention + 3 * d * c.intermediate_size
    embedding = c.vocab_size * d
    total = 2 * embedding + d + c.first_k_dense_replace * dense + c.num_moe_layers * moe
    active = total - c.num_moe_layers * (c.n_routed_experts - c.num_experts_per_tok) * expert
    module = moe + 3 * d + 2 * d * d  # enorm, hnorm, shared_head.norm, eh_proj
    own = c.num_nextn_predict_layers * module
    shared = own + c.num_nextn_predict_layers * 2 * embedding
    return Counts(total, active, active - embedding, own, shared, total + shared)


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _split(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    items, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    return items


def _literal(text: str) -> object:
    words: dict[str, object] = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text, parse_constant=_not_a_number)
    except ValueError:
        return text
