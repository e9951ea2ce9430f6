"""Draw the pictures of results/diffusion/ from its curves and from the agents in RUNS; called by
scripts/diffusion.py.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.common import mixtures
from zoo.common.device import flatten
from zoo.common.diffusion import Schedule, cosine_schedule
from zoo.common.files import load_checkpoint
from zoo.common.targets import Exact, make_target

LINE = {
    "line_return": "DDPO, KL in the return",
    "line_loss": "DDPO, KL as a loss a step, S0 (29)",
    "dpo_trajectory": "DPO of whole chains",
    "dpo_standard": "Diffusion-DPO, S0 (33)",
}
CURVES = LINE | {
    "line_is_return": "DDPO importance sampled, KL in the return",
    "line_none": "DDPO without a KL",
    "dpo_notes35": "S0 (35)",
}
Curves = dict[str, list[list[dict[str, float]]]]


class Agent(NamedTuple):
    """A run's networks as they were at its end."""

    module: Any
    args: Any
    target: Any
    schedule: Schedule
    mean: Any
    acting: dict[str, Tensor]

    def exact(self) -> Exact:
        """The exact quantities of its task."""
        return Exact(self.target, self.schedule, self.args.beta, self.mean)

    def samples(self, which: str, count: int) -> Tensor:
        """x_0 (count, d) of the chain of `params` or `reference`, always of the same noise."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.schedule.steps + 1, count, self.target.dim, generator=generator)
        context = torch.zeros(count, dtype=torch.int64)
        return self.module.sample_chain(self.mean, self.acting[which], noise, context, self.schedule.sigma)[
            0
        ][0]


def load_agent(folder: Path) -> Agent:
    """The agent of a finished run."""
    saved = load_checkpoint(folder / "agent.pt", "--runs")
    module = importlib.import_module(f"zoo.{saved['agent']}")
    args = module.Args(**saved["args"])
    target = make_target(args.env)
    schedule = cosine_schedule(args.steps, args.eta, args.min_sigma)
    net = module.Denoiser(target.dim, target.contexts, args.steps, tuple(args.hidden))
    mean = module.make_mean(net, flatten(net)[1], schedule, args.predict)
    return Agent(module, args, target, schedule, mean, saved["state"])


def draw_density(runs: Path, names: dict[str, str], out: Path) -> None:
    """x_0 of the line's two contexts: the reference, the tilt, and what each method ends at (seed 1)."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    first = True
    for name, label in names.items():
        agent = load_agent(runs / name / "seed_1")
        exact = agent.exact()
        exact(agent.acting)
        assert exact.truth is not None
        x, cell = exact.grid.points[:, 0], exact.grid.cell
        found = mixtures.marginals(exact.grid, exact.means(agent.acting["params"]), exact.sigma)[0]
        for context, panel in enumerate(axes):
            if first:
                panel.fill_between(x, exact.truth.reference[context] / cell, color="0.85", label="reference")
                panel.plot(
                    x, exact.truth.tilt[context] / cell, "k--", linewidth=2, label="the tilt, the optimum"
                )
            panel.plot(x, found[context] / cell, label=label, alpha=0.9)
            panel.set(title=f"context {context}", xlabel="$x_0$ (the reward)", xlim=(-3, 3))
        first = False
    axes[0].set(ylabel="density")
    axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


RING = {
    "ring_return/seed_1": "KL in the return",
    "ring_none/seed_1": "no KL, seed 1",
    "ring_none/seed_3": "no KL, seed 3",
}


def at_mode(target: mixtures.Mixture, points: Tensor, chance: Tensor, mode: int) -> float:
    """The share of `chance` (N,) at a mode: within half the distance to the next one."""
    apart = torch.pdist(target.mean[0]).min()
    near = (points - target.mean[0, mode].to(points)).norm(dim=-1) < apart / 2
    return chance[near].sum().item()


