"""Patches by re-entry are patches by whole forward passes, and those are what plain torch hooks do."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DECODERS, VOCABULARY

from finetune_lens.errors import InputError
from finetune_lens.hooked import KINDS, HookedModel
from finetune_lens.hooked import sweep as engine
from finetune_lens.hooked.reentry import resume
from finetune_lens.hooked.sites import HEADS
from finetune_lens.hooked.sweep import Place, Side, shape_of, sweep
from finetune_lens.prompts import Encoded

EXAMPLES, COLUMNS = 4, 7
LENGTHS = {"none": (7, 7, 7, 7), "left": (7, 4, 6, 5), "right": (7, 4, 6, 5)}


def encoded(seed: int, padding: str = "none") -> Encoded:
    """Random tokens, an answer and a wrong answer each; padded on one side to 7 columns."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (EXAMPLES, COLUMNS), generator=generator)
    length = torch.tensor(LENGTHS[padding])[:, None]
    column = torch.arange(COLUMNS)[None]
    mask = column >= COLUMNS - length if padding == "left" else column < length
    ids[~mask] = 0
    read_at = torch.full((EXAMPLES, 1), COLUMNS - 1) if padding == "left" else length - 1
    answers = torch.arange(5, 5 + EXAMPLES)[:, None, None]
    tokens = [[str(i) for i in row[m].tolist()] for row, m in zip(ids, mask, strict=True)]
    return Encoded(ids, mask, read_at, answers, answers[:, 0] + 10, mask, mask, tokens)


def changed(model: HookedModel) -> HookedModel:
    """Another model of the same shape: every weight moved."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return HookedModel(module, name="changed")


def every_kind(model: HookedModel, seed: int) -> list[tuple[Place, ...]]:
    """Patches at every kind of site in the first and last layer, of one head or all, one column or all; some mixed."""
    order = np.random.default_rng(seed)
    singles = []
    for layer, kind in itertools.product((0, model.layers - 1), KINDS):
        if not model.lacks(kind, layer):
            heads = [None, *range(shape_of(model, kind, layer)[0])] if kind in HEADS else [None]
            columns = [None] if kind == "pattern" else [None, 0, 3, 3, COLUMNS - 1]
            singles.append(Place(kind, layer, order.choice(heads), order.choice(columns)))
    mixed = [tuple(singles[i] for i in order.permutation(len(singles))[:size]) for size in (2, 3, 4, 6)]
    return [*((place,) for place in singles), *mixed]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Effects agree (relative to the largest of a metric), and are missing at the same places."""
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, np.nanmax(np.abs(other[name])))
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("padding", LENGTHS)
@pytest.mark.parametrize("family", DECODERS)
def test_re_entry_is_the_full_run(library, family, padding):
    """Every kind of site, alone and mixed, from another model and other prompts, with and without padding."""
    model = HookedModel(library.model(family))
    recipient, donor = Side(model, encoded(0, padding)), Side(changed(model), encoded(1, padding))
    patches = every_kind(model, list(LENGTHS).index(padding))
    entered = sweep(recipient, donor, patches, progress=False)
    assert entered.notes == []
    full = sweep(recipient, donor, patches, full=True, progress=False)
    continuous = ("logit_diff", "logprob", "prob", "kl")  # ranks may turn on the last bit
    same({m: entered.effects[m] for m in continuous}, {m: full.effects[m] for m in continuous})
    same(entered.recipient, full.recipient)
    same(entered.donor, full.donor)
    effect = full.effects["logit_diff"]
    columns = [[p.column for p in patch if p.column is not None] for patch in patches]
    mask = recipient.prompts.mask.numpy()
    assert np.array_equal(np.isfinite(effect), np.array([mask[:, c].all(1) for c in columns]))
    assert np.nanmax(np.abs(effect)) > 0.01


