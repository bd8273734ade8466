"""Linear read-outs of many sets of features at once, with an L2 penalty λ on standardised features; all in float64.

    logistic:  ½ λ ‖w‖² − Σ_rows log p(y | x̃·w + b),  p a sigmoid of two classes and a softmax of more
    ridge:       λ ‖w‖² + Σ_rows (y − x̃·w − b)²

x̃ are the features less their mean over the fitted rows, divided by their standard deviation there (features that do
not vary are left out); b is free. This is what scikit-learn's LogisticRegression(C=1/λ) and Ridge(alpha=λ) minimise
behind a StandardScaler. Several targets of the same rows (a task and its controls) share what depends on the features
alone.

Ridge is one Cholesky factorisation of X̃ᵀX̃ + λ. Logistic regression is L-BFGS (Nocedal and Wright 2006, §7.2) whose
first guess of the inverse Hessian is (λ + c X̃ᵀX̃)⁻¹, c = ¼ for two classes and ½ for more: the inverse of an upper bound
of the Hessian (Böhning 1992, "Multinomial logistic regression algorithm"), with which features of any correlation take
some tens of steps. Logits along a step lie on a line, so that finding its length takes no product with the features.
Fewer rows than features are first turned into coordinates in the space that they span, which changes nothing.

Cost of a fit of n rows and d features (d ← min(n, d)): 2·n·d² + d³ flops, and 4·n·d flops a step, target and output.
Memory: three times 8·n·d bytes.

>>> x = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]], dtype=torch.float64)
>>> y, rows = torch.tensor([[[0], [0], [1], [1]]]), torch.ones(1, 4, dtype=torch.bool)
>>> fit_logistic(x, y, rows, classes=2, penalty=1.0).classify(x).flatten().tolist()
[0, 0, 1, 1]
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CONSTANT = 1e-6  # standard deviation, relative to the root mean square, up to which a float32 feature does not vary
TOLERANCE = 1e-10  # nats a row that the loss may still lie above its minimum
STEPS = 500
HISTORY = 20
HALVINGS = 40


@dataclass(frozen=True)
class Probes:
    """Read-outs x·weight + bias, of features as they are (not standardised).

    Attributes:
        converged: whether the loss is at its minimum, up to TOLERANCE.
    """

    weight: Float[Tensor, "fit feature target output"]
    bias: Float[Tensor, "fit target output"]
    converged: Bool[Tensor, "fit target"]

    def __call__(self, x: Float[Tensor, "fit row feature"]) -> Float[Tensor, "fit row target output"]:
        """Values, or logits: that of the second class for two classes, else one a class."""
        return _times(x, self.weight) + self.bias[:, None]

    def moved(self, by: Float[Tensor, "fit 1 feature"]) -> "Probes":
        """The same read-outs of features that all lie `by` further."""
        return replace(self, bias=self.bias - _times(by, self.weight)[:, 0])

    def classify(self, x: Float[Tensor, "fit row feature"]) -> Int[Tensor, "fit row target"]:
        """The likeliest class of each row."""
        logits = self(x)
        return (logits[..., 0] > 0).long() if logits.shape[-1] == 1 else logits.argmax(-1)


def fit_logistic(
    x: Float[Tensor, "fit row feature"],
    labels: Int[Tensor, "fit row target"],
    there: Bool[Tensor, "fit row"],
    *,
    classes: int,
    penalty: float,
) -> Probes:
    """Logistic regression of every target on every set of features.

    Args:
        x: float64; rows that are not `there` fill up sets of different length and count for nothing.
        labels: 0 to classes − 1.
        penalty: λ above 0.
    """
    outputs = 1 if classes == 2 else classes
    wanted = torch.nn.functional.one_hot(labels, classes)[..., -outputs:].to(x)
    standard = _Standardised(x, there)
    weight, bias, converged = _minimised(standard.x, wanted, there, penalty)
    return standard.probes(weight, bias, converged)


def fit_ridge(
    x: Float[Tensor, "fit row feature"],
    values: Float[Tensor, "fit row target"],
    there: Bool[Tensor, "fit row"],
    *,
    penalty: float,
) -> Probes:
    """Ridge regression of every target on every set of features; arguments as of `fit_logistic`."""
    standard = _Standardised(x, there)
    rows = there[..., None].to(x)
    mean = (values * rows).sum(1, keepdim=True) / rows.sum(1, keepdim=True)
    gram = standard.x.mT @ standard.x
    gram.diagonal(dim1=-2, dim2=-1).add_(penalty)
    weight = torch.cholesky_solve(standard.x.mT @ (values - mean), torch.linalg.cholesky(gram))
    return standard.probes(weight[..., None], mean[:, 0, :, None], torch.ones_like(mean[:, 0], dtype=torch.bool))


class _Standardised:
    """Features without their mean and in units of their standard deviation, or coordinates in the space of the rows."""

    def __init__(self, x: Float[Tensor, "fit row feature"], there: Bool[Tensor, "fit row"]):
        rows = there[..., None].to(x)
        count = rows.sum(1, keepdim=True)
        self.centre = (x * rows).sum(1, keepdim=True) / count
        x = (x - self.centre).mul_(rows)
        spread = (torch.linalg.vector_norm(x, dim=1, keepdim=True).square() / count).sqrt()
        varies = spread > CONSTANT * torch.hypot(spread, self.centre)
        self.scale = torch.where(varies, 1 / spread, 0.0)
        self.x = x.mul_(self.scale)
        self.space = None
        if x.shape[1] < x.shape[2]:
            self.space, triangle = torch.linalg.qr(self.x.mT)
            self.x = triangle.mT

    def probes(
        self,
        weight: Float[Tensor, "fit coordinate target output"],
        bias: Float[Tensor, "fit target output"],
        converged: Bool[Tensor, "fit target"],
    ) -> Probes:
        """The same read-out of the features as they are."""
        if self.space is not None:
            weight = _times(self.space, weight)
        weight = weight * self.scale.mT[..., None]
        return Probes(weight, bias - _times(self.centre, weight)[:, 0], converged)


def _times(x: Float[Tensor, "fit row inner"], w: Float[Tensor, "fit inner target output"]) -> Tensor:
    """(fit, row, target, output)."""
    return (x @ w.flatten(2)).unflatten(2, w.shape[2:])


def _minimised(
    x: Float[Tensor, "fit row feature"],
    wanted: Float[Tensor, "fit row target output"],
    there: Bool[Tensor, "fit row"],
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and whether they are at the minimum, of the logistic loss; the features have mean 0."""
    rows = there.to(x)[..., None, None]
    x = torch.cat([x, rows[..., 0]], 2)  # the last weight is the bias
    damping = x.new_full((x.shape[2], 1, 1), penalty)
    damping[-1] = 0
    binary = wanted.shape[-1] == 1
    bound = x.mT @ x * (0.25 if binary else 0.5)
    bound.diagonal(dim1=-2, dim2=-1).add_(damping[:, 0, 0])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(bound))

    def loss(w: Tensor, z: Tensor) -> Tensor:
        total = torch.nn.functional.softplus(z)[..., 0] if binary else z.logsumexp(-1)
        return ((total - (wanted * z).sum(-1)) * rows[..., 0]).sum(1) + (damping * w.square()).sum((1, 3)) / 2

    def gradient(w: Tensor, z: Tensor) -> Tensor:
        p = z.sigmoid() if binary else z.softmax(-1)
        # the residuals on the left: a product with few columns on the right of x.mT takes six times as long on a CPU
        return (((p - wanted) * rows).flatten(2).mT @ x).mT.unflatten(2, wanted.shape[2:]) + damping * w

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 3))[:, None, :, None]

    w = x.new_zeros(x.shape[0], x.shape[2], *wanted.shape[2:])
    z, slope_at = torch.zeros_like(wanted), gradient(w, torch.zeros_like(wanted))
    now, history, scale = loss(w, z), [], 1.0
    enough = TOLERANCE * there.sum(1)[:, None]
    for _ in range(STEPS):
        step = slope_at
        weights = []
        for moved, turned, curvature in reversed(history):
            weights.append(curvature * dot(moved, step))
            step = step - weights[-1] * turned
        step = scale * _times(inverse, step)
        for (moved, turned, curvature), weight in zip(history, reversed(weights), strict=True):
            step = step + moved * (weight - curvature * dot(turned, step))
        descent = dot(slope_at, step)[:, 0, :, 0]  # twice what is left, if the guess of the Hessian were right
        done = descent / 2 <= enough
        if done.all():
            break
        step = -step * ~done[:, None, :, None]
        along = _times(x, step)
        length = torch.ones_like(descent)
        for _ in range(HALVINGS):
            tried = length[:, None, :, None]
            then = loss(w + tried * step, z + tried * along)
            steep = then > now - 1e-4 * length * descent + 1e-14 * now.abs()
            if not (steep & ~done).any():
                break
            length = torch.where(steep, length / 2, length)
        moved = length[:, None, :, None] * step
        w, z = w + moved, z + length[:, None, :, None] * along
        now, before = loss(w, z), slope_at
        slope_at = gradient(w, z)
        turned = slope_at - before
        bend = dot(moved, turned)
        stretched = dot(turned, _times(inverse, turned))
        scale = torch.where(bend > 0, bend / stretched, scale)
        history = [*history, (moved, turned, torch.where(bend > 0, 1 / bend, 0.0))][-HISTORY:]
    return w[:, :-1], w[:, -1], done
