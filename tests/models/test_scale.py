"""The real dimensions, without their memory: the 7B model is traced and lowered from shapes alone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from voco_jax.config import default_config
from voco_jax.models import presets
from voco_jax.models.build import abstract_model
from voco_jax.models.voco import VoCoConfig
from voco_jax.train.from_config import loss_of, make_optimizer
from voco_jax.train.step import make_train_step


def lowered_step(num_layers: int) -> str:
    """The training step of VoCo-LLaMA 7B with so many decoder layers, two images and 2,048 tokens, as StableHLO."""
    llama = dataclasses.replace(presets.LLAMA["vicuna-7b"], vocab_size=32001, num_hidden_layers=num_layers)
    config = VoCoConfig(llama=llama, vision=presets.VIT["clip-vit-l-14-336"], num_voco_tokens=2, dtype="bfloat16")
    graphdef, params = abstract_model(config)
    optimizer = make_optimizer(default_config())
    integers = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    batch = {name: integers for name in ("tokens", "positions", "segment_ids", "slot_index", "targets")}
    batch["weights"] = jax.ShapeDtypeStruct((1, 2048), jnp.float32)
    batch["pixel_values"] = jax.ShapeDtypeStruct((1, 2, 336, 336, 3), jnp.float32)
    step = make_train_step(graphdef, loss_of(default_config()), optimizer)
    return step.lower(params, jax.eval_shape(optimizer.init, params), batch).as_text()


@pytest.mark.slow
def test_32_layers_compile_like_one():
    two, all_layers = lowered_step(2), lowered_step(32)
    assert "tensor<32x4096x11008xf32>" in all_layers  # parameters stacked, in float32 …
    assert "tensor<1x2048x11008xbf16>" in all_layers  # … and computation in bfloat16
    assert abs(len(all_layers.splitlines()) - len(two.splitlines())) < 10
