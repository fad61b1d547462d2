"""What the page shows, as HTML: pictures and what they cost, problems, and where a key is asked for.

All that comes from people (names of files, questions, answers) is escaped here.
"""

from collections.abc import Sequence
import dataclasses
import html

from voco_jax.infer.memory import size_of
from voco_jax.serve.errors import ApiError
from voco_jax.serve.store import Entry
from voco_jax.terminal import count_of, one_line

NAMED = "page: "  # of memories that the page names, after files: names that API clients choose are left to them


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture or a clip. tokens: of each of its images; bytes: of what is kept; view: a data URI, or '' where none is
    at hand; was_there: whether it was known when it came."""

    id: str
    name: str
    kind: str
    images: int
    tokens: int
    bytes: int
    view: str = ""
    was_there: bool = False

    @classmethod
    def of(cls, entry: Entry, view: str = "", was_there: bool = False) -> "Shown":
        name = entry.name.removeprefix(NAMED) or f"{entry.kind} {entry.id[:8]}"
        return cls(entry.id, name, entry.kind, entry.images, entry.tokens, entry.bytes, view, was_there)


@dataclasses.dataclass(frozen=True)
class Uncompressed:
    """What an image takes without compression: places in the prompt, and bytes of their keys and values."""

    places: int
    bytes: int


def chosen(pictures: Sequence[Shown], whole: Uncompressed) -> str:
    """What the questions are about, and its cost."""
    if not pictures:
        return '<p class="hint">Drop a picture or a clip above, or choose one of the album below.</p>'
    views = "".join(
        f'<figure>{_view(one)}<figcaption title="{_text(one.name)}">{_text(one.name)}</figcaption></figure>'
        for one in pictures
    )
    images = sum(one.images for one in pictures)
    rows = _cost("tokens in a prompt", sum(one.images * one.tokens for one in pictures), images * whole.places, "{:,}")
    rows += _cost("bytes kept", sum(one.bytes for one in pictures), images * whole.bytes)
    known = sum(one.was_there for one in pictures)
    note = "Stored already: nothing was compressed again." if known == len(pictures) else ""
    if images > len(pictures):
        note += f" {count_of(images, 'image')} in all."
    return (
        f'<div class="views">{views}</div><table class="cost"><thead><tr><th></th><th>kept</th><th>uncompressed</th>'
        f"<th>fewer</th></tr></thead><tbody>{rows}</tbody></table><p class='hint'>{note.strip()}</p>"
    )


def _cost(what: str, kept: int, whole: int, form: str = "") -> str:
    given, instead = (form.format(n) if form else size_of(n) for n in (kept, whole))
    share = min(100, max(1, round(100 * kept / whole)))
    return (
        f'<tr><th>{what}</th><td class="kept">{given}</td><td>{instead}<i style="width:100%"></i>'
        f'<i class="kept" style="width:{share}%"></i></td><td>{whole / kept:,.0f} ×</td></tr>'
    )


def album(pictures: Sequence[Shown], chosen_ids: Sequence[str], more: bool) -> str:
    """Cards to choose from, the newest first."""
    if not pictures:
        return '<p class="hint">The album is empty: what you drop is kept in it.</p>'
    cards = "".join(
        f'<button type="button" data-id="{one.id}" title="{_text(one.name)}" aria-pressed="{is_chosen}"'
        f">{_view(one)}<b>{_text(one.name)}</b><span>{_facts(one)}</span><span>{size_of(one.bytes)}</span></button>"
        for one in pictures
        for is_chosen in [str(one.id in chosen_ids).lower()]
    )
    end = '<p class="hint">There are older ones too.</p>' if more else ""
    return f'<div class="cards">{cards}</div>{end}'


def _facts(one: Shown) -> str:
    tokens = count_of(one.images * one.tokens, "token")
    return f"{tokens} of {one.images:,}" if one.images > 1 else tokens


def _view(one: Shown) -> str:
    if one.view:
        return f'<img src="{one.view}" alt="{_text(one.name)}">'
    return f'<i class="blank">{_text(one.kind)}</i>'


def progress(what: str, done: int = 0, total: int = 0) -> str:
    """A bar: how far it is, or, of a single thing, that it goes on."""
    share = f' style="width: {round(100 * done / total)}%"' if total > 1 else ' class="going"'
    counted = f", {done} of {total}" if total > 1 else ""
    bar = f'<div role="progressbar"><i{share}></i></div>'
    return f'<div class="working" role="status"><span>{_text(what)}{counted} …</span>{bar}</div>'


def problem(text: str) -> str:
    return f'<div class="problem" role="alert">{_text(text)}</div>' if text else ""


def note(text: str) -> str:
    return f'<p class="hint" role="status">{_text(text)}</p>'


def _text(text: str) -> str:
    return html.escape(one_line(text))


def unformatted(text: str) -> str:
    """
    >>> unformatted("is <image> a word & what is 'a*b*'?")
    "is &lt;image&gt; a word &amp; what is 'a*b*'?"
    """
    return html.escape(text, quote=False)


def sentence(error: ApiError, name: str = "") -> str:
    """An error as somebody is told who uses no API. `name`: of the file that it is about.

    >>> sentence(ApiError(400, "a.pdf: expected a picture (JPEG, PNG), found PDF"), "a.pdf")
    'a.pdf cannot be used: expected a picture (JPEG, PNG), found PDF.'
    >>> sentence(ApiError(429, "the server is busy", code="server_busy", headers={"Retry-After": "3"}))
    'The server is busy. Try again in 3 seconds.'
    """
    if error.code == "server_busy":
        return f"The server is busy. Try again in {error.headers.get('Retry-After', '10')} seconds."
    known = {
        "memory_not_found": "This picture is not in the store any more. Drop it again.",
        "context_length_exceeded": "The conversation is too long for this model. Begin a new one.",
        "server_closed": "The server is being stopped. Try again when it is back.",
        "timeout": "The answer took longer than the server allows. Ask again, or something shorter.",
    }
    if error.code in known:
        return known[error.code]
    if error.status == 500:
        return "Something went wrong in the server. Its log says what."
    message = error.message.removeprefix(f"{name}: ").removeprefix("messages: ").rstrip(".")
    if name:
        return f"{name} cannot be used: {message}."
    return f"{message[:1].upper()}{message[1:]}."


CSS = """
footer { display: none !important }
.gradio-container { max-width: 1320px !important; width: 100% !important; margin: 0 auto !important;
  --layout-gap: 10px; --faint: color-mix(in srgb, var(--body-text-color) 72%, transparent) }
