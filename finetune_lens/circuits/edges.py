"""Which edges between heads, MLPs, embedding and logits carry the answer? All at once, to first order.

Edge attribution patching (EAP, Syed et al. 2023, arXiv 2310.10348): with a clean prompt, its corrupt counterfactual and
a metric m, the edge from a writer u to a reader v of the residual stream has the score

    S[u, v] = Σ_positions (a_u^corrupt − a_u^clean) · ∂m/∂(what v reads)

an estimate of m(clean run in which v reads u's corrupt message) − m(clean run). It is the fast stand-in for patching
each edge: two forward passes and a backward one for all of them, whatever their number. Where the metric saturates, the
gradient at the clean run says little; with `steps` it is averaged on the way to the corrupt embeddings (EAP-IG, Hanna
et al. 2024, arXiv 2403.17806). Set scores beside exact ones before believing them: `Edges.agreement`.

Cost: about five forward passes for the 32,491 edges of GPT-2 small, and four a step. The result holds writers × readers
× examples numbers in float32: 70,000 an example for GPT-2 small, 3 million for a model of 32 layers and heads.

>>> from finetune_lens.zoo import path
>>> prompts = [{"prompt": "<copy>gafbdk=", "answer": "g", "wrong": "x", "corrupt": "<copy>xafbdk="}]
>>> found = attribute_edges(path("strings") / "base", prompts, steps=5, progress=False)
>>> found.top(1)[["writer", "reader"]].values.tolist()
[['embed', 'a0.kv2<v>']]
>>> share = found.data.score.sel(writer="embed").sum() / found.gap()["difference"]   # all that comes in
>>> round(float(share), 1)
1.0
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.results.edges import Edges


@recorded
def attribute_edges(
    model: "HookedModel | Any",
    prompts: Any,
    *,
    metric: str = "logit_diff",
    steps: int = 0,
    position: int | str | None = None,
    align: str = "error",
    template: str = "none",
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    config: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> "Edges":
    """Estimate what patching each edge would do, on each prompt with its counterfactual (`corrupt`).

    Args:
        model: a hooked model, a Hugging Face model, or where one lies (folder, file, cached hub id).
        prompts: a JSONL file, or a list of mappings with prompt, answer, wrong, corrupt.
        metric: logit_diff, logprob or prob.
        steps: of integrated gradients (EAP-IG); 0: the gradient at the clean run (EAP).
        position: what is written there alone, as where paths are patched (`trace_paths`): a number, or a mention of a
            field (`label:first`). By default at all positions.
        align: "left" or "right": which positions correspond where prompts differ in length; those that only one of a
            pair has are left out.
        template: "none"; "each" puts the prompts through the chat template; positions are as of `trace_paths`.
        batch_size: examples at once; by default up to 16, as memory allows.
        config, tokenizer: where they do not lie beside the weights.

    Raises:
        InputError: prompts without counterfactual or of different lengths, a metric without a gradient or that the
            prompts cannot have, an architecture whose edges cannot be told apart.
    """
    import xarray as xr

    from finetune_lens.hooked.edges import edge_scores, graph_of
    from finetune_lens.hooked.effects import describe_prompts
    from finetune_lens.hooked.grid import aligned
    from finetune_lens.hooked.loading import as_model
    from finetune_lens.prompts import read_prompts, require_template
    from finetune_lens.results.edges import Edges

    framed = require_template(template)
    items = read_prompts(prompts, limit=limit)
    model = as_model(model, device=device, dtype=dtype, config=config, tokenizer=tokenizer)
    where = aligned(items, model.require_tokenizer(), corrupted=True, align=align, template=framed)
    if lacking := [p.id for p in items if metric == "logit_diff" and not p.wrong]:
        raise InputError(
            f"the logit difference needs a wrong answer, and {len(lacking)} of {len(items)} prompts have none (first: "
            f'{lacking[0]}); add "wrong" to them, or pass metric="logprob"'
        )
    scores, clean, corrupt = edge_scores(
        model, where.clean, where.corrupt, metric, steps=steps, at=None if position is None else where.each(position),
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    graph = graph_of(model)
    coords: dict[str, Any] = {"example": np.array([p.id for p in items], dtype=object)}
    for dim, nodes in (("writer", graph.writers), ("reader", graph.readers)):
        coords[dim] = np.array([node.name for node in nodes], dtype=object)
        coords[f"{dim}_kind"] = (dim, np.array([node.kind for node in nodes], dtype=object))
        coords[f"{dim}_layer"] = (dim, np.array([node.layer for node in nodes]))
        coords[f"{dim}_head"] = (dim, np.array([node.head for node in nodes]))
    data = {"score": (("writer", "reader", "example"), scores), "clean": ("example", clean)}
    data["corrupt"] = ("example", corrupt)
    record = {"model": model.describe(), "prompts": describe_prompts(items)}
    attributes = {"metric": metric, "steps": steps, "provenance": json.dumps(record)}
    return Edges(xr.Dataset(data, coords, attributes))
