"""The page of `voco preview`: one HTML file with everything in it. The browser wraps and colours."""

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
import io
import itertools

import numpy as np
from PIL import Image

from voco_jax.data.packing import OF_PACKS, PADDING_SEGMENT
from voco_jax.preview.text import count_conversations, pack_arrays, row_runs, used_images
from voco_jax.terminal import count_of, printable

_COLOURS = 5  # of conversations, taken in turn
_STYLE = """
body { font: 14px/1.5 sans-serif; color: #1f2328; max-width: 1100px; margin: 2em auto; padding: 0 1em }
header p { margin: 0 }
h2 { font-size: 1em; background: #f0f2f4; padding: .3em .6em; margin: 2em 0 .6em }
h2 small, h3 { font-weight: normal; font-size: .9em; color: #59636e }
h3 { margin: .8em 0 .2em }
figure { display: inline-block; position: relative; margin: 0 .3em .3em 0 }
img { width: 96px; height: 96px; display: block }
figcaption { position: absolute; left: 0; top: 0; font-size: .8em }
figcaption, .image { background: #3d5a99; color: #fff; padding: 0 .3em }
.label { background: #c6f0cf; color: #116329 }
.text, .label { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.bar { display: flex; height: .6em; background: #e4e7ea }
.bar .image { padding: 0 } .bar .label { background: #6fcf85 }
.conversation { margin: .3em 0; padding-left: .6em; border-left: .25em solid }
.c0 { border-color: #b58a2d } .c1 { border-color: #7a5aa6 } .c2 { border-color: #2f8f8f }
.c3 { border-color: #b5563f } .c4 { border-color: #6b7280 }
.bar .c0 { background: #b58a2d } .bar .c1 { background: #7a5aa6 } .bar .c2 { background: #2f8f8f }
.bar .c3 { background: #b5563f } .bar .c4 { background: #6b7280 }
"""


def render(
    batch: Mapping[str, np.ndarray],
    visual_tokens: int,
    decode: Callable[[Sequence[int]], str],
    header: Sequence[str],
    num_packs: int,
) -> str:
    """A page of a batch's first `num_packs` packs, below the lines of `header`.

    `batch` holds rows [packs·R, T] as `packing.Row` has them, and pixel_values [packs, I, S, S, 3], uint8.
    `visual_tokens` is M, the tokens of an image.
    """
    total = len(batch["pixel_values"])
    shown = min(num_packs, total)
    of_picture = f"{_span('image', f'▣1×{visual_tokens}')} the {count_of(visual_tokens, 'token')} of picture 1"
    legend = of_picture if visual_tokens > 1 else f"{_span('image', '▣1')} picture 1"
    legend += f" · {_span('label', 'trained on')} · {_span('text', 'read only')} · ↵ new line"
    lines = [f"<p>{_text(line)}</p>" for line in header]
    if shown < total:
        lines.append(f"<p>the first {shown} of {total} packs</p>")
    packs = (_pack(i, pack_arrays(batch, i), visual_tokens, decode) for i in range(shown))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(header[0])}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n{''.join(lines)}\n<p>{legend}</p>\n</header>\n"
        f"{''.join(packs)}</body>\n</html>\n"
    )


def _pack(number: int, arrays: Mapping[str, np.ndarray], visual_tokens: int, decode) -> str:
    segments = arrays["segment_ids"]
    images, slots = used_images(arrays["slot_index"], visual_tokens), len(arrays["pixel_values"])
    used = int((segments != PADDING_SEGMENT).sum())
    facts = f"conversations: {count_conversations(segments)} · tokens: {_share(used, segments.size)}"
    facts += f" · image slots: {_share(len(images), slots) if slots else 'none'}"
    if "num_tokens" in arrays:
        facts += f" · reads the first {count_of(int(arrays['num_tokens']), 'token')} of a picture"
    pictures = [
        f'<figure><img src="{_data_uri(arrays["pixel_values"][i])}" alt="picture {i + 1}">'
        f"<figcaption>▣{i + 1}</figcaption></figure>"
        for i in images
    ]
    if len(images) < slots:
        pictures.append(f"<small>{slots - len(images)} empty</small>")
    rows = []
    for r in range(len(segments)):
        row = {name: x[r] for name, x in arrays.items() if name not in OF_PACKS}
        padding = int((segments[r] == PADDING_SEGMENT).sum())
        rows.append(f"<h3>row {r + 1} · padding: {_share(padding, segments.shape[1])}</h3>\n{_bar(row)}\n")
        runs = row_runs(row, visual_tokens, decode)
        for segment, of_conversation in itertools.groupby(runs, lambda run: run.segment):
            spans = "".join(_span(run.kind, run.text) for run in of_conversation)
            rows.append(f'<p class="conversation {_colour(segment)}"><b>{segment}</b> {spans}</p>\n')
    head = f"<h2>pack {number + 1} <small>{facts}</small></h2>"
    return f"<section>\n{head}\n<div>{''.join(pictures)}</div>\n{''.join(rows)}</section>\n"


def _bar(row: Mapping[str, np.ndarray]) -> str:
    """What each of a row's tokens is, as a strip: image, label, other text of a conversation, or padding."""
    kinds = ["padding" if segment == PADDING_SEGMENT else _colour(segment) for segment in row["segment_ids"].tolist()]
    for t in np.flatnonzero(row["weights"][:-1] > 0).tolist():
        kinds[t + 1] = "label"
    for t in np.flatnonzero(row["slot_index"] >= 0).tolist():
        kinds[t] = "image"
    parts = ((kind, len(list(group))) for kind, group in itertools.groupby(kinds))
    return '<div class="bar">' + "".join(f'<i class="{kind}" style="flex:{n}"></i>' for kind, n in parts) + "</div>"


def _colour(segment: int) -> str:
    return f"c{(segment - 1) % _COLOURS}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{_text(text)}</span>'


def _text(text: str) -> str:
    """Any text as HTML: what could be markup, or a control character, is shown and never obeyed."""
    return escape(printable(text, keep="\n\t")).replace("\n", "↵\n")


def _data_uri(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
