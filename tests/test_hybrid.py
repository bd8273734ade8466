"""Hybrids: the ends bit for bit, what lies between them against a naive sum, and a base that is intact afterwards."""

import json
import warnings

import pytest
import torch
from conftest import DECODERS, VOCABULARY

from finetune_lens import InputError, ModelPair
from finetune_lens.hooked.loading import load_model
from finetune_lens.hybrid import Hybrid
from finetune_lens.masks import Graft, joined, merged, shared, size

IDS = torch.arange(1, 9)[None] % VOCABULARY


def tuned_copy(library, family, seed=1):
    """The family's model with every parameter moved a little."""
    model = library.fresh(family)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def saved_tuned(library, family, tmp_path, seed=1):
    path = tmp_path / f"tuned-{seed}"
    tuned_copy(library, family, seed).save_pretrained(path)
    return path


def state(hybrid):
    return {name: p.detach().clone() for name, p in hybrid.parameters.items()}


def logits(model):
    return model.run(IDS).logits


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=DECODERS)
def family(request):
    return request.param


def test_ends_are_base_and_tuned_model_bit_for_bit(library, family, tmp_path):
    pair = ModelPair.load(library.saved(family), saved_tuned(library, family, tmp_path))
    base, tuned = (logits(load_model(c)) for c in (pair.base_checkpoint, pair.tuned_checkpoint))
    hybrid = Hybrid(pair)
    assert not hybrid.notes
    assert set(hybrid.weights) == set(pair.names(vectors=True))
    before = state(hybrid)
    assert torch.equal(logits(hybrid.model), base)
    with hybrid.at(1.0) as model:
        assert torch.equal(logits(model), tuned)
        assert not torch.equal(base, tuned)
    assert torch.equal(logits(hybrid.model), base)
    half = dict.fromkeys(hybrid.weights, 0.5)
    with hybrid.at(half) as model:
        assert not torch.equal(logits(model), base)
        expected = {n: torch.lerp(before[n], t, 0.5) for n, t in state_of_file(pair, hybrid).items()}
        assert all(torch.equal(p, expected[n]) for n, p in hybrid.parameters.items() if n in expected)
    assert same(state(hybrid), before)


def state_of_file(pair, hybrid):
    return {n: s.read() for n, s in pair.tuned_checkpoint.tensors.items() if n in hybrid.parameters}


def test_every_weight_is_put_at_its_own_place(library, family, tmp_path):
    """One weight at γ = 1: its part of the running model is the tuned model's, and nothing else has moved."""
    pair = ModelPair.load(library.saved(family), saved_tuned(library, family, tmp_path))
    hybrid = Hybrid(pair)
    live_base = {name: w.live.read().clone() for name, w in hybrid.weights.items()}
    for name in list(hybrid.weights)[::3]:
        with hybrid.at({name: 1.0}):
            now = {n: w.live.read().clone() for n, w in hybrid.weights.items()}
        matrix = next(pair.matrices([name]))
        assert torch.equal(now[name], matrix.tuned)
        assert all(torch.equal(now[n], live_base[n]) for n in now if n != name)


def test_masks_numbers_and_rules(library, tmp_path):
    pair = ModelPair.load(library.saved("gpt2"), saved_tuned(library, "gpt2", tmp_path))
    hybrid = Hybrid(pair)
    name = next(n for n in hybrid.names(components=["q"]))
    matrix = next(pair.matrices([name]))
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(matrix.base.shape, generator=generator) < 0.3
    soft = torch.rand(matrix.base.shape, generator=generator)
    cases = {
        "mask": (mask, torch.where(mask, matrix.tuned, matrix.base)),
        "soft": (soft, matrix.base + soft * (matrix.tuned - matrix.base)),
        "rule": (lambda zero, one: zero - one, matrix.base - matrix.tuned),
    }
    for gamma, expected in cases.values():
        with hybrid.at({name: gamma}):
            torch.testing.assert_close(hybrid.weights[name].live.read(), expected, rtol=0, atol=1e-6)
    with hybrid.at({name: mask}):
        assert torch.equal(hybrid.weights[name].live.read(), cases["mask"][1])  # nothing is computed
    with hybrid.at({name: torch.ones_like(soft)}):
        assert torch.equal(hybrid.weights[name].live.read(), matrix.tuned)


