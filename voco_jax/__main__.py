"""`voco COMMAND …`, or `python -m voco_jax COMMAND …`: every command of voco_jax. Only the chosen one is imported."""

import difflib
import importlib
from importlib.metadata import version
import sys

from voco_jax import interrupts
from voco_jax.errors import one_line_errors

# Name: what runs it, and one line for --help
COMMANDS = {
    "train": ("voco_jax.train.__main__:command", "train a model as a config file says, or continue a run"),
    "curves": ("voco_jax.train.curves:main", "plot the losses and the other logged values of runs"),
    "evaluate": ("voco_jax.evaluate:main", "score a run on its test set"),
    "ask": ("voco_jax.ask:main", "ask questions about images or a video"),
    "chat": ("voco_jax.chat:main", "hold a conversation about images"),
    "serve": ("voco_jax.serve.__main__:main", "answer questions over HTTP, as OpenAI's API does"),
    "compress": ("voco_jax.compress:main", "compress images and videos into a memory file"),
    "memory": ("voco_jax.memory:main", "list, check and merge memory files"),
    "preview": ("voco_jax.preview.__main__:main", "draw a training batch"),
    "aot": ("voco_jax.aot.__main__:main", "compile a step for a TPU slice: does it fit, how fast should it be?"),
    "convert": ("voco_jax.convert.__main__:main", "convert, merge and compare PyTorch and Hugging Face checkpoints"),
    "store-logits": ("voco_jax.store_logits:main", "store what a teacher says of the training data, to distil from"),
    "build-records": ("voco_jax.data.shards.__main__:main", "write training records into ArrayRecord shards"),
    "make-video-questions": ("voco_jax.data.make_video_questions:main", "make the video demo's clips and questions"),
    "make-scene-questions": ("voco_jax.data.make_scene_questions:main", "make pictures of objects, and questions"),
    "check-logits": ("voco_jax.convert.check_logits:main", "compare a converted checkpoint with recorded values"),
}


def help_text() -> str:
    lines = [f"  {name:<22}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: voco COMMAND … | voco --version",
            "",
            *lines,
            "",
            "voco COMMAND --help explains one of them.",
        ]
    )


@one_line_errors
def show(text: str) -> None:
    print(text)


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "--version"):
        show(f"voco_jax {version('voco_jax')}" if name == "--version" else help_text())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean 'voco {near[0]}'?" if near else "voco --help lists the commands"
        print(f"error: {name!r} is not a command of voco; {hint}", file=sys.stderr)
        sys.exit(2)
    if not interrupts.listening():
        interrupts.listen(terminates=name == "train")
    module, _, function = COMMANDS[name][0].partition(":")
    sys.argv = [f"voco {name}", *arguments]
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
