"""The training loop: seeded, resumable bit for bit, never a mixture of two runs."""

import warnings

import numpy as np
import pytest
import torch

from finetune_lens.training import Diverged, train


class Net(torch.nn.Module):
    """Two layers with a norm and dropout: matrices, vectors and randomness inside the model."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(5, 16), torch.nn.LayerNorm(16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1)
        )

    def forward(self, x, y):
        return {"loss": (self.layers(x).squeeze(-1) - y).square().mean()}


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batch(step, generator):
    x = torch.from_numpy(generator.normal(size=(32, 5))).float()
    return {"x": x, "y": x[:, 0] - x[:, 1]}


OPTIONS = {"steps": 12, "learning_rate": 0.05, "every": 4, "warmup": 2, "weight_decay": 0.1, "progress": False}


class Interrupted(Exception):
    """Stands for the user's Ctrl-C."""


def interrupted_at(stop):
    def draw(step, generator):
        if step == stop:
            raise Interrupted
        return batch(step, generator)

    return draw


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("optimizer", "l1"), [("adamw", 0.0), ("sgd", 0.0), ("adamw", 0.05), ("sgd", 0.05)])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path, optimizer, l1, schedule):
    options = OPTIONS | {"optimizer": optimizer, "schedule": schedule, "l1": l1}
    whole, scored = net(), []
    expected = train(whole, batch, evaluate=lambda: scored.append(0) or len(scored), **options)
    again, scored = net(), []
    options |= {"checkpoint": tmp_path / "state.pt", "evaluate": lambda: scored.append(0) or len(scored)}
    with pytest.raises(Interrupted):
        train(again, interrupted_at(7), **options)
    resumed, torch_state = net(), torch.random.get_rng_state()
    drawn = []
    got = train(resumed, lambda step, g: drawn.append(step) or batch(step, g), **options)
    assert drawn == [0, *range(4, 12)], "the first batch to recognise the run, then the steps since the checkpoint"
    assert same(whole, resumed)
    assert np.array_equal(expected.losses, got.losses)
    assert expected.scores == got.scores == {4: 1.0, 8: 2.0, 12: 3.0}
    assert torch.equal(torch_state, torch.random.get_rng_state()), "the caller's random state is left alone"


def test_a_finished_run_is_not_run_again(tmp_path):
    first, second = net(), net()
    expected = train(first, batch, checkpoint=tmp_path / "state.pt", **OPTIONS)
    got = train(second, interrupted_at(1), checkpoint=tmp_path / "state.pt", **OPTIONS)
    assert same(first, second)
    assert np.array_equal(expected.losses, got.losses)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 13},
        {"learning_rate": 0.04},
        {"seed": 1},
        {"weight_decay": 0.0},
        {"optimizer": "sgd"},
        {"clip": 0.1},
        {"l1": 0.1},
    ],
    ids=str,
)
def test_a_changed_argument_starts_anew(tmp_path, change):
    train(net(), batch, checkpoint=tmp_path / "state.pt", **OPTIONS)
    fresh, other = net(), net()
    train(fresh, batch, **OPTIONS | change)
    train(other, batch, checkpoint=tmp_path / "state.pt", **OPTIONS | change)
    assert same(fresh, other)


def test_other_weights_or_data_start_anew(tmp_path):
    def doubled(step, generator):
        return {name: 2 * tensor for name, tensor in batch(step, generator).items()}

    for start, data in ((1, batch), (0, doubled)):
        train(net(), batch, checkpoint=tmp_path / "state.pt", **OPTIONS)
        fresh, other = net(start), net(start)
        train(fresh, data, **OPTIONS)
        train(other, data, checkpoint=tmp_path / "state.pt", **OPTIONS)
        assert same(fresh, other)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.02), ("sgd", 0.1)])
def test_the_loss_goes_down(optimizer, rate):
    losses = train(net(), batch, steps=150, learning_rate=rate, optimizer=optimizer, progress=False).losses
    assert losses.shape == (150,)
    assert losses[-10:].mean() < 0.5 * losses[:10].mean()


