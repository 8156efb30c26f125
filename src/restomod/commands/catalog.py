"""Summary and example of every command, in the groups of `restomod --help`.

Only the standard library is imported, so that `restomod --help` is fast.
"""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """Two lines at the top of a command's help."""

    summary: str
    example: str
    """Complete command line. It works in an empty folder, or after `FIRST_STEPS` and other examples."""


FIRST_STEPS = {  # command line -> what it does
    "restomod train quickstart": "Train a small GPT-2 on a laptop CPU in minutes.",
    "restomod sample runs/quickstart": "Generate text with the trained model.",
    "restomod eval runs/quickstart": "Compute its validation loss and its accuracy on HellaSwag.",
}
GROUPS = {
    "prepare": {
        "prepare": Command(
            "Tokenize text into a folder of verified token shards.",
            "restomod prepare python-stdlib --out data/stdlib",
        ),
        "data": Command(
            "Show the contents of a folder of token shards.",
            "restomod data data/stdlib --verify",
        ),
    },
    "train": {
        "plan": Command(
            "Estimate memory, time, cost and final loss of a run before it starts.",
            "restomod plan gpt2-124m --gpu h100 --gpus 8 --price 2.5",
        ),
        "train": Command(
            "Train a model from a preset, or resume a run.",
            "restomod train quickstart --steps 300 --out runs/short",
        ),
    },
    "evaluate": {
        "sample": Command(
            "Generate text with the model of a run, or with any GPT-2.",
            'restomod sample runs/quickstart --prompt "def main():" --max-tokens 50',
        ),
        "compare-samples": Command(
            "Generate text with two models from the same prompts, side by side.",
            "restomod compare-samples runs/quickstart gpt2 --out samples.html",
        ),
        "eval": Command(
            "Evaluate a model: validation loss, HellaSwag, LAMBADA, ARC, PIQA, Winograd, your own questions.",
            "restomod eval runs/quickstart --tasks validation,hellaswag --limit 100",
        ),
        "inspect": Command(
            "Show statistics and plots of a model's weights, or compare the weights of two models.",
            "restomod inspect runs/quickstart --plots plots",
        ),
    },
    "experiment": {
        "sweep": Command(
            "Train one run for every point of a grid, or for points that a sampler chooses.",
            "restomod sweep quickstart --grid optim.lr=1e-3,2e-3,4e-3 --out sweeps/lr",
        ),
        "compare": Command(
            "Compare runs: loss curves, seeds, significance, tokens to a target loss.",
            "restomod compare runs/quickstart runs/short --plot curves.png",
        ),
        "report": Command(
            "Write an HTML report about runs: curves, evaluations, samples, settings, cost.",
            "restomod report runs/quickstart --out report.html",
        ),
        "watch": Command(
            "Show a run in the browser while it trains.",
            "restomod watch runs/quickstart --port 8124",
        ),
        "verdict": Command(
            "Find symptoms of an unhealthy run, and suggest what to change.",
            "restomod verdict runs/quickstart",
        ),
    },
    "check and measure": {
        "check": Command(
            "Test that a model is correct and can learn: initial loss, causality, gradients, overfitting.",
            "restomod check quickstart --device cpu",
        ),
        "doctor": Command(
            "Test that this machine can train: GPU, software, disk space, memory, speed.",
            "restomod doctor --preset quickstart",
        ),
        "bench": Command(
            "Measure the speed of a training step: tokens/s, time per phase, memory, MFU.",
            "restomod bench step quickstart --micro-batch 2 --json step.json",
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def heading(name: str) -> str:
    """Return the summary and the example of a command, for the top of its help."""
    return f"{COMMANDS[name].summary}\n\nexample: {COMMANDS[name].example}"
