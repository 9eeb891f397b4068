"""`torch.compile(model, backend="liteattention")`: our passes in order, then Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import fx

from . import dropped_mass, ops  # noqa: F401  (register lite_compile::dropped_mass, attend)
from .announce import active_generation
from .calibration.fingerprint import calling_modules
from .clock_source import ClockSource
from .decisions import GraphReport, record
from .dense_layers import DenseLayers
from .errors import OptionValueError, UnsupportedAttentionError
from .find_root import describe_root, find_root, is_below_root
from .options import Options
from .passes.attention_site import AttentionSite
from .passes.decide_attention import Rewrite, decide_attention
from .passes.decide_dense_layers import decide_dense_layers
from .passes.find_attention import find_attention
from .passes.find_clock_inputs import ClockInputs, find_clock_inputs, find_unreadable
from .passes.find_joint_tokens import find_joint_tokens
from .passes.find_launch_bound import find_launch_bound
from .passes.find_nested_attention import find_nested_attention
from .passes.fuse_gelu import fuse_gelu
from .passes.fuse_layer_norm import fuse_layer_norm
from .passes.fuse_rotary import fuse_rotary
from .passes.graph_inputs import NESTED, copy_graph, fake_value, forget_arguments, placeholders, real_parameters
from .passes.insert_ranges import insert_ranges
from .passes.insert_step_guard import clock_length, insert_step_guard
from .passes.insert_thresholds import insert_thresholds
from .passes.match_key_mask import mask_inputs
from .passes.protect_positions import protect_positions
from .passes.record_history import record_history, record_probes
from .passes.report_attention import report_attention
from .passes.rewrite_attention import rewrite_attention
from .runtime import StatefulGraph, StateInputs
from .threshold_table import threshold_table


def liteattention(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: self-attention becomes the stateful op, the rest stays Inductor's.

    Args:
        mode, options: as given to `torch.compile`; `Options` lists the names.

    Raises:
        OptionValueError, OptionTypeError: an option is unknown or wrong.
        UnsupportedAttentionError: `on_unsupported="error"` and some attention has to stay dense.
    """
    settings = Options.parse(options, mode)
    rewritten, state, report = rewrite_or_leave(gm, settings)
    if settings.on_unsupported == "error":
        raise_unsupported(report)
    record(replace(report, options=settings))
    if state is None:
        return compile_inner(gm, example_inputs, settings)
    added = placeholders(rewritten.graph)[len(example_inputs) :]
    compiled = compile_inner(rewritten, [*example_inputs, *map(fake_value, added)], settings)
    stateful = StatefulGraph(compiled, rewritten.graph, state)
    forget_arguments(rewritten.graph)
    return stateful


def rewrite_or_leave(gm: fx.GraphModule, settings: Options) -> tuple[fx.GraphModule, StateInputs | None, GraphReport]:
    """`rewrite_graph`, but an error of ours leaves the graph as it was, with a warning and a line in the report."""
    try:
        return rewrite_graph(gm, settings)
    except OptionValueError:
        raise
    except Exception as error:
        if settings.on_unsupported == "error":
            raise
        message = f"error in liteattention, graph left as it was: {type(error).__name__}: {error}"
        warnings.warn(f"{message}. Please report it.", stacklevel=2)
        return gm, None, GraphReport((), message)