def draw_ring(runs: Path, out: Path) -> None:
    """x_0 on the ring: the reference, the tilt, with the KL, and two seeds without it."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 + len(RING), figsize=(15, 3.9), layout="constrained", sharey=True)
    for i, (run, title) in enumerate(RING.items()):
        agent = load_agent(runs / run)
        exact = agent.exact()
        exact(agent.acting)
        assert exact.truth is not None
        found = mixtures.marginals(exact.grid, exact.means(agent.acting["params"]), exact.sigma)[0, 0]
        shown = [(axes[2 + i], found, title)]
        if i == 0:
            shown += [
                (axes[0], exact.truth.reference[0], "reference"),
                (axes[1], exact.truth.tilt[0], "tilt"),
            ]
        for panel, chance, text in shown:
            size, edge = len(exact.grid.axis), agent.target.half_width
            right, left = (at_mode(agent.target, exact.grid.points, chance, mode) for mode in (0, 4))
            panel.imshow(chance.view(size, size).T, origin="lower", extent=(-edge, edge, -edge, edge))
            panel.set(title=f"{text}\nright mode {right:.2f}, left {left:.2f}")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def draw_digits(runs: Path, out: Path) -> None:
    """Samples of the same noises: the reference, with and without the KL (seed 1)."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(9, 5), layout="constrained")
    agents = {name: load_agent(runs / name / "seed_1") for name in ("digits_return", "digits_none")}
    shown = (
        ("reference", agents["digits_return"], "reference"),
        ("rewarded for threes, with the KL", agents["digits_return"], "params"),
        ("without", agents["digits_none"], "params"),
    )
    for panel, (title, agent, which) in zip(axes, shown, strict=True):
        framed = torch.nn.functional.pad(agent.samples(which, 32).view(2, 16, 8, 8), (1, 1, 1, 1), value=-1)
        pictures = framed.permute(0, 2, 1, 3).reshape(20, 160)
        panel.imshow(-pictures, cmap="gray", vmin=-1, vmax=1)
        panel.set(title=title, xticks=[], yticks=[])
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def draw_curves(curves: Curves, out: Path) -> None:
    """KL to the tilt and path KL over training on the line, means over seeds."""
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, label in CURVES.items():
        if seeds := curves.get(name):
            length = min(map(len, seeds))
            share = np.linspace(1 / length, 1, length)
            for panel, column in zip(axes, ("eval_kl_tilt", "eval_path_kl"), strict=True):
                values = np.mean([[row[column] for row in seed[:length]] for seed in seeds], axis=0)
                panel.plot(share, values, label=f"{label} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
    for panel, title in zip(
        axes, ("KL of $x_0$ to the tilt", "KL of the path to the reference"), strict=True
    ):
        panel.set(title=title, xlabel="share of the run", yscale="log")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def draw_frontier(curves: Curves, runs: Path, out: Path) -> None:
    """Reward and path KL on the line at several beta, and the exact curve of the best chains (seed 1)."""
    import numpy as np
    from matplotlib import pyplot

    agent = load_agent(runs / "line_return" / "seed_1")
    exact = agent.exact()
    means, reward = exact.means(agent.acting["reference"]), agent.target.reward(exact.grid.points)
    best = []
    for beta in np.geomspace(0.07, 3.0, 25):
        values = mixtures.soft_values(exact.grid, means, exact.sigma, reward, beta)
        chance = mixtures.best_marginal(exact.grid, means, exact.sigma, values, beta)
        expected = (chance @ reward.to(chance)).mean().item()
        best.append(((expected - (values[-1] @ mixtures.start(exact.grid)).mean().item()) / beta, expected))
    figure, panel = pyplot.subplots(figsize=(6, 4), layout="constrained")
    panel.plot(*zip(*best, strict=True), "k-", linewidth=1, label="the best chains")
    for place, label, mark in (
        ("return", "KL in the return", "o"),
        ("loss", "KL as a loss a step, S0 (29)", "s"),
    ):
        points = []
        for beta in ("1", "0.5", "0.25", "0.1"):
            last = [seed[-1] for seed in curves.get(f"line_{place}" + f"_{beta}" * (beta != "0.5"), [])]
            points += [(row["eval_path_kl"], row["eval_reward"]) for row in last]
        panel.plot(*zip(*points, strict=True), mark, label=label, alpha=0.6)
    panel.set(xlabel="KL of the path to the reference", ylabel="reward", title="line, beta 1, 0.5, 0.25, 0.1")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


KEEPS = {
    "line_none": "neither",
    "line_return": "a KL in the return",
    "data_loss": "a pretraining loss",
    "data_loss_return": "both",
}


def draw_keeps(curves: Curves, out: Path) -> None:
    """Reward, pretraining loss and path KL over training with a KL, a pretraining loss, both, and neither."""
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, label in KEEPS.items():
        seeds = [seed for seed in curves[name] if "eval_pretrain_loss" in seed[0]]
        if not seeds:
            continue
        length = min(map(len, seeds))
        step = [row["step"] for row in seeds[0][:length]]
        for panel, column in zip(axes, ("eval_reward", "eval_pretrain_loss", "eval_path_kl"), strict=True):
            values = np.mean([[row[column] for row in seed[:length]] for seed in seeds], axis=0)
            panel.plot(step, values, label=f"{label} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
    titles = ("reward", "pretraining loss on held-out data", "KL of the path to the reference")
    for panel, title in zip(axes, titles, strict=True):
        panel.set(title=title, xlabel="chains", yscale="linear" if title == "reward" else "log")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def draw_returns(curves: Curves, out: Path) -> None:
    """Returns over the steps of fine-tuning, means over seeds and their range, the clones as lines."""
    import numpy as np
    from matplotlib import pyplot

    tasks = {"pendulum": "Pendulum-v1", "hopper": "Hopper-v4"}
    shown = {task: env for task, env in tasks.items() if any(name.startswith(task) for name in curves)}
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(5.5 * len(shown), 4), layout="constrained", squeeze=False
    )
    for panel, (task, env) in zip(axes[0], shown.items(), strict=True):
        for policy, color in (("diffusion", "C0"), ("gaussian", "C1")):
            if seeds := curves.get(f"{task}_{policy}"):
                length = min(map(len, seeds))
                step = [row["step"] for row in seeds[0][:length]]
                values = np.array([[row["eval_return"] for row in seed[:length]] for seed in seeds])
                label = f"{policy} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
                panel.plot(step, values.mean(0), color=color, label=label)
                panel.fill_between(step, values.min(0), values.max(0), color=color, alpha=0.2)
                panel.axhline(
                    values[:, 0].mean(), color=color, linestyle="--", linewidth=1, label="its clone"
                )
        panel.set(title=env, xlabel="environment steps")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    axes[0, 0].set(ylabel="return without noise")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def draw(curves: Curves, runs: Path, results: Path) -> list[str]:
    """Every picture whose runs are there; what is missing for the others."""
    import matplotlib

    matplotlib.use("Agg")
    ended = [f"{name}/seed_{seed}" for name in curves for seed in (1, 3)]
    there = {run for run in ended if (runs / run / "agent.pt").exists()}
    lines = {name: label for name, label in LINE.items() if name in curves}
    missing = []
    if lack := [f"{name}/seed_1" for name in lines if f"{name}/seed_1" not in there]:
        missing.append(f"density.png needs {', '.join(lack)}")
    elif lines:
        draw_density(runs, lines, results / "density.png")
    for out, names, function in (
        ("ring.png", RING.keys(), draw_ring),
        ("digits.png", {"digits_return/seed_1", "digits_none/seed_1"}, draw_digits),
    ):
        if names <= there:
            function(runs, results / out)
        else:
            missing.append(f"{out} needs {', '.join(sorted(names - there))}")
    if curves.keys() & CURVES.keys():
        draw_curves(curves, results / "line.png")
    if "line_return/seed_1" in there and {"line_return_1", "line_loss_1"} <= curves.keys():
        draw_frontier(curves, runs, results / "frontier.png")
    if curves.keys() >= KEEPS.keys():
        draw_keeps(curves, results / "keeps.png")
    if any(name.startswith(("pendulum", "hopper")) for name in curves):
        draw_returns(curves, results / "control.png")
    return missing
