"""Decision stage: a classifier on the softmax outputs of a network whose training stopped early."""

from collections.abc import Iterable
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from plywise._util.checks import require_whole
from plywise._util.modes import evaluating
from plywise.errors import NonFiniteError, PlywiseError


class Classifier(Protocol):
    """The two methods of scikit-learn's classifiers that are needed here."""

    def fit(self, X: Any, y: Any) -> Any:
        """Learn labels (n,) from rows (n, C)."""

    def predict(self, X: Any) -> Any:
        """Predict labels (n,) of rows (n, C)."""


class DecisionStage:
    """A second classifier that decides from the whole softmax vector of a half-trained network.

    Idea: a network whose training stopped early confuses classes, but systematically. A support vector
        machine, or another classifier, learns these confusions from all class probabilities, and its decision
        replaces the class of the largest probability.
    Equation: p(x) = softmax(model(x)); fit(x, y) = classifier.fit(p(x), y); predict(x) =
        classifier.predict(p(x)).
    Use when: training is expensive and must stop early, and the classifier is cheap in comparison.
    Do not use when: the network has converged, because the class of its largest probability is then as good;
        or a higher learning rate is possible, with which nothing was saved.
    Layers: none. It takes any model with one row of C ≥ 2 scores for each sample, and does not change it.
    Cost: one forward pass over the data to fit on, and the classifier's own fit on n rows of C numbers;
        ``python benchmarks/decision_stage.py`` measures the time saved.
    Status: after the abstract of the paper. The paper uses two classifiers, one of them the support vector
        machine of its title; here you choose the classifier.
    Source: Monteiro, Cerrada, Cabrera, Sánchez, Bastos-Filho, "Using a Support Vector Machine Based Decision
        Stage to Improve the Fault Diagnosis on Gearboxes", Computational Intelligence and Neuroscience, 2019,
        doi:10.1155/2019/1383752.
    Code: none found.
    Results: the paper reports almost 80 % less training time at equal accuracy. Ours is the CPU time to the
        network's final accuracy with a support vector machine, divided by the network's own time to it, as
        median of 3 seeds (lowest and highest): 0.22 (0.19 to 1.02) on digits with Adam(1e-3), 1.02 (0.92 to
        1.03) at ten times that rate, 0.88 (0.79 to 1.12) on 3,000 images of Fashion-MNIST
        (benchmarks/decision_stage.json).
    Limits: the classifier is not part of a ``state_dict``: save it as its library describes. A network that
        overfits is too confident on its training data: fit on samples that it has not seen.

    Args:
        model: the network, from a batch to scores (B, C) before the softmax.
        classifier: a classifier with ``fit(X, y)`` and ``predict(X)``, for example of scikit-learn.
        batch_size: samples in a forward pass of `predict`. Default 1024. Range 16 to 8192.

    Raises:
        PlywiseError: ``classifier`` has no ``fit`` or no ``predict``.
        ValueError: ``batch_size`` is not a whole number above 0.

    Example:
        >>> import torch
        >>> from plywise.nn import DecisionStage
        >>> class Nearest:  # in practice: sklearn.svm.SVC()
        ...     def fit(self, X, y):
        ...         self.X, self.y = X, y
        ...     def predict(self, X):
        ...         return self.y[((X[:, None] - self.X) ** 2).sum(2).argmin(1)]
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
        >>> model = torch.nn.Linear(4, 3)  # in practice: a network after a few epochs
        >>> stage = DecisionStage(model, Nearest()).fit([(x, y)])
        >>> bool((stage.predict(x) == y).all())
        True
    """

    def __init__(self, model: nn.Module, classifier: Classifier, *, batch_size: int = 1024) -> None:
        missing = [name for name in ("fit", "predict") if not callable(getattr(classifier, name, None))]
        if missing:
            raise PlywiseError(
                f"DecisionStage: {type(classifier).__name__} has no {' and no '.join(missing)}. Give an "
                "object like those of scikit-learn, for example sklearn.svm.SVC()."
            )
        require_whole(self, batch_size=batch_size)
        self.model, self.classifier, self.batch_size = model, classifier, batch_size
        self._fitted = False

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """Fit the classifier on the softmax vectors of the model.

        Args:
            batches: (x, y) with class labels y (B,), as a DataLoader gives them; one pass.

        Raises:
            NonFiniteError: the model's scores are not finite; the classifier has learned nothing.
            PlywiseError: there is no batch, labels do not fit, or the model returns no rows of scores.
        """
        rows, labels = [], []
        for x, y in batches:
            if y.shape != x.shape[:1]:
                raise PlywiseError(
                    f"DecisionStage needs one class label a sample, (B,); for inputs {tuple(x.shape)} it got "
                    f"labels {tuple(y.shape)}."
                )
            rows.append(self.probabilities(x))
            labels.append(y)
        if not rows:
            raise PlywiseError("DecisionStage.fit got no batch. An iterator is used up by its first pass.")
        self.classifier.fit(torch.cat(rows).numpy(), torch.cat(labels).cpu().numpy())
        self._fitted = True
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Predict labels (n,) of inputs, on their device.

        Raises:
            NonFiniteError: the model's scores are not finite.
            PlywiseError: `fit` has not been called, or the classifier returns no whole numbers.
        """
        if not self._fitted:
            raise PlywiseError("DecisionStage has not been fitted: call fit(batches) before predict(x).")
        rows = torch.cat([self.probabilities(part) for part in x.split(self.batch_size)])
        labels = np.asarray(self.classifier.predict(rows.numpy()))
        if labels.shape != (len(x),):
            raise PlywiseError(
                f"DecisionStage: {type(self.classifier).__name__}.predict gave {labels.shape} for {len(x)} "
                "rows; one label a row is needed."
            )
        return torch.from_numpy(labels).to(x.device)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Compute the inputs of the classifier: the softmax vectors (B, C) of a batch, in float64 on the CPU.

        The model runs in eval mode, on the device of its parameters.
        """
        parameter = next(self.model.parameters(), x)
        with evaluating(self.model):
            scores = self.model(x.to(parameter.device))
        if (
            not isinstance(scores, Tensor)
            or scores.dim() != 2
            or scores.shape[1] < 2
            or len(scores) != len(x)
        ):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PlywiseError(
                f"DecisionStage: {type(self.model).__name__} must give scores (B, C) of 2 or more classes; "
                f"for {tuple(x.shape)} it gave {found}."
            )
        if not scores.isfinite().all():
            raise NonFiniteError("DecisionStage: the model's scores hold a NaN or an infinity.")
        return scores.cpu().double().softmax(1)
