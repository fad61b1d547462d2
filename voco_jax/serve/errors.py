"""Errors that a client is told: OpenAI's error objects, with the status of HTTP that goes with them."""

from voco_jax.terminal import one_line

_LONGEST = 1000  # characters
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """`param` is the request's key that is wrong, `code` a word for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, one_line(message, _LONGEST), param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict:
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": _TYPES.get(self.status, usual), "param": self.param}
        return {"error": error | {"code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Of a request that cannot be answered as it is: status 400."""
    return ApiError(400, message, param=param, code=code)
