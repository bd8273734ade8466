"""A patched row that joins a pass on the way gives what a whole forward pass of its own gives."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import DECODERS, VOCABULARY
from test_hooked import as_it_was, near
from torch import Tensor

from finetune_lens.hooked import KINDS, HookedModel, site_name
from finetune_lens.hooked.reentry import BEHIND_ATTENTION, Change, Recording, Rows, record, resume

START = 3
BY_HEAD = ("z", "q", "k", "v", "result")
Patch = tuple[str, int, int, int]  # kind, layer, column, head


@dataclass
class Batch:
    ids: Tensor
    donor: Tensor
    mask: Tensor
    read_at: Tensor


def batch(padding: str) -> Batch:
    """Three examples of up to nine tokens, read at their last two."""
    generator = torch.Generator().manual_seed(4)
    ids, donor = torch.randint(3, VOCABULARY, (2, 3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.bool)
    if padding == "padded":  # on the left and on the right
        mask[1, :2] = mask[2, -2:] = False
    last = [int(row.nonzero().max()) for row in mask]
    return Batch(ids, donor, mask, torch.tensor([[at - 1, at] for at in last]))


@pytest.fixture(params=["whole", "padded"])
def padded(request: Any) -> Batch:
    return batch(request.param)


class Case:
    """One batch in one model: its recording, the donor's and its own activations, and the two ways to patch."""

    def __init__(self, model: HookedModel, on: Batch):
        self.model, self.on = model, on
        self.passed: dict[tuple, Tensor] = {}
        names = [
            site_name(kind, layer) for kind in KINDS for layer in range(model.layers) if not model.lacks(kind, layer)
        ]
        self.kinds = [kind for kind in KINDS if not model.lacks(kind, 1)]
        self.donor = model.run(on.donor, mask=on.mask, capture=names).cache
        self.own = model.run(on.ids, mask=on.mask, capture=names).cache
        self.recording: Recording = record(model, on.ids, on.mask, on.read_at)

    def value(self, patch: Patch, example: int, start: int) -> Tensor:
        """What the patch puts in: the donor's activation."""
        kind, layer, column, head = patch
        donor = self.donor[site_name(kind, layer)][example]
        if kind == "pattern":
            return torch.cat([self.own[site_name(kind, layer)][example, head, :start], donor[head, start:]])
        return donor[column, head] if kind in BY_HEAD else donor[column]

    def heads(self, kind: str, layer: int) -> int:
        return (
            self.own[site_name(kind, layer)].shape[1 if kind == "pattern" else 2]
            if kind in (*BY_HEAD, "pattern")
            else 1
        )

    def whole(self, patches: tuple[Patch, ...], start: int) -> Tensor:
        """Logits of every example, patched, by forward passes of their own."""
        start = start if any(kind == "pattern" for kind, *_ in patches) else 0
        if (patches, start) in self.passed:
            return self.passed[patches, start]

        def edit(patch: Patch) -> Any:
            def change(x: Tensor) -> Tensor:
                x = x.clone()
                for example in range(len(x)):
                    kind, _, column, head = patch
                    at = (example, head) if kind == "pattern" else (example, column)
                    x[(*at, head) if kind in BY_HEAD else at] = self.value(patch, example, start)
                return x

            return site_name(*patch[:2]), change

        edits = [edit(patch) for patch in patches]
        run = self.model.run(self.on.ids, mask=self.on.mask, edits=edits, logits_at=self.on.read_at)
        return self.passed.setdefault((patches, start), run.logits)

    def resumed(self, rows: list[tuple[int, tuple[Patch, ...]]], start: int) -> Tensor:
        """Logits of the rows (example, patches) in one pass."""
        fresh = (self.model.layers, False)  # an unpatched row never joins
        joins = [min(((p[1], p[0] in BEHIND_ATTENTION) for p in patches), default=fresh) for _, patches in rows]
        sites: dict[tuple[str, int], list] = {}
        for row, (example, patches) in enumerate(rows):
            for patch in patches:
                value = self.value(patch, example, start)
                sites.setdefault(patch[:2], []).append((row, patch[2], patch[3], value))
        changes = {}
        for (kind, layer), found in sites.items():
            row, column, head = torch.tensor([entry[:3] for entry in found]).T
            by_head = kind in (*BY_HEAD, "pattern")
            changes[kind, layer] = Change(row, column, head if by_head else None, torch.stack([f[3] for f in found]))
        entry, behind = zip(*joins, strict=True)
        example = torch.tensor([example for example, _ in rows])
        return resume(
            self.model, self.recording, Rows(start, example, torch.tensor(entry), torch.tensor(behind), changes)
        )

    def check(self, patchings: list[tuple[Patch, ...]], start: int, seed: int = 0) -> dict[tuple[Patch, ...], float]:
        """Every example under each of the patchings, all shuffled into one pass. The effects on the logits."""
        expected = {patches: self.whole(patches, start) for patches in patchings}
        rows = [(example, patches) for patches in patchings for example in range(3)]
        rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        found = self.resumed(rows, start)
        for (example, patches), logits in zip(rows, found, strict=True):
            torch.testing.assert_close(
                logits, expected[patches][example], atol=1e-5, rtol=1e-5, msg=lambda m, p=patches: f"{p}: {m}"
            )
        return {p: float((logits - self.recording.logits).abs().max()) for p, logits in expected.items()}


