"""What `--tokens auto` is worth: accuracy against the tokens that are read of each image, by the confidence asked for.

All numbers of tokens have been tried for every question, so that what any confidence would have chosen is known.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from voco_jax.eval.scoring import normalize
from voco_jax.infer.auto_tokens import AutoTokens, Try

CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)  # that are compared, beside the one asked for


def compare(auto: AutoTokens, tries: Sequence[Sequence[Try]], truths: Sequence[str]) -> dict:
    """Of each question's answers with every number of tokens, and the right one: accuracy, mean tokens of the answers
    that are taken, and mean tokens of all that are then tried, by confidence; and accuracy by a fixed number.

    Questions without images, which have one answer, count with it everywhere.
    """
    right = [[normalize(one.text) == normalize(truth) for one in of] for of, truth in zip(tries, truths, strict=True)]

    def chosen(places: Sequence[int]) -> dict[str, float]:
        pairs = list(zip(tries, places, strict=True))
        return {
            "accuracy": float(np.mean([of[i] for of, i in zip(right, places, strict=True)])),
            "mean_tokens": float(np.mean([of[i].tokens for of, i in pairs])),
            "mean_tokens_tried": float(np.mean([sum(one.tokens for one in of[: i + 1]) for of, i in pairs])),
        }

    def sure(confidence: float) -> dict[str, float]:
        rule = dataclasses.replace(auto, confidence=confidence)
        return {"confidence": confidence} | chosen([of.index(rule.decide(of)) for of in tries])

    def fixed(tokens: int) -> dict[str, float]:
        places = [max((i for i, one in enumerate(of) if one.tokens <= tokens), default=0) for of in tries]
        return {"tokens": tokens, "accuracy": chosen(places)["accuracy"]}

    numbers = sorted({one.tokens for of in tries for one in of if one.tokens})
    return {
        **sure(auto.confidence),
        "by_confidence": [sure(confidence) for confidence in sorted({*CONFIDENCES, auto.confidence})],
        "by_tokens": [fixed(tokens) for tokens in numbers],
    }


def table(found: dict) -> str:
    """Of `compare`, as Markdown: fixed numbers of tokens, then confidences; the one asked for in bold."""
    lines = ["| tokens read | right | mean tokens | with all tries |", "|---|---:|---:|---:|"]
    lines += [f"| {of['tokens']} | {of['accuracy']:.1%} | {of['tokens']} | |" for of in found["by_tokens"]]
    for of in found["by_confidence"]:
        name = f"auto, confidence {of['confidence']:g}"
        name = f"**{name}**" if of["confidence"] == found["confidence"] else name
        lines.append(f"| {name} | {of['accuracy']:.1%} | {of['mean_tokens']:.2f} | {of['mean_tokens_tried']:.2f} |")
    return "\n".join(lines).replace("%", " %")


def draw(found: dict, path: Path, title: str) -> None:
    """Accuracy against mean tokens: a curve of confidences, and points of fixed numbers."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    fixed, sure = found["by_tokens"], found["by_confidence"]
    axis.plot(
        [of["tokens"] for of in fixed], [100 * of["accuracy"] for of in fixed], "o--", color="#9ca3af",
        label="a fixed number",
    )  # fmt: skip
    axis.plot(
        [of["mean_tokens"] for of in sure], [100 * of["accuracy"] for of in sure], ".-", color="#2563eb",
        label=f"auto, confidence {sure[0]['confidence']:g} to {sure[-1]['confidence']:g}",
    )  # fmt: skip
    axis.plot([found["mean_tokens"]], [100 * found["accuracy"]], "D", color="#2563eb", markersize=7)
    axis.annotate(
        f"confidence {found['confidence']:g}", (found["mean_tokens"], 100 * found["accuracy"]), xytext=(8, -12),
        textcoords="offset points", fontsize=9,
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks([of["tokens"] for of in fixed], [str(of["tokens"]) for of in fixed])
    axis.set_xlabel("tokens read of each image, mean")
    axis.set_ylabel("questions right, %")
    axis.set_title(title, fontsize=11, parse_math=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
