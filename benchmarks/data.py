"""How fast training data is made: pictures beside the PyTorch route, video beside decoding every frame, packing.

    python -m benchmarks.data --out docs/data.json

Everything in one run on the same files, the two routes taking turns; medians of `--rounds`. Pictures are 640×480 JPEGs
made of photographs that come with scikit-image, at 336 px, two worker processes each:

    PyTorch    DataLoader, Pillow, LLaVA's padding to a square, the CLIP processor of transformers
    voco_jax   the whole pipeline of a training: rows of the JSON file, tokens, pictures, packed batches

What a TPU host needs follows from the step time that `docs/aot/tables.md` estimates.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import importlib.util
import json
from pathlib import Path
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks.machine import machine
from tests.helpers.mix665k import mix665k, shared, unshared
from voco_jax.config import default_config, source, sources
from voco_jax.data.best_fit import Packs, PackShape, pack_items
from voco_jax.data.images import pad_to_square
from voco_jax.data.pipeline import Batches
from voco_jax.data.plan import Pack
from voco_jax.data.records import Clip
from voco_jax.data.training_data import open_training_data
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests" / "fixtures" / "llama_tokenizer"
BATCH, WORKERS, SIZE = 32, 2, 336
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")

# docs/aot/tables.md: a step of configs/voco_7b.py on v5e:8x8 takes 1.76 to 1.91 s; eight hosts of eight chips.
STEP_SECONDS, STEP_PICTURES, HOSTS, HOST_CORES = 1.76, 128, 8, 224
SAMPLE = 20_000  # items from which a shape is judged


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=1280, help="files; the same for both routes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = {
            "machine": machine(),
            "pictures": time_pictures(Path(scratch), args.pictures, args.rounds),
            "video": time_video(Path(scratch), args.rounds),
            "packing": time_packing(),
        }
    pictures = figures["pictures"]
    needed = STEP_PICTURES / HOSTS / STEP_SECONDS
    figures["v5e-64"] = {
        "pictures_per_second_and_host": round(needed, 1),
        "cores": round(needed * pictures["core_ms_per_picture"] / 1000, 2),
        "cores_of_a_host": HOST_CORES,
    }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


# ---- Pictures ---------------------------------------------------------------------------------------------------


def time_pictures(scratch: Path, count: int, rounds: int) -> dict:
    """Pictures a second of both routes, and what a picture and a batch cost on one core."""
    file = make_pictures(scratch, count)
    speeds: dict[str, list[float]] = {"pytorch": [], "voco_jax": []}
    for _ in range(rounds):  # both begin anew: what workers make while the other route runs would be a present
        speeds["pytorch"].append(rate(torch_batches(scratch, file)))
        with contextlib.closing(open_pipeline(scratch, file, WORKERS)) as batches:
            speeds["voco_jax"].append(rate(counted(batches)))
    alone = open_pipeline(scratch, file, 0)
    packs = alone.dataset()
    alone.loader.map(Pack(0, alone.loader.plan[0]))  # what happens once
    start = time.process_time()
    held = sum(int((packs[i]["pixel_values"].max(axis=(2, 3, 4)) > 0).sum()) for i in range(4))
    seconds = time.process_time() - start
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "pytorch_pictures_per_second": round(medians["pytorch"], 1),
        "voco_jax_pictures_per_second": round(medians["voco_jax"], 1),
        "ratio": round(medians["voco_jax"] / medians["pytorch"], 2),
        "ratios_of_rounds": [round(b / a, 2) for a, b in zip(speeds["pytorch"], speeds["voco_jax"], strict=True)],
        "core_ms_per_picture": round(1000 * seconds / held, 2),
        "core_ms_per_batch_of": [held // 4, round(1000 * seconds / 4, 1)],
    }


def make_pictures(scratch: Path, count: int) -> Path:
    """JPEGs of 640×480, cut here and there out of photographs, and a LLaVA file about them."""
    directory = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data"
    photographs = [Image.open(directory / name).convert("RGB") for name in PHOTOGRAPHS]
    rng = np.random.default_rng(0)
    (scratch / "images").mkdir()
    with (scratch / "questions.jsonl").open("w") as file:
        for i in range(count):
            photograph = photographs[i % len(photographs)]
            width, height = photograph.size
            side = rng.uniform(0.6, 1) * min(width / 4, height / 3)
            left, top = rng.uniform(0, width - 4 * side), rng.uniform(0, height - 3 * side)
            box = (left, top, left + 4 * side, top + 3 * side)
            picture = photograph.resize((640, 480), Image.Resampling.BICUBIC, box)
            picture.save(scratch / "images" / f"{i}.jpg", quality=90)
            answer = "It is a photograph. " * int(rng.integers(3, 60))
            turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": i, "image": f"{i}.jpg", "conversations": turns}) + "\n")
    return scratch / "questions.jsonl"


def open_pipeline(scratch: Path, file: Path, workers: int) -> Batches:
    """Batches of some `BATCH` pictures, packed."""
    config = default_config()
    with config.unlocked():
        config.data.train = sources(pictures=source("llava", file=str(file), images=str(scratch / "images")))
        config.data.update(
            batch_size=2, rows_per_pack=2, row_length=2048, images_per_pack=BATCH // 2, conversations_per_record=0,
            num_workers=workers, num_threads=1, prefetch=4,
        )  # fmt: skip
        config.model.vision.image_size = SIZE
        config.model.vision.patch_size = 14
        config.tokenizer.source = str(TOKENIZER)
    return open_training_data(config, log=lambda line: None).batches


def counted(batches: Batches) -> Iterator[int]:
    """Pictures in each batch."""
    for batch in batches:
        yield int((batch["pixel_values"].max(axis=(2, 3, 4)) > 0).sum())


def torch_batches(scratch: Path, file: Path) -> Iterator[int]:
    """Pictures in each batch of the PyTorch route."""
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    files = [scratch / "images" / json.loads(line)["image"] for line in file.read_text().splitlines()]
    loader = torch.utils.data.DataLoader(
        TorchPictures(files, processor), batch_size=BATCH, shuffle=True, num_workers=WORKERS, prefetch_factor=4,
        multiprocessing_context="spawn",  # jax has threads, which a fork would cut
    )  # fmt: skip
    for batch in loader:
        yield len(batch)


class TorchPictures:
    """A map-style dataset as LLaVA's."""

    def __init__(self, files: list[Path], processor):
        self._files, self._processor = files, processor
        self._mean = tuple(int(value * 255) for value in processor.image_mean)

    def __len__(self):
        return len(self._files)

    def __getitem__(self, i):
        image = pad_to_square(Image.open(self._files[i]).convert("RGB"), self._mean)
        return self._processor(image, return_tensors="pt")["pixel_values"][0]