def test_only_trainable_parameters_move_and_the_seed_decides():
    model, before = net(), net().state_dict()
    for p in model.layers[0].parameters():
        p.requires_grad_(False)
    train(model, batch, **OPTIONS)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"layers.1.weight", "layers.1.bias", "layers.3.weight", "layers.3.bias"}
    one, two, three = net(), net(), net()
    train(one, batch, **OPTIONS)
    train(two, batch, **OPTIONS)
    train(three, batch, **OPTIONS | {"seed": 1})
    assert same(one, two)
    assert not same(one, three)


def test_the_run_ends_at_the_first_evaluation_that_reaches_the_target():
    values = iter([0.1, 0.5, 0.9])
    run = train(net(), batch, evaluate=lambda: next(values), target=0.5, **OPTIONS)
    assert run.scores == {4: 0.1, 8: 0.5}
    assert len(run.losses) == 8


class Slope(torch.nn.Module):
    def __init__(self, start=0.0):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start))

    def forward(self):
        return {"loss": -self.w}  # gradient −1: SGD moves w by the learning rate


def test_the_learning_rate_warms_up_and_comes_down():
    def travelled(schedule):
        model = Slope()
        options = {"steps": 4, "learning_rate": 1.0, "warmup": 1, "optimizer": "sgd", "clip": 1.0, "progress": False}
        taken = []
        train(model, lambda s, g: taken.append(model.w.item()) or {}, schedule=schedule, **options)
        return np.diff([*taken, model.w.item()])

    assert travelled("constant") == pytest.approx([0.5, 1, 1, 1])
    assert travelled("linear") == pytest.approx([0.5, 1, 2 / 3, 1 / 3])
    assert travelled("cosine") == pytest.approx([0.5, 1, 0.75, 0.25])


class Still(torch.nn.Module):
    """A matrix and a vector, with a gradient of the given size everywhere."""

    def __init__(self, gradient):
        super().__init__()
        self.matrix, self.vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
        self.gradient = gradient

    def forward(self):
        return {"loss": self.gradient * (self.matrix.sum() + self.vector.sum())}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_shrinks_matrices_only(optimizer):
    model = Still(0.0)
    options = {"schedule": "constant", "weight_decay": 0.5, "optimizer": optimizer, "progress": False}
    train(model, lambda step, generator: {}, steps=2, learning_rate=0.1, **options)
    assert torch.allclose(model.matrix, torch.full((2, 2), 0.95**2))
    assert torch.equal(model.vector, torch.ones(2))


def test_the_gradient_is_clipped_to_its_norm():
    model = Still(1000.0)
    options = {"schedule": "constant", "optimizer": "sgd", "clip": 3.0, "progress": False}
    train(model, lambda step, generator: {}, steps=1, learning_rate=0.1, **options)
    travelled = torch.cat([1 - p.flatten() for p in model.parameters()]).norm().item()
    assert travelled == pytest.approx(0.3, rel=1e-5)


def test_the_l1_term_pulls_towards_the_start():
    model = Slope(5.0)
    options = {"schedule": "constant", "optimizer": "sgd", "progress": False}
    run = train(model, lambda step, generator: {}, steps=4, learning_rate=0.5, l1=0.25, **options)
    # There is no pull at the start itself; then |w − 5| has slope 1, and each step moves w by 0.5·(1 − 0.25).
    w = [5, 5.5, 5.875, 6.25]
    assert run.losses == pytest.approx([-at + 0.25 * (at - 5) for at in w])
    assert model.w.item() == pytest.approx(6.625)


def test_a_heavier_l1_term_leaves_less_of_the_update():
    def travelled(l1):
        model, start = net(), net()
        train(model, batch, steps=100, learning_rate=0.01, l1=l1, progress=False)
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return sum((p - q).abs().sum().item() for p, q in pairs)

    none, some, much = map(travelled, (0.0, 0.01, 1.0))
    assert none > 1.2 * some > 2 * much


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_the_mode_it_came_in(training):
    model = net().train(training)
    train(model, batch, evaluate=lambda: 0.0, **OPTIONS)
    assert model.training is training


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum(momentum):
    model = Slope()  # gradient −1
    options = {"schedule": "constant", "optimizer": "sgd", "momentum": momentum, "progress": False}
    train(model, lambda step, generator: {}, steps=5, learning_rate=0.1, **options)
    velocity = at = 0.0
    for _ in range(5):
        velocity = momentum * velocity + 1
        at += 0.1 * velocity
    assert model.w.item() == pytest.approx(at, rel=1e-5)


