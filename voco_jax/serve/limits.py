"""What pictures and clips of a request may be, and the error for those that are not."""

import dataclasses
import functools

from voco_jax.data.records import Encoded
from voco_jax.errors import UserError
from voco_jax.serve.hosts import Domain
from voco_jax.terminal import shortened


class MediaError(UserError):
    """A request's picture or clip cannot be used: one line for the client (HTTP status 400)."""


@dataclasses.dataclass(frozen=True)
class Media(Encoded):
    """What came with a request, not yet looked at. `label` is the media type that it is said to be ('image/png'), or
    ''; `name` stands in messages."""

    label: str = ""


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """Of what is fetched and decoded for a request.

    allowed_domains: hosts that URLs may name: `example.com`, `*.example.com` for those below it, `host:port` for a port
      that is not the usual one; addresses are hosts too. Without any, no URL is fetched.
    max_picture_bytes, max_video_bytes: of an encoded picture, of an encoded clip.
    max_redirects: of a fetch.
    timeout: seconds for a whole fetch: names, redirects and all bytes.
    max_seconds: a clip's duration.
    max_frames: frames that are taken of a clip.
    decode_seconds: for probing and decoding a clip.
    allow_http: fetch also without TLS. allow_private: fetch also from this machine and private networks.
    """

    allowed_domains: tuple[str, ...] = ()
    max_picture_bytes: int = 20 * 2**20
    max_video_bytes: int = 100 * 2**20
    max_redirects: int = 3
    timeout: float = 10.0
    max_seconds: float = 3600.0
    max_frames: int = 256
    decode_seconds: float = 30.0
    allow_http: bool = False
    allow_private: bool = False

    def __post_init__(self):
        """UserError for a value that cannot be."""
        for field in ("max_picture_bytes", "max_video_bytes", "timeout", "max_seconds", "max_frames", "decode_seconds"):
            if not (value := getattr(self, field)) > 0:
                raise UserError(f"{field}: expected more than 0, found {value}")
        if self.max_redirects < 0:
            raise UserError(f"max_redirects: expected 0 or more, found {self.max_redirects}")
        _ = self.domains

    @functools.cached_property
    def domains(self) -> tuple[Domain, ...]:
        """`allowed_domains`, parsed."""
        return tuple(map(_domain, self.allowed_domains))

    def most(self, video: bool) -> int:
        """Bytes that an encoded picture, or clip, may have."""
        return self.max_video_bytes if video else self.max_picture_bytes


def _domain(entry: str) -> Domain:
    try:
        return Domain.parse(entry)
    except ValueError:
        expected = "expected a host (example.com, *.example.com, example.com:8443)"
        raise UserError(f"--allowed-media-domains: {expected}, found {shortened(entry)}") from None