@pytest.mark.parametrize("family", DECODERS)
def test_every_site(library, family, padded):
    """All kinds of sites at all layers in one pass, at different columns and heads, from `start` 0 and 3; rows with
    several patches; an unpatched row is the recording."""
    case = Case(HookedModel(library.model(family)), padded)
    layers = case.model.layers
    patchings: list[tuple[Patch, ...]] = []
    for number, kind in enumerate(case.kinds):
        for layer in range(layers):
            # Far enough on for a window of three to pass it on to what is read, at the last layer what is read itself.
            column = (7 if layer == layers - 1 else 5) + number % 2
            head = (number + layer) % case.heads(kind, layer)
            patchings.append(((kind, layer, column, head),))
    several = [
        (("mlp_out", 0, 6, 0), ("resid_pre", layers - 1, 3, 0)),
        (("attn_out", 0, 3, 0), ("attn_out", 1, 4, 0), ("resid_post", layers - 1, 7, 0)),
    ]
    if "z" in case.kinds:
        several.append((("z", 0, 3, 1), ("z", 0, 4, 2), ("mlp_out", 0, 6, 0), ("z", 1, 8, 3)))
    if "q" in case.kinds:
        several.append((("q", 0, 4, 1), ("v", 1, 3, 0), ("mlp_out", 1, 7, 0)))
    patchings += [*several, ()]
    near(case.recording.logits, case.model.run(padded.ids, mask=padded.mask, logits_at=padded.read_at).logits)
    effects = case.check(patchings, START)
    assert effects.pop(()) < 1e-5
    assert all(effect > 1e-4 for patches, effect in effects.items() if effect_reaches(patches)), effects
    if padded.mask.all():
        case.check([p for p in patchings if not any(kind == "pattern" for kind, *_ in p)][::2], 0, seed=1)


def effect_reaches(patches: tuple[Patch, ...]) -> bool:
    """Whether the logits must differ: not for a key or query, of which a head may take little notice."""
    return not all(kind in ("q", "k") for kind, *_ in patches)


@pytest.mark.parametrize("family", ["gpt2", "neox", "bloom", "gemma3-sliding", "mixtral"])
def test_one_kind_alone(library, family):
    """Passes in which nobody attends in a block, nobody has joined in the first, or everybody at the last."""
    case = Case(HookedModel(library.model(family)), batch("padded"))
    last = case.model.layers - 1
    for kind in case.kinds:
        for layers in ((0,), (last,), (0, last)):
            case.check([((kind, layer, 4, 1 if kind in (*BY_HEAD, "pattern") else 0),) for layer in layers], START)
    near(case.resumed([(1, ()), (0, ())], START), case.recording.logits[[1, 0]], 0)


def test_whole_pattern(library):
    """From the first column on, the donor's whole attention map of one head."""
    for family in ("llama", "gpt2", "gemma2-sliding"):
        case = Case(HookedModel(library.model(family)), batch("padded"))
        effects = case.check([(("pattern", layer, 0, head),) for layer in range(2) for head in range(4)], 0)
        assert min(effects.values()) > 1e-5


