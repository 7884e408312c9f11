"""The detectors that stonechat is measured against, on the same windows: `fit(X)` on benign features, `score(X)`,
higher is more unusual. X is float, one window a row, log2(1 + count)."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Peer(Protocol):
    def fit(self, x: Floats) -> None: ...

    def score(self, x: Floats) -> Floats: ...


class RobustZ:
    """Mean squared robust z: median and 1.48 MAD, at least a tenth of the standard deviation."""

    def fit(self, x: Floats) -> None:
        self._centre = np.median(x, axis=0)
        mad = 1.4826 * np.median(np.abs(x - self._centre), axis=0)
        self._scale = np.maximum.reduce([mad, 0.1 * x.std(axis=0), np.full(len(mad), 0.02)])

    def score(self, x: Floats) -> Floats:
        out: Floats = (((x - self._centre) / self._scale) ** 2).mean(axis=1)
        return out


class Mahalanobis:
    """Mahalanobis's distance with a Ledoit-Wolf covariance of the standardized features."""

    def fit(self, x: Floats) -> None:
        from sklearn.covariance import LedoitWolf

        self._mean, self._scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
        self._model = LedoitWolf().fit((x - self._mean) / self._scale)

    def score(self, x: Floats) -> Floats:
        out: Floats = self._model.mahalanobis((x - self._mean) / self._scale)
        return out

    def contributions(self, x: Floats) -> Floats:
        """By how much the distance would fall if one feature alone were what the others say it should be."""
        precision = self._model.precision_
        out: Floats = ((x - self._mean) / self._scale @ precision) ** 2 / np.diag(precision)
        return out


class IsolationForest:
    """scikit-learn's, 200 trees."""

    def __init__(self, seed: int) -> None:
        from sklearn.ensemble import IsolationForest as Forest

        self._model = Forest(n_estimators=200, random_state=seed)

    def fit(self, x: Floats) -> None:
        self._model.fit(x)

    def score(self, x: Floats) -> Floats:
        out: Floats = -self._model.score_samples(x)
        return out


class FloatAutoencoder:
    """A ReLU autoencoder n/2 - n/4 - n/2 in float, trained by Adam (scikit-learn); score: mean squared error."""

    def __init__(self, seed: int, epochs: int = 40) -> None:
        self._seed, self._epochs = seed, epochs

    def fit(self, x: Floats) -> None:
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPRegressor

        self._mean, self._scale = x.mean(axis=0), np.maximum(x.std(axis=0), 0.02)
        n = x.shape[1]
        hidden = (max(2, n // 2), max(2, n // 4), max(2, n // 2))
        self._model = MLPRegressor(hidden_layer_sizes=hidden, random_state=self._seed, max_iter=self._epochs)
        z = self._standard(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(z, z)

    def score(self, x: Floats) -> Floats:
        z = self._standard(x)
        out: Floats = ((z - self._model.predict(z)) ** 2).mean(axis=1)
        return out

    def _standard(self, x: Floats) -> Floats:
        out: Floats = np.clip((x - self._mean) / self._scale, -20, 20)
        return out


class KitNET:
    """An ensemble of small autoencoders and one over their errors (Mirsky et al., Kitsune, NDSS 2018): features are
    grouped by correlation, at most `group` together; each autoencoder has one sigmoid layer of .75 the width, tied
    weights, 0-1 normalization, and is trained online, one pass, at a rate of .1."""

    def __init__(self, seed: int, group: int = 10, rate: float = 0.1) -> None:
        self._rng = np.random.default_rng(seed)
        self._group, self._rate = group, rate

    def fit(self, x: Floats) -> None:
        self._groups = self._map(x)
        self._small = [_TiedAutoencoder(len(columns), self._rng, self._rate) for columns in self._groups]
        for model, columns in zip(self._small, self._groups, strict=True):
            model.fit(x[:, columns])
        errors = self._errors(x)
        self._last = _TiedAutoencoder(errors.shape[1], self._rng, self._rate)
        self._last.fit(errors)

    def score(self, x: Floats) -> Floats:
        return self._last.errors(self._errors(x))

    def _errors(self, x: Floats) -> Floats:
        pairs = zip(self._small, self._groups, strict=True)
        return np.stack([model.errors(x[:, columns]) for model, columns in pairs], axis=1)

    def _map(self, x: Floats) -> list[list[int]]:
        """Agglomerative clusters by correlation distance, cut where a cluster would grow over `group`."""
        from scipy.cluster.hierarchy import linkage, to_tree

        centred = x - x.mean(axis=0)
        norm = np.sqrt((centred**2).sum(axis=0))
        norm[norm == 0] = 1e-9
        distance = np.clip(1 - (centred / norm).T @ (centred / norm), 0, None)
        rows, columns = np.triu_indices(len(distance), 1)
        groups: list[list[int]] = []

        def cut(node: Any) -> None:
            if node.count <= self._group:
                groups.append(node.pre_order())
            else:
                cut(node.left)
                cut(node.right)

        cut(to_tree(linkage(distance[rows, columns], "single")))
        return groups


class _TiedAutoencoder:
    def __init__(self, n: int, rng: np.random.Generator, rate: float) -> None:
        hidden = max(1, int(np.ceil(0.75 * n)))
        self._weights = rng.uniform(-1 / n, 1 / n, (n, hidden))
        self._hidden_bias, self._visible_bias = np.zeros(hidden), np.zeros(n)
        self._rate = rate

    def fit(self, x: Floats) -> None:
        self._low = x.min(axis=0)
        self._span = np.maximum(x.max(axis=0) - self._low, 1e-9)
        w, bh, bv, rate = self._weights, self._hidden_bias, self._visible_bias, self._rate
        for row in (x - self._low) / self._span:
            hidden = 1 / (1 + np.exp(-(row @ w + bh)))
            output = 1 / (1 + np.exp(-(w @ hidden + bv)))
            visible_error = row - output
            hidden_error = (visible_error @ w) * hidden * (1 - hidden)
            w += rate * (np.outer(row, hidden_error) + np.outer(visible_error, hidden))
            bh += rate * hidden_error
            bv += rate * visible_error

    def errors(self, x: Floats) -> Floats:
        """Root mean squared error of each row."""
        z = np.clip((x - self._low) / self._span, -1e3, 1e3)
        hidden = 1 / (1 + np.exp(-np.clip(z @ self._weights + self._hidden_bias, -500, 500)))
        output = 1 / (1 + np.exp(-np.clip(hidden @ self._weights.T + self._visible_bias, -500, 500)))
        out: Floats = np.sqrt(((z - output) ** 2).mean(axis=1))
        return out


def make(name: str, seed: int) -> Peer:
    """A peer by its name in PEERS."""
    if name == "robust z":
        return RobustZ()
    if name == "Mahalanobis":
        return Mahalanobis()
    if name == "IsolationForest":
        return IsolationForest(seed)
    return KitNET(seed) if name == "KitNET" else FloatAutoencoder(seed)


# name: whether a seed plays a part
PEERS = {
    "Mahalanobis": False,
    "robust z": False,
    "IsolationForest": True,
    "KitNET": True,
    "float autoencoder": True,
}
