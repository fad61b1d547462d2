"""Endings of file names, for finding pictures and videos. What a file is, its content says (`media.py`)."""

from pathlib import Path

# Of files in a directory that is looked through, and of videos that are named without an ending. A GIF may be either.
PICTURES = (
    ".avif", ".bmp", ".gif", ".ico", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
VIDEOS = (
    ".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".mxf", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".gif",
)  # fmt: skip


def has_ending(file: Path, endings: tuple[str, ...]) -> bool:
    return file.suffix.lower() in endings
