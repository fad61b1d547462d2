"""Run directories, trained and converted, in which a file is damaged, gone, another run's or no file at all; read as
asking, converting and resuming do."""

from collections.abc import Callable
import contextlib
import io
import json
import os
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage, dumps, odd_json
from tests.helpers import tiny
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.run import load_run
from voco_jax.config import KEYS, flatten, load_config, save_config
from voco_jax.convert.inspect import describe_run
from voco_jax.convert.sources import open_source
from voco_jax.convert.to_hf import to_hf
from voco_jax.convert.to_jax import Options, to_jax
from voco_jax.data.from_config import make_model_config
from voco_jax.data.tokenizer import load_run_tokenizer, save_tokenizer, train_tokenizer
from voco_jax.models.build import abstract_model

SMALL = {
    "model__llama__hidden_size": 8, "model__llama__intermediate_size": 8, "model__llama__head_dim": 8,
    "model__llama__num_attention_heads": 1, "model__llama__num_key_value_heads": 1,
    "model__vision__hidden_size": 8, "model__vision__intermediate_size": 8, "model__vision__num_attention_heads": 1,
}  # fmt: skip
OPT_STATE = {"m": jnp.arange(6, dtype=jnp.float32)}
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "metadata", "_METADATA", "_sharding",
        "_CHECKPOINT_METADATA", "process_0", "generation_config.json")  # fmt: skip


def make_run(run: Path, seed: int, **changes) -> Path:
    """As training leaves one, with checkpoints of steps 1 and 2, of random numbers."""
    run.mkdir(parents=True)
    config = tiny.config(run, **SMALL | changes)
    words = ["red", "blue", "green", "what", "is", "it", "a", "cat", "dog"]
    tokenizer = train_tokenizer([" ".join(np.random.default_rng(seed).permutation(words))] * 9, 270)
    save_config(config, run / "config.json")
    save_tokenizer(tokenizer, run / "tokenizer")
    params = abstract_model(make_model_config(config, tokenizer))[1]
    with contextlib.closing(Checkpointer(run, create=True, config=config)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, _drawn(params, [seed, step]), OPT_STATE, {"batches": step})
    return run