def test_other_reads(library):
    """Columns read anywhere from `start` on, one or several, in an order of their own."""
    on = batch("whole")
    model = HookedModel(library.model("gemma2-sliding"))
    for read in ([[8], [3], [5]], [[4, 8, 3], [7, 6, 5], [3, 4, 8]]):
        on.read_at = torch.tensor(read)
        case = Case(model, on)
        case.check([(("mlp_out", 3, 3, 0),), (("z", 1, 3, 2),), (("resid_post", 2, 3, 0),), ()], START)


def test_what_is_skipped(library):
    """Rows are computed from the block where they join, from the column where they start, attention only where a row
    needs it, the last MLP only at the columns read."""
    model = HookedModel(library.model("gemma2-sliding"))
    case = Case(model, batch("whole"))
    joins = [0, 1, 1, 2, 3]  # layers of the rows; each twice, once behind attention
    rows = [(0, ((kind, layer, START, 0),)) for layer in joins for kind in ("resid_pre", "mlp_out")]
    seen: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        for block in model.anatomy.blocks:

            def hook(module: Any, args: tuple, name: str = name) -> None:
                seen.setdefault(name, []).append(tuple(args[0].shape[:2]))

            handles.append(block.module.get_submodule(name).register_forward_pre_hook(hook))
    try:
        case.resumed(rows, START)
    finally:
        for handle in handles:
            handle.remove()
    live, attending = [2, 6, 8, 10], [1, 4, 7, 9]  # at layer 1: two rows from below and two that join before attention
    assert seen["self_attn.q_proj"] == [(n, 6) for n in attending]
    assert seen["mlp.gate_proj"] == seen["mlp.down_proj"] == [*((n, 6) for n in live[:3]), (10, 2)]
    behind = [1, 2, 1, 1]  # whose recorded z is projected: first these, then those that attend
    assert seen["self_attn.o_proj"] == [(n, 6) for pair in zip(behind, attending, strict=True) for n in pair]


def test_sides_of_an_adapter(library):
    """Re-entry into a model with its adapter and without, on one set of weights; and nothing is left behind."""
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = peft.get_peft_model(library.fresh("llama"), peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    before = as_it_was(module)
    recorded = []
    for adapted in (False, True, False):
        case = Case(HookedModel(module, adapted=adapted), batch("padded"))
        case.check([((kind, layer, 4, 1 if kind in BY_HEAD else 0),) for kind in case.kinds for layer in (0, 1)], START)
        recorded.append(case.recording.logits)
        with pytest.raises(IndexError):
            case.resumed([(0, (("z", 0, 4, 0),)), (7, ())], START)
    assert as_it_was(module) == before
    assert torch.equal(recorded[0], recorded[2])
    assert not torch.allclose(recorded[0], recorded[1], atol=1e-2)


def test_offloaded(library, tmp_path):
    """Into blocks that accelerate brings in for the forward pass."""
    from accelerate import dispatch_model

    module = library.fresh("gemma2-sliding")
    plan = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    plan |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    module = dispatch_model(module, plan, main_device="cpu", offload_dir=tmp_path)
    before = as_it_was(module)
    case = Case(HookedModel(module), batch("padded"))
    case.check([((kind, layer, 4, 1 if kind in BY_HEAD else 0),) for kind in case.kinds for layer in (1, 2)], START)
    assert as_it_was(module) == before


def test_recording_of_an_edited_run(library):
    """A run with an edit of its own can be re-entered above the edit."""
    model, on = HookedModel(library.model("qwen3")), batch("whole")
    halved = ("blocks.0.hook_mlp_out", lambda x: x / 2)
    recording = record(model, on.ids, on.mask, on.read_at, edits=[halved])
    new = torch.ones(1, 32)
    at = torch.tensor([0])
    change = {("attn_out", 1): Change(at, at + 8, None, new)}
    rows = Rows(4, torch.tensor([2]), torch.tensor([1]), torch.tensor([True]), change)

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[2, 8] = new
        return x

    expected = model.run(on.ids, edits=[halved, ("blocks.1.hook_attn_out", edit)], logits_at=on.read_at).logits[2:]
    near(resume(model, recording, rows), expected)
    assert not torch.allclose(expected, model.run(on.ids, edits=[halved], logits_at=on.read_at).logits[2:])
