"""Runs transformers' DeepSeek-V3 on a checkpoint folder: the independent side of `dsv3c verify`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv3c.errors import InputError, WorkError
from dsv3c.runtime.parity import ReferenceResult

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
FP8_BLOCK = 128


def sample_tokens(vocab_size: int, batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """Reproducible random tokens [batch, length]."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference_run(hf_dir: str | Path, tokens: Tensor, dtype: str = "fp32") -> ReferenceResult:
    """Logits, gradients of the main loss and expert choices of transformers' model in `hf_dir` on tokens [B, S].

    dtype is fp32 or fp64; in fp64 everything is, also what transformers keeps in float32 (norms, router, softmax and
    rotary angles). FP8 checkpoints (e4m3 with weight_scale_inv) are dequantized first. Never touches the network.
    Raises InputError if transformers is missing or older than 5, or if the checkpoint is not a whole DeepSeek-V3.
    """
    if dtype not in DTYPES:
        raise InputError(f"precision '{dtype}' cannot be verified; use {' or '.join(DTYPES)}")
    model = load_reference(Path(hf_dir), dtype)
    vocab = model.config.vocab_size
    if tokens.dim() != 2 or tokens.shape[1] < 2 or int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
        raise InputError(f"tokens must be [sequences, at least 2 positions] with values below {vocab}")
    return run_model(model, tokens, dtype)


def run_model(model: Any, tokens: Tensor, dtype: str) -> ReferenceResult:
    """The same for a DeepseekV3ForCausalLM that is already in memory and in the precision `dtype`."""
    import transformers

    experts: dict[int, Tensor] = {}
    margins: dict[int, Tensor] = {}
    shape = tokens.shape

    def recorder(layer: int) -> Any:
        def record(gate: Any, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            router_logits, _, chosen = outputs
            experts[layer] = chosen.detach().view(*shape, -1).sort(dim=-1).values
            biased = router_logits.detach().sigmoid() + gate.e_score_correction_bias
            margins[layer] = _margin(biased, gate.num_group, gate.topk_group, gate.top_k).view(shape)

        return record

    hooks = []
    for layer, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "gate"):
            hooks.append(block.mlp.gate.register_forward_hook(recorder(layer)))
    model.eval()
    model.zero_grad(set_to_none=True)
    try:
        with torch.enable_grad(), everything_in(DTYPES[dtype]):
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            torch.autograd.backward(loss)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = checkpoint_tensors(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    )
    return ReferenceResult(
        tokens=tokens,
        dtype=dtype,
        logits=logits.detach(),
        loss=loss.item(),
        gradients=gradients,
        experts=experts,
        margins=margins,
        source=f"transformers {transformers.__version__}",
    )


def checkpoint_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits transformers' fused expert tensors ([E, 2I, H] and [E, H, I]) into the checkpoint's; drops empty ones."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            at = name.removesuffix("gate_up_proj")
            for expert, fused in enumerate(tensor):
                out[f"{at}{expert}.gate_proj.weight"], out[f"{at}{expert}.up_proj.weight"] = fused.chunk(2, dim=0)
        elif name.endswith(".mlp.experts.down_proj"):
            at = name.removesuffix("down_proj")
            for expert, weight in enumerate(tensor):
                out[f"{at}{expert}.down_proj.weight"] = weight
        elif tensor.numel():
            out[name] = tensor
    return out


def load_reference(hf_dir: Path, dtype: str) -> Any:
    """transformers' DeepseekV3ForCausalLM from a folder, in eager mode and in `dtype` throughout."""
    transformers = _transformers()
    config = _config(hf_dir, transformers)
    weights = _dequantized(hf_dir) if getattr(config, "quantization_config", None) else None
    if weights is not None:
        del config.quantization_config
    level = transformers.utils.logging.get_verbosity()
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.DeepseekV3ForCausalLM.from_pretrained(
            None if weights is not None else str(hf_dir),
            config=config,
            state_dict=weights,
            dtype=DTYPES[dtype],
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(f"transformers cannot load {hf_dir}: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"a safetensors file in {hf_dir} is damaged: {_first_line(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{hf_dir} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    return in_dtype(model, dtype)


def in_dtype(model: Any, dtype: str) -> Any:
    """Casts a transformers model to `dtype`, router biases and rotary frequencies included; returns the model."""
    model.to(DTYPES[dtype])
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.to(DTYPES[dtype])
    with everything_in(DTYPES[dtype]):
        rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb.inv_freq = rotary.inv_freq.to(DTYPES[dtype])
    model.model.rotary_emb.original_inv_freq = rotary.original_inv_freq.to(DTYPES[dtype])
    return model


@contextmanager
def everything_in(dtype: torch.dtype) -> Iterator[None]:
    """Turns explicit float32 in torch calls into float64; does nothing for float32.

    transformers computes norms, router, softmax and rotary angles in float32 whatever the model's dtype.
    """
    if dtype == torch.float64:
        with _Float64():
            yield
    else:
        yield


class _Float64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {key: torch.float64 if v is torch.float32 else v for key, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _margin(biased: Tensor, groups: int, kept_groups: int, top_k: int) -> Tensor:
    """By how much each token's choice wins: the least gap at the group cut and at the expert cut, [tokens]."""
    grouped = biased.view(*biased.shape[:-1], groups, -1)
    strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).sort(dim=-1, descending=True)
    margin = torch.full(biased.shape[:-1], math.inf, dtype=biased.dtype)
    if kept_groups < groups:
        margin = strength.values[..., kept_groups - 1] - strength.values[..., kept_groups]
    dropped = torch.ones_like(strength.values, dtype=torch.bool).scatter(-1, strength.indices[..., :kept_groups], False)
    scores = grouped.masked_fill(dropped[..., None], -math.inf).flatten(-2).sort(dim=-1, descending=True).values
    if top_k < scores.shape[-1]:
        margin = torch.minimum(margin, scores[..., top_k - 1] - scores[..., top_k])
    return margin


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("verify needs transformers, which is not installed: pip install transformers") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise InputError(f"verify needs transformers 5 or newer, found {transformers.__version__}; upgrade it")
    return transformers


def _config(hf_dir: Path, transformers: Any) -> Any:
    path = hf_dir / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give the folder of a checkpoint") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {_first_line(error)}") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != "deepseek_v3":
        raise InputError(f"{path} describes model type '{kind}', not 'deepseek_v3'")
    # A loader for code shipped beside the weights must never run here.
    fields.pop("auto_map", None)
    try:
        return transformers.DeepseekV3Config(**fields)
    except Exception as error:  # the validators of several libraries, each with its own exception class
        raise InputError(f"transformers refuses {path}: {_first_line(error)}") from error


def _dequantized(hf_dir: Path) -> dict[str, Tensor]:
    """All tensors of an FP8 checkpoint in float32: e4m3 values times their 128 x 128 block's weight_scale_inv."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    files = sorted(hf_dir.glob("*.safetensors"))
    if not files:
        raise InputError(f"{hf_dir} holds no .safetensors file")
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensors[name] = file.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{path} is damaged: {_first_line(error)}") from error
        except OSError as error:
            raise WorkError(f"cannot read {path}: {error.strerror}") from error
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(name + "_scale_inv")
        if tensor.dtype == torch.float8_e4m3fn and scale is None:
            raise InputError(f"{hf_dir}: {name} is FP8 but {name}_scale_inv is missing")
        value = tensor.float()
        if scale is not None:
            blocks = scale.float().repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            value = value * blocks[: value.shape[0], : value.shape[1]]
        out[name] = value
    return out


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
