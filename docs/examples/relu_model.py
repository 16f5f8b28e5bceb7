"""A model family from outside: DeepSeek-V3 with the activation of relu_glu.py instead of SwiGLU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsv3c.ir import Graph, Node, Program
from dsv3c.job import Job
from dsv3c.models import Model, ModelConfig, register
from dsv3c.models.deepseek_v3 import DEEPSEEK_V3
from dsv3c.plugins import load_plugin

load_plugin(Path(__file__).with_name("relu_glu.py"))


def build(config: ModelConfig, job: Job, alignment: int) -> Program:
    """The program of DeepSeek-V3 with every `swiglu` node replaced."""

    def other(node: Node) -> Node:
        return replace(node, op="relu_glu") if node.op == "swiglu" else node

    def changed(graph: Graph) -> Graph:
        return graph.but(nodes=tuple(map(other, graph.nodes)))

    program = DEEPSEEK_V3.build(config, job, alignment)
    return program.but(name="relu-moe", graphs=tuple(map(changed, program.graphs)))


RELU_MOE = register(Model(
    name="relu-moe", doc="DeepSeek-V3 with ReLU-gated experts", model_type="relu_moe",
    presets={"relu-moe-tiny": DEEPSEEK_V3.presets["deepseek-v3-tiny"].override("num_hidden_layers=2")},
    build=build, parts=DEEPSEEK_V3.parts,
))  # fmt: skip