# Where the sites of a layer are, by hand: module, side, features (of all heads).
SPOTS = {
    "gpt2": {
        "resid_pre": ("transformer.h.{}", "in", slice(None)),
        "resid_post": ("transformer.h.{}", "out", slice(None)),
        "attn_out": ("transformer.h.{}.attn.c_proj", "out", slice(None)),
        "mlp_out": ("transformer.h.{}.mlp.c_proj", "out", slice(None)),
        "z": ("transformer.h.{}.attn.c_proj", "in", slice(None)),
        "q": ("transformer.h.{}.attn.c_attn", "out", slice(0, 32)),
        "k": ("transformer.h.{}.attn.c_attn", "out", slice(32, 64)),
        "v": ("transformer.h.{}.attn.c_attn", "out", slice(64, 96)),
    },
    "llama": {
        "resid_pre": ("model.layers.{}", "in", slice(None)),
        "resid_post": ("model.layers.{}", "out", slice(None)),
        "attn_out": ("model.layers.{}.self_attn.o_proj", "out", slice(None)),
        "mlp_out": ("model.layers.{}.mlp.down_proj", "out", slice(None)),
        "z": ("model.layers.{}.self_attn.o_proj", "in", slice(None)),
        "q": ("model.layers.{}.self_attn.q_proj", "out", slice(None)),
        "k": ("model.layers.{}.self_attn.k_proj", "out", slice(None)),
        "v": ("model.layers.{}.self_attn.v_proj", "out", slice(None)),
    },
}
D_HEAD = 8


