"""Scores of every edge of the residual stream, and the circuit that the largest of them make up."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.few import caution
from finetune_lens.results.patching import NOTHING
from finetune_lens.results.tables import jsonable, mean_of

if TYPE_CHECKING:
    import pandas as pd

INTERVALS = 10_000  # edges that have an interval and are tested: those of the largest mean score
FDR = 0.05


class Edges(Result):
    """What `attribute_edges` estimated.

    `data` has the dimensions writer, reader and example, and

    - score (writer, reader, example): the estimate of metric(edge patched) − metric(clean), NaN where there is no edge;
    - clean, corrupt (example): the metric of the two runs.

    Writers are named embed, a1.h0 (head 0 of layer 1), m1 (its MLP); readers a1.h0<q>, a1.h0<k>, a1.h0<v>, m1, logits,
    and a1.kv0<k>, a1.kv0<v> where several query heads share a key and value. Their kind, layer and head are coordinates
    (writer_kind …; -1 where one has none). Intervals are 95 % percentile bootstrap over the examples.
    """

    kind = "edges"

    @property
    def metric(self) -> str:
        return self.data.attrs["metric"]

    @property
    def method(self) -> str:
        """EAP, or EAP-IG and its steps."""
        steps = int(self.data.attrs["steps"])
        return f"EAP-IG, {steps} steps" if steps else "EAP"

    @cached_property
    def _scores(self) -> np.ndarray:
        return self.data["score"].transpose("writer", "reader", "example").values

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        """Every edge, the largest first."""
        import pandas as pd

        means = mean_of(self._scores)
        writers, readers = np.nonzero(~np.isnan(means))
        order = np.argsort(-np.abs(means[writers, readers]), kind="stable")
        writers, readers = writers[order], readers[order]
        some = self._scores[writers[:INTERVALS], readers[:INTERVALS]].astype(float)
        found = np.full((3, len(order)), np.nan)
        p = np.where(np.abs(some).max(-1) > 0, stats.two_sided_p(some), np.nan)  # what cannot change is no test
        found[:, : len(some)] = *stats.interval_of_mean(some), p
        # Of the others p counts as 1: no adjusted p is smaller than it would be if they were tested.
        adjusted = stats.benjamini_hochberg(np.concatenate([p, np.ones(len(order) - len(some))]))
        adjusted[len(some) :] = np.nan
        return pd.DataFrame(
            {
                "writer": self.data["writer"].values[writers],
                "reader": self.data["reader"].values[readers],
                "score": means[writers, readers],
                "low": found[0],
                "high": found[1],
                "p": found[2],
                "p_adjusted": adjusted,
            }
        )

    def to_frame(self) -> "pd.DataFrame":
        """A row an edge, the largest mean score first: score, low, high, p, p_adjusted (over all edges).

        The 10,000 largest have an interval and are tested; the others count as tested without effect.
        """
        return self._frame.copy()

    def top(self, n: int = 10) -> "pd.DataFrame":
        """The edges with the largest mean score either way."""
        return self._frame.head(n).copy()

    def gap(self) -> dict[str, float]:
        """clean, corrupt, and their paired difference corrupt − clean with its interval."""
        clean, corrupt = self.data["clean"].values, self.data["corrupt"].values
        low, high = stats.interval_of_mean(corrupt - clean)
        ends = {"clean": mean_of(clean), "corrupt": mean_of(corrupt), "difference": mean_of(corrupt - clean)}
        return {name: float(value) for name, value in (ends | {"low": low, "high": high}).items()}

    def heads(self, receivers: str | Sequence[str] = "logits") -> "pd.DataFrame":
        """Of every head that has an edge to one of these readers: the sum of those scores, as of patching them at once.

        Columns: layer, head, score, low, high, p_adjusted (over the heads).

        Raises:
            InputError: a reader that there is not.
        """
        import pandas as pd

        names = [receivers] if isinstance(receivers, str) else list(receivers)
        known = {str(name): i for i, name in enumerate(self.data["reader"].values)}
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            found = repr(unknown[0]) if unknown else "none"
            raise InputError(f"receivers are readers such as {', '.join([*known][:3])} or logits; found {found}")
        kept = self._scores[:, [known[name] for name in dict.fromkeys(names)]]
        senders = (self.data["writer_kind"].values == "head") & ~np.isnan(kept).all((1, 2))
        scores = np.nansum(kept[senders], 1, dtype=float)
        low, high = stats.interval_of_mean(scores)
        frame = pd.DataFrame({name: self.data[f"writer_{name}"].values[senders] for name in ("layer", "head")})
        frame["score"], frame["low"], frame["high"] = mean_of(scores), low, high
        tested = np.where(np.abs(scores).max(-1, initial=0) > 0, stats.two_sided_p(scores), np.nan)
        return frame.assign(p_adjusted=stats.benjamini_hochberg(tested))

    def agreement(
        self, frame: "pd.DataFrame", receivers: str | Sequence[str] = "logits", *, column: str = "effect"
    ) -> "pd.DataFrame":
        """Of the heads' scores with another measure of heads, in one row: rank correlation, slope, worst disagreement.

        Over the heads in which either is not 0 (`cells`), as `Patching.agreement`; the slope is that of scores on the
        other measure through 0.

        Args:
            frame: a row a head: layer, head, and the measure. Of paths: `Paths.to_frame()` of one group and model.

        Raises:
            InputError: columns are missing, a head has two rows, or no head is in both.
        """
        import pandas as pd

        if lacking := [name for name in ("layer", "head", column) if name not in frame]:
            raise InputError(f"expected the columns layer, head and {column}; there is no {', '.join(lacking)}")
        if frame.duplicated(["layer", "head"]).any():
            raise InputError("a head has several rows; expected one each: choose one group and model of the frame")
        other = frame[["layer", "head", column]].rename(columns={column: "effect"})
        both = self.heads(receivers).merge(other, on=["layer", "head"])
        if not len(both):
            raise InputError("no head of the frame has an edge to these receivers")
        size = both[["score", "effect"]].abs()
        both = both[size.max(axis=1) > NOTHING * size.max().max()]
        off = (both["score"] - both["effect"]).abs()
        squares = float((both["effect"] ** 2).sum())
        worst = both.loc[off.idxmax()] if off.notna().any() else None
        row = {
            "cells": len(both),
            "slope": float((both["score"] * both["effect"]).sum()) / squares if squares else np.nan,
            "rank_correlation": stats.rank_correlation(both["score"].values, both["effect"].values),
            "worst": np.nan if worst is None else float(off.max()),
            "worst_at": "" if worst is None else f"layer {int(worst['layer'])}, head {int(worst['head'])}",
            "largest_effect": float(both["effect"].abs().max()),
        }
        return pd.DataFrame([row])

    def circuit(self, n: int = 100) -> "pd.DataFrame":
        """Of the n largest edges, those on a way from the embedding to the logits; rows as in `to_frame`."""
        frame = self._frame.head(n)
        frame = frame[frame["score"] != 0]
        place = {str(name): i for i, name in enumerate(self.data["writer"].values)}
        order = {str(name): i for i, name in enumerate(self.data["reader"].values)}
        reached, wanted, kept = {"embed"}, {"logits"}, []
        edges = list(zip(frame["writer"], frame["reader"], frame.index, strict=True))
        onward = []  # what is written has been read before
        for writer, reader, row in sorted(edges, key=lambda edge: order[edge[1]]):
            if writer in reached:
                reached.update(self._nodes_of[reader])
                onward.append((writer, reader, row))
        for writer, reader, row in sorted(onward, key=lambda edge: -place[edge[0]]):
            if not wanted.isdisjoint(self._nodes_of[reader]):
                wanted.add(writer)
                kept.append(row)
        return frame.loc[sorted(kept)].copy()

    def nodes(self, n: int = 100) -> "pd.DataFrame":
        """The nodes of `circuit(n)`, in the model's order: node, kind, layer, head, edges into it, edges out of it.

        An edge to a key or value that heads share leads into each of them that is in the circuit.
        """
        import pandas as pd

        edges = self.circuit(n)
        writers = {str(name) for name in edges["writer"]}
        into = [node for reader in edges["reader"] for node in self._nodes_of[reader]]
        names = [str(name) for name in self.data["writer"].values if name in writers]
        at = self.data.sel(writer=names)
        frame = pd.DataFrame({"node": names} | {c: at[f"writer_{c}"].values for c in ("kind", "layer", "head")})
        if len(edges):
            last = int(self.data["reader_layer"].values[-1])
            frame.loc[len(frame)] = {"node": "logits", "kind": "logits", "layer": last, "head": -1}
        frame["edges_in"] = [into.count(name) for name in frame["node"]]
        frame["edges_out"] = [int((edges["writer"] == name).sum()) for name in frame["node"]]
        return frame

    @cached_property
    def _nodes_of(self) -> dict[str, list[str]]:
        """Of each reader: the nodes that read through it, by the names that they have as writers."""
        frame = self.data[["reader_kind", "reader_layer", "reader_head"]].to_dataframe()
        of_layer = self.data["writer_layer"].values[self.data["writer_kind"].values == "head"]
        found = {}
        for name, kind, layer, head in frame[["reader_kind", "reader_layer", "reader_head"]].itertuples():
            found[str(name)] = [str(name)]
            if kind in ("q", "k", "v"):
                count = int(((frame["reader_kind"] == kind) & (frame["reader_layer"] == layer)).sum())
                each = int((of_layer == layer).sum()) // count
                found[str(name)] = [f"a{layer}.h{each * head + i}" for i in range(each)]
        return found

    def headline(self) -> dict[str, Any]:
        """The gap and the largest edges."""
        top = [jsonable(row) for row in self.top(5).to_dict("records")]
        found = {"metric": self.metric, "method": self.method, "examples": int(self.data.sizes["example"])}
        return found | {"edges": len(self._frame)} | jsonable(self.gap()) | {"top": top}

    def summary(self) -> str:
        """How many edges, between which ends, and which are the largest."""
        writers, readers, examples = (self.data.sizes[dim] for dim in ("writer", "reader", "example"))
        gap, frame = self.gap(), self._frame

        def ends(row: dict[str, float]) -> str:
            return "" if np.isnan(row["low"]) else f" [{row['low']:.3g}, {row['high']:.3g}]"

        lines = [
            f"{len(frame)} edges ({writers} writers, {readers} readers) by {self.method}, {examples} examples; metric "
            f"{self.metric}",
            f"clean {gap['clean']:.3g}, corrupt {gap['corrupt']:.3g}, difference {gap['difference']:.3g}{ends(gap)}",
        ]
        for row in self.top(5).to_dict("records"):
            lines.append(f"  {row['writer']} → {row['reader']}: {row['score']:+.3g}{ends(row)}")
        if examples > 1:
            tested = min(len(frame), INTERVALS)
            clear = int((frame["p_adjusted"] < FDR).sum())
            lines.append(f"{clear} of the {tested} largest are clear of 0 (false discovery rate {FDR:g})")
        lines += caution(examples)
        return "\n".join([*lines, *map(str, self.provenance.get("notes", []))])