def _drawn(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


class Runs(Target):
    """Two runs of each kind, of which one is damaged, by parts of the other too."""

    count = 2000

    def make(self, directory: Path) -> None:
        self._runs, self._sound, self._params = {}, {}, {}
        for seed, name in enumerate(("trained", "other trained")):
            run = self._runs[name] = make_run(directory / name, seed)
            to_hf(run, directory / f"hf {seed}", "llava-hf", None, 10**9)
            converted = self._runs[name.replace("trained", "converted")] = directory / f"converted {seed}"
            to_jax(open_source(directory / f"hf {seed}"), converted, None, Options())
        for name in ("trained", "converted"):
            run = self._runs[name]
            with contextlib.closing(Checkpointer(run)) as checkpointer:
                sums = {step: checkpointer.about(step)["checksums"]["params"] for step in checkpointer.steps()}
            config = load_config(run / "config.json")
            self._sound[name] = flatten(config), _tokenizer(run), sums
            self._params[name] = abstract_model(make_model_config(config, load_run_tokenizer(run)))[1]

    def case(self, rng: np.random.Generator, directory: Path) -> tuple[str, Callable[[], str | None]]:
        kind = str(rng.choice(["trained", "converted"]))
        run, other = directory / "case", self._runs[f"other {kind}"]
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self._runs[kind], run, copy_function=os.link)
        what = self._spoil(rng, run, other)
        reads = [self._load, self._load, self._inspect, self._resume, self._export]
        read = reads[rng.integers(len(reads))]
        return f"{kind}, {what}, {read.__name__}", lambda: read(kind, run)

    def _spoil(self, rng: np.random.Generator, run: Path, other: Path) -> str:
        files = sorted(path for path in run.rglob("*") if path.is_file())
        # As many cases of each kind of file as of any other, though most files are arrays'
        of_kind = {}
        for file in files:
            name = file.name if file.name in JSON or file.parent.name != "d" else "d"
            of_kind.setdefault(name, []).append(file)
        among = of_kind[sorted(of_kind)[rng.integers(len(of_kind))]]
        file = among[rng.integers(len(among))]
        content, short = file.read_bytes(), str(file.relative_to(run))
        action = rng.choice(["damage", "damage", "damage", "json", "json", "remove", "other", "kind", "tree", "huge"])
        if action == "json" and file.name in JSON:
            what, value = odd_json(rng, json.loads(content))
            _replace(file, dumps(value))
            return f"{short}: {what}"
        if action == "remove":
            file.unlink()
            return f"{short} removed"
        if action == "other" and (there := other / file.relative_to(run)).is_file():
            _replace(file, there.read_bytes())
            return f"{short} of the other run"
        if action == "kind":
            return f"{short} is {_other_kind(rng, file)}"
        if action == "tree":
            return self._other_tree(rng, run, other)
        if action == "huge" and file.name in JSON:
            text = str(rng.choice(["[[],", '{"":0},', "1,", '"a":', "["]))
            _replace(file, b"[" + text.encode() * int(2.0 ** rng.uniform(10, 24)) + b"0]")
            return f"{short}: {text!r} again and again"
        what, damaged = damage(rng, content)
        _replace(file, damaged)
        return f"{short}: {what}"

    def _other_tree(self, rng: np.random.Generator, run: Path, other: Path) -> str:
        trees = sorted(path for path in run.rglob("*") if path.is_dir())
        tree = trees[rng.integers(len(trees))]
        short = tree.relative_to(run)
        shutil.rmtree(tree)
        sources = [other / short, other / "tokenizer", *other.glob("checkpoints/*"), *other.glob("checkpoints/*/*")]
        sources = [source for source in sources if source.is_dir()]
        if rng.random() < 0.3:
            return f"{short} removed"
        source = sources[0 if rng.random() < 0.5 else rng.integers(len(sources))]
        shutil.copytree(source, tree)
        return f"{short} is {source.relative_to(other)} of the other run"

    # ---- Reading -----------------------------------------------------------------------------------------------

    def _load(self, kind: str, run: Path) -> str | None:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            loaded = load_run(run)
        config, tokenizer, sums = self._sound[kind]
        if loaded.checksums != sums.get(loaded.step):
            return f"other parameters: {said.getvalue()}"
        return self._changed(kind, run, said.getvalue())

    def _inspect(self, kind: str, run: Path) -> str | None:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            describe_run(run)
        return self._changed(kind, run, said.getvalue())

    def _export(self, kind: str, run: Path) -> str | None:
        shutil.rmtree(out := run.with_name("exported"), ignore_errors=True)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                to_hf(run, out, "voco", None, 10**9)
            except BaseException:
                if out.exists() or list(out.parent.glob(".exported*")):
                    return "something is left at the destination"
                raise
        return self._changed(kind, run, said.getvalue())

    def _resume(self, kind: str, run: Path) -> str | None:
        config = load_config(run / "config.json")
        lines = []
        with (
            contextlib.redirect_stderr(io.StringIO()) as said,
            contextlib.closing(Checkpointer(run, create=True, config=config)) as checkpointer,
        ):
            resumed = checkpointer.resume(self._params[kind], jax.eval_shape(lambda: OPT_STATE), lines.append)
            checkpointer.wait()
        if resumed is None:
            return None if not any((run / "checkpoints").glob("[0-9]/*")) else "a run begins anew"
        return self._changed(kind, run, said.getvalue() + "".join(lines))

    def _changed(self, kind: str, run: Path, said: str) -> str | None:
        """What of a run that was read is other than it was, and nothing was said of it."""
        if "has no checksums" in said:
            return None
        config, tokenizer, _ = self._sound[kind]
        now = flatten(load_config(run / "config.json"))
        for key in sorted(config.keys() | now.keys()):
            counts = key in KEYS and KEYS[key].rules.on_load != "free"
            if counts and now.get(key) != config.get(key) and key not in said:
                return f"{key} changed: {said}"
        if _tokenizer(run) != tokenizer:
            return f"another tokenizer: {said}"
        return None


def _tokenizer(run: Path) -> tuple:
    tokenizer = load_run_tokenizer(run)
    return tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, tokenizer.origin.stop_ids


def _replace(file: Path, content: bytes) -> None:
    """Not written into, which other directories have too."""
    file.unlink()
    file.write_bytes(content)


def _other_kind(rng: np.random.Generator, file: Path) -> str:
    file.unlink()
    kind = str(rng.choice(["a pipe", "a directory", "a link to a device", "a link to itself", "a link to nothing",
                           "a link to the directory", "empty"]))  # fmt: skip
    match kind:
        case "a pipe":
            os.mkfifo(file)
        case "a directory":
            file.mkdir()
        case "a link to a device":
            file.symlink_to("/dev/zero")
        case "a link to itself":
            file.symlink_to(file)
        case "a link to nothing":
            file.symlink_to(file.with_name("nothing"))
        case "a link to the directory":
            file.symlink_to(file.parent)
        case "empty":
            file.touch()
    return kind
