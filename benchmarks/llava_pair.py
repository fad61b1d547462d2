"""The same training twice: a small LLaVA in transformers with torch's AdamW, and in this package.

Weights are made by transformers and taken over by the converter's rules; the batch is the same pictures, tokens and
labels in each side's own form; vision tower frozen, projector and language model trained, everything in float32.
`Peer.step()` and `Ours.step()` take one step and return its loss, waited for.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np
import torch
import transformers

from voco_jax.config import default_config, typed
from voco_jax.convert.formats import FORMATS, recognise
from voco_jax.convert.to_jax import layers_of
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig
from voco_jax.optim import make_schedule
from voco_jax.parallel.mesh import make_mesh
from voco_jax.parallel.sharding import put_batch
from voco_jax.train.from_config import abstract_state, make_optimizer, train_step_of
from voco_jax.train.state import init_opt_state


@dataclasses.dataclass(frozen=True)
class Shape:
    """A LLaVA and its batch. The last two tokens of the vocabulary stand for a picture and for VoCo."""

    vocabulary: int = 32000
    hidden: int = 512
    mlp: int = 1376
    heads: int = 8
    layers: int = 4
    vision_hidden: int = 512
    vision_mlp: int = 2048
    vision_heads: int = 8
    vision_layers: int = 4
    picture: int = 336
    rows: int = 2
    turns: int = 3
    question: tuple[int, int] = (12, 30)  # tokens, at least and at most
    answer: tuple[int, int] = (15, 60)
    system: int = 35  # tokens before the picture

    @property
    def patches(self) -> int:
        return (self.picture // 14) ** 2

    @property
    def picture_token(self) -> int:
        return self.vocabulary - 2

    @property
    def voco_token(self) -> int:
        return self.vocabulary - 1


SMALL = Shape()


def optimizer_config():
    """AdamW as LLaVA is fine-tuned with, at a rate at which a step shows."""
    config = default_config()
    config.optim.update(learning_rate=3e-4, warmup_steps=2, weight_decay=0.01, b1=0.9, b2=0.999, clip_norm=1.0)
    config.train.update(steps=10_000, freeze=("vision_tower",))
    return config


class Conversation(NamedTuple):
    """Token ids [n] with one place, -1, for the picture, and which of them are labels."""

    tokens: np.ndarray
    labels: np.ndarray


def conversations(shape: Shape, seed: int = 0) -> tuple[list[Conversation], np.ndarray]:
    """A batch: system prompt, picture, questions and answers; and pictures [rows, size, size, 3], normalised."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return rng.integers(3, shape.picture_token, size=count).tolist()

    made = []
    for _ in range(shape.rows):
        tokens, labels = [1, *words(shape.system), -1], [False] * (shape.system + 2)
        for _ in range(shape.turns):
            for (least, most), is_label in ((shape.question, False), (shape.answer, True)):
                turn = words(int(rng.integers(least, most + 1)))
                tokens += turn
                labels += [is_label] * len(turn)
        made.append(Conversation(np.array(tokens, np.int32), np.array(labels)))
    pictures = rng.normal(size=(shape.rows, shape.picture, shape.picture, 3)).astype(np.float32)
    return made, pictures


# ---- transformers ----------------------------------------------------------------------------------------------


def make_llava(shape: Shape, seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    """As transformers initialises it, in training mode; it has no dropout."""
    torch.manual_seed(seed)
    text = transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp, rms_norm_eps=1e-5,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=shape.vision_hidden, intermediate_size=shape.vision_mlp, num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads, image_size=shape.picture, patch_size=14,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=shape.picture_token,
        image_seq_length=shape.patches, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).train()


class Peer:
    """A training step as users of transformers write it. `variant` is torch's AdamW: 'foreach' or 'fused'."""

    def __init__(self, shape: Shape, variant: str = "fused", compiled: bool = False):
        self.model = make_llava(shape)
        self.model.model.vision_tower.requires_grad_(False)
        self.batch = peer_batch(shape, *conversations(shape))
        optim = optimizer_config().optim
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        decayed = [p for p in trained.values() if p.ndim > 1]  # transformers' Trainer: neither norms nor biases
        groups = [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._parameters = list(trained.values())
        self._optimizer = torch.optim.AdamW(
            groups, lr=optim.learning_rate, betas=(optim.b1, optim.b2), eps=1e-8, **{variant: True}
        )
        self._clip_norm = optim.clip_norm
        self._rates = make_schedule(typed(optimizer_config()).optim, optimizer_config().train.steps)
        self._forward = torch.compile(self.model) if compiled else self.model
        self._count = 0

    def step(self) -> float:
        rate = float(self._rates(self._count))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._count += 1
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._forward(**self.batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm, foreach=True)
        self._optimizer.step()
        return loss.item()


def peer_batch(shape: Shape, made: list[Conversation], pictures: np.ndarray) -> dict[str, torch.Tensor]:
    """What `LlavaForConditionalGeneration` takes: padding on the right, -100 where there is no label."""
    length = row_length(shape, made)
    ids = np.zeros((len(made), length), np.int64)
    labels, mask = np.full_like(ids, -100), np.zeros_like(ids)
    for row, conversation in enumerate(made):
        sample = expand(conversation, shape.patches, shape.picture_token)
        n = len(sample)
        ids[row, :n], mask[row, :n] = sample.tokens, 1
        labels[row, :n] = np.where(sample.labels, sample.tokens, -100)
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
        "pixel_values": torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    }


