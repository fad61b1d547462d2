"""Lengths and pictures as in LLaVA-1.5's mix665k, drawn at random: for tests and benchmarks of packing.

The number of records of each part and which pictures it is about are as published (llava_v1_5_mix665k.json: 665,298
records). The rest are assumptions, not measurements: the number of tokens of a conversation is drawn from a log-normal
law with a mean and spread guessed from the kind of the part (turns, length of answers, boxes), and which pictures of a
collection a part is about is drawn uniformly. A length counts one visual token; `tokens_per_image` adds the others.
"""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
    """Records of one source. Tokens are those of the turns: PROMPT and visual tokens come on top."""

    name: str
    records: int
    tokens: int  # mean
    spread: float  # of the logarithm
    pictures: str = ""  # the collection of its pictures; "": text only
    per_picture: int = 1  # records about one picture


PROMPT = 45  # tokens of the system prompt, in every record
PARTS = (
    Part("ShareGPT", 40_688, 1_800, 1.0),  # about 1,200 after the cut at 2,048
    Part("LLaVA detail", 23_240, 260, 0.25, "COCO"),
    Part("LLaVA conversation", 57_669, 370, 0.3, "COCO"),
    Part("LLaVA reasoning", 76_803, 270, 0.25, "COCO"),
    Part("VQAv2", 82_783, 200, 0.3, "COCO"),
    Part("GQA", 72_140, 280, 0.4, "Visual Genome"),
    Part("OKVQA", 8_998, 70, 0.3, "COCO"),
    Part("OCR-VQA", 80_000, 160, 0.25, "book covers"),
    Part("A-OKVQA", 66_160, 95, 0.2, "COCO", per_picture=4),
    Part("TextCaps", 21_953, 45, 0.2, "TextVQA"),
    Part("RefCOCO", 48_447, 450, 0.4, "COCO", per_picture=2),
    Part("Visual Genome", 86_417, 650, 0.4, "Visual Genome"),
)
PICTURES = {"COCO": 118_287, "Visual Genome": 108_077, "book covers": 200_000, "TextVQA": 21_953}


class Mix(NamedTuple):
    """Records in shuffled order, every array int64 [records]."""

    lengths: np.ndarray  # tokens, at most `row_length`
    num_images: np.ndarray  # 0 or 1
    pictures: np.ndarray  # the picture's number; -1: none


def mix665k(seed: int = 0, records: int = 665_298, tokens_per_image: int = 1, row_length: int = 2048) -> Mix:
    """The mix, or one of `records` records alike: as many of each part and as many pictures in proportion."""
    rng = np.random.default_rng(seed)
    scale = records / sum(part.records for part in PARTS)
    pictures_of = {name: round(count * scale) for name, count in PICTURES.items()}
    first_of = dict(zip(PICTURES, np.cumsum([0, *pictures_of.values()]).tolist(), strict=False))
    lengths, pictures = [], []
    for part in PARTS:
        count = round(part.records * scale)
        tokens = rng.lognormal(np.log(part.tokens) - part.spread**2 / 2, part.spread, count)
        visual = tokens_per_image if part.pictures else 0
        lengths.append(np.minimum(PROMPT + visual + tokens.astype(np.int64), row_length))
        if part.pictures:
            chosen = rng.permutation(pictures_of[part.pictures])[: -(-count // part.per_picture)]
            pictures.append(first_of[part.pictures] + np.repeat(chosen, part.per_picture)[:count])
        else:
            pictures.append(np.full(count, -1))
    order = rng.permutation(sum(map(len, lengths)))
    all_pictures = np.concatenate(pictures)[order]
    return Mix(np.concatenate(lengths)[order], (all_pictures >= 0).astype(np.int64), all_pictures)


class Items(NamedTuple):
    """What `voco_jax.data.best_fit.pack` takes: items of conversations, int64."""

    num_images: np.ndarray  # [items]
    offsets: np.ndarray  # [items + 1]
    lengths: np.ndarray  # [conversations]


def unshared(mix: Mix) -> Items:
    """Every record an item."""
    return Items(mix.num_images, np.arange(len(mix.lengths) + 1), mix.lengths)


def shared(mix: Mix, limit: int = 1024) -> Items:
    """Records of one picture as one item, or as several where they have more than `limit` tokens together."""
    members: list[list[int]] = []
    open_items: dict[int, tuple[int, int]] = {}  # picture -> its latest item, and how many tokens that has
    for record, (length, picture) in enumerate(zip(mix.lengths.tolist(), mix.pictures.tolist(), strict=True)):
        item, tokens = open_items.get(picture, (0, 0))
        if picture >= 0 and tokens and tokens + length <= limit:
            members[item].append(record)
            open_items[picture] = item, tokens + length
        else:
            open_items[picture] = len(members), length
            members.append([record])
    # an item stands where its first record stood: its place is as random, but late places hold fewer pictures
    members = [members[i] for i in np.random.default_rng(len(members)).permutation(len(members))]
    records = np.array([record for item in members for record in item])
    offsets = np.cumsum([0, *map(len, members)])
    return Items(mix.num_images[records[offsets[:-1]]], offsets, mix.lengths[records])
