"""Paths by the short way are paths by whole forward passes, and those are what plain torch hooks do."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import DECODERS
from test_sweep import EXAMPLES, encoded

from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked import paths as engine
from finetune_lens.hooked.paths import FREEZABLE, Receivers, sweep_paths
from finetune_lens.hooked.sweep import Side
from finetune_lens.prompts import Encoded

FROZEN = {"z": ("z",), "q, k, v": ("q", "k", "v"), "z and MLPs": ("z", "mlp_out")}


def everyone(model: HookedModel) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(model.layers) for head in range(model.heads)]


def receivers(model: HookedModel, kind: str, prompts: Encoded, where: str = "end") -> Receivers:
    """Two heads of the last layer and one of the first but one, at the end, at each example's own column, or all."""
    ends = prompts.read_at[:, 0].numpy()
    columns = {
        "end": [np.array([end]) for end in ends],
        "own": [np.array([end - n % 3]) for n, end in enumerate(ends)],
        "all": [np.flatnonzero(row) for row in prompts.mask.numpy()],
    }[where]
    last = model.layers - 1
    heads = ((last, 0), (last, model.heads - 1), (1, 1)) if kind != "logits" else ()
    return Receivers(kind, tuple(dict.fromkeys(heads)), columns)


def traced(model: HookedModel, kind: str, where: str = "end", padding: str = "none", **options: Any) -> Any:
    clean, corrupt = encoded(1, padding), encoded(2, padding)
    reads = receivers(model, kind, clean, where)
    return sweep_paths(
        Side(model, clean), Side(model, corrupt), everyone(model), reads, progress=False, **options
    )  # fmt: skip


def same(one: Any, other: Any, tolerance: float = 1e-9) -> None:
    for name in one.effects:
        if name not in ("accuracy", "reciprocal_rank"):
            np.testing.assert_allclose(one.effects[name], other.effects[name], atol=tolerance, rtol=1e-6)


def exact(library: Any, family: str) -> HookedModel:
    """In float64: a path through one head may change very little."""
    return HookedModel(library.fresh(family).double())


CASES = [
    ("logits", "end", "left", ("z",)), ("q", "own", "right", ("q", "k", "v")), ("v", "all", "left", ("z",)),
    ("k", "own", "none", ("z", "mlp_out")),
]  # fmt: skip
# Experts that torch does not multiply in float64, and sliding windows that hold nothing but padding.
SINGLE = ("mixtral", "qwen3-moe", "gpt-oss", "gpt-oss-sliding", "gemma2-sliding")


@pytest.mark.parametrize("family", DECODERS)
def test_the_short_way_is_the_long_way(library, family):
    for kind, where, padding, freeze in CASES:
        single = family in SINGLE or padding == "left"  # eager attention in float64 has NaN where all is padding
        model = HookedModel(library.model(family)) if single else exact(library, family)
        if kind != "logits" and model.lacks(kind, 0):
            continue
        short = traced(model, kind, where, padding, freeze=freeze)
        long = traced(model, kind, where, padding, freeze=freeze, full=True)
        assert bool(short.notes) == (family == "bloom"), short.notes  # whose projection adds the residual itself
        same(short, long, 2e-5 if single else 1e-8)
        if kind != "logits":
            above = np.array([layer >= model.layers - 1 for layer, _ in everyone(model)])
            assert (short.effects["logprob"][above] == 0).all()
        assert np.abs(long.effects["logprob"]).max() > (1e-4 if single else 1e-7)