# ---- This package ----------------------------------------------------------------------------------------------


class Ours:
    """The trainer's step over a mesh of one device, as the trainer calls it. `compressor` 'none' is the peer's model;
    'voco' presses the same pictures into one token each."""

    def __init__(self, shape: Shape, compressor: str = "none", attention: str = "xla", unroll: bool = True):
        config = optimizer_config()
        model_config = VoCoConfig(
            llama=LlamaConfig(
                vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp, rms_norm_eps=1e-5,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
            ),
            vision=ViTConfig(
                image_size=shape.picture, hidden_size=shape.vision_hidden, intermediate_size=shape.vision_mlp,
                num_hidden_layers=shape.vision_layers, num_attention_heads=shape.vision_heads,
            ),
            compressor=compressor, voco_token_id=shape.voco_token, suffix_ids=(29871, 13) if shape == SMALL else (5, 6),
            attention=attention, unroll_layers=unroll,
        )  # fmt: skip
        self.mesh = make_mesh(config.mesh, jax.devices()[:1])
        optimizer = make_optimizer(config)
        with jax.set_mesh(self.mesh):
            state = abstract_state(config, model_config, optimizer, self.mesh)
            self._step = train_step_of(config, state, optimizer)
            self.params = take_over(make_llava(shape), state.params)
            self.opt_state = init_opt_state(optimizer, self.params, state)
        self.batch = our_batch(shape, model_config, self.mesh, *conversations(shape))

    def step(self) -> float:
        with jax.set_mesh(self.mesh):
            self.params, self.opt_state, metrics = self._step(self.params, self.opt_state, self.batch)
        jax.block_until_ready((self.params, self.opt_state))
        return float(metrics["loss"])

    def lowered(self):
        """The step, to be looked at."""
        with jax.set_mesh(self.mesh):
            return self._step.lower(self.params, self.opt_state, self.batch)


def take_over(model: torch.nn.Module, params: dict) -> dict:
    """Our parameters, in their places, from a model of transformers, by the converter's table."""
    theirs = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    format = recognise(theirs, FORMATS, ("llm", "projector", "vision"), "transformers", "a LLaVA's tensors")
    sources: dict[str, list[tuple]] = {}
    for path, rule, layer, shape in layers_of(params):
        sources.setdefault(path, []).append((rule, layer, shape))

    def place(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator=".")
        arrays = [
            rule.transform.to_ours(theirs[format.their_name(rule, layer)], shape)
            for rule, layer, shape in sources[path]
        ]
        array = np.stack(arrays) if ".layers." in path else arrays[0]
        # A copy: JAX would share NumPy's memory, and the step gives its buffers up
        return jax.device_put(
            np.ascontiguousarray(array, leaf.dtype).reshape(leaf.shape), leaf.sharding, may_alias=False
        )

    return jax.tree_util.tree_map_with_path(place, params)


def our_batch(shape: Shape, config: VoCoConfig, mesh: Mesh, made: list[Conversation], pictures: np.ndarray) -> dict:
    """A conversation a row, as the peer has it."""
    token = shape.voco_token if config.compressor == "voco" else shape.picture_token
    samples = [expand(conversation, config.num_visual_tokens, token) for conversation in made]
    length = max(len(sample) for sample in samples)
    packed = [pack_row([sample], length).arrays() for sample in samples]
    arrays = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    return put_batch(mesh, arrays | {"pixel_values": pictures[:, None]})


# ---- Both ------------------------------------------------------------------------------------------------------


def expand(conversation: Conversation, places: int, token: int) -> Sample:
    """The picture's place becomes as many as its visual tokens take."""
    at = int(np.flatnonzero(conversation.tokens == -1)[0])

    def filled(array, value):
        return np.concatenate([array[:at], np.full(places, value, array.dtype), array[at + 1 :]])

    slot_index = np.full(len(conversation.tokens) - 1 + places, -1, np.int32)
    slot_index[at : at + places] = np.arange(places)
    return Sample(filled(conversation.tokens, token), filled(conversation.labels, False), slot_index, num_images=1)


def row_length(shape: Shape, made: list[Conversation]) -> int:
    return max(len(conversation.tokens) - 1 + shape.patches for conversation in made)


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Relative, of losses step by step."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