class Naive:
    """One example through a plain module with one torch hook: what a patch is, without any of our machinery."""

    def __init__(self, module: Any, family: str):
        self.module, self.spots = module, SPOTS[family]
        name = "transformer.h.{}.attn.c_proj" if family == "gpt2" else "model.layers.{}.self_attn.o_proj"
        self.w_o = lambda layer: (
            module.get_submodule(name.format(layer)).weight.T
            if family == "llama"
            else module.get_submodule(name.format(layer)).weight
        )  # (head · d_head, d_model)

    def run(self, ids: torch.Tensor, kind: str, layer: int, change: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the last token, and what was at the site (pos, features) before `change` wrote into it."""
        path, side, features = self.spots[kind]
        seen = []

        def put(x: torch.Tensor) -> torch.Tensor:
            seen.append(x[0, :, features].clone())
            if change is not None:
                x = x.clone()
                x[0, :, features] = change(x[0, :, features])
            return x

        module = self.module.get_submodule(path.format(layer))
        if side == "in":
            hook = module.register_forward_pre_hook(lambda m, args: (put(args[0]), *args[1:]))
        else:
            hook = module.register_forward_hook(
                lambda m, args, out: (put(out[0]), *out[1:]) if isinstance(out, tuple) else put(out)
            )
        try:
            with torch.no_grad():
                return self.module(ids[None], use_cache=False).logits[0, -1], seen[0]
        finally:
            hook.remove()

    def pattern(self, ids: torch.Tensor, layer: int) -> torch.Tensor:
        eager = copy.deepcopy(self.module)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            return eager(ids[None], output_attentions=True, use_cache=False).attentions[layer][0]


def naive_logits(recipient: Naive, donor: Naive, ids: torch.Tensor, other: torch.Tensor, place: Place) -> torch.Tensor:
    kind, layer, head = place.kind, place.layer, place.head
    at = slice(None) if place.column is None else place.column

    def take(side: Naive, tokens: torch.Tensor, kind: str) -> torch.Tensor:
        return side.run(tokens, kind, layer)[1]

    def written(new: torch.Tensor) -> Any:
        def change(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[at, features] = new[at, features]
            return x

        return change

    features = slice(None) if head is None else slice(head * D_HEAD, (head + 1) * D_HEAD)
    if kind == "resid_mid":
        middle = take(donor, other, "resid_pre") + take(donor, other, "attn_out")
        return recipient.run(ids, "attn_out", layer, written(middle - take(recipient, ids, "resid_pre")))[0]
    if kind == "result":
        theirs = take(donor, other, "z")[:, features] @ donor.w_o(layer)[features]
        mine = take(recipient, ids, "z")[:, features] @ recipient.w_o(layer)[features]
        features = slice(None)
        return recipient.run(ids, "attn_out", layer, written(take(recipient, ids, "attn_out") + theirs - mine))[0]
    if kind == "pattern":
        pattern, v = donor.pattern(other, layer), take(recipient, ids, "v").unflatten(-1, (-1, D_HEAD))
        groups = len(pattern) // v.shape[1]
        z = torch.stack([pattern[h] @ v[:, h // groups] for h in range(len(pattern))], 1).flatten(1)
        return recipient.run(ids, "z", layer, written(z))[0]
    return recipient.run(ids, kind, layer, written(take(donor, other, kind)))[0]


@pytest.mark.parametrize("family", SPOTS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_patch_is_one_plain_hook(library, family, padding):
    """Each example alone, unpadded, one torch hook a patch: the full sweep and re-entry give its logit differences."""
    model = HookedModel(library.model(family))
    other = changed(model)
    recipient, donor = Side(model, encoded(0, padding)), Side(other, encoded(1, padding))
    places = []
    for kind, layer in itertools.product(KINDS, (0, 1)):
        columns = [None] if kind == "pattern" else [None, 3]
        heads = [None, 1] if kind in HEADS else [None]
        places += [Place(kind, layer, head, column) for head in heads for column in columns]
    full = sweep(recipient, donor, [(p,) for p in places], full=True, progress=False).effects["logit_diff"]
    entered = sweep(recipient, donor, [(p,) for p in places], progress=False).effects["logit_diff"]
    plain, theirs = Naive(model.module, family), Naive(other.module, family)
    mask = recipient.prompts.mask
    for example in (0, 1):
        here = mask[example]
        ids, tokens = recipient.prompts.ids[example, here], donor.prompts.ids[example, here]
        start = int(here.int().argmax())
        answer, wrong = 5 + example, 15 + example
        unpatched = model.module(ids[None]).logits[0, -1]
        for number, place in enumerate(places):
            column = place.column
            if column is not None and not here[column]:
                assert np.isnan(full[number, example])
                assert np.isnan(entered[number, example])
                continue
            moved = Place(place.kind, place.layer, place.head, None if column is None else column - start)
            difference = naive_logits(plain, theirs, ids, tokens, moved) - unpatched
            expected = float(difference[answer] - difference[wrong])
            assert full[number, example] == pytest.approx(expected, abs=2e-5), place
            assert entered[number, example] == pytest.approx(expected, abs=2e-5), place


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformer_lens(library, family):
    """TransformerLens's own sweeps over the same model: every example's logit difference."""
    from transformer_lens import patching
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    plain = library.model(family)
    copied = library.fresh(family)
    bridge = build_bridge_from_module(copied, type(copied).__name__, hf_config=copied.config, tokenizer=None)
    model, corrupt, clean = HookedModel(plain), encoded(0), encoded(1)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean.ids)
    answers, wrongs, rows = corrupt.answers[:, 0, 0], corrupt.wrongs[:, 0], torch.arange(EXAMPLES)
    unpatched = sweep(Side(model, corrupt), Side(model, clean), [], progress=False).recipient["logit_diff"]

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return logits[rows, -1, answers] - logits[rows, -1, wrongs]

    heads = [(layer, h) for layer in (0, 1) for h in range(4)]
    columns = list(itertools.product((0, 1), range(COLUMNS)))
    sweeps = {
        patching.get_act_patch_resid_pre: [Place("resid_pre", layer, None, c) for layer, c in columns],
        patching.get_act_patch_attn_out: [Place("attn_out", layer, None, c) for layer, c in columns],
        patching.get_act_patch_mlp_out: [Place("mlp_out", layer, None, c) for layer, c in columns],
        patching.get_act_patch_attn_head_out_all_pos: [Place("z", *head) for head in heads],
        patching.get_act_patch_attn_head_q_all_pos: [Place("q", *head) for head in heads],
        patching.get_act_patch_attn_head_pattern_all_pos: [Place("pattern", *head) for head in heads],
    }
    for theirs, places in sweeps.items():
        with torch.no_grad():
            found = theirs(bridge, corrupt.ids, cache, difference, reduce="none").values
        ours = sweep(Side(model, corrupt), Side(model, clean), [(p,) for p in places], progress=False)
        effects = ours.effects["logit_diff"].reshape(*found.shape)
        np.testing.assert_allclose(effects, found.numpy() - unpatched, atol=1e-5, err_msg=theirs.func.__name__)
        assert np.abs(effects).max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom"])
def test_a_run_patched_with_itself(library, family):
    """Changes nothing: exactly in full runs (but for results, which are sums), and within rounding by re-entry."""
    model = HookedModel(library.model(family))
    side = Side(model, encoded(0, "left"))
    patches = every_kind(model, 0)
    exact = [patch for patch in patches if all(place.kind != "result" for place in patch)]
    everything = tuple(
        Place(kind, layer) for kind in KINDS if kind != "result" for layer in range(2) if not model.lacks(kind, layer)
    )
    for effects in sweep(side, side, [*exact, everything], full=True, progress=False).effects.values():
        assert np.nanmax(np.abs(effects)) == 0
    for full in (False, True):
        for name, effects in sweep(side, side, [*patches, everything], full=full, progress=False).effects.items():
            if name != "reciprocal_rank":
                assert np.nanmax(np.abs(effects)) < 1e-5, name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("full", [False, True])
def test_places_named_twice_are_set_once(library, family, full):
    """A set whose places overlap is their union."""
    model = HookedModel(library.model(family))
    recipient, donor = Side(model, encoded(0)), Side(changed(model), encoded(1))
    for kind in ("z", "result", "v", "resid_pre"):
        head = 1 if kind in HEADS else None
        once = sweep(recipient, donor, [(Place(kind, 1),)], full=full, progress=False)
        twice = [(Place(kind, 1), Place(kind, 1, head, 3), Place(kind, 1), Place(kind, 1, head))]
        same(sweep(recipient, donor, twice, full=full, progress=False).effects, once.effects)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("sides", [("right", "none"), ("none", "right"), ("left", "none"), ("none", "left")])
def test_all_columns_are_those_that_both_sides_have(library, full, sides):
    """Where recipient and donor differ in length, no padding stands in for a token."""
    model = HookedModel(library.model("llama"))
    recipient, donor = (Side(model, encoded(seed, padding)) for seed, padding in enumerate(sides))
    both = recipient.prompts.mask & donor.prompts.mask
    kinds = [("resid_pre", None), ("z", 1), ("k", None)]
    whole = [(Place(kind, 1, head),) for kind, head in kinds]
    found = sweep(recipient, donor, whole, full=full, progress=False).effects
    for example in range(EXAMPLES):
        columns = both[example].nonzero()[:, 0].tolist()
        written = [tuple(Place(kind, 1, head, c) for c in columns) for kind, head in kinds]
        expected = sweep(recipient, donor, written, full=full, progress=False).effects
        for name in ("logit_diff", "kl"):
            np.testing.assert_allclose(found[name][:, example], expected[name][:, example], atol=1e-5)


def test_neither_batches_nor_units_matter(library, monkeypatch):
    model = HookedModel(library.model("llama"))
    recipient, donor = Side(model, encoded(0, "left")), Side(changed(model), encoded(1, "left"))
    patches = every_kind(model, 0)
    expected = sweep(recipient, donor, patches, progress=False)
    for batch_size, unit, tokens in ((1, 2048, 8192), (3, 5, 8192), (None, 8, 30), (None, 2048, 20)):
        monkeypatch.setattr(engine, "UNIT", unit)
        monkeypatch.setattr(engine, "TOKENS", {"cpu": tokens})
        found = sweep(recipient, donor, patches, batch_size=batch_size, progress=False)
        assert not found.notes
        same(found.effects, expected.effects)
        same(found.donor, expected.donor)


@pytest.mark.parametrize("rows", [12, 0])
def test_memory_that_runs_out(library, monkeypatch, rows):
    """The batch is halved until it fits; one row that does not is an error."""
    model = HookedModel(library.model("gpt2"))
    recipient, donor = Side(model, encoded(0)), Side(changed(model), encoded(1))
    patches = every_kind(model, 0)
    expected = sweep(recipient, donor, patches, progress=False)
    sizes = []

    def small(model, recording, wanted):
        sizes.append(len(wanted.example))
        if len(wanted.example) > rows:
            raise torch.OutOfMemoryError("on purpose")
        return resume(model, recording, wanted)

    monkeypatch.setattr(engine, "resume", small)
    if rows:
        found = sweep(recipient, donor, patches, progress=False)
        same(found.effects, expected.effects)
        assert not found.notes
        assert max(sizes) > rows
        assert sum(size > rows for size in sizes) < 12  # what was learnt is kept
    else:
        with pytest.raises(torch.OutOfMemoryError, match="on purpose"):
            sweep(recipient, donor, patches, progress=False)


def wrong_numbers(model, recording, rows):
    return resume(model, recording, rows) * 1.5


def no_numbers(model, recording, rows):
    return resume(model, recording, rows) * torch.nan


def no_cache(model, recording, rows):
    raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")


@pytest.mark.parametrize(
    ("astray", "reason"),
    [(wrong_numbers, "differs from the full run"), (no_numbers, "differs"), (no_cache, "cannot be re-entered")],
)
def test_a_model_that_cannot_be_re_entered(library, monkeypatch, astray, reason):
    """Is found out, and run in full, with a word on why."""
    model = HookedModel(library.model("gpt2"))
    recipient, donor = Side(model, encoded(0, "right")), Side(changed(model), encoded(1, "right"))
    patches = every_kind(model, 0)[:6]
    expected = sweep(recipient, donor, patches, full=True, progress=False)
    assert not expected.notes
    monkeypatch.setattr(engine, "resume", astray)
    found = sweep(recipient, donor, patches, progress=False)
    [note] = found.notes
    assert "re-entry was not used" in note
    assert reason in note
    same(found.effects, expected.effects, 0)


def test_an_edited_recipient(library):
    """Edits that belong to a side are in its recorded run, its patched rows and its full runs."""
    model = HookedModel(library.model("gpt2"))
    noise = torch.randn(EXAMPLES, COLUMNS, 32, generator=torch.Generator().manual_seed(3))

    def edits(examples):
        return [("blocks.0.hook_resid_pre", lambda x: x + noise[torch.from_numpy(examples)])]

    prompts = encoded(0)
    noised, clean = Side(model, prompts, edits), Side(model, prompts)
    patches = [(Place("resid_pre", 0),), (Place("resid_pre", 1, None, 3),), (Place("z", 1, 2),)]
    entered, full = (sweep(noised, clean, patches, full=f, batch_size=3, progress=False) for f in (False, True))
    same(entered.effects, full.effects)
    gap = entered.donor["logit_diff"] - entered.recipient["logit_diff"]
    assert np.abs(gap).max() > 0.1
    np.testing.assert_allclose(entered.effects["logit_diff"][0], gap, atol=1e-5)


class Stops:
    """`resume`, counted, that is interrupted at its n-th call."""

    def __init__(self, at: int):
        self.calls, self.at = 0, at

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return resume(*arguments)


def test_an_interrupted_sweep_continues(library, monkeypatch, tmp_path):
    """Finished units are not computed again; whatever would change their numbers starts anew."""
    model = HookedModel(library.model("gpt2"))
    recipient, donor = Side(model, encoded(0)), Side(changed(model), encoded(1))
    patches = [(Place("resid_pre", layer, None, c),) for layer in (0, 1) for c in range(COLUMNS)]
    monkeypatch.setattr(engine, "UNIT", 4)  # a unit: one column, one layer
    expected = sweep(recipient, donor, patches, progress=False)

    def go(at=-1, recipient=recipient, patches=patches, analysis="test", **options):
        monkeypatch.setattr(engine, "resume", count := Stops(at))
        options = {"progress": False, "partial": tmp_path, "arguments": {"analysis": analysis}} | options
        if at > 0:
            with pytest.raises(KeyboardInterrupt):
                sweep(recipient, donor, patches, **options)
            return count.calls
        found = sweep(recipient, donor, patches, **options)
        return count.calls, found

    assert go(at=6) == 6
    calls, found = go()
    assert calls == len(patches) - 5
    same(found.effects, expected.effects, 0)
    assert found.deviation == expected.deviation
    assert go()[0] == 0
    assert go(analysis="another")[0] == len(patches)
    assert go()[0] == 0  # one analysis leaves the chunks of another alone
    assert go(batch_size=2)[0] == len(patches)  # half the examples, two patches a unit
    assert go()[0] == len(patches)
    assert go(patches=patches[::-1])[0] == len(patches)
    assert go(patches=patches[:-1])[0] == len(patches) - 1
    assert go(arguments={"analysis": "test", "seed": 1})[0] == len(patches)
    for name in ("ids", "answers", "wrongs", "mask"):
        go()
        prompts = copy.copy(recipient.prompts)
        tensor = getattr(prompts, name).clone()
        tensor[0, 0] = tensor[0, 0] ^ 1
        object.__setattr__(prompts, name, tensor)
        assert go(recipient=Side(model, prompts))[0] == len(patches), name


def test_a_sweep_in_full_continues_too(library, monkeypatch, tmp_path):
    """One that re-entry failed: the full runs done so far are kept."""
    model = HookedModel(library.model("gpt2"))
    recipient, donor = Side(model, encoded(0)), Side(changed(model), encoded(1))
    patches = [(Place("resid_pre", layer, None, c),) for layer in (0, 1) for c in range(COLUMNS)]
    monkeypatch.setattr(engine, "UNIT", 4)
    monkeypatch.setattr(engine, "resume", no_cache)
    in_full, done = engine._Batch.unit_in_full, []

    def counted(batch, unit):
        if len(done) == 5:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(unit)
        return in_full(batch, unit)

    monkeypatch.setattr(engine._Batch, "unit_in_full", counted)
    options = {"progress": False, "partial": tmp_path, "arguments": {"analysis": "test"}}
    with pytest.raises(KeyboardInterrupt):
        sweep(recipient, donor, patches, **options)
    sweep(recipient, donor, patches, **options)
    assert len(done) == 1 + len(patches)
    monkeypatch.setattr(engine, "resume", count := Stops(-1))
    assert not sweep(recipient, donor, patches, **options).notes
    assert count.calls == len(patches)  # full runs do not stand in for re-entered ones


def test_the_largest_deviation_is_told(library, monkeypatch):
    """Of any unit, not of the last."""
    model, calls = HookedModel(library.model("gpt2")), []

    def less_and_less_wrong(*arguments):
        calls.append(1e-4 / (1 + len(calls)))
        return resume(*arguments) + calls[-1]

    monkeypatch.setattr(engine, "UNIT", 4)
    monkeypatch.setattr(engine, "resume", less_and_less_wrong)
    side = Side(model, encoded(0))
    found = sweep(side, side, [(Place("resid_pre", 1, None, c),) for c in range(COLUMNS)], progress=False)
    assert len(calls) == COLUMNS
    assert found.deviation == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Place("nothing", 0), "site 'nothing' is unknown; expected one of resid_pre"),
        (Place("z", 7), "has no site blocks.7.attn.hook_z: the model has layers 0 to 1"),
        (Place("z", 0, 4), "heads 0 to 3; found head 4"),
        (Place("k", 0, 2), "heads 0 to 1; found head 2"),
        (Place("z", 0, -1), "heads 0 to 3; found head -1"),
        (Place("mlp_out", 0, 0), "has no heads; found head 0"),
        (Place("pattern", 0, 0, 3), "a pattern is patched as a whole"),
    ],
)
def test_places_that_do_not_exist(library, place, words):
    side = Side(HookedModel(library.model("llama")), encoded(0))
    with pytest.raises(InputError, match=words):
        sweep(side, side, [(place,)], progress=False)


def test_what_cannot_stand_in_the_other(library):
    llama, wide = HookedModel(library.model("llama")), HookedModel(library.model("qwen3"))
    one, other = Side(llama, encoded(0)), Side(wide, encoded(0))
    with pytest.raises(InputError, match=r"hook_z is \(4, 12\) in .* and \(4, 8\) in .*two versions of one architect"):
        sweep(one, other, [(Place("z", 0),)], progress=False)
    with pytest.raises(InputError, match="side by side"):
        sweep(one, Side(HookedModel(library.model("neox")), encoded(0)), [(Place("resid_mid", 0),)], progress=False)
    short = Side(llama, encoded(0).rows(slice(2)))
    with pytest.raises(InputError, match=r"recipient and donor prompts are \(4, 7\) and \(2, 7\)"):
        sweep(one, short, [(Place("z", 0),)], progress=False)
    with pytest.raises(InputError, match="a patch sets one place or more"):
        sweep(one, one, [()], progress=False)