.gradio-container > main, .gradio-container .fillable { max-width: none !important; padding: 10px 24px !important }
.gradio-container .html-container { padding: 0 }
#head h1 { display: inline; font-size: 1.2rem; font-weight: 700; margin-right: 12px }
#head form { float: right } #head form button { text-decoration: underline; font-size: .85rem; cursor: pointer }
#head span, .hint { color: var(--faint); font-size: .85rem; line-height: 1.4 }
.voco-panel { padding: 12px; gap: 8px; background: var(--block-background-fill); border-radius: 8px;
  border: 1px solid var(--border-color-primary) }
.voco-panel h2 { font-size: .95rem; font-weight: 600 }
.voco-small { align-self: flex-end; flex-grow: 0; width: fit-content; min-width: 100px }
#drop button > div { padding-top: 22px; line-height: 1.2; height: auto; min-height: 0; font-size: .95rem }
#drop button span { margin: 2px }
.views, .cards { display: flex; flex-wrap: wrap; gap: 8px }
.views { max-height: 244px; overflow-y: auto } .views figure { margin: 0; width: 96px }
.views img, .views .blank { width: 96px; height: 96px }
figcaption, .cards b, .cards span { display: block; font-size: .75rem; line-height: 1.35; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; font-weight: 500 }
.views img, .cards img { object-fit: cover; border-radius: 6px; background: #8882 }
.blank { display: flex; align-items: center; justify-content: center; border-radius: 6px; background: #8883;
  font-size: .75rem; font-style: normal }
.cost { width: 100%; margin: 8px 0 4px; font-size: .85rem; border-collapse: collapse;
  font-variant-numeric: tabular-nums }
.cost th { font-weight: 500; text-align: left; white-space: nowrap } .cost td, .cost thead th + th { text-align: right }
.cost th, .cost td { padding: 4px 8px 4px 0; border: none; border-bottom: 1px solid var(--border-color-primary) }
.cost thead th { color: var(--faint); font-size: .75rem }
.cost td.kept { font-weight: 700; color: var(--primary-600) } .dark .cost td.kept { color: var(--primary-300) }
.cost i { display: block; height: 3px; border-radius: 2px; background: var(--neutral-400); margin-top: 2px }
.cost i.kept { background: var(--primary-500) }
.cards { max-height: 240px; overflow-y: auto; padding: 3px }
.cards button { width: 88px; padding: 5px; border-radius: 8px; border: 1px solid var(--border-color-primary);
  text-align: left; cursor: pointer; color: inherit }
.cards button:hover, .cards button:focus-visible { border-color: var(--primary-500) }
.cards button[aria-pressed=true] { outline: 2px solid var(--primary-500) }
.cards img, .cards .blank { width: 76px; height: 76px } .cards span { color: var(--faint); font-weight: 400 }
.problem { padding: 8px 12px; border-radius: 8px; border: 1px solid #d97706; background: #f59e0b22; font-size: .9rem;
  margin-bottom: 4px }
.working { display: flex; gap: 10px; align-items: center; font-size: .9rem }
.working div { flex: 1; height: 6px; border-radius: 3px; background: #8883; overflow: hidden }
.working i { display: block; height: 100%; border-radius: 3px; background: var(--primary-500) }
.working .going { width: 30%; animation: going 1.4s ease-in-out infinite alternate }
@keyframes going { from { margin-left: 0 } to { margin-left: 70% } }
#how { align-items: center } #how > * { align-self: center } #how label, #how span { font-size: .85rem }
#how .block, #how .form { padding: 2px;
  border-color: transparent !important; background: none; box-shadow: none }
"""

_LOGIN = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>voco_jax</title><style>
:root {{ color-scheme: light dark; font: 16px system-ui, sans-serif }}
body {{ display: grid; place-items: center; min-height: 90vh; margin: 0 }}
form {{ display: grid; gap: 12px; width: min(360px, 90vw) }} h1 {{ font-size: 1.2rem; margin: 0 }} p {{ margin: 0 }}
input, button {{ font: inherit; padding: 8px 12px }} [role=alert] {{ color: #d97706 }}</style></head>
<body><form method="post" action="login"><h1>voco_jax</h1><label for="key">This server asks for an API key.</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<p role="alert">{}</p><button>Open the page</button></form></body></html>"""


def login_page(problem: str = "") -> str:
    return _LOGIN.format(html.escape(problem))
