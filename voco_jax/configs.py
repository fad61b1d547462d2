"""The configs that come with voco_jax, by name: `voco train --config=easyvqa`, `from voco_jax.configs import easyvqa`.

A checkout has them in configs/ at its top, an installed package in voco_jax/configs/.
"""

from pathlib import Path

_INSTALLED = Path(__file__).with_suffix("")
DIRECTORY = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"
__path__ = [str(DIRECTORY)]  # where Python looks for `voco_jax.configs.NAME`


def names() -> list[str]:
    return sorted(file.stem for file in DIRECTORY.glob("*.py"))


def find(name: str) -> Path | None:
    """The file of `easyvqa`, `easyvqa.py` or `configs/easyvqa.py`; None where no config is called so."""
    name = name.removeprefix("configs/").removesuffix(".py")
    return DIRECTORY / f"{name}.py" if name in names() else None
