"""Training with `train.compress_gradients` off: memories are constants, and what acts through them alone is frozen."""

import dataclasses
import shutil

from flax import nnx
from flax.traverse_util import flatten_dict
import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.losses import label_loss
from tests.models.test_two_streams import make
from tests.parallel.test_mesh_steps import ADAPTED
from tests.parallel.test_meshes import BASE, random_batch
from voco_jax.checkpoint.run import load_run
from voco_jax.checkpoint.workdir import check_workdir
from voco_jax.config import default_config
from voco_jax.errors import UserError
from voco_jax.models import voco
from voco_jax.models.build import init_params
from voco_jax.train.from_config import trainable_filter
from voco_jax.train.loop import train

EMBEDDING = dataclasses.replace(BASE, compressor="voco_embedding")


def config_of(*freeze: str):
    config = default_config()
    config.train.freeze, config.train.compress_gradients = freeze, False
    return config


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(BASE, id="unrolled"),
        pytest.param(EMBEDDING, id="embeddings", marks=pytest.mark.slow),
        pytest.param(ADAPTED, id="scanned, remat, LoRA", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_the_read_streams(model, monkeypatch):
    """That of both streams side by side with the slots' keys and values stopped on their way from one to the other."""
    graphdef, params = make(model)
    batch = random_batch(model)
    batch["weights"][batch["slot_index"] >= 0] = 0  # what follows a slot is never a label (data/conversations.py)
    fill = voco.fill_slots

    @jax.jit
    def computed(params, batch):
        def loss_and_gradient(**options):
            return jax.value_and_grad(lambda p: label_loss(graphdef, p, batch, **options))(params)

        found, whole = loss_and_gradient(compress_gradients=False), loss_and_gradient()
        monkeypatch.setattr(voco, "fill_slots", lambda text, kept, i: fill(text, jax.lax.stop_gradient(kept), i))
        return found, whole, loss_and_gradient()

    results = jax.device_get(computed(params, batch))
    (loss, found), (whole_loss, whole), (stopped_loss, stopped) = ((x, flatten_dict(g)) for x, g in results)
    np.testing.assert_allclose([loss, stopped_loss], whole_loss, rtol=1e-6)
    for keys, gradient in found.items():
        np.testing.assert_allclose(gradient, stopped[keys], rtol=1e-4, atol=1e-5 * np.abs(stopped[keys]).max())
        if keys[0] in ("vision_tower", "projector", "compressor"):
            assert not gradient.any(), keys
    k_proj = next(keys for keys in found if "k_proj" in keys and keys[-1] in ("kernel", "lora_b"))
    assert np.abs(found[k_proj] - whole[k_proj]).max() > 0.01 * np.abs(whole[k_proj]).max()  # it is another gradient
    embedding = found["llama", "embed_tokens", "embedding"]
    assert embedding.any() and not embedding[model.voco_token_id].any()


def test_what_acts_through_memories_alone_is_frozen():
    _, params = make(BASE)
    trained, frozen = trainable_filter(config_of(), BASE).split(params)
    assert set(trained) == {"llama"} and set(frozen) == {"vision_tower", "projector"}
    # Not even the VoCo token's row of a frozen embedding, which would decay
    trained, _ = trainable_filter(config_of("vision_tower", "llama.embed_tokens"), BASE).split(params)
    assert set(trained) == {"llama"} and "embed_tokens" not in trained["llama"]
    trained, frozen = trainable_filter(config_of(), EMBEDDING).split(make(EMBEDDING)[1])
    assert set(trained) == {"llama"} and set(frozen) == {"vision_tower", "projector", "compressor"}
    trained, _ = trainable_filter(config_of(), ADAPTED).split(make(ADAPTED)[1])
    assert all("lora" in keys for keys in flatten_dict(trained))


def test_what_cannot_be():
    with pytest.raises(
        UserError, match="expected something to train, found llama, vision_tower, projector .some of it "
    ):
        trainable_filter(config_of("llama"), BASE).split(make(BASE)[1])
    with pytest.raises(UserError, match="compress_gradients: expected True with compressor 'none', which has no comp"):
        trainable_filter(config_of(), dataclasses.replace(BASE, compressor="none"))


@pytest.mark.slow
def test_a_run_trains_and_goes_on(tmp_path, capsys):
    config = tiny.config(
        tmp_path / "run", train__compress_gradients=False, train__steps=4, train__checkpoint_every=2,
        optim__weight_decay=0.1,
    )  # fmt: skip
    run = train(config)
    assert " of them trained" in next(x for x in capsys.readouterr().out.splitlines() if x.startswith("model: "))
    restored = load_run(run)
    found = flatten_dict(params_of(restored))
    for keys, first in flatten_dict(jax.device_get(init_params(restored.model.config, config.seed))).items():
        assert (found[keys] == first).all() == (keys[0] != "llama"), keys

    shutil.rmtree(run / "checkpoints" / "4")
    train(config)
    assert "resuming, at step 2 of 4" in capsys.readouterr().out
    again = flatten_dict(params_of(load_run(run)))
    assert all((again[keys] == leaf).all() for keys, leaf in found.items())
    with pytest.raises(UserError, match="holds a run with train.compress_gradients = False, this config has True"):
        check_workdir(run, tiny.config(run, train__steps=4, train__checkpoint_every=2, optim__weight_decay=0.1))


def params_of(run) -> dict:
    return jax.device_get(nnx.to_pure_dict(nnx.state(run.model)))