def brute(module: Any, clean: Encoded, corrupt: Encoded, sender: Any, reads: Receivers, freeze: str) -> np.ndarray:
    """The logit difference of each example after its path is patched, by hooks on the bare modules."""
    config, gpt = module.config, hasattr(module, "transformer")
    layers = module.transformer.h if gpt else module.model.layers
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    shared = 1 if gpt else heads // config.num_key_value_heads
    out = [(b.attn.c_proj if gpt else b.self_attn.o_proj) for b in layers]
    mlps = [b.mlp for b in layers]

    def read(layer: int) -> tuple[Any, int]:
        """The module that makes the receivers' kind, and where in its output they begin."""
        if gpt:
            return layers[layer].attn.c_attn, "qkv".index(reads.kind) * config.hidden_size
        return getattr(layers[layer].self_attn, f"{reads.kind}_proj"), 0

    def keep_in(store: dict, key: int) -> Any:
        return lambda _, a: store.__setitem__(key, a[0].clone())

    def keep_out(store: dict, key: int) -> Any:
        return lambda _, a, o: store.__setitem__(key, o.clone())

    def run(ids: Any, hooks: list) -> Any:
        handles = [m.register_forward_pre_hook(f) if pre else m.register_forward_hook(f) for m, f, pre in hooks]
        try:
            with torch.no_grad():
                return module(input_ids=ids).logits
        finally:
            for handle in handles:
                handle.remove()

    found = []
    for n in range(len(clean)):
        (column,) = reads.columns[n].tolist()
        z, y, m, kept = {}, {}, {}, {}
        ids, other = clean.ids[n : n + 1], corrupt.ids[n : n + 1]
        run(ids, [*((o, keep_in(z, i), True) for i, o in enumerate(out)),
                  *((f, keep_out(m, i), False) for i, f in enumerate(mlps))])  # fmt: skip
        run(other, [(o, keep_in(y, i), True) for i, o in enumerate(out)])

        def frozen(layer: int, z: dict = z, y: dict = y, column: int = column) -> Any:
            value = z[layer].clone()
            if layer == sender[0]:
                part = slice(sender[1] * width, (sender[1] + 1) * width)
                value[:, column, part] = y[layer][:, column, part]
            return lambda _, a: (value, *a[1:])

        hooks = [(o, frozen(i), True) for i, o in enumerate(out)]
        if "MLPs" in freeze:
            hooks += [(f, (lambda v: lambda _, a, o: v)(m[i]), False) for i, f in enumerate(mlps)]
        places = sorted({layer for layer, _ in reads.heads})
        hooks += [(read(i)[0], keep_out(kept, i), False) for i in places]
        logits = run(ids, hooks)
        if reads.kind != "logits":
            patched = []
            for i in places:
                start, mine = read(i)[1], {h // (1 if reads.kind == "q" else shared) for j, h in reads.heads if j == i}

                def put(_: Any, a: Any, o: Any, i: int = i, start: int = start, mine: set = mine,
                        kept: dict = kept, column: int = column) -> Any:  # fmt: skip
                    o = o.clone()
                    for h in mine:
                        part = slice(start + h * width, start + (h + 1) * width)
                        o[:, column, part] = kept[i][:, column, part]
                    return o

                patched.append((read(i)[0], put, False))
            logits = run(ids, patched)
        at = logits[0, clean.read_at[n, 0]]
        found.append(float(at[clean.answers[n, 0, 0]] - at[clean.wrongs[n, 0]]))
    return np.array(found)


@pytest.mark.parametrize("freeze", FROZEN)
@pytest.mark.parametrize("kind", ["logits", "q", "k", "v"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_brute_force(library, family, kind, freeze):
    model = exact(library, family)
    module = model.module
    clean, corrupt = encoded(1), encoded(2)
    reads = receivers(model, kind, clean, "end" if kind == "logits" else "own")
    found = traced(model, kind, "end" if kind == "logits" else "own", freeze=FROZEN[freeze])
    assert not found.notes
    for number, sender in enumerate(everyone(model)):
        expected = brute(module, clean, corrupt, sender, reads, freeze)
        patched = found.effects["logit_diff"][number] + found.recipient["logit_diff"]
        np.testing.assert_allclose(patched, expected, atol=1e-8, rtol=1e-8)
    assert (found.effects["logit_diff"] != 0).any()


def test_without_frozen_heads_others_pass_it_on(library):
    """Then it is patching z, as long as the receivers are the logits."""
    from finetune_lens.hooked.sweep import Place, sweep

    model = exact(library, "llama")
    clean, corrupt = Side(model, encoded(1)), Side(model, encoded(2))
    reads = receivers(model, "logits", clean.prompts, "all")
    paths = sweep_paths(clean, corrupt, everyone(model), reads, freeze=(), progress=False)
    plain = sweep(clean, corrupt, [(Place("z", *head),) for head in everyone(model)], progress=False)
    same(paths, plain)


def test_senders_elsewhere(library):
    """Without frozen heads they reach the end, as a patch of z there does; with them they reach nothing."""
    from finetune_lens.hooked.sweep import Place, sweep

    model = exact(library, "llama")
    clean, corrupt = Side(model, encoded(1)), Side(model, encoded(2))
    ends, early = [np.array([6])] * EXAMPLES, [np.array([n % 4]) for n in range(EXAMPLES)]
    everywhere = [np.arange(7)] * EXAMPLES

    def effects(kind, sent, **options):
        heads = () if kind == "logits" else ((1, 0), (1, 3))
        return sweep_paths(
            clean, corrupt, everyone(model), Receivers(kind, heads, ends, sent), progress=False, **options
        )

    own = tuple(int(column[0]) for column in early)
    plain = sweep(clean, corrupt, [(Place("z", *head, own),) for head in everyone(model)], progress=False)
    same(effects("logits", early, freeze=()), plain)
    assert (effects("q", early).effects["logprob"] == 0).all()
    for kind in ("logits", "q"):
        same(effects(kind, everywhere), effects(kind, None))
        same(effects(kind, everywhere), effects(kind, everywhere, full=True))
        same(effects(kind, early), effects(kind, early, full=True))


@pytest.mark.parametrize("kind", ["logits", "q", "v"])
def test_a_run_that_is_its_own_counterfactual_changes_nothing(library, kind):
    model = HookedModel(library.model("gpt2"))
    side = Side(model, encoded(1, "right"))
    found = sweep_paths(side, side, everyone(model), receivers(model, kind, side.prompts), progress=False)
    assert all((values == 0).all() for values in found.effects.values())


def test_batches_do_not_matter(library, monkeypatch):
    model = exact(library, "llama")
    whole = traced(model, "q", "own", "left")
    same(traced(model, "q", "own", "left", batch_size=1), whole)
    monkeypatch.setattr(engine, "LOGITS", 1)
    same(traced(model, "q", "own", "left"), whole)


def test_a_wrong_short_way_is_found_out(library, monkeypatch):
    """Where what is read is not what the attention uses, every sender runs in full, and that is said."""
    model = exact(library, "gpt2")
    expected = traced(model, "q", full=True)
    right = engine._Chain.caught

    def wrong(self):
        return {site: engine._Caught(c.row, c.column, c.values + 1) for site, c in right(self).items()}

    monkeypatch.setattr(engine._Chain, "caught", wrong)
    found = traced(model, "q")
    assert "the short way was not taken" in found.notes[0]
    same(found, expected)


def test_it_goes_on_where_it_was_interrupted(library, tmp_path, monkeypatch):
    model = HookedModel(library.model("gpt2"))
    expected = traced(model, "q", batch_size=2)
    right, calls = engine._Short.measured, []

    def measured(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(self)

    monkeypatch.setattr(engine._Short, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        traced(model, "q", batch_size=2, partial=tmp_path)
    again = traced(model, "q", batch_size=2, partial=tmp_path)
    assert len(calls) == 3
    same(again, expected, 0)
    traced(model, "q", batch_size=2, partial=tmp_path, freeze=("q", "k", "v"))
    assert len(calls) == 5  # another question is asked anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"senders": []}, "one sender or more"),
        ({"senders": [(0, 99)]}, r"heads 0 to 3; found 0.99"),
        ({"reads": Receivers("q", (), [np.array([6])] * EXAMPLES)}, "or q, k or v of one head or more"),
        ({"reads": Receivers("q", ((7, 0),), [np.array([6])] * EXAMPLES)}, "layers 0 to 1"),
        ({"reads": Receivers("x", ((0, 0),), [np.array([6])] * EXAMPLES)}, "receivers are one of"),
        ({"freeze": ("attn",)}, f"cannot be frozen; expected some of {', '.join(FREEZABLE)}"),
    ],
)
def test_bad_input(library, change, message):
    model = HookedModel(library.model("gpt2"))
    side = Side(model, encoded(1))
    reads = change.pop("reads", receivers(model, "logits", side.prompts))
    with pytest.raises(InputError, match=message):
        sweep_paths(side, side, change.pop("senders", everyone(model)), reads, progress=False, **change)
