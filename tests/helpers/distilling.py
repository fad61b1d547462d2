"""A batch whose conversations are about images at their front, and a dense account of the loss that distils."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tests.models.test_two_streams import IMAGES, make
from tests.parallel.test_meshes import BASE
from voco_jax.config_keys import DistillConfig
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.models.read import Read, first_tokens, whole_places
from voco_jax.models.voco import VoCoConfig, VoCoLlama, Whole

PACKS, ROWS, LENGTH, MOST = 8, 2, 48, 3  # rows of a pack
SCANNED = dataclasses.replace(BASE, unroll_layers=False)
# Another model of the same vocabulary: wider, deeper, other numbers of VoCo tokens and heads
TEACHER = dataclasses.replace(
    SCANNED, num_voco_tokens=2,
    llama=dataclasses.replace(
        SCANNED.llama, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, vocab_multiple=1
    ),
)  # fmt: skip


def make_batch(config: VoCoConfig) -> dict:
    """Of each pack two rows: conversations about one image and about two; text alone, text before an image, and one
    image too many for `MOST`, which nobody teaches."""
    rng, K = np.random.default_rng(0), config.num_voco_tokens

    def conversation(images, words, before=0):
        slots = [image * K + i for image in images for i in range(K)]
        text = rng.integers(4, 48, before + words)
        tokens = np.array([*text[:before], *[config.voco_token_id] * len(slots), *text[before:]], np.int32)
        slot_index = np.array([*[-1] * before, *slots, *[-1] * words], np.int32)
        labels = np.arange(len(tokens)) > before + len(slots)
        return Sample(tokens, labels & (rng.random(len(tokens)) < 0.8), slot_index, len(images))

    rows = []
    for _ in range(PACKS):
        for kinds in ([((1,), 4), ((2, 0), 5), ((1,), 3)], [((), 5), ((3,), 6), ((0,), 3, 2)]):
            row = pack_row([conversation(*kind) for kind in kinds], LENGTH).arrays()
            rows.append(row | {"weights": row["weights"] * np.float32(rng.uniform(0.5, 1.5))})
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"pixel_values": rng.normal(size=(PACKS, IMAGES, 8, 8, 3)).astype(np.float32)}


def teacher_rows(batch: dict, teacher: VoCoConfig) -> dict:
    """The rows of a batch as plain LLaVA reads them: patches in place of slots, and a word more before everything; the
    second conversation of each row is missing."""
    length = 80
    rows, K, P = [], BASE.num_voco_tokens, teacher.vision.num_features
    for tokens, segment_ids, slot_index in zip(
        *(batch[k] for k in ("tokens", "segment_ids", "slot_index")), strict=True
    ):
        samples, places, start = [], np.full(LENGTH, -1, np.int32), 0
        for segment in (1, 3):
            at = np.flatnonzero(segment_ids == segment)
            own, slots = [5], [-1]
            for place in at:
                if slot_index[place] < 0:
                    places[place] = start + len(own)
                    own.append(tokens[place]), slots.append(-1)
                elif slot_index[place] % K == 0:
                    own += [0] * P
                    slots += range(slot_index[place] // K * P, (slot_index[place] // K + 1) * P)
            samples.append(Sample(np.array(own, np.int32), np.ones(len(own), bool), np.array(slots, np.int32), 0))
            start += len(own)
        row = pack_row(samples, length)
        rows.append({f"teacher_{name}": getattr(row, name) for name in Read._fields} | {"teacher_places": places})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def dense(
    distill: DistillConfig, alpha: float, model: VoCoLlama, batch: dict, teacher: VoCoLlama | None, by_rows=False
):
    """(sum, {metric: sum}) of the loss, with all logits at once, each term as docs/training.md has it."""
    K, vocab_size = model.config.num_voco_tokens, model.config.llama.vocab_size
    raw = Read(*(jnp.asarray(batch[name]) for name in Read._fields))
    read = first_tokens(raw, batch["num_tokens"], K) if "num_tokens" in batch else raw
    weights, pixels, targets = (jnp.asarray(batch[k]) for k in ("weights", "pixel_values", "targets"))
    taught = batch["teacher_places"] >= 0 if by_rows else whole_places(read, K, MOST)
    if distill.teacher == "prefix":
        of_images = jax.vmap(lambda slot, ids: jnp.isin(ids, jnp.where(slot >= 0, ids, -1)))(
            raw.slot_index, raw.segment_ids
        )
        taught = of_images & (jnp.repeat(batch["num_tokens"], ROWS) < K)[:, None]
    queries = jnp.where(taught & (weights > 0), jnp.arange(LENGTH), -1)
    wants = dict(layers=bool(distill.beta), queries=queries if distill.attention else None)
    student, whole = model.streams(
        read, pixels, whole=Whole(MOST) if distill.teacher in ("self", "ema") else None, **wants
    )
    by = model if teacher is None else teacher
    if distill.teacher == "prefix":
        said = model.streams(raw, pixels)[0]
    elif by_rows:
        theirs = Read(*(batch[f"teacher_{name}"] for name in Read._fields))
        said = teacher.streams(theirs, pixels)[0]
        places = jnp.maximum(batch["teacher_places"], 0)
        said = said._replace(hidden=said.hidden[jnp.arange(len(places))[:, None], places])
    elif teacher is not None:
        said = teacher.streams(read, pixels, compressed=False, whole=Whole(MOST, slots_per_image=K), **wants)[1]
    else:
        said = whole
    said, teacher_logits = jax.lax.stop_gradient((said, by.llama.logits(said.hidden)))
    logits = model.llama.logits(student.hidden)
    at = lambda logits: -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]  # noqa: E731
    entropy, T = at(logits), distill.temperature
    log_p, log_q = (jax.nn.log_softmax(x[..., :vocab_size] / T) for x in (teacher_logits, logits))
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    u = jnp.where(taught, weights, 0)
    sums = {"cross_entropy": (entropy * weights).sum(), "kl": (kl * u).sum(), "taught": u.sum()}
    total = (jnp.where(taught, (1 - alpha) * entropy + alpha * T**2 * kl, entropy) * weights).sum()
    if distill.beta:
        a, b = (x.layers[jnp.array(distill.layers)] for x in (student, said))
        cosine = (a * b).sum(-1) / jnp.maximum(jnp.linalg.norm(a + 1e-30, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-20)
        sums["feature"] = (jnp.where(taught & (weights > 0), (1 - cosine).mean(0), 0) * weights).sum()
        total += distill.beta * sums["feature"]
    if distill.attention:
        p, q = (x.attention[jnp.array(distill.attention_layers)] for x in (said, student))
        divergence = jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - jnp.log(q)), 0).sum(-1).mean(0)
        looked_at = p[0].sum(-1) > 0.5
        means = (divergence * looked_at).sum(1) / looked_at.sum(1)
        sums["attention"] = (means * u.reshape(PACKS, -1).sum(1)).sum()
        total += distill.attention * sums["attention"]
    if distill.whole_weight:
        sums["whole_cross_entropy"] = (at(model.llama.logits(whole.hidden)) * u).sum()
        total += distill.whole_weight * sums["whole_cross_entropy"]
    return total, sums


def make_teacher(config: VoCoConfig) -> tuple[nnx.GraphDef, dict]:
    """A model with other parameters than `make(config)` has."""
    graphdef, params = make(config)
    rng = np.random.default_rng(1)
    return graphdef, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype) * np.std(x), params)