def test_another_momentum_or_other_evaluations_start_anew(tmp_path):
    options = OPTIONS | {"optimizer": "sgd", "evaluate": lambda: 0.0, "checkpoint": tmp_path / "state.pt"}
    train(net(), batch, **options)
    fresh, other = net(), net()
    train(fresh, batch, **OPTIONS | {"optimizer": "sgd", "momentum": 0.5})
    train(other, batch, **options | {"momentum": 0.5})
    assert same(fresh, other)
    assert list(train(net(), batch, **options | {"momentum": 0.5, "every": [3]}).scores) == [3, 12]


def test_evaluations_after_chosen_steps():
    model, start = net(), net()
    seen = []

    def look():
        assert not model.training
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return len(seen)

    run = train(model, batch, evaluate=look, **OPTIONS | {"every": [0, 1, 5, 50]})
    assert run.scores == {0: 1.0, 1: 2.0, 5: 3.0, 12: 4.0}, "at 0, before the first, and after the last in any case"
    assert all(torch.equal(tensor, seen[0][name]) for name, tensor in start.state_dict().items())
    assert all(torch.equal(tensor, seen[3][name]) for name, tensor in model.state_dict().items())
    after_one = net()
    train(after_one, batch, **OPTIONS | {"every": [1]}, target=0.0, evaluate=lambda: 0.0)
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in after_one.state_dict().items())


def test_no_steps_change_nothing_and_are_evaluated():
    model, start = net(), net()
    assert train(model, batch, evaluate=lambda: 0.25, **OPTIONS | {"steps": 0}).scores == {0: 0.25}
    assert same(model, start)


def test_evaluations_that_are_arrays(tmp_path):
    def look():
        seen.append(1)
        return np.array([[len(seen), 0.0], [np.nan, 1.0]], dtype=np.float32)

    options = OPTIONS | {"evaluate": look, "every": [0, 3, 8]}
    seen = []
    expected = train(net(), batch, **options).scores
    seen = []
    with pytest.raises(Interrupted):
        train(net(), interrupted_at(7), checkpoint=tmp_path / "state.pt", **options)
    got = train(net(), batch, checkpoint=tmp_path / "state.pt", **options).scores
    assert list(got) == list(expected) == [0, 3, 8, 12]
    for step in got:
        np.testing.assert_array_equal(got[step], expected[step], strict=True)
        assert got[step].shape == (2, 2)
    means = iter([0.4, 0.5, 0.6])
    run = train(net(), batch, evaluate=lambda: next(means) + np.array([-0.1, 0.1]), target=0.45, **OPTIONS)
    assert list(run.scores) == [4, 8], "of an array the mean reaches the target"


@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw", 0.0), ("sgd", 0.9)])
@pytest.mark.parametrize("trained", ["all", "lora"])
def test_an_interrupted_language_model_ends_bit_for_bit(library, tmp_path, optimizer, momentum, trained):
    def fresh():
        model = library.fresh("llama-bias-tied").requires_grad_(True)
        if trained == "lora":
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(5)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what PEFT uses of transformers is deprecated
                model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]))
        return model

    def words(step, generator):
        ids = torch.from_numpy(generator.integers(3, 40, size=(4, 6)))
        if step == stop:
            raise Interrupted
        return {"input_ids": ids, "labels": ids}

    options = OPTIONS | {"optimizer": optimizer, "momentum": momentum, "steps": 8, "every": [0, 1, 3, 6]}
    file = tmp_path / "state.pt"
    stop, whole, again, resumed = None, fresh(), fresh(), fresh()
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    expected = train(whole, words, **options)
    stop = 5
    with pytest.raises(Interrupted):
        train(again, words, checkpoint=file, **options)
    stop = 2  # not drawn again
    got = train(resumed, words, checkpoint=file, **options)
    assert same(whole, resumed)
    assert np.array_equal(expected.losses, got.losses)
    moved = {name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, start[name])}
    assert all(("lora_" in name) == (trained == "lora") for name in moved)
    assert moved
    held = set(torch.load(file, weights_only=True)["model"])
    assert (held == moved) if trained == "lora" else (held >= moved), "what is frozen is not in the checkpoint"


def poisoned(at):
    return lambda step, g: batch(step, g) | ({"y": torch.full((32,), torch.nan)} if step == at else {})


