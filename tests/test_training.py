"""The training loop: seeded, resumable bit for bit, never a mixture of two runs."""

import numpy as np
import pytest
import torch

from finetune_lens.training import train


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


def test_a_loss_that_is_not_finite_is_an_error():
    def broken(step, generator):
        return batch(step, generator) | ({"y": torch.full((32,), torch.nan)} if step == 3 else {})

    with pytest.raises(FloatingPointError, match="step 3"):
        train(net(), broken, **OPTIONS)