def rate(batches: Iterator[int], warm: int = 12, timed: int = 20) -> float:
    """Pictures a second, once the workers are under way."""
    for _ in range(warm):
        next(batches)
    start, held = time.perf_counter(), 0
    for _ in range(timed):
        held += next(batches)
    return held / (time.perf_counter() - start)


# ---- Video ------------------------------------------------------------------------------------------------------


def time_video(scratch: Path, rounds: int) -> dict:
    """Frames a second of `read_frames` and of decoding every frame, on a minute and a half of video."""
    file = make_video(scratch / "clip.mp4")
    clip = Clip(file)
    figures = {}
    for count in (8, 64):
        times = sample_times(probe(clip), FrameSampling(count))
        sought, every = [], []
        for _ in range(rounds):
            sought.append(seconds(lambda t=times: read_frames(clip, t)))
            every.append(seconds(lambda t=times: decode_every_frame(file, t)))
        fast, slow = statistics.median(sought), statistics.median(every)
        figures[f"{count} frames"] = {
            "frames_per_second": round(count / fast, 1),
            "decoding_every_frame": round(count / slow, 1),
            "ratio": round(slow / fast, 2),
        }
    return figures


def make_video(file: Path) -> Path:
    """Ninety seconds of 640×360 H.264 at 25 frames a second, a keyframe every two seconds: photographs passing by."""
    import av

    directory = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data"
    wide = Image.open(directory / "hubble_deep_field.jpg").convert("RGB")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "50", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for i in range(90 * 25):
            at = i % (wide.width - 640), (i // 3) % (wide.height - 360)
            frame = av.VideoFrame.from_image(wide.crop((*at, at[0] + 640, at[1] + 360)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def decode_every_frame(file: Path, times: np.ndarray) -> list[Image.Image]:
    """The frames at `times`, from the first to the last frame of the file."""
    import av

    pictures, wanted = [], list(times)
    with av.open(str(file)) as container:
        container.streams.video[0].thread_count = 1
        shown = None
        for frame in container.decode(video=0):
            while wanted and frame.time > wanted[0]:
                pictures.append(shown.to_image())
                wanted.pop(0)
            shown = frame
    return pictures + [shown.to_image()] * len(wanted)


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ---- Packing ----------------------------------------------------------------------------------------------------


def time_packing() -> list[dict]:
    """Use of both budgets over an epoch like mix665k's, and the time to plan it."""
    mix = mix665k(seed=0)
    figures = []
    for name, items in (("apart", unshared(mix)), ("together", shared(mix))):
        for rows in (1, 2, 4):
            shape = PackShape(rows, 2048, suggest_images(*items, rows=rows, row_length=2048))
            start = time.perf_counter()
            packs = pack_items(*items, shape)
            spent = time.perf_counter() - start
            tokens, images = usage(packs, items[0], items[2], shape)
            figures.append(
                {
                    "records_of_a_picture": name,
                    "rows_per_pack": rows,
                    "images_per_pack": shape.images,
                    "packs": len(packs.offsets) - 1,
                    "tokens_used": round(tokens, 4),
                    "image_slots_used": round(images, 4),
                    "seconds": round(spent, 1),
                }
            )
    return figures


def usage(packs: Packs, num_images: np.ndarray, lengths: np.ndarray, shape: PackShape) -> tuple[float, float]:
    """Shares of all packs' tokens and image slots, the last pack's included, that are used."""
    count = len(packs.offsets) - 1
    return int(lengths.sum()) / (count * shape.rows * shape.row_length), int(num_images.sum()) / (count * shape.images)


def suggest_images(
    num_images: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, rows: int, row_length: int, slot_cost: int = 600
) -> int:
    """The number of image slots a pack with which packing these items costs least; 0 where they have no images.

    Arguments as `pack_items`'s. More slots than the items' mix needs stand empty; with fewer, tokens do. What is better
    depends on `slot_cost`, the work of a slot in read tokens (to compress 576 patches is to read as many). Numbers of
    slots near the mix's are tried on the first items. ValueError as `pack_items`, where one of those does not fit.
    """
    num_images, offsets = np.asarray(num_images), np.asarray(offsets)
    if not num_images.any():
        return 0
    sample = num_images[:SAMPLE], offsets[: SAMPLE + 1], np.asarray(lengths)[: offsets[: SAMPLE + 1][-1]]
    images, tokens = int(sample[0].sum()), max(int(sample[2].sum()), 1)
    least = int(num_images.max())
    # 3/4 to 5/4 of the slots with which both budgets would fill up
    tried = {max(least, rows * row_length * images * part // (100 * tokens) + 1) for part in range(75, 126, 5)}

    def cost(images: int) -> int:
        packs = len(pack_items(*sample, PackShape(rows, row_length, images)).offsets) - 1
        return packs * (rows * row_length + images * slot_cost)

    return min(sorted(tried), key=cost)


if __name__ == "__main__":
    main()