@pytest.mark.parametrize(("at", "every", "kept"), [(6, 4, 4), (3, 4, 0), (4, 4, 0), (7, [0, 2, 5], 5), (0, 4, 0)])
def test_divergence_puts_the_model_back(at, every, kept):
    """To the last evaluation that a finite step followed, or to the start."""
    model, other = net(), net()
    if kept:
        train(other, batch, **OPTIONS | {"every": [kept]}, evaluate=lambda: 1.0, target=1.0)
    with pytest.raises(Diverged, match=rf"the loss is nan at step {at}.*after {kept} steps") as caught:
        train(model.train(), poisoned(at), evaluate=lambda: 0.5, **OPTIONS | {"every": every})
    assert same(model, other)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert "\n" not in str(caught.value)
    assert (caught.value.step, caught.value.kept) == (at, kept)
    whole = train(net(), batch, **OPTIONS)
    assert np.array_equal(caught.value.run.losses, whole.losses[:at])
    every = every if isinstance(every, list) else range(every, at + 1, every)
    assert list(caught.value.run.scores) == [step for step in every if step <= at]


def test_a_continued_run_that_diverges_at_once_goes_back_no_further(tmp_path):
    """The step after the checkpoint at 8 is bad: back to 4, as without the interruption."""
    options = OPTIONS | {"checkpoint": tmp_path / "state.pt", "evaluate": lambda: 0.5}
    with pytest.raises(Interrupted):
        train(net(), interrupted_at(8), **options)
    model, other = net(), net()
    with pytest.raises(Diverged, match=r"at step 8.*after 4 steps"):
        train(model, poisoned(8), **options)
    train(other, batch, **OPTIONS | {"every": [4]}, evaluate=lambda: 1.0, target=1.0)
    assert same(model, other)


@pytest.mark.parametrize(("every", "kept"), [(4, 4), ([0, 4, 6], 6)])
def test_a_last_step_that_leads_astray_is_noticed(tmp_path, every, kept):
    """√ of a number that the last step makes negative: its own loss was finite, and no step follows."""

    class Slope(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.75))

        def forward(self):
            return {"loss": self.w + 0 * self.w.log()}

    options = {"learning_rate": 0.1, "schedule": "constant", "optimizer": "sgd", "every": every, "progress": False}
    model = Slope()
    with pytest.raises(Diverged, match="the loss is nan at step 8") as caught:
        train(
            model, lambda step, generator: {}, steps=8, evaluate=lambda: 0.5, checkpoint=tmp_path / "state.pt",
            **options,
        )  # fmt: skip
    assert caught.value.step == 8
    assert len(caught.value.run.losses) == 8
    assert 8 not in caught.value.run.scores, "what is no good is not evaluated, nor kept in the checkpoint"
    assert torch.load(tmp_path / "state.pt", weights_only=True)["model"]["w"].isfinite()
    assert caught.value.kept == kept
    assert model.w.item() == pytest.approx(0.75 - 0.1 * kept, abs=1e-5)


class Root(torch.nn.Module):
    """√w at 0: the loss is 0, its slope is infinite."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))

    def forward(self):
        return {"loss": self.w.sqrt()}


def test_a_gradient_that_is_not_finite_is_not_applied():
    model = Root()
    with pytest.raises(Diverged, match="gradient's norm is inf at step 0"):
        train(model, lambda step, generator: {}, steps=3, learning_rate=0.1, progress=False)
    assert model.w.item() == 0.0


class Cliff(torch.nn.Module):
    """Finite at 1, infinite where a step leads."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))

    def forward(self):
        return {"loss": self.w.log()}


def test_an_evaluated_state_that_is_no_good_is_not_what_is_kept(tmp_path):
    """A step leads to w = 0, which is evaluated; its loss is not finite, so that the model is put back to the start."""
    options = {"schedule": "constant", "optimizer": "sgd", "every": 1, "clip": 2.0, "progress": False}
    for _ in range(2):  # the second continues from the checkpoint of the evaluation
        model = Cliff()
        with pytest.raises(Diverged, match="-inf at step 1") as caught:
            train(
                model, lambda step, generator: {}, steps=3, learning_rate=1.0, checkpoint=tmp_path / "state.pt",
                evaluate=lambda model=model: model.w.item(), **options,
            )  # fmt: skip
        assert model.w.item() == 1.0
        assert caught.value.run.scores == {1: 0.0}
