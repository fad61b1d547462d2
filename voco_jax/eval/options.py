"""What a run's config says of how test sets are scored."""

from dataclasses import dataclass

from voco_jax.data.reports import Report
from voco_jax.errors import UserError


@dataclass(frozen=True)
class Options:
    """`batch_size` questions are asked at once; answers have `max_new_tokens` (0: room for the longest expected one).

    A set of which more than `max_skipped_fraction` cannot be used has no score. Of videos that are cut off the frames
    that are there are taken where `incomplete`; frames have their times in the text where `timestamps`.
    """

    batch_size: int
    max_new_tokens: int
    max_skipped_fraction: float
    incomplete: bool = False
    timestamps: bool = False

    def check(self, report: Report, key: str, total: int, least: int = 1000) -> None:
        """UserError, under the name of the config's `key`, where too much has been left out."""
        try:
            report.check(self.max_skipped_fraction, total, least)
        except UserError as error:
            raise UserError(f"{key}: {str(error).removeprefix('data: ')}") from None
