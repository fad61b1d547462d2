"""`python -m voco_jax`: which commands there are."""

import sys

COMMANDS = {
    "voco_jax.train": "train a model by a config file, or go on with it",
    "voco_jax.train.curves": "draw a run's losses and what else it has logged",
    "voco_jax.evaluate": "score a run on its test set",
    "voco_jax.ask": "ask about pictures or a video",
    "voco_jax.chat": "a conversation about pictures",
    "voco_jax.compress": "pictures and videos into a memory file",
    "voco_jax.memory": "list, check and merge memory files",
    "voco_jax.preview": "draw a training batch",
    "voco_jax.aot": "does a run fit a TPU slice, and how fast should it be? Asked without a TPU",
}


def main() -> None:
    print("Commands, each with --help:\n")
    for name, what in COMMANDS.items():
        print(f"  python -m {name:<24}{what}")
    print("\nIn Python: voco_jax.load(RUN). Weights of other projects: voco convert --help")
    if unknown := sys.argv[1:]:
        sys.exit(0 if unknown[0] in ("-h", "--help") else 2)


if __name__ == "__main__":
    main()
