"""Name datasets in reports and published files, without local paths, and tell the names of data from others."""

import re
from pathlib import Path

from diffusers_cfg.settings import CONFIG_FILE, DataConfig

# Contents by which the output folder of a run is recognized, which is not a folder of data.
RUN_MARKERS = re.compile(rf"model_index\.json|{re.escape(CONFIG_FILE)}|checkpoint-\d+")

# Folders that archivers, Python, and the file servers of Synology and Windows put beside data.
NOT_DATA = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN")


def is_visible(name: str) -> bool:
    """Return whether a file or folder is neither hidden nor one of `NOT_DATA`."""
    return not name.startswith(".") and name not in NOT_DATA


def is_built_in(config: DataConfig) -> bool:
    """Return whether the settings name no dataset, which selects scikit-learn's digits."""
    return config.dataset_name is None and config.train_data_dir is None


def public_name(name_or_path: str | None) -> str | None:
    """Return the name of a repository on the Hub, or `None` for a local path and for an empty name."""
    if not name_or_path or Path(name_or_path).exists() or name_or_path.count("/") > 1 or name_or_path[0] in "./~":
        return None
    return name_or_path


def local_name(config: DataConfig) -> str:
    """Return the name of a dataset for reports: the last component of its path or repository."""
    source = config.dataset_name or config.train_data_dir
    return "scikit-learn's digits" if source is None else Path(source).resolve().name