def test_layers_and_components(library, tmp_path):
    pair = ModelPair.load(library.saved("llama"), saved_tuned(library, "llama", tmp_path))
    hybrid = Hybrid(pair)
    gamma = hybrid.gamma(layers=[1], components=["q", "norm"])
    chosen = {n for n, g in gamma.items() if g}
    assert chosen == {n for n in hybrid.weights if n.startswith("layers.1.") and ("q_proj" in n or "norm" in n)}
    everything = hybrid.gamma(0.25, rest=0.75, layers=[0])
    assert set(everything.values()) == {0.25, 0.75}
    with pytest.raises(InputError, match=r"no weight is of layer 7; there are 0, 1, None"):
        hybrid.names(layers=[7])
    with pytest.raises(InputError, match=r"component 'heart'"):
        hybrid.names(components=["heart"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_any_exception_the_base_is_intact(library, tmp_path, error):
    pair = ModelPair.load(library.saved("llama"), saved_tuned(library, "llama", tmp_path))
    hybrid = Hybrid(pair)
    before = state(hybrid)

    def breaks(zero, one):
        raise error

    with pytest.raises(error), hybrid.at(0.5):  # while the model is used
        raise error
    assert same(state(hybrid), before)
    names = list(hybrid.weights)
    with pytest.raises(error), hybrid:  # while the weights are written
        hybrid.hold({names[0]: 1.0, names[3]: breaks})
    assert same(state(hybrid), before)


def test_a_perturbation_is_relative_and_undone(library, family, tmp_path):
    """θ(γ)·(1 + ρε) in the named weights at whatever γ is held, masks too; then what was held, and later the base."""
    pair = ModelPair.load(library.saved(family), saved_tuned(library, family, tmp_path))
    hybrid = Hybrid(pair)
    base, names = state(hybrid), hybrid.names(layers=[1])
    mask = {
        n: torch.rand(hybrid.weights[n].base.shape, generator=torch.Generator().manual_seed(0)) < 0.5 for n in names
    }
    for gamma in (0.0, 0.3, mask):
        with hybrid.at(gamma):
            before = state(hybrid)
            live = {n: w.live.read().clone() for n, w in hybrid.weights.items()}
            with hybrid.perturbed(names, 0.1, torch.Generator().manual_seed(3)):
                generator = torch.Generator().manual_seed(3)
                for name in names:
                    noise = torch.randn(live[name].shape, generator=generator)
                    torch.testing.assert_close(hybrid.weights[name].live.read(), live[name] * (1 + 0.1 * noise))
                rest = set(hybrid.weights) - set(names)
                assert all(torch.equal(hybrid.weights[n].live.read(), live[n]) for n in rest)
            assert same(state(hybrid), before)
            hybrid.hold(gamma)
            assert same(state(hybrid), before)
        assert same(state(hybrid), base)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_perturbation_ends_with_an_exception(library, tmp_path, error):
    pair = ModelPair.load(library.saved("llama"), saved_tuned(library, "llama", tmp_path))
    hybrid = Hybrid(pair)
    base = state(hybrid)
    with hybrid.at(0.5):
        before = state(hybrid)
        with pytest.raises(error), hybrid.perturbed(hybrid.names(layers=[0]), 0.1, torch.Generator()):
            raise error
        assert same(state(hybrid), before)
        with pytest.raises(InputError, match="γ names nobody"), hybrid.perturbed(["nobody"], 0.1, torch.Generator()):
            pass
    assert same(state(hybrid), base)


def test_of_an_adapter_the_sum_is_perturbed(library, tmp_path):
    """As the same noise on θ0 + BA, written into the weights."""
    pair = ModelPair.load(library.saved("llama"), lora(library, "llama", tmp_path, **ADAPTERS["everything"][1]))
    hybrid = Hybrid(pair)
    names = hybrid.names(layers=[0])
    masks = {n: torch.ones(w.base.shape, dtype=torch.bool) for n, w in hybrid.weights.items()}
    found = []
    for gamma in (1.0, masks):  # carried by the adapter; in the weights
        with hybrid.at(gamma), hybrid.perturbed(names, 0.3, torch.Generator().manual_seed(0)) as model:
            found.append(logits(model))
    with hybrid.at(1.0) as model:
        assert not torch.allclose(logits(model), found[0], atol=1e-2)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_half_a_writing_is_undone(library, tmp_path, monkeypatch):
    pair = ModelPair.load(library.saved("llama"), saved_tuned(library, "llama", tmp_path))
    hybrid = Hybrid(pair)
    before = state(hybrid)
    original, calls = Hybrid._write, []

    def interrupted(self, weight, gamma):
        calls.append(weight.name)
        original(self, weight, gamma)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Hybrid, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt), hybrid:
        hybrid.hold(1.0)
    monkeypatch.undo()
    assert same(state(hybrid), before)


def test_models_in_memory_stay_what_they_are(library):
    base, tuned = library.model("llama"), tuned_copy(library, "llama")
    kept = {n: p.clone() for n, p in base.state_dict().items()}
    hybrid = Hybrid(ModelPair.load(base, tuned))
    with hybrid.at(1.0) as model:
        assert torch.equal(logits(model), tuned(IDS).logits)
        assert same(dict(base.state_dict()), kept)
    tensors = {n: p.clone() for n, p in base.state_dict().items()}
    pair = ModelPair.load(tensors, dict(tuned.state_dict()), config=base.config)
    with Hybrid(pair).at(1.0):
        assert same(tensors, kept)


def lora(library, family, tmp_path, **options):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options
        torch.manual_seed(2)
        peft = get_peft_model(library.fresh(family), LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if parameter.requires_grad and "lora_" not in name:  # biases, whole modules
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        peft.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


ADAPTERS = {
    "attention": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "everything": ("llama", {"target_modules": "all-linear"}),
    "fused": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases": ("llama-bias-tied", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "whole module": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
    "merged by PEFT": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
}


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(library, tmp_path, kind):
    family, options = ADAPTERS[kind]
    pair = ModelPair.load(library.saved(family), lora(library, family, tmp_path, **options))
    one, other = pair.models()
    base, tuned = logits(one), logits(other)
    hybrid = Hybrid(pair)
    factored = kind != "merged by PEFT"
    assert any(w.factored for w in hybrid.weights.values()) == factored
    assert torch.equal(logits(hybrid.model), base)
    with hybrid.at(1.0) as model:
        if factored and kind != "embedding":  # the adapter itself, not merged; PEFT saves an embedding as a whole
            assert torch.equal(logits(model), tuned)
        torch.testing.assert_close(logits(model), tuned, rtol=1e-5, atol=1e-5)
    changed = list(hybrid.weights)
    with hybrid.at({n: torch.ones(hybrid.weights[n].base.shape, dtype=torch.bool) for n in changed}) as model:
        torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-5)  # as θ0 + BA
    with hybrid.at(0.5) as model:
        half = logits(model)
    with hybrid.at({n: torch.full(hybrid.weights[n].base.shape, 0.5) for n in changed}) as model:
        torch.testing.assert_close(logits(model), half, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(half, base)
    assert torch.equal(logits(hybrid.model), base)


def test_parts_of_a_fused_adapter(library, tmp_path):
    """q, k and v of one adapted module at different γ: the sum of what each gives alone, in the weights."""
    pair = ModelPair.load(library.saved("gpt2"), lora(library, "gpt2", tmp_path, **ADAPTERS["fused"][1]))
    hybrid = Hybrid(pair)
    q, k = (hybrid.names(layers=[0], components=[c])[0] for c in "qk")
    ends = {n: (m.base, m.tuned_dense(torch.float32)) for n in (q, k) for m in pair.matrices([n])}
    with hybrid.at({q: 1.0, k: 0.25}):
        torch.testing.assert_close(hybrid.weights[q].live.read(), ends[q][1])
        torch.testing.assert_close(hybrid.weights[k].live.read(), torch.lerp(*ends[k], 0.25))
    assert torch.equal(hybrid.weights[q].live.read(), ends[q][0])


def test_tied_in_one_and_untied_in_the_other(library, tmp_path):
    import transformers

    base = library.fresh("llama-bias-tied")
    config = library.configs["llama-bias-tied"]()
    config.tie_word_embeddings = False
    tuned = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.normal_(0, 0.2)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    hybrid = Hybrid(pair)
    assert torch.equal(logits(hybrid.model), base(IDS).logits)
    with hybrid.at(1.0) as model:
        assert torch.equal(logits(model), tuned(IDS).logits)


def test_what_gamma_one_leaves_out_is_said(library, tmp_path):
    tuned = tuned_copy(library, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.resize_token_embeddings(VOCABULARY + 3)
    tuned.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "config.json"
    config = json.loads(file.read_text())
    config["rms_norm_eps"] = 0.1
    file.write_text(json.dumps(config))
    hybrid = Hybrid(ModelPair.load(library.saved("llama"), tmp_path / "tuned"))
    assert "rows that both models have" in hybrid.notes[0]
    assert "rms_norm_eps: 1e-06 against 0.1" in hybrid.notes[1]
    before = state(hybrid)
    with hybrid.at(1.0):
        pass
    assert same(state(hybrid), before)


def test_grafts_round_trip(library, family, tmp_path):
    pair = ModelPair.load(library.saved(family), saved_tuned(library, family, tmp_path))
    hybrid = Hybrid(pair)
    generator = torch.Generator().manual_seed(0)
    mask = {
        n: torch.rand(w.base.shape, generator=generator) < 0.05
        for n, w in hybrid.weights.items()
        if w.layer is not None
    }
    graft = hybrid.graft(mask, task="made up")
    assert graft.size == size(mask)
    again = Graft.load(graft.save(tmp_path / "graft.safetensors"))
    assert again.facts == {"task": "made up"}
    assert shared(again.mask(), mask) == size(again.mask()) == size(mask)
    with hybrid.at(mask) as model:
        held, expected = state(hybrid), logits(model)
    with hybrid.at(again) as model:
        assert same(state(hybrid), held)
        assert torch.equal(logits(model), expected)


def test_grafts_of_others_are_refused(library, tmp_path):
    pair = ModelPair.load(library.saved("llama"), saved_tuned(library, "llama", tmp_path))
    hybrid = Hybrid(pair)
    name = hybrid.names(components=["q"])[0]
    mask = {name: torch.ones(hybrid.weights[name].base.shape, dtype=torch.bool)}
    graft = hybrid.graft(mask)
    other = Hybrid(ModelPair.load(tmp_path / "tuned-1", library.saved("llama")))
    with pytest.raises(InputError, match="made for another base"):
        other.hold(graft)
    with pytest.raises(InputError, match="the graft is of another model"):
        Hybrid(ModelPair.load(library.saved("qwen3"), library.saved("qwen3"))).hold(graft)
    with pytest.raises(InputError, match="no such graft"):
        Graft.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(InputError, match="is no graft"):
        Graft.load(library.saved("llama") / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(graft.save(tmp_path / "g.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated or not a graft"):
        Graft.load(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match=r"γ of layers.0.self_attn.q_proj has shape \(2, 2\)"):
        hybrid.hold({name: torch.ones(2, 2)})
    with pytest.raises(InputError, match="γ names nobody"):
        hybrid.hold({"nobody": 1.0})


def test_merged_grafts_keep_what_came_first():
    def graft(at, values):
        return Graft({"a": torch.tensor(at)}, {"a": torch.tensor(values)}, {"a": (2, 3)}, {"a": "base"})

    both = merged([graft([1, 4], [1.0, 1.0]), graft([0, 4, 5], [2.0, 2.0, 2.0])])
    assert both.positions["a"].tolist() == [0, 1, 4, 5]
    assert both.values["a"].tolist() == [2, 1, 1, 2]
    assert size(joined([graft([1, 4], [1.0, 1.0]).mask(), graft([0, 4], [1.0, 1.0]).mask()])) == 3
    with pytest.raises(InputError, match="different bases"):
        merged(
            [graft([1], [1.0]), Graft({"a": torch.tensor([1])}, {"a": torch.ones(1)}, {"a": (2, 3)}, {"a": "other"})]
        )


@pytest.mark.parametrize("kind", ["dense", "adapter"])
def test_a_saved_hybrid_is_an_ordinary_model(library, tmp_path, kind):
    other = (
        saved_tuned(library, "llama", tmp_path)
        if kind == "dense"
        else lora(library, "llama", tmp_path, **ADAPTERS["attention"][1])
    )
    hybrid = Hybrid(ModelPair.load(library.saved("llama"), other))
    with hybrid.at(0.3) as model:
        expected = logits(model)
        hybrid.save(tmp_path / "hybrid")
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    from finetune_lens.checkpoints import open_checkpoint

    again = load_model(open_checkpoint(tmp_path / "hybrid"))
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)
