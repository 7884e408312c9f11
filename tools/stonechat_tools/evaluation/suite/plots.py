"""The suite's plots: small PNGs."""

from pathlib import Path
from typing import Any

import numpy as np

from stonechat_tools.evaluation.suite.protocol import Subject, auc, make_model


def plots(groups: dict[str, list[Subject]], folder: Path) -> list[str]:
    """ROC curves, the evidence over time and the drift, as small PNGs in `folder` -> their names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for group in ("pi3-malware", "pi-spectrum"):
        for one in groups.get(group, []):
            model = make_model(one)
            replay = model.replay()
            figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
            for name, f_q8 in one.attacks.items():
                b, a = (replay.scores(replay.steps(part)) for part in (one.test, f_q8))
                lines = np.quantile(b, np.linspace(0, 1, 200))
                fpr, tpr = [(b > line).mean() for line in lines], [(a > line).mean() for line in lines]
                left.plot(fpr, tpr, label=f"{name} {auc(b, a):.3f}", linewidth=1)
            left.set(xlabel="false positive rate", ylabel="recall", title=f"{one.name}: ROC, single windows")
            left.legend(fontsize=6)
            replay.run(one.table)
            results = [replay.run(part) for part in [one.rest, *one.later]]
            results += [replay.calm().run(f_q8) for f_q8 in one.attacks.values()]
            at = 0
            for result, name in zip(results, [*(["benign"] * (1 + len(one.later))), *one.attacks], strict=True):
                colour = "tab:blue" if name == "benign" else "tab:red"
                right.plot(np.arange(at, at + len(result)), result.evidence_q8 / 256, color=colour, linewidth=0.6)
                at += len(result)
            right.axhline(1, color="black", linewidth=0.6)
            right.set(xlabel="window (benign, then each attack)", title="evidence; 1 is the alarm line")
            figure.tight_layout()
            path = folder / f"{one.name}.png"
            figure.savefig(path, dpi=80)
            plt.close(figure)
            made.append(path.name)
            made.append(_drift_plot(one, folder, plt))
    return made


def _drift_plot(one: Subject, folder: Path, plt: Any) -> str:
    model = make_model(one)
    replay = model.replay()
    stream = np.concatenate([one.table, one.rest, *one.later])
    track = []
    for start in range(0, len(stream), 100):
        replay.run(stream[start : start + 100])
        track.append(np.abs(replay.drift) / (16 << model.meta.drift_shift))
    drift = np.array(track)
    figure, axis = plt.subplots(figsize=(6, 2.6))
    for share, label in ((0.5, "median"), (0.9, "90 %"), (1.0, "greatest")):
        axis.plot(np.arange(len(drift)) * 100, np.quantile(drift, share, axis=1), label=label, linewidth=1)
    axis.set(xlabel="benign window", ylabel="drift, deviations", title=f"{one.name}: adaptation", ylim=(0, 0.55))
    axis.legend(fontsize=6)
    figure.tight_layout()
    path = folder / f"{one.name}-drift.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path.name