def rewrite_graph(gm: fx.GraphModule, settings: Options) -> tuple[fx.GraphModule, StateInputs | None, GraphReport]:
    """All passes, on a copy of `gm`: the new graph, the state it expects (None: it is `gm`), and what was decided."""
    graph = copy_graph(gm)
    sites = find_attention(graph)
    clock, description = find_clock(graph, sites)
    # A block does not know what it is called in the model: there, `layers` and `dense_layers` wait until it runs.
    known = replace(settings, layers=("*",)) if clock is ClockSource.ROOT else settings
    sites = protect_tokens(graph, sites, clock, settings)
    sites += find_nested_attention(graph)
    per_step = clock.per_step if isinstance(clock, ClockInputs) else ()
    # Only of blocks: a whole model, which may be announced, is launched without modules of Python in between.
    is_block = clock is ClockSource.ROOT and is_below_root({site.layer for site in sites}, real_parameters(graph.graph))
    launch_bound = find_launch_bound(graph, sites, settings) if is_block else None
    decisions = decide_attention(sites, description if clock is None else None, known, per_step, launch_bound)
    dense_layers: DenseLayers | frozenset[str] = settings.dense_layers
    if clock is not ClockSource.ROOT:
        decisions, dense_layers = decide_dense_layers(decisions, settings.dense_layers, settings.must_skip is not None)
    report = report_attention(decisions, description)
    rewrites = [decision for decision in decisions if isinstance(decision, Rewrite)]
    if not rewrites or clock is None:
        return gm, None, report
    device = rewrites[0].device
    biases = [rewrite.key_bias for rewrite in rewrites if rewrite.key_bias is not None and clock is ClockSource.ROOT]
    masks = dict.fromkeys(node for bias in biases for node in mask_inputs(bias, graph.graph))
    refresh_every = settings.refresh_every or 0
    now = insert_step_guard(graph, clock, settings.max_streams, device, settings.dense_steps, refresh_every)
    thresholds = insert_thresholds(graph, now, len(rewrites), device)
    ranges = insert_ranges(graph, settings.ranges, device)
    layers = rewrite_attention(
        graph, rewrites, now, thresholds, settings.max_streams, settings.criterion, ranges, settings.probe
    )
    if settings.history:
        record_history(graph, layers, now, settings.max_streams)
    if settings.probe:
        record_probes(graph, layers, now, settings.max_streams)
    if device.type == "cuda":
        if settings.fuse_rotary:
            fuse_rotary(graph, device)
        if settings.fuse_gelu:
            fuse_gelu(graph, device)
        if settings.fuse_layer_norm:
            fuse_layer_norm(graph, device)
    settings.thresholds.check_criterion(settings.criterion)
    modules = calling_modules(real_parameters(graph.graph))
    settings.thresholds.check_model(modules, tuple(site.layer for site in report.sites))
    if clock is not ClockSource.ROOT:  # where the layers' full names are known, what they lack is an error right now
        threshold_table(settings.thresholds, tuple(layer.layer for layer in layers))
    graph.graph.lint()
    graph.recompile()
    source = clock if isinstance(clock, ClockSource) else None
    words = clock_length(clock, settings.max_streams)
    state = StateInputs(
        tuple(layers), settings.max_streams, device, source, words, settings.names, settings.thresholds,
        settings.dense_steps, refresh_every, dense_layers, settings.ranges, settings.history, settings.probe,
        tuple(masks), settings.criterion, is_whole(gm),
    )  # fmt: skip
    return graph, state, report


def protect_tokens(
    graph: fx.GraphModule, sites: Sequence[AttentionSite], clock: ClockInputs | ClockSource | None, settings: Options
) -> list[AttentionSite]:
    """The sites with the tokens whose tiles are always computed: what the option says, or the text that is found."""
    if settings.protect != "auto":
        return protect_positions(sites, settings.protect)
    return find_joint_tokens(graph, sites, clock.latents if isinstance(clock, ClockInputs) else None)


def find_clock(graph: fx.GraphModule, sites: Sequence[AttentionSite]) -> tuple[ClockInputs | ClockSource | None, str]:
    """Where the graph's clock reads, or None; and the report's line about it."""
    unreadable = find_unreadable(graph)
    inputs = unreadable or find_clock_inputs(graph, sites)
    if isinstance(inputs, ClockInputs):
        return inputs, str(inputs)
    if NESTED in inputs:  # nor can the sizes of the states be read from the inputs of a call
        return None, inputs
    root = find_root() if unreadable is None else ""
    if not isinstance(root, str):
        return ClockSource.ROOT, describe_root(root)
    if active_generation(map(id, real_parameters(graph.graph))) is not None:
        return ClockSource.ANNOUNCED, "announced by lite_compile.generation"
    return None, "; ".join(filter(None, (inputs, root)))


def is_whole(gm: fx.GraphModule) -> bool:
    """Whether the graph ends where the compiled function returns. (What a break left to another graph begins late.)"""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and not reason.graph_break


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Options) -> Callable[..., Any]:
    """Hand the graph to what compiles it after us."""
    if settings.inner == "eager":
        return gm
    if settings.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx  # takes two seconds to import

    return cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=settings.inductor_config()))


def raise_unsupported(report: GraphReport) -> None:
    """Raise for the first site that should have been rewritten and was not."""
    for site in report.sites:
        if site.reason is not None and not site.reason.by_design:
            detail = f"{site.reason.value}{': ' + site.detail if site.detail else ''}"
            raise UnsupportedAttentionError(
                f"on_unsupported='error': attention of layer {site.layer!r} has to stay dense ({detail}); exclude it "
                f"with options={{'exclude_layers': [{site.layer!r}]}}, or use on_unsupported='dense'"
            )
