"""``torch.compile(model, backend="wandapp")``: Inductor, after layers that share an input have become one call.

A decode step of a small model is mostly Python and small operators, of which a compiled graph has few. Layers cannot
see their neighbours while they are traced (`shared_input` is for eager mode); in the graph q, k and v are three calls
of ``wandapp::linears`` on one value, and become one here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from transformers import CompileConfig

from wandapp_kernels.ops import linears as _defines_the_operator  # noqa: F401

_IN_PLACE = {operator.setitem, operator.delitem, operator.iand, operator.ior} | {
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)
}


def compile_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that ``torch.compile(model, backend="wandapp")`` finds; ``mode`` and ``options`` are Inductor's."""
    from torch._dynamo import lookup_backend

    run_together(graph)
    _call_directly()
    inductor: Callable[..., Any] = lookup_backend("inductor")
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    return inductor(graph, example_inputs, config_patches=patches) if patches else inductor(graph, example_inputs)


def compile_config(device: torch.device | str) -> CompileConfig:
    """For ``model.generate(cache_implementation="static", compile_config=...)``: the decode step is compiled, once for
    each batch size and cache length; the prefill is not.

    On a GPU the step is replayed as a CUDA graph (mode ``"reduce-overhead"``).
    """
    on_gpu = torch.device(device).type == "cuda"
    config = CompileConfig(dynamic=False, backend=compile_graph, mode="reduce-overhead" if on_gpu else "default")
    config._compile_all_devices = True  # type: ignore[assignment]  # else only on a GPU
    return config


def run_together(graph: fx.GraphModule) -> int:
    """Make one call of all calls of ``wandapp::linears`` on one value, in place; returns how many calls that saved.

    Only without anything between them that may write into a tensor, and where the later weights are there early enough.
    """
    target = torch.ops.wandapp.linears
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    open_groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    groups: list[list[fx.Node]] = []
    for node in graph.graph.nodes:
        if _may_write(node):
            open_groups.clear()
        if node.op != "call_function" or node.target not in (target, target.default) or node.kwargs:
            continue
        x, tensors, biases, _, columns, pattern, layout = node.args
        if any(user.target is not operator.getitem for user in node.users):
            continue
        key = (x, columns, pattern, layout)
        group = open_groups.get(key)
        needed = [value for value in (*tensors, *biases) if isinstance(value, fx.Node)]
        if group is None or any(order[value] > order[group[0]] for value in needed):
            open_groups[key] = [node]
            groups.append(open_groups[key])
        else:
            group.append(node)
    for group in groups:
        if len(group) > 1:
            _merge(graph.graph, group)
    graph.graph.lint()
    graph.recompile()
    return sum(len(group) - 1 for group in groups)


def _call_directly() -> None:
    """Let Inductor's code call what is under ``wandapp::linears``: torch's dispatcher takes as long as a small linear.

    Where torch has no such hook, its code calls the operator.
    """
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    except ImportError:
        return
    CUSTOM_EXTERN_KERNEL_CODEGEN["torch.ops.wandapp.linears.default"] = CustomCodegen(python=_write_call)


def _write_call(node: Any, writeline: Callable[[str], None]) -> None:
    arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
    writeline(f"{node.get_name()} = torch.ops.wandapp.linears_now({arguments})")


def _merge(graph: fx.Graph, group: Sequence[fx.Node]) -> None:
    x, _, _, _, columns, pattern, layout = group[0].args
    tensors, biases, rows = ([value for node in group for value in node.args[place]] for place in (1, 2, 3))  # type: ignore[union-attr]
    with graph.inserting_before(group[0]):
        merged = graph.call_function(
            torch.ops.wandapp.linears.default, (x, tensors, biases, rows, columns, pattern, layout)
        )
    before = 0
    for node in group:
        for user in list(node.users):
            user.args = (merged, before + user.args[1])  # type: ignore[operator]
        before += len(node.args[3])  # type: ignore[arg-type]
        graph.erase_node(node)


def _may_write(node: fx.Node) -> bool:
    """Whether the node may change a tensor that exists already; when in doubt, yes."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op != "call_function":
        name = str(node.target)
        return node.op != "call_method" or (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, HigherOrderOperator) or node.target in _IN_PLACE or "out" in node.kwargs:
        return True
    return getattr(node.target, "__name__", "_").endswith("_")
