"""Name a dataset, for reports and for what is published: without paths of this machine."""

from pathlib import Path

from diffusers_cfg.settings import DataConfig


def is_built_in(config: DataConfig) -> bool:
    """Return whether no dataset is named, which means scikit-learn's digits."""
    return config.dataset_name is None and config.train_data_dir is None


def public_name(name_or_path: str | None) -> str | None:
    """Return a repository's name on the Hub, or `None` for a path (and for `None`)."""
    if name_or_path is None or Path(name_or_path).exists() or name_or_path.count("/") > 1 or name_or_path[0] in "./~":
        return None
    return name_or_path


def local_name(config: DataConfig) -> str:
    """Return the name of a dataset as it is called in reports: the last part of its path or repository."""
    if is_built_in(config):
        return "scikit-learn's digits"
    return Path(config.dataset_name or config.train_data_dir).resolve().name
