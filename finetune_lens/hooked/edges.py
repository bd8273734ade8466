"""Edge attribution: what patching one edge of the residual stream would do, to first order, for all edges at once.

Every head's result, every MLP's output and the embedding are written to the residual stream and added up; q, k and v of
every head, every MLP and the logits read that sum. The edge u → v is u's summand in what v reads, and

    S[u, v] = Σ_positions (a_u^corrupt − a_u^clean) · ∂m/∂(what v reads),   the gradient taken at the clean run

(Syed et al. 2023, arXiv 2310.10348). The direction: recipient clean, donor corrupt; S estimates m(edge patched) −
m(clean). With `steps`, the gradient is averaged along the straight line between the clean and the corrupt embeddings,
by the midpoint rule, and the difference of the activations stays that of the two ends (EAP-IG, Hanna et al. 2024,
arXiv 2403.17806; its sum has the points on the right). The embedding's edges then sum to m(corrupt) − m(clean).

A reader's gradient goes from q, k, v or the MLP's output back through the block's own modules to the residual stream,
one block after another from the last to the first, so that these short ways back together are the one backward pass.
Summed over its readers they are the gradient at a writer's output: Σ_v S[u, v] is u's attribution, exactly. That the
readers are all there is, is checked on a few tokens first.

A head's result goes through the norm that some architectures have after attention: to first order there, too.

Cost: two forward passes, one backward, the heads' results and gradients (about one more projection each) and the
products, 2·d_model flops for each edge and position; with steps, two forward passes, and a forward and backward pass
with the products a step. Memory: for each example of a batch, writers × positions × d_model numbers and the graph.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetune_lens.errors import InputError
from finetune_lens.hooked.anatomy import Block
from finetune_lens.hooked.model import HookedModel
from finetune_lens.hooked.sites import site_name
from finetune_lens.hooked.sweep import TOLERANCE
from finetune_lens.metrics import DIFFERENTIABLE, score
from finetune_lens.prompts import Encoded

NUMBERS = 1 << 26  # numbers in the writers' differences of a batch
FEW = 8  # tokens on which the readers are checked


@dataclass(frozen=True)
class Node:
    """A writer or reader: of the kind embed, head (reading: q, k, v), mlp, logits. Layer and head -1 where none."""

    name: str
    kind: str
    layer: int = -1
    head: int = -1


@dataclass(frozen=True)
class Graph:
    """Writers and readers in the order of the forward pass; `before`: how many of the writers come before a reader."""

    writers: list[Node]
    readers: list[Node]
    before: list[int]


@dataclass(frozen=True)
class _Forward:
    """A run on prompts: the metric, activations by site, and what some modules read, by name and layer."""

    values: Float[Tensor, " batch"]
    cache: dict[str, Tensor]
    inputs: dict[tuple[str, int], Tensor]

    def at(self, kind: str, layer: int) -> Tensor:
        return self.cache[site_name(kind, layer)]


def graph_of(model: HookedModel) -> Graph:
    """The writers and readers of a model, k and v one for each group of query heads that share them.

    Raises:
        InputError: heads or halves of a block that cannot be told apart.
    """
    graph = Graph([Node("embed", "embed")], [], [])
    for layer, block in enumerate(model.anatomy.blocks):
        model.require(["z", "q", "k", "v", "attn_out", "mlp_out"], [layer])
        graph.before.extend([len(graph.writers)] * sum(part.heads for part in block.features.values()))
        for part in "qkv":
            count = block.features[part].heads
            letter = "h" if count == block.heads else "kv"
            graph.readers.extend(Node(f"a{layer}.{letter}{i}<{part}>", part, layer, i) for i in range(count))
        heads = [Node(f"a{layer}.h{i}", "head", layer, i) for i in range(block.heads)]
        graph.before.append(len(graph.writers) + (len(heads) if model.anatomy.sequential else 0))
        graph.readers.append(Node(f"m{layer}", "mlp", layer))
        graph.writers.extend([*heads, Node(f"m{layer}", "mlp", layer)])
    graph.before.append(len(graph.writers))
    graph.readers.append(Node("logits", "logits", model.layers))
    return graph


def edge_scores(
    model: HookedModel,
    clean: Encoded,
    corrupt: Encoded,
    metric: str,
    *,
    steps: int = 0,
    at: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (writer, reader, example) in the order of `graph_of`, NaN where there is no edge; m(clean), m(corrupt).

    Args:
        clean, corrupt: prompts padded to the same columns; columns of which one of the two has no token are left out.
        metric: one that has a gradient.
        steps: points on the line between the embeddings; 0: the clean run alone.
        at: the one column of each example whose differences count; by default all.
        batch_size: examples at once; by default up to 16, as memory allows.

    Raises:
        InputError: a metric without a gradient, no steps, an architecture whose edges are not known.
    """
    from tqdm.auto import tqdm

    if metric not in DIFFERENTIABLE or metric == "kl":
        raise InputError(f"edges need a metric with a gradient at the clean run; found {metric!r}; expected one of "
                         "logit_diff, logprob, prob")  # fmt: skip
    if steps < 0 or (batch_size is not None and batch_size < 1):
        raise InputError(f"steps are at least 0 and the batch size 1; found {steps} and {batch_size}")
    graph = graph_of(model)
    _require_known(model, clean.ids[:1, clean.mask[0]][:, :FEW])
    examples, width = clean.ids.shape
    both = clean.prompt_columns & corrupt.prompt_columns
    counted = both if at is None else both & (torch.arange(width) == torch.from_numpy(np.array(at))[:, None])
    d_model = model.module.get_input_embeddings().weight.shape[-1]
    size = batch_size or min(16, max(1, NUMBERS // (len(graph.writers) * width * d_model)))
    scores = np.full((len(graph.writers), len(graph.readers), examples), np.nan, np.float32)
    ends = np.empty((2, examples))
    exists = np.arange(len(graph.writers))[:, None] < np.array(graph.before)
    bar = tqdm(total=examples * max(steps, 1), desc="edges", disable=not progress, dynamic_ncols=True)
    with bar:
        for begin in range(0, examples, size):
            rows = slice(begin, min(begin + size, examples))
            one, other = clean.rows(rows), corrupt.rows(rows)
            start = _forward(model, one, metric, gradients=not steps)
            end = _forward(model, other, metric, gradients=False)
            ends[:, rows] = [side.values.detach().double().cpu() for side in (start, end)]
            apart = _differences(model, start, end, counted[rows])
            embedded = start.at("resid_pre", 0).detach()
            way = (end.at("resid_pre", 0) - embedded) * both[rows, :, None].to(embedded.device)
            total = apart.new_zeros(len(apart), *exists.shape)
            for step in range(max(steps, 1)):
                here = start
                if steps:
                    mixed = embedded + (step + 0.5) / steps * way
                    here = _forward(model, one, metric, gradients=True, embedded=mixed)
                _add_products(total, apart, model, here, graph)
                bar.update(len(apart))
                del here  # its graph, before there is another
            found = (total / max(steps, 1)).permute(1, 2, 0).cpu().numpy()
            scores[:, :, rows] = np.where(exists[:, :, None], found, np.nan)
    return scores, *ends


def _forward(
    model: HookedModel, prompts: Encoded, metric: str, *, gradients: bool, embedded: Tensor | None = None
) -> _Forward:
    """A run and its metric; with `embedded` in the place of the embeddings."""
    edits = [] if embedded is None else [(site_name("resid_pre", 0), embedded.requires_grad_())]
    with _inputs_kept(model) as inputs:
        run = model.run(
            prompts.ids, mask=prompts.mask, capture=_sites(model, not gradients), edits=edits, gradients=gradients,
            logits_at=prompts.read_at,
        )  # fmt: skip
    values = score(run.logits, prompts.answers, prompts.wrongs, only=metric)[metric]
    return _Forward(values, run.cache, inputs)


def _sites(model: HookedModel, written: bool = False) -> list[str]:
    """What the backward pass needs; or what is written alone."""
    kinds = ["z", "mlp_out"] if written else ["resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out"]
    names = [site_name(kind, layer) for layer in range(model.layers) for kind in kinds]
    return [*names, site_name("resid_pre", 0) if written else site_name("resid_post", model.layers - 1)]


@contextmanager
def _inputs_kept(model: HookedModel) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Within: runs leave here what the projections to q, k and v read, a norm after attention, and the MLP or its norm.

    The MLP's is no site of the run (resid_mid): the hook there writes in place, which the graph of a view does not see.
    """
    kept: dict[tuple[str, int], Tensor] = {}
    hooks = []
    for layer, block in enumerate(model.anatomy.blocks):
        modules = {part: block.features[part].module for part in "qkv"}
        modules |= {"attn_out": block.attn_out, "mlp": block.before_mlp}
        for name, module in modules.items():
            keep = functools.partial(_keep, kept, (name, layer))
            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _keep(kept: dict, at: tuple[str, int], module: nn.Module, args: tuple, kwargs: dict) -> None:
    kept[at] = args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def _differences(
    model: HookedModel, start: _Forward, end: _Forward, counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch writer pos d_model"]:
    """Corrupt − clean of what each writer writes, in float32 or better; 0 in columns that do not count."""
    dtype = torch.promote_types(model.dtype, torch.float32)

    def apart(kind: str, layer: int) -> Tensor:
        return end.at(kind, layer).to(dtype) - start.at(kind, layer).detach().to(dtype)

    embedding = apart("resid_pre", 0)
    count = 1 + sum(block.heads + 1 for block in model.anatomy.blocks)
    differences = embedding.new_empty(len(embedding), count, *embedding.shape[1:])
    differences[:, 0] = embedding
    at = 1
    for layer, block in enumerate(model.anatomy.blocks):
        z = apart("z", layer)
        with model.side():
            output = _weight(block.projection, start.at("z", layer).flatten(-2)).to(dtype)
        written = torch.einsum("bphe,hed->bhpd", z, output.unflatten(0, (block.heads, block.d_head)))
        if _normed_after(block):
            read = start.inputs["attn_out", layer].detach()[:, None].expand_as(written)
            with model.side(), torch.enable_grad():
                written = torch.autograd.functional.jvp(block.attn_out.forward, read, written.to(read.dtype))[1]
        differences[:, at : at + block.heads] = written
        differences[:, at + block.heads] = apart("mlp_out", layer)
        at += block.heads + 1
    return differences.mul_(counted.to(differences.device)[:, None, :, None])


def _normed_after(block: Block) -> bool:
    return block.attn_out not in (block.attention, block.projection)


def _add_products(
    total: Float[Tensor, "batch writer reader"],
    apart: Float[Tensor, "batch writer pos d_model"],
    model: HookedModel,
    run: _Forward,
    graph: Graph,
) -> None:
    """Add every writer's difference times every later reader's gradient."""
    for readers, gradients in _gradients(model, run, graph):
        before = graph.before[readers.start]
        total[:, :before, readers] += apart[:, :before].flatten(2) @ gradients.to(apart).flatten(2).mT


def _gradients(
    model: HookedModel, run: _Forward, graph: Graph
) -> Iterator[tuple[slice, Float[Tensor, "batch reader pos d_model"]]]:
    """∂m/∂(what each reader reads), from the last to the first: those with the same writers before them at once."""

    def back(output: Tensor, inputs: list[Tensor], given: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, given.to(output), retain_graph=True)

    stop = len(graph.readers) - 1
    last = run.at("resid_post", model.layers - 1)
    (total,) = torch.autograd.grad(run.values.nansum(), last, retain_graph=True)
    yield slice(stop, stop + 1), total[:, None]
    total = total.to(torch.promote_types(total.dtype, torch.float32))  # many are going to be added
    for layer in reversed(range(model.layers)):
        residual = run.at("resid_pre", layer)
        middle = run.inputs["mlp", layer] if model.anatomy.sequential else residual
        mlp = back(run.at("mlp_out", layer), [middle], total)[0].view_as(residual)
        yield slice(stop - 1, stop), mlp[:, None]
        total = total.to(mlp.device)
        after = total + mlp if model.anatomy.sequential else total  # at attention's output
        inner = back(run.at("attn_out", layer), [run.at(part, layer) for part in "qkv"], after)
        features = model.anatomy.blocks[layer].features
        start = stop - 1 - sum(features[part].heads for part in "qkv")
        heads = residual.new_empty(len(residual), stop - 1 - start, *residual.shape[1:])
        at = 0
        for part, gradient in zip("qkv", inner, strict=True):
            read, rows = run.inputs[part, layer], features[part].rows
            with model.side():
                weight = _weight(features[part].module, read)
            weight = weight if rows is None else weight[:, rows.to(weight.device)]
            weight = weight.unflatten(1, (features[part].heads, -1)).to(gradient)
            for given in torch.einsum("bphe,dhe->hbpd", gradient, weight):
                heads[:, at] = back(read, [residual], given)[0]
                at += 1
        yield slice(start, stop - 1), heads
        total = total + mlp + heads.sum(1, dtype=total.dtype)
        stop = start


@torch.no_grad()
def _weight(module: nn.Module, read: Float[Tensor, "*n width"]) -> Float[Tensor, "width out"]:
    """The matrix of a linear map; of a class that keeps it elsewhere (an adapter's), what it makes of the identity."""
    if type(module) in (nn.Linear, Conv1D) and not module.weight.is_meta:
        weight = module.weight.detach()
        return weight if type(module) is Conv1D else weight.T
    identity = torch.eye(read.shape[-1], dtype=read.dtype, device=read.device)
    return module.forward(identity) - module.forward(torch.zeros_like(identity[:1]))


def _require_known(model: HookedModel, ids: Int[Tensor, "1 few"]) -> None:
    """Raise InputError where the readers known here are not all, or heads' results are not what attention writes."""
    with _inputs_kept(model) as inputs:
        run = model.run(ids, capture=_sites(model), gradients=True)
    here = _Forward(run.logits[:, -1].max(-1).values.float(), run.cache, inputs)
    total = sum(gradients.sum(1).double().cpu() for _, gradients in _gradients(model, here, graph_of(model)))
    (whole,) = torch.autograd.grad(here.values.sum(), here.at("resid_pre", 0))
    off = [_off(total, whole)]
    for layer, block in enumerate(model.anatomy.blocks):
        if not _normed_after(block):
            z, written = here.at("z", layer).detach().flatten(-2), here.at("attn_out", layer).detach()
            with model.side():
                given = (z - z[:, :1]) @ _weight(block.projection, z)  # without the bias
            off.append(_off(given + written[:, :1], written))
    if not max(off) <= max(TOLERANCE.get(model.dtype, 0.2), 1e-6):  # some norms compute in float32 whatever is stored
        raise InputError(
            f"{model.name}: edges cannot be told apart: what heads, MLPs and logits known here read and write does not "
            f"add up to the whole ({max(off):.2g} of it is missing); something in this architecture reads the residual "
            "stream, or is added to it, in another way"
        )


def _off(found: Tensor, whole: Tensor) -> float:
    whole = whole.detach().double().cpu()
    return float((found.double().cpu() - whole).abs().max() / whole.abs().max().clamp_min(1e-30))
