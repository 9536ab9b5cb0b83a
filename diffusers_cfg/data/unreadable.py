"""Report images that cannot be read."""

import logging
from collections.abc import Iterable

from diffusers_cfg.config import UserError

logger = logging.getLogger(__name__)


def none_readable_message(num_images: int, name: str) -> str:
    """Return the error message for a dataset without a readable image."""
    return f"None of the {num_images} images can be read, starting with {name}. Check that PIL can open them."


def check_unreadable(unreadable: Iterable[str], num_images: int, max_unreadable_fraction: float) -> None:
    """Raise UserError if more than `max_unreadable_fraction` of the images cannot be read."""
    unreadable = list(unreadable)
    if len(unreadable) > max_unreadable_fraction * num_images:
        raise UserError(
            f"{len(unreadable)} of {num_images} images cannot be read, more than --max_unreadable_fraction "
            f"{max_unreadable_fraction} allows: {', '.join(unreadable[:5])}{', …' if len(unreadable) > 5 else '.'} "
            "Repair or remove them, or raise --max_unreadable_fraction."
        )


def warn_about_unreadable(unreadable: set[str]) -> None:
    """Log the number of unreadable images and the first of their names, if there are any."""
    if unreadable:
        logger.warning("%d images could not be read: %s", len(unreadable), ", ".join(sorted(unreadable)[:20]))
